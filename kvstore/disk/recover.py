"""What is in the tier's directory: the listing that a start needs, the order of use, and the full walk of `check`."""

from __future__ import annotations

import contextlib
from binascii import unhexlify
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from kvstore.disk.blocks import DESCRIPTION, BlockFiles, description_cost
from kvstore.disk.directory import Directory
from kvstore.disk.format import Shape, block_name, file_cost, is_domain, is_namespace, parse_name
from kvstore.disk.index import Space
from kvstore.disk.io import Files, let_go
from kvstore.types import BlockId, Scope

_KEY_HEX = 64

Names = TypeVar("Names")

Named = tuple[bytes, Shape]


@dataclass(slots=True)
class Recovered:
    """What a start found.

    Attributes
    ----------
    spaces : dict
        Blocks by scope, as their names tell.
    quarantine : dict
        Cost of each file in quarantine, oldest first.
    texts : dict
        Descriptions of namespaces.
    foreign : list of str
        Paths of what we have not written and do not touch.
    """

    spaces: dict[Scope, Space] = field(default_factory=dict)
    quarantine: dict[str, int] = field(default_factory=dict)
    texts: dict[Scope, bytes] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)


def recover(directory: Directory, blocks: BlockFiles, files: Files) -> Recovered:
    """List the directory. No block's file is looked at: the names say how large they are.

    Raises
    ------
    OSError
        If a directory cannot be listed.
    """
    found = Recovered()
    shapes: dict[str, tuple[Shape, int]] = {}
    for scope, path, names in walk(directory, files, files.list_names, found.foreign):
        space, strange = Space(), []
        space.nbytes, doubled = _take_names(names, space.blocks, shapes, strange)
        for named in _superseded(names) if doubled else ():
            blocks.remove(BlockId(scope, named[0]), named[1])
        found.foreign += [f"{path}/{name}" for name in strange if name != DESCRIPTION]
        if not space.blocks:
            blocks.remove_namespace(scope)
            continue
        text = blocks.description(scope) if DESCRIPTION in strange else None
        if text is not None:
            space.description = description_cost(len(text))
            found.texts[scope] = text
        found.spaces[scope] = space
    for name in sorted(files.list_dir(directory.quarantine).files):
        info = files.stat_name(name, directory.quarantine)
        found.quarantine[name] = file_cost(info.st_size)
    return found


def walk(
    directory: Directory, files: Files, look: Callable[[int], Names], foreign: list[str]
) -> Iterator[tuple[Scope, str, Names]]:
    """Each namespace's scope and path, and what `look` sees in its open directory.

    What is none of ours is added to `foreign`; what is removed meanwhile is passed over.
    """
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
                try:
                    with _opened(files, ns, at) as opened:
                        seen = look(opened)
                except FileNotFoundError:
                    continue
                yield Scope(domain, bytes.fromhex(ns)), path, seen


@contextlib.contextmanager
def _opened(files: Files, name: str, at: int) -> Iterator[int]:
    fd = files.open_dir(name, at)
    try:
        yield fd
    finally:
        let_go(files, fd)


def _take_names(
    names: list[str], blocks: dict[bytes, Shape], shapes: dict[str, tuple[Shape, int]], strange: list[str]
) -> tuple[int, bool]:
    """Turn file names into blocks; what they cost, and whether a block was named twice.

    Most blocks share a few shapes, so each shape is read once. Of a block's two files, the later one by name counts.
    """
    total = count = 0
    for name in names:
        try:
            shape, cost = shapes[name[_KEY_HEX:]]
            blocks[unhexlify(name[:_KEY_HEX])] = shape
        except (KeyError, ValueError):
            parsed = parse_name(name)
            if parsed is None:
                strange.append(name)
                continue
            key, shape = parsed
            cost = shape.cost
            shapes[name[_KEY_HEX:]] = shape, cost
            blocks[key] = shape
        total += cost
        count += 1
    doubled = count != len(blocks)
    if doubled:  # or two spellings of one key: one is not ours, and the look that follows finds out which
        total = sum(shape.cost for shape in blocks.values())
    return total, doubled


def _superseded(names: list[str]) -> list[Named]:
    """The files that `_take_names` passed over: of blocks that were being replaced when the power failed."""
    last: dict[bytes, Shape] = {}
    found = []
    for key, shape in filter(None, map(parse_name, names)):
        if key in last:
            found.append((key, last[key]))
        last[key] = shape
    return found


def by_last_use(
    directory: Directory, files: Files, found: dict[Scope, list[Named]]
) -> tuple[list[tuple[int, BlockId]], list[tuple[BlockId, Shape]]]:
    """Look at each file: last use (ns) and name of blocks, oldest first, and those without a file of ours. Slow."""
    times: list[tuple[int, BlockId]] = []
    strangers: list[tuple[BlockId, Shape]] = []
    for scope, blocks in found.items():
        try:
            with _opened(files, scope.domain, directory.blocks) as domain, _opened(files, scope.ns.hex(), domain) as at:
                for key, shape in blocks:
                    block = BlockId(scope, key)
                    used_at, plain = _used_at(files, block_name(key, shape), at)
                    if plain:
                        times.append((used_at, block))
                    else:
                        strangers.append((block, shape))
        except OSError:
            times += [(0, BlockId(scope, key)) for key, _ in blocks]
    times.sort()
    return times, strangers


def _used_at(files: Files, name: str, at: int) -> tuple[int, bool]:
    try:
        return files.used_at(name, at)
    except FileNotFoundError:
        return 0, False
    except OSError:  # says nothing about the block
        return 0, True
