"""The daemon's snapshot as tables, for `status` and `top`. Every key may be missing: other versions' daemons show too.

Rates need two snapshots; with one, the counters since start are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvstore.cli.out import clean
from kvstore.errors import BY_CODE
from kvstore.obs import Snapshot, count, namespaces, number, numbers, part
from kvstore.units import format_duration, format_size

MAX_NAMESPACES = 12
_NOTHING = Text("-", "dim")


def render(now: Snapshot, before: Snapshot | None = None, seconds: float = 1.0) -> RenderableType:
    """Everything worth seeing at once.

    Parameters
    ----------
    now : mapping
        The snapshot.
    before : mapping, optional
        An earlier one of the same daemon; adds rates.
    seconds : float
        Time between the two.
    """
    if before is not None and before.get("boot") != now.get("boot"):
        before = None  # restarted in between: its counters began anew
    parts: list[RenderableType] = [*_head(now), Text(), _space(now), Text(), _counts(now, before, seconds)]
    for table in (_encoded(now), _namespaces(now), _requests(now, before, seconds), _trouble(now)):
        if table is not None:
            parts += [Text(), table]
    return Group(*parts)


def _head(now: Snapshot) -> Iterator[RenderableType]:
    if now.get("draining"):
        state = Text("draining", "bold yellow")
    elif now.get("ready", True):
        state = Text("ready", "bold green")
    else:
        state = Text("not ready", "bold red")
    uptime = number(now, "uptime_s")
    facts = [
        f"version {clean(now.get('version', '?'))}",
        f"pid {clean(now.get('pid', '?'))}",
        f"up {format_duration(uptime)}" if uptime is not None else "",
        f"boot {_short(now.get('boot', ''))}" if now.get("boot") else "",
    ]
    yield Text.assemble(("kvstore ", "bold"), state, "  ", ("  ".join(filter(None, facts)), "dim"))
    queue = part(now, "queue")
    waiting = (
        f"{_whole(count(queue, 'blocks'))} blocks ({format_size(count(queue, 'bytes'))}) on their way to disk"
        if count(queue, "blocks")
        else "nothing waiting for disk"
    )
    words = (("sessions", "session"), ("leases", "lease"), ("reservations", "reservation"))
    yield Text(", ".join([*(_many(count(now, key), word) for key, word in words), waiting]))
    asked, hits = count(now, "asked_blocks"), sum(numbers(now, "hit_blocks").values())
    wanted = count(now, "reuse", "wanted")
    if wanted > 0:
        ceiling = 100 * min(1.0, max(count(now, "reuse", "reusable"), hits) / wanted)
        share = f"{100 * hits / wanted:.1f} %, at most {ceiling:.1f} % in a store without bounds"
        yield Text(f"{_whole(hits)} of {_whole(wanted)} wanted blocks were here ({share})")
    elif asked > 0:
        yield Text(f"{_whole(hits)} of {_whole(asked)} blocks asked for were here ({100 * hits / asked:.1f} %)")
    seconds = count(now, "saved", "seconds")
    if seconds > 0:
        saved = f"{_whole(count(now, 'saved', 'tokens'))} tokens were not computed again"
        yield Text(f"{saved}: about {format_duration(seconds)} saved", "green")


def _space(now: Snapshot) -> Table:
    """What each tier holds of what it may."""
    table = _table("Tier", "", "Used", "Of", "Blocks", "State", left=2)
    for name, state in _states(now):
        used, capacity, held = (number(state, key) for key in ("used", "capacity", "blocks_bytes"))
        used = used if held is None else held  # memory made ready ahead of need is not in use
        blocks = _number(number(state, "blocks"))
        table.add_row(Text(name, "bold"), _bar(used, capacity), _size(used), _size(capacity), blocks, _state(state))
    return table


def _counts(now: Snapshot, before: Snapshot | None, seconds: float) -> Table:
    """What happened in each tier since start, and with an earlier snapshot how fast its bytes move."""
    heads = ["Hits", "Misses", "Stored", "Evicted", "Dropped", "Damaged"]
    table = _table("Tier", *heads, *(["Read", "Written"] if before is not None else []))
    for name, state in _states(now):
        row: list[RenderableType] = [Text(name, "bold")]
        row += [_number(number(state, key)) for key in ("hits", "misses", "stored", "evicted")]
        row += [_number(sum(numbers(state, "dropped").values()), "yellow"), _number(number(state, "corrupt"), "red")]
        if before is not None:
            old = part(before, "tiers", name)
            for key in ("bytes_read", "bytes_written"):
                rate = max(0.0, count(state, key) - count(old, key)) / seconds
                row.append(Text(f"{format_size(rate)}/s"))
        table.add_row(*row)
    return table


def _states(now: Snapshot) -> list[tuple[str, Mapping[str, Any]]]:
    return [(clean(name), state) for name, state in part(now, "tiers").items() if isinstance(state, Mapping)]


def _state(state: Mapping[str, Any]) -> Text:
    """Facts of a tier in a few words: breaker, what holds memory, how it does its I/O."""
    facts: list[tuple[str, str]] = []
    breaker = clean(part(state, "breaker").get("state", "closed"))
    if breaker != "closed":
        facts.append((f"breaker {breaker}", "bold red"))
    if sized := count(state, "blocks_capacity"):
        facts.append((f"{format_size(sized)} for blocks", "dim"))
    for key, word in (
        ("leased_bytes", "leased"),
        ("dirty_bytes", "not yet below"),
        ("pinned_bytes", "pinned"),
        ("dropping_bytes", "held by clients"),
    ):
        if count(state, key):
            facts.append((f"{format_size(count(state, key))} {word}", ""))
    held = part(state, "codecs", "held").values()
    if stored := sum(count(each, "stored_bytes") for each in held):
        facts.append((f"{sum(count(each, 'logical_bytes') for each in held) / stored:.1f}x smaller by codecs", ""))
    if state.get("huge_pages"):
        facts.append(("huge pages", "dim"))
    if state.get("direct_io") is False:
        facts.append(("no O_DIRECT", "yellow"))
    if state.get("path"):
        facts.append((clean(state["path"]), "dim"))
    joined = Text(", ").join(Text(word, style) for word, style in facts)
    joined.overflow = "fold"
    return joined if facts else Text("ok", "green")


def _encoded(now: Snapshot) -> Table | None:
    """What each tier keeps on which rung, from the largest to the smallest."""
    table = _table("Tier", "Encoded by", "Blocks", "Raw", "Kept as", "Smaller", left=2)
    for tier, state in _states(now):
        held = part(state, "codecs", "held")
        rungs = [(name, count(held, name, "logical_bytes"), count(held, name, "stored_bytes")) for name in held]
        for name, raw, stored in sorted(rungs, key=lambda rung: rung[1] / max(rung[2], 1)):
            row = [
                _number(count(held, name, "blocks")),
                _size(raw),
                _size(stored),
                Text(f"{raw / max(stored, 1):.2f}x"),
            ]
            table.add_row(Text(tier, "bold"), Text(clean(name), overflow="fold"), *row)
    return table if table.row_count else None


def _namespaces(now: Snapshot) -> Table | None:
    listed = sorted(namespaces(now), key=lambda each: -_total(each, "bytes"))
    if not listed:
        return None
    table = _table("Model", "Namespace", "Blocks", "Bytes", left=2)  # a block in two tiers is kept twice
    for each in listed[:MAX_NAMESPACES]:
        table.add_row(
            Text(clean(each.get("model") or "unnamed")[:60]),
            Text(_short(each.get("digest", "")), "dim"),
            _by_tier(each, "blocks", _whole),
            _by_tier(each, "bytes", format_size),
        )
    hidden = len(listed) - MAX_NAMESPACES
    if hidden > 0:
        table.add_row(Text(f"and {_whole(hidden)} more", "dim"))
    return table


def _by_tier(each: Snapshot, field: str, show: Callable[[float], str]) -> str:
    return ", ".join(f"{clean(tier)} {show(value)}" for tier, value in numbers(each, field).items())


def _requests(now: Snapshot, before: Snapshot | None, seconds: float) -> Table | None:
    rows = []
    for verb, state in part(now, "requests").items():
        old = part(before, "requests", verb)
        times, spent = count(state, "count"), count(state, "seconds")
        rate: RenderableType = Text(f"{max(0.0, times - count(old, 'count')) / seconds:,.1f}/s")
        mean = Text(format_duration(spent / times)) if times > 0 else _NOTHING
        cells = [Text(clean(verb)), _number(times), _number(count(state, "errors"), "red"), mean]
        rows.append(cells + ([rate] if before is not None else []))
    if not rows:
        return None
    table = _table("Verb", "Calls", "Errors", "Mean", *(["Now"] if before is not None else []))
    for row in rows:
        table.add_row(*row)
    return table


def _trouble(now: Snapshot) -> Table | None:
    rows = []
    for code, times in sorted(numbers(now, "errors").items()):
        kind = BY_CODE.get(code)
        if times > 0:
            meaning = kind.__name__ if kind else "unknown to this version"
            rows.append((f"error {clean(code)}", times, meaning))
    for tier, state in part(now, "tiers").items():
        for reason, times in numbers(state, "dropped").items():
            if times > 0:
                rows.append((f"dropped at {clean(tier)}", times, clean(reason)))
    if not rows:
        return None
    table = _table("Trouble", "Times", "What", left=1)
    table.columns[2].justify = "left"
    for what, times, meaning in rows:
        table.add_row(Text(what, "yellow"), _number(times), Text(meaning))
    return table


# -- cells -------------------------------------------------------------------------------------------------------------


def _table(*heads: str, left: int = 1) -> Table:
    """A plain table; columns after the first `left` are numbers, and a last one called State is text again."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        justify = "left" if place < left or head == "State" else "right"
        folds = head in ("State", "Encoded by")  # names of rungs differ at their ends
        table.add_column(head, justify=justify, no_wrap=not folds, ratio=1 if head == "State" else None)
    return table


def _bar(used: float | None, capacity: float | None) -> RenderableType:
    if not capacity:
        return Text()
    return ProgressBar(total=capacity, completed=min(used or 0, capacity), width=10, finished_style="yellow")


def _size(value: float | None) -> Text:
    return _NOTHING if value is None else Text(format_size(value))


def _number(value: float | None, style: str = "") -> Text:
    return _NOTHING if value is None else Text(_whole(value), style if value else "")


def _total(tree: Mapping[str, Any], key: str) -> float:
    """A number, or the sum of the numbers of all tiers."""
    single = number(tree, key)
    return sum(numbers(tree, key).values()) if single is None else single


def _short(digest: object) -> str:
    return (bytes(digest).hex() if isinstance(digest, (bytes, bytearray)) else clean(digest))[:12]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _many(value: float, word: str) -> str:
    return f"{_whole(value)} {word}{'' if value == 1 else 's'}"
