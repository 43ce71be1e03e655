"""Identity: what differs in one thing has another key, and the same thing has the same key however it is given."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.errors import InvalidParams
from kvstore.keys import (
    PrefixChain,
    as_token_array,
    content_key,
    derived_key,
    hash_salt,
    is_digest,
    namespace_digest,
    prefix_keys,
)
from kvstore.types import Namespace

texts = st.text(max_size=20)
counts = st.integers(0, 1 << 40)
namespaces = st.builds(
    Namespace,
    **{
        name: texts if field.type in (str, "str") or "str" in str(field.type) else counts
        for name, field in ((f.name, f) for f in msgspec.structs.fields(Namespace))
    },
)
FIELDS = Namespace.__struct_fields__
tokens = st.lists(st.integers(0, 0x7FFFFFFF), max_size=70)
TOY = Namespace(model="toy", block_tokens=4)
REFUSED: list[Any] = [
    [-1],
    [1 << 31],
    [1 << 80],
    [1.0],
    [1.5],
    ["1"],
    [None],
    [[1, 2], [3, 4]],
    [[1], [2, 3]],
    "text",
    5,
    None,
    {1, 2},
    np.array([-1], dtype=np.int32),
    np.array([-1], dtype=np.int64),
    np.array([1 << 31], dtype=np.uint32),
    np.array([1 << 31], dtype=np.int64),
    np.array([1 << 63], dtype=np.uint64),
    np.array([[1, 2], [3, 4]], dtype=np.int32),
    np.array(7, dtype=np.int32),
    np.array([1.0]),
    np.array([True, False]),
    np.array(["1"]),
    np.array([1, 2], dtype=object),
]


# -- namespaces --------------------------------------------------------------------------------------------------------


@given(namespaces, st.sampled_from(FIELDS), st.data())
def test_namespaces_that_differ_in_one_field_differ(ns: Namespace, name: str, data: st.DataObject) -> None:
    value = getattr(ns, name)
    other = data.draw((texts if isinstance(value, str) else counts).filter(lambda new: new != value))
    changed = msgspec.structs.replace(ns, **{name: other})
    assert namespace_digest(changed) != namespace_digest(ns)
    assert namespace_digest(msgspec.structs.replace(changed, **{name: value})) == namespace_digest(ns)


@given(namespaces, namespaces)
def test_only_equal_namespaces_are_equal(one: Namespace, other: Namespace) -> None:
    assert (namespace_digest(one) == namespace_digest(other)) == (one == other)


@given(texts, texts, st.integers(0, 20))
def test_text_does_not_run_from_one_field_into_the_next(left: str, right: str, cut: int) -> None:
    """The same characters, divided differently."""
    both = left + right
    one = Namespace(model=left, revision=right)
    other = Namespace(model=both[:cut], revision=both[cut:])
    assert (namespace_digest(one) == namespace_digest(other)) == (one == other)


def test_a_number_is_not_its_text() -> None:
    assert namespace_digest(Namespace(model="m", layers=1)) != namespace_digest(Namespace(model="m", kv_heads=1))
    assert namespace_digest(Namespace(model="0")) != namespace_digest(Namespace(model=""))


def test_the_digest_of_a_namespace_is_pinned() -> None:
    """Blocks on disk are found by it: a change of this value makes every store cold and needs a new domain."""
    seen = namespace_digest(Namespace(model="toy", layers=2, salt="s")).hex()
    assert seen == "0055c1272c84bcac3b6d592b905601b2b53e0b1d124d4f8144e9d960145e768d"
    assert prefix_keys(TOY, range(4))[0].hex() == "16f9b9ecc78b00745abbf2fcdbff337135c604cc4ed70246ce4b9429bea519dd"


# -- salts -------------------------------------------------------------------------------------------------------------


@given(st.text(), st.text())
def test_salts_of_any_text(one: str, other: str) -> None:
    assert (hash_salt(one) == hash_salt(other)) == (one == other)
    assert hash_salt(one) == "" or len(hash_salt(one)) == 64
    assert not one or one not in hash_salt(one) or len(one) < 3


def test_no_salt_is_no_salt() -> None:
    assert hash_salt(None) == hash_salt("") == ""
    assert hash_salt("\ud800") != hash_salt("\udfff")  # halves of a surrogate pair, as JSON may carry them
    assert hash_salt("é") != hash_salt("e\u0301")  # as it was sent, not normalised
    assert is_digest(namespace_digest(Namespace(model="\ud800", salt="\0")))


# -- tokens ------------------------------------------------------------------------------------------------------------


@given(tokens)
@example([0, 0x7FFFFFFF])
def test_tokens_mean_the_same_however_they_are_given(ids: list[int]) -> None:
    wanted = as_token_array(ids).tolist()
    assert wanted == ids
    for other in (
        tuple(ids),
        np.array(ids, dtype=np.int32),
        np.array(ids, dtype=np.int64),
        np.array(ids, dtype=np.uint32),
        np.array(ids, dtype=np.uint64),
        np.array(ids, dtype=">i4"),
        np.repeat(np.array(ids, dtype=np.int32), 2)[::2],
        array("i", ids),
        [np.int64(i) for i in ids],
    ):
        array_of = as_token_array(other)
        assert array_of.tolist() == ids
        assert array_of.dtype == np.dtype("<i4")
        assert array_of.flags.c_contiguous
        assert prefix_keys(TOY, other) == prefix_keys(TOY, ids)
        assert content_key(TOY, other) == content_key(TOY, ids)


@pytest.mark.parametrize("ids", REFUSED, ids=repr)
def test_what_is_not_a_row_of_ids_is_refused(ids: Any) -> None:
    with pytest.raises(InvalidParams):
        as_token_array(ids)
    with pytest.raises(InvalidParams):
        PrefixChain(TOY).extend(ids)


@pytest.mark.parametrize("at", [0, 8191, 8192, 20_000])
def test_one_wrong_id_in_a_long_list_is_refused(at: int) -> None:
    ids: list[Any] = list(range(20_001))
    assert as_token_array(ids).tolist() == ids
    for wrong in (-1, 1 << 31, 0.5):
        ids[at] = wrong
        with pytest.raises(InvalidParams):
            as_token_array(ids)


# -- chains ------------------------------------------------------------------------------------------------------------


@given(tokens, st.lists(st.integers(1, 20), max_size=30), st.integers(1, 9))
def test_a_chain_that_grew_is_the_chain_at_once(ids: list[int], cuts: list[int], block_tokens: int) -> None:
    ns = Namespace(model="toy", block_tokens=block_tokens)
    grown = PrefixChain(ns)
    at, fresh = 0, []
    for number, cut in enumerate([*cuts, len(ids)]):
        part = ids[at : at + cut]
        fresh += grown.extend(np.array(part, dtype=np.int64) if number % 2 else part)
        at += len(part)
        assert grown.n_tokens == at
    assert grown.keys == fresh == prefix_keys(ns, ids)
    assert len(grown.keys) == len(ids) // block_tokens
    parents = [b"", *grown.keys[:-1]][: len(grown.keys)]
    assert list(grown.blocks()) == list(zip(grown.keys, parents, strict=True))


@given(tokens, st.integers(0, 69), st.integers(1, 1 << 20))
def test_a_changed_token_changes_its_block_and_all_behind_it(ids: list[int], at: int, by: int) -> None:
    keys = prefix_keys(TOY, ids)
    if at >= 4 * len(keys):
        return
    changed = list(ids)
    changed[at] = (changed[at] + by) & 0x7FFFFFFF
    others = prefix_keys(TOY, changed)
    if changed == ids:
        assert others == keys
        return
    assert others[: at // 4] == keys[: at // 4]
    assert set(others[at // 4 :]).isdisjoint(keys)


def test_the_caller_may_reuse_its_array() -> None:
    ids = np.arange(6, dtype=np.int32)
    chain = PrefixChain(TOY)
    chain.extend(ids)
    ids[:] = 9
    chain.extend([6, 7])
    assert chain.keys == prefix_keys(TOY, range(8))


def test_kinds_of_keys_never_meet() -> None:
    """A content key is no prefix key, and neither is what stands at the root of a chain or over an engine's hash."""
    digest = namespace_digest(TOY)
    seen = [
        digest,
        PrefixChain(TOY).root,
        *prefix_keys(TOY, [0, 1, 2, 3]),
        content_key(TOY, [0, 1, 2, 3]),
        content_key(TOY, []),
        derived_key(digest, prefix_keys(TOY, [0, 1, 2, 3])[0]),
        derived_key(digest, b""),
    ]
    # The hash of an empty engine hash is the root, which names no block.
    assert len(set(seen)) == len(seen) - (derived_key(digest, b"") == PrefixChain(TOY).root)
    assert all(is_digest(key) for key in seen)
    assert content_key(TOY, [1]) == content_key(digest, [1])
    assert content_key(TOY, [1]) != content_key(Namespace(model="other"), [1])


def test_a_chain_knows_its_block_size() -> None:
    digest = namespace_digest(TOY)
    with pytest.raises(InvalidParams, match="block_tokens"):
        PrefixChain(digest)
    for bad in (0, -1):
        with pytest.raises(InvalidParams, match="block_tokens"):
            PrefixChain(digest, bad)
    chain = PrefixChain(digest, 4)
    chain.extend(range(8))
    assert chain.keys == prefix_keys(TOY, range(8))
