"""What a request asks for, ``kv_transfer_params={"kvstore": {...}}``, and the server's defaults where it is silent."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kvstore.errors import InvalidParams
from kvstore.types import Label
from kvstore_connectors.blend.amount import Amount

Position = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]

NAME = "kvstore"
"""The key in a request's `kv_transfer_params` under which we are spoken to."""


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a request's chunks are reused.

    Attributes
    ----------
    blend : bool
        Take stored chunks wherever they stand, and compute some of their tokens again. Approximate.
    capture : bool
        Store the named spans that are no chunks yet, if the prompt is computed exactly.
    spans : list of (int, int)
        Half-open ranges of token positions that are chunks.
    separator : list of int
        Token ids between which chunks stand.
    find : bool
        Look for stored chunks at any place.
    share : float
        Share of reused tokens to compute again.
    amount : {"share", "loading"}
        That share, or as many as take as long as the loading, but no less than that share.
    selector : str
        How these are chosen; ``auto`` is the planner's choice.
    labels : list of str
        Rights to read that the request's sender has; given by the gateway, never by users.
    """

    blend: bool = False
    capture: bool = False
    spans: Annotated[list[tuple[Position, Position]], msgspec.Meta(max_length=4096)] = []
    separator: Annotated[list[TokenId], msgspec.Meta(max_length=64)] = []
    find: bool = True
    share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.15
    amount: Amount = "share"
    selector: Annotated[str, msgspec.Meta(max_length=64)] = "auto"
    labels: Annotated[list[Label], msgspec.Meta(max_length=16)] = []

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return self.blend or self.capture


def read_wish(params: Any, default: Wish) -> Wish:
    """The wish of a request; fields that it does not name are the server's.

    Parameters
    ----------
    params : mapping or None
        The request's `kv_transfer_params`.

    Raises
    ------
    InvalidParams
        If what it says to us is not understood.
    """
    said = params.get(NAME) if isinstance(params, dict) else None
    if said is None:
        return default
    if not isinstance(said, dict):
        raise InvalidParams(f"kv_transfer_params: {NAME!r} is not a table.", "docs/chunks.md lists its fields.")
    try:
        return msgspec.convert({**msgspec.structs.asdict(default), **said}, Wish, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidParams(f"kv_transfer_params: {NAME}: {error}.", "docs/chunks.md lists its fields.") from None
