"""What is in the tier's directory: the listing that a start needs, the order of use, and the full walk of `check`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.disk.blocks import DESCRIPTION, BlockFiles, description_cost
from kvstore.disk.directory import Directory
from kvstore.disk.format import ENTRY_COST, Shape, is_domain, is_namespace, parse_name, round_up
from kvstore.disk.index import Space
from kvstore.disk.io import Files, Listing, let_go
from kvstore.types import BlockId, Scope

_KEY_HEX = 64
_NO_SHAPE = Shape(0, 0)


@dataclass(slots=True)
class Recovered:
    """What a start found.

    Attributes
    ----------
    spaces : dict
        Blocks by scope, as their names tell.
    quarantine : dict
        Cost of each file in quarantine, oldest first.
    foreign : list of str
        Paths of what we have not written and do not touch.
    texts : dict
        Descriptions of namespaces.
    """

    spaces: dict[Scope, Space] = field(default_factory=dict)
    quarantine: dict[str, int] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    texts: dict[Scope, bytes] = field(default_factory=dict)


def recover(directory: Directory, blocks: BlockFiles, files: Files) -> Recovered:
    """List the directory. No block's file is looked at: the names say how large they are.

    Raises
    ------
    OSError
        If a directory cannot be listed.
    """
    found = Recovered()
    shapes: dict[str, tuple[Shape, int]] = {}
    for scope, path, listing in walk(directory, files, found.foreign):
        space = Space()
        space.nbytes = _take_names(listing.files, space.blocks, shapes, path, found.foreign)
        if not space.blocks:
            blocks.remove_namespace(scope)
            continue
        if DESCRIPTION in listing.files:
            text = blocks.description(scope)
            if text is not None:
                space.description = description_cost(len(text))
                found.texts[scope] = text
        found.spaces[scope] = space
    for name in sorted(files.list_dir(directory.quarantine).files):
        info = files.stat_name(name, directory.quarantine)
        found.quarantine[name] = round_up(info.st_size) + ENTRY_COST
    return found


def walk(directory: Directory, files: Files, foreign: list[str]) -> Iterator[tuple[Scope, str, Listing]]:
    """Each namespace's scope, path and listing. What is none is added to `foreign`."""
    top = files.list_dir(directory.blocks)
    foreign += [f"blocks/{name}" for name in (*top.files, *top.others)]
    for domain in top.dirs:
        if not is_domain(domain):
            foreign.append(f"blocks/{domain}")
            continue
        with _opened(files, domain, directory.blocks) as at:
            inner = files.list_dir(at)
            foreign += [f"blocks/{domain}/{name}" for name in (*inner.files, *inner.others)]
            for ns in inner.dirs:
                path = f"blocks/{domain}/{ns}"
                if not is_namespace(ns):
                    foreign.append(path)
                    continue
                with _opened(files, ns, at) as fd:
                    listing = files.list_dir(fd)
                foreign += [f"{path}/{name}" for name in (*listing.dirs, *listing.others)]
                yield Scope(domain, bytes.fromhex(ns)), path, listing


def _take_names(
    names: list[str],
    blocks: dict[bytes, Shape],
    shapes: dict[str, tuple[Shape, int]],
    path: str,
    foreign: list[str],
) -> int:
    """Turn file names into blocks; what they cost. Most blocks share a few shapes, so each shape is read once."""
    total = 0
    fromhex = bytes.fromhex
    for name in names:
        head, tail = name[:_KEY_HEX], name[_KEY_HEX:]
        try:
            shape, cost = shapes[tail]
            key = fromhex(head)
        except (KeyError, ValueError):
            key, shape, cost = b"", _NO_SHAPE, 0
        if key.hex() != head or not head:  # a shape not seen before, or no name of ours
            parsed = parse_name(name)
            if parsed is None:
                if name != DESCRIPTION:
                    foreign.append(f"{path}/{name}")
                continue
            key, shape = parsed
            cost = shape.cost
            shapes[tail] = shape, cost
        blocks[key] = shape
        total += cost
    return total


def by_last_use(directory: Directory, files: Files) -> list[BlockId]:
    """All blocks by the times of their files, oldest first. Slow: looks at each file."""
    times: list[tuple[int, BlockId]] = []
    foreign: list[str] = []
    for scope, _, listing in walk(directory, files, foreign):
        with (
            contextlib.suppress(OSError),
            _opened(files, scope.domain, directory.blocks) as domain,
            _opened(files, scope.ns.hex(), domain) as at,
        ):
            for name in listing.files:
                parsed = parse_name(name)
                if parsed is not None:
                    with contextlib.suppress(OSError):  # evicted meanwhile
                        times.append((files.used_at(name, at), BlockId(scope, parsed[0])))
    times.sort()
    return [block for _, block in times]


@contextlib.contextmanager
def _opened(files: Files, name: str, at: int) -> Iterator[int]:
    fd = files.open_dir(name, at)
    try:
        yield fd
    finally:
        let_go(files, fd)
