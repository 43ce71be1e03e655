"""What names and digests that people write may look like, as patterns for decoders and in words for those who wrote."""

from __future__ import annotations

import re

NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
HEX32 = "^[0-9a-f]{64}$"
DIGEST_START = "^([0-9a-f]{8,64})?$"
KEYS = "^([0-9a-f]{64}(,[0-9a-f]{64}){0,40})?$"
PROFILE = "^[a-z0-9][a-z0-9._-]{0,63}$"
CODE = "^KV[0-9]{3}$"

_WORDS = {
    NAME: "1 to 64 letters, digits, dots, dashes or underscores of ASCII, the first a letter or a digit",
    HEX32: "64 hexadecimal digits in lower case",
    DIGEST_START: "8 to 64 hexadecimal digits in lower case, or nothing",
    KEYS: "up to 41 keys of 64 hexadecimal digits in lower case, by commas and without spaces",
    PROFILE: "1 to 64 lower-case letters, digits, dots, dashes or underscores of ASCII, the first a letter or a digit",
    CODE: "KV and three digits",
}
_EXPECTED = re.compile(r"Expected `str` matching regex '([^']*)'(?: - at `\$\.?([^`]*)`)?")


def in_words(error: Exception) -> str:
    """What an error says, without its last dot; what a decoder says of a pattern is said in words."""
    text = str(error).removesuffix(".")
    found = _EXPECTED.fullmatch(text)
    if found is None or found[1] not in _WORDS:
        return text
    return f"{found[2]}: must be {_WORDS[found[1]]}" if found[2] else f"Must be {_WORDS[found[1]]}"
