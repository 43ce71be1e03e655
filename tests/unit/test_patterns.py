"""A name or digest that is refused: people read the rule in words, not the pattern it is checked with."""

from __future__ import annotations

import inspect
import re
from typing import Annotated

import msgspec
import pytest

from kvstore import patterns
from kvstore.errors import InvalidParams
from kvstore.patterns import in_words
from kvstore.quotas import QuotaRule
from kvstore.wire.desk import Quota
from kvstore.wire.envelope import decode_params

PATTERNS = [text for name, text in inspect.getmembers(patterns) if name.isupper() and isinstance(text, str)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_has_words(pattern: str) -> None:
    made = msgspec.defstruct("Made", [("field", Annotated[str, msgspec.Meta(pattern=pattern)])])
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"field": "no such thing!"}, made)
    assert re.fullmatch(r"field: must be [^\\^$\[\]{}]+", in_words(caught.value))


def test_a_refused_quota_says_the_rule_and_where() -> None:
    asked = Quota(set=QuotaRule(name="team a"))
    with pytest.raises(InvalidParams) as caught:
        decode_params("quota", msgspec.Raw(msgspec.msgpack.encode(asked)))
    assert "name: must be 1 to 64 letters, digits, dots, dashes or underscores" in str(caught.value)
    assert "regex" not in str(caught.value)


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"name": "a", "priority": 1000}, QuotaRule)
    assert in_words(caught.value) == str(caught.value)
    assert in_words(ValueError("Bad.")) == "Bad"
