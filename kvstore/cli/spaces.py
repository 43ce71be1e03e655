"""Which namespace is meant on the command line: by the first digits of its digest, by its model, or the only one."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from kvstore.errors import InvalidParams, UnknownNamespace
from kvstore.keys import namespace_digest
from kvstore.obs import namespaces
from kvstore.types import Namespace

Digest = Annotated[str, Parameter(name="--namespace", help="First digits of the namespace digest.")]
Model = Annotated[str, Parameter(name="--model", help="Pattern of the model's name, with * and ?.")]

_REMEDY = "`kvstore status` lists them; name one with --namespace or --model."


def choose(snapshot: Mapping[str, Any], digest: str = "", model: str = "") -> Mapping[str, Any]:
    """The one namespace that fits.

    Raises
    ------
    UnknownNamespace, InvalidParams
        If none does, or more than one.
    """
    found = [
        each
        for each in namespaces(snapshot)
        if str(each.get("digest", "")).startswith(digest.lower())
        and (not model or fnmatchcase(str(each.get("model", "")), model))
    ]
    if not found:
        raise UnknownNamespace("no such namespace is known to the daemon.", _REMEDY)
    if len(found) > 1:
        shown = ", ".join(f"{each.get('digest', '')[:12]} ({each.get('model') or 'unnamed'})" for each in found[:8])
        raise InvalidParams(f"{len(found)} namespaces fit: {shown}.", _REMEDY)
    return found[0]


def fields(space: Mapping[str, Any]) -> Namespace | None:
    """The namespace itself, from what the daemon says of it; None if that is not all there is to know."""
    known = {name: space[name] for name in Namespace.__struct_fields__ if name in space}
    try:
        made = msgspec.convert(known, Namespace)
    except msgspec.ValidationError:
        return None
    return made if namespace_digest(made).hex() == space.get("digest") else None
