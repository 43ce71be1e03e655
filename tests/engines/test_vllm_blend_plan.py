"""What the scheduler promises of chunks, and under which names: without an engine, and without a daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.keys import content_key
from kvstore.types import Namespace
from kvstore_connectors.base import Tally
from kvstore_connectors.choice import Blend
from kvstore_connectors.vllm.blend_scheduler import LEAST_SPAN, LONGEST_TAIL, Blends
from kvstore_connectors.vllm.blend_search import Chunk
from kvstore_connectors.vllm.blend_wish import Wish
from kvstore_connectors.vllm.identity import Scope

RANK = Namespace(model="m", block_tokens=64)
ENGINE_BLOCK, BLOCK = 16, 64


class Found:
    """A search that is answered at once."""

    finished = over = True

    def __init__(self, chunks: list[Chunk], absent: list[tuple[int, int]]) -> None:
        self.found, self.absent = chunks, absent


class Searches:
    def __init__(self, *spans: tuple[int, int], overhead: float = 0.62, absent: Any = ()) -> None:
        self._chunks = [Chunk(a, b, {b"ns": b"k%d" % a}, overhead) for a, b in spans]
        self._absent = list(absent)

    def submit(self, namespaces: Any, tokens: Any, wish: Any) -> Any:
        return Found(self._chunks, self._absent)


class OpenGate:
    reach = 26

    def why_closed(self, namespace: Namespace, share: float) -> str:
        return ""


def request(tokens: int, wish: dict[str, Any] | None = None, name: str = "r", **fields: Any) -> Any:
    hashes = [hashlib.sha256(b"%d" % index).digest() for index in range(tokens // ENGINE_BLOCK)]
    params = {"kvstore": {"blend": True} if wish is None else wish}
    return SimpleNamespace(
        request_id=name, prompt_token_ids=list(range(tokens)), kv_transfer_params=params, block_hashes=hashes, **fields
    )


def blends(
    searches: Searches, gate: Any = None, pays: Callable[[Blend, int], bool] = lambda blend, tokens: True
) -> Blends:
    gate = OpenGate() if gate is None else gate
    made = Blends(searches, Tally(), ENGINE_BLOCK, BLOCK, Wish(), gate, pays)  # type: ignore[arg-type]
    made.know_ranks([RANK])
    return made


def promised(made: Blends, asked: Any, n_local: int = 0, exact: int = 0) -> int:
    made.arrived(asked, Scope())
    count = made.promise(asked, n_local, exact)
    made.allocated(asked.request_id, count)
    return count


def test_all_but_the_last_token_is_promised() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    assert promised(made, asked) == 329
    job = made.job("r", 0, list(range(21)), [], set())
    assert job is not None
    assert (job.begin, job.exact, len(job.tokens) // 4, job.sound) == (0, 0, 329, True)
    assert [(s.start, s.stop, s.offset, s.exact) for s in job.spans] == [(100, 300, 0, False)]
    assert job.reach == 26  # as the verdict says


def test_of_a_long_tail_only_the_beginning() -> None:
    made, asked = blends(Searches((100, 3000))), request(5000)
    assert promised(made, asked) == 3000 + LONGEST_TAIL


def test_an_exact_prefix_goes_first_and_cuts_a_chunk() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    assert promised(made, asked, n_local=64, exact=128) == 329 - 64
    job = made.job("r", 64, list(range(21)), [b"0", b"1", b"2"], set())
    assert job is not None
    assert (job.begin, job.exact, job.hashes, job.skip) == (64, 128, [b"1"], 0)
    assert [(s.start, s.stop, s.offset) for s in job.spans] == [(128, 300, 28)]


def test_a_chunk_of_which_little_is_left_is_not_worth_it() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    exact = 300 - LEAST_SPAN + 1
    assert promised(made, asked, n_local=exact, exact=exact) == 0
    assert made.exact_tokens("r") is None


def test_what_is_sooner_computed_is_not_blended_however_often_the_engine_asks() -> None:
    asked_of: list[tuple[int, int, float, int]] = []

    def pays(blend: Blend, tokens: int) -> bool:
        asked_of.append((blend.exact, blend.end, blend.computed, tokens))
        return len(asked_of) > 1

    made, asked = blends(Searches((100, 300)), pays=pays), request(330)
    before = list(asked.block_hashes)
    assert promised(made, asked, exact=64) == 0
    assert made.promise(asked, 0, 64) == 0
    assert asked_of == [(64, 329, 329 - 64 - 200 + 0.15 * 200, 330)]
    assert asked.block_hashes == before
    assert made.exact_tokens("r") is None
    assert made.blending("r") is None
    other = request(330, name="other")
    assert promised(made, other, exact=64) == 329
    assert made.promise(other, 0, 64) == 329
    assert len(asked_of) == 2, "each prompt is decided once"
    taken = made.blending("other")
    assert taken is not None
    assert (taken.exact, taken.end) == (64, 329)


def test_names_are_replaced_from_the_first_blended_block_on() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    before = list(asked.block_hashes)
    promised(made, asked, exact=64)
    assert asked.block_hashes[:4] == before[:4]
    assert not set(asked.block_hashes[4:]) & set(before)
    assert made.exact_tokens("r") == 64
    again = request(330, name="again")
    promised(made, again, exact=64)
    assert again.block_hashes == asked.block_hashes  # the same prompt blended in the same way
    other = request(330, {"blend": True, "share": 0.2}, name="other")
    promised(made, other, exact=64)
    assert not set(other.block_hashes[4:]) & set(asked.block_hashes)


def test_less_exact_at_the_second_asking_replaces_more_names() -> None:
    made, asked = blends(Searches((130, 300))), request(330)
    before = list(asked.block_hashes)
    promised(made, asked, exact=128)
    promised(made, asked, exact=64)  # preempted, and one of the exact blocks was evicted meanwhile
    assert asked.block_hashes[:4] == before[:4]
    assert not set(asked.block_hashes[4:]) & set(before)
    assert made.exact_tokens("r") == 64
    more = list(asked.block_hashes)
    promised(made, asked, exact=128)
    assert asked.block_hashes == more
    assert made.exact_tokens("r") == 64


@pytest.mark.parametrize(
    "wish", [{}, {"blend": False}, {"capture": True}, {"blend": True, "share": 0.9}, {"nonsense": 1}]
)
def test_nothing_is_promised_nor_replaced(wish: dict[str, Any]) -> None:
    made, asked = blends(Searches((100, 300))), request(330, wish)
    before = list(asked.block_hashes)
    assert promised(made, asked) == 0
    assert asked.block_hashes == before
    assert made.job("r", 0, [], [], set()) is None


def test_a_closed_gate() -> None:
    class Closed:
        def why_closed(self, namespace: Namespace, share: float) -> str:
            return "it is closed"

    made, asked = blends(Searches((100, 300)), Closed()), request(330)
    assert promised(made, asked) == 0


@pytest.mark.parametrize(
    ("fields", "scope"),
    [({"mm_features": [1]}, Scope()), ({"prompt_embeds": object()}, Scope()), ({}, Scope(lora="adapter@1"))],
)
def test_only_text_and_the_base_model(fields: dict[str, Any], scope: Scope) -> None:
    made, asked = blends(Searches((100, 300))), request(330, **fields)
    made.arrived(asked, scope)
    assert made.promise(asked, 0, 0) == 0


def test_what_this_very_step_computes_can_not_be_read() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    promised(made, asked, n_local=64, exact=64)
    job = made.job("r", 64, list(range(50, 71)), [], {52})
    assert job is not None
    assert not job.sound


def test_a_promise_that_the_engine_did_not_take() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    made.arrived(asked, Scope())
    made.promise(asked, 0, 0)
    made.allocated("r", 0)
    assert made.blending("r") is None
    assert made.exact_tokens("r") == 0  # its names stay replaced


def test_after_a_failure_nothing_more_is_promised() -> None:
    made, asked = blends(Searches((100, 300))), request(330)
    promised(made, asked)
    made.give_up("r")
    assert made.promise(asked, 0, 0) == 0
    assert made.exact_tokens("r") == 0


def test_spans_are_captured_once_whole_with_their_lineage() -> None:
    wish = {"capture": True, "labels": ["board"]}
    made = blends(Searches((64, 128), overhead=0.1, absent=[(128, 280), (280, 320)]))
    asked = request(330, wish)
    made.arrived(asked, Scope())
    table = list(range(21))
    assert made.captures("r", 279, table, asked.block_hashes) == []
    (one,) = made.captures("r", 300, table, asked.block_hashes)
    (two,) = made.captures("r", 330, table, asked.block_hashes)
    assert (one.start, len(one.tokens) // 4, two.start, one.labels) == (128, 280, 280, ("board",))
    keys = [content_key(RANK, np.arange(a, b)) for a, b in ((64, 128), (128, 280))]
    assert (one.lineage, two.lineage) == (keys[:1], keys)
    assert one.hashes == {0: asked.block_hashes[11], 1: asked.block_hashes[15]}  # two blocks that prefixes name, too
    assert two.hashes == {}
    assert made.captures("r", 330, table, asked.block_hashes) == []


def test_a_variant_that_fits_badly_is_captured_again_but_not_of_blended_prompts() -> None:
    made, asked = blends(Searches((100, 300), overhead=0.6)), request(330, {"capture": True})
    made.arrived(asked, Scope())
    assert len(made.captures("r", 330, list(range(21)), asked.block_hashes)) == 1
    both = request(330, {"capture": True, "blend": True}, name="both")
    promised(made, both)
    assert made.captures("both", 330, list(range(21)), both.block_hashes) == []
