"""Who may ask for what: three levels, one token.

`Access.OPEN` is for probes and answers anybody. `Access.READ` answers anybody on loopback, and beyond it whoever shows
the token. `Access.ACT` changes something and always asks for the token, as ``Authorization: Bearer``. A browser cannot
send that header from another site without asking us first, and we answer no such question; so the other way to show the
token, HTTP Basic, which browsers add by themselves, is good for reading only.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from enum import Enum

from kvstore.errors import AccessError, AuthenticationFailed


class Access(Enum):
    """What it takes to be answered."""

    OPEN = "open"
    READ = "read"
    ACT = "act"


class Gate:
    """Checks the Authorization header.

    Parameters
    ----------
    token : str
        The token; empty if the daemon has none.
    wide : bool
        Whether others than this machine can reach the server. Then reading asks for the token, too.
    """

    def __init__(self, token: str, wide: bool) -> None:
        self._token = token
        self.wide = wide

    def check(self, access: Access, authorization: str) -> None:
        """Raise unless the header opens this level.

        Raises
        ------
        AccessError
            If the daemon has no token, so nobody can act over HTTP.
        AuthenticationFailed
            If the token is missing or wrong.
        """
        if access is Access.OPEN or (access is Access.READ and not self.wide):
            return
        if not self._token:
            raise AccessError(
                "Nothing can be changed over HTTP: this daemon has no token.",
                "Start it with --token-file, or use the command line on its socket.",
            )
        shown = _shown(authorization, basic=access is Access.READ)
        if not hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._token.encode()):
            raise AuthenticationFailed(
                "the token is missing or wrong.", "Send `Authorization: Bearer <token>`; it is listen.token."
            )

    def challenge(self, access: Access) -> str:
        """What a 401 answer asks for."""
        return 'Basic realm="kvstore"' if access is Access.READ else 'Bearer realm="kvstore"'


def _shown(authorization: str, basic: bool) -> str:
    """The token in a header; empty if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return ""
    return ""
