"""The dashboard as HTML: `dashboard/index.html` with the values of a view in it.

The template holds the words and the order of things; ``{{kind:id}}`` marks what changes. Everything that comes from the
daemon goes through `html.escape`, here and in `kvstore.http.flow`, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from importlib.resources import files

from kvstore.http import flow
from kvstore.http.charts import HEIGHT, WIDTH
from kvstore.http.now import EVENTS
from kvstore.http.numbers import NOTHING
from kvstore.http.view import View

_MARK = re.compile(r"\{\{(\w+)(?::(\w+))?\}\}")

Setting = tuple[str, str, str]

# Columns of a table: a title, and `#` before it where the cells are numbers. `{tiers}` stands for one column a tier.
TABLES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "flows": ("What flows now", "Nothing flows.", ("Way", "#Now")),
    "minutes": (
        "Hit rate by minute",
        "Nothing was wanted in the last 15 minutes.",
        ("When", "#Wanted", "{tiers}", "#Computed", "#Ceiling"),
    ),
    "whatif": ("Hit rate by size", "Nothing was wanted yet.", ("#Size of all tiers together", "#Hit rate")),
    "namespaces": (
        "Namespaces, largest first",
        "No engine has introduced itself yet.",
        ("Model", "Kind", "Digest", "Domain", "Kept", "#Computed", "#Served", "#Hit rate"),
    ),
    "quotas": (
        "What each rule holds",
        "No rules: everybody shares each tier.",
        ("Tier", "Rule", "#Holds", "#Guarantee", "#Limit", "#Expired"),
    ),
    "evictions": (
        "Who made whom give way",
        "Nobody had to, or there are no rules to tell apart.",
        ("Tier", "Needed room", "Gave it", "#Blocks"),
    ),
    "found": (
        "The blocks of the prompt",
        "Look up a prompt to see where each of its blocks is.",
        ("#Block", "Key", "Where", "#Bytes", "Usable", "Why"),
    ),
    "leases": (
        "Open leases, oldest first",
        "Nobody reads at this moment.",
        ("Client", "Domain", "Model", "Namespace", "#Blocks", "#Bytes", "#On their way", "#Ends in"),
    ),
    "fidelity": (
        "Namespaces that are not exact",
        "Every namespace is exact: what is handed out is, bit by bit, what was stored.",
        ("Model", "Digest", "Fidelity", "#Bytes", "#Served"),
    ),
    "gates": (
        "What was measured of lossy chains, and which may run",
        "No profile is here, so no block ever loses precision. `kvstore calibrate` makes one.",
        ("Profile", "Rung", "#Smaller", "#KL, mean", "#KL, up to", "#Same first choice", "Gate"),
    ),
    "codecs": (
        "What is encoded now",
        "No tier holds an encoded block: all are kept as they came.",
        ("Tier", "Rung", "#Blocks", "#Raw", "#Kept as", "#Smaller", "#KL, at most"),
    ),
    "ladder": (
        "Steps down the ladder, since start",
        "No block was encoded, so none could become smaller instead of leaving.",
        ("Tier", "#Times encoded", "#May step down", "#Stepped down", "#Bytes freed", "#Lost", "#Time in codecs"),
    ),
    "blends": (
        "Prompts put together from chunks, as engines report them",
        "No engine has reported a blended prompt.",
        ("Model", "Rank", "#Prompts", "#Tokens", "#Computed", "#Reused", "Its gate"),
    ),
    "chunks": (
        "Chunks that can be reused at another place of a prompt",
        "No engine has stored a chunk.",
        ("#Contents", "#Variants", "#Stored", "#Replaced", "#Forgotten", "#Refused"),
    ),
    "verbs": (
        "Requests by verb, since start",
        "No request yet.",
        ("Verb", "#Count", "#Errors", "#Mean", "#Half", "#9 of 10", "#99 of 100"),
    ),
    "slow": ("Slow requests, latest first", "No request took longer than 50 ms.", ("When", "Verb", "#Took", "Error")),
    "errors": (
        "Errors sent to clients",
        "No error was sent to any client.",
        ("Code", "Name", "#Count", "What to do"),
    ),
    "drops": (
        "Blocks that were not stored",
        "Every offered block was stored.",
        ("Where", "Reason", "#Blocks", "What it means"),
    ),
    "missed": (
        "Blocks that were asked for and not handed out",
        "No block was missed.",
        ("Reason", "#Blocks", "What it means"),
    ),
    "breakers": (
        "Health of the tiers",
        "No tier below host memory.",
        ("Tier", "Breaker", "#For", "#Failures", "#Quarantined", "Why"),
    ),
    "config": ("Settings", "No settings to show.", ("Setting", "Value", "From")),
}
_TIER_PARTS = (
    ("used", "used"),
    ("leased", "leased to readers"),
    ("dirty", "not yet written below"),
    ("pinned", "pinned"),
    ("writing", "lent for writing"),
    ("quarantined", "quarantined"),
    ("dropping", "waiting for clients to let go"),
    ("free", "free"),
)
_ASSETS = {"app.js": "text/javascript", "style.css": "text/css"}
_KNOWN = ("gpu", "host", "disk", "redis", "missed", "ceiling", "out", "in")


def load_assets() -> dict[str, tuple[bytes, str]]:
    """Bytes and type of the files that the page needs, by name."""
    folder = files("kvstore.http").joinpath("dashboard")
    return {name: (folder.joinpath(name).read_bytes(), kind) for name, kind in _ASSETS.items()}


def load_template() -> str:
    """The page before anything is filled in."""
    return files("kvstore.http").joinpath("dashboard", "index.html").read_text("utf-8")


def render(
    template: str,
    view: View,
    tiers: list[str],
    settings: list[Setting],
    spaces: list[tuple[str, str]] | None = None,
    asked: tuple[str, str] = ("", ""),
) -> str:
    """The page, complete without JavaScript.

    Parameters
    ----------
    spaces : list of (digest, words), optional
        Namespaces to choose from.
    asked : tuple of str
        Namespace and prompt that were looked up.
    """
    view.rows["config"] = [[name, value or NOTHING, origin] for name, value, origin in settings]
    colours = {tier: _colour(tier) for tier in tiers}
    fill: dict[str, Callable[[str], str]] = {
        "text": lambda name: _text(view, name),
        "table": lambda name: _table(view, name, tiers),
        "chart": lambda name: _chart(view, name, tiers if name == "hits" else ["out", "in"]),
        "hidden": lambda name: "" if view.shown.get(name, True) else " hidden",
        "path": lambda name: f'id="{escape(name)}" d="{escape(view.paths.get(name, ""))}"',
        "tiers": lambda _: "".join(_tier(view, tier) for tier in tiers),
        "gauge": lambda _: _gauge(view, tiers),
        "flow": lambda _: flow.markup(view, tiers, colours),
        "legend": lambda _: "".join(_legend(tier, f"served from {tier}") for tier in tiers),
        "spaces": lambda _: _options(spaces or [], asked[0]),
        "asked": lambda _: escape(asked[1]),
        "policies": lambda _: _options([(tier, tier) for tier in tiers], ""),
        "boot": lambda _: escape(view.boot),
    }
    return _MARK.sub(lambda mark: fill[mark[1]](mark[2] or ""), template)


def _text(view: View, name: str) -> str:
    mood = view.mood.get(name)
    shown = "" if view.shown.get(name, True) else " hidden"
    moody = f' data-mood="{mood}"' if mood else ""
    return f'<span id="{escape(name)}"{moody}{shown}>{escape(view.text.get(name, ""))}</span>'


def _options(listed: list[tuple[str, str]], chosen: str) -> str:
    return "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(words)}</option>'
        for value, words in listed
    )


def _table(view: View, name: str, tiers: list[str]) -> str:
    title, empty, columns = TABLES[name]
    heads = [part for column in columns for part in ([f"#{t}" for t in tiers] if column == "{tiers}" else [column])]
    return _plain_table(name, title, empty, heads, view.rows.get(name, []))


def _plain_table(name: str, title: str, empty: str, heads: list[str], rows: list[list[str]]) -> str:
    kinds = ["num" if head.startswith("#") else "" for head in heads]
    titles = [head.lstrip("#") for head in heads]
    head = "".join(f'<th scope="col"{_class(k)}>{escape(t)}</th>' for k, t in zip(kinds, titles, strict=True))
    body = "".join(_row(row, kinds, titles) for row in rows)
    if not rows:
        body = f'<tr class="none"><td colspan="{len(heads)}">{escape(empty)}</td></tr>'
    return (
        f'<table id="{escape(name)}" data-empty="{escape(empty)}"><caption>{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _row(row: list[str], kinds: list[str], titles: list[str]) -> str:
    cells = zip(row, kinds, titles, strict=False)
    return "<tr>" + "".join(f'<td{_class(k)} data-label="{escape(t)}">{escape(c)}</td>' for c, k, t in cells) + "</tr>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _chart(view: View, name: str, series: list[str]) -> str:
    order = ["missed", *series, "ceiling"] if name == "hits" else series
    paths = "".join(
        f'<path id="{escape(f"{name}_{each}")}" class="fill-{_colour(each)}" '
        f'd="{escape(view.paths.get(f"{name}_{each}", ""))}"/>'
        for each in order
    )
    lines = "".join(
        f'<path class="grid" d="M0 {y}H{WIDTH}"/>'
        for y in ((0.5, HEIGHT / 2, HEIGHT - 0.5) if name == "hits" else (HEIGHT / 2,))
    )
    about = escape(view.text.get(f"{name}_about", ""))
    return (
        f'<div class="plot" data-chart="{name}" tabindex="0" role="group" aria-label="Chart; arrow keys choose a bar" '
        f'aria-describedby="{name}_about">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{lines}{paths}'
        f'<path class="cursor" d=""/></svg></div><span id="{name}_about" class="unseen">{about}</span>'
    )


def _gauge(view: View, tiers: list[str]) -> str:
    """One bar: what each tier served, and a mark where the ceiling is."""
    parts = "".join(
        f'<path id="gauge_{escape(tier)}" class="fill-{_colour(tier)}" '
        f'd="{escape(view.paths.get(f"gauge_{tier}", ""))}"/>'
        for tier in tiers
    )
    mark = escape(view.paths.get("gauge_ceiling", ""))
    return (
        '<svg class="gauge" viewBox="0 -2 100 14" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rail" width="100" height="10"/>{parts}'
        f'<path id="gauge_ceiling" class="fill-ceiling" d="{mark}"/></svg>'
    )


def _legend(series: str, words: str) -> str:
    return f'<li><i class="swatch swatch-{_colour(series)}"></i>{escape(words)}</li>'


def _colour(series: str) -> str:
    return series if series in _KNOWN else "other"


def _tier(view: View, tier: str) -> str:
    bars = "".join(_bar(view, tier, name, words) for name, words in _TIER_PARTS)
    name, heads = f"{tier}_events", [f"#{words}" for words in EVENTS.values()]
    events = _plain_table(name, "Blocks, since start", "Nothing yet.", heads, view.rows[name])
    return (
        f'<article class="card tier"><h3><i class="swatch swatch-{_colour(tier)}"></i>{escape(tier)}</h3>'
        f'<p class="about">{_text(view, f"{tier}_about")}</p><dl class="bars">{bars}</dl>'
        f'<p class="about">Now: {_text(view, f"{tier}_rates")}</p><div class="sheet">{events}</div></article>'
    )


def _bar(view: View, tier: str, name: str, words: str) -> str:
    key = f"{tier}_{name}"
    shown = "" if view.shown.get(f"{key}_row", True) else " hidden"
    fill = "free" if name == "free" else _colour(tier)
    return (
        f'<div id="{escape(key)}_row" class="part part-{name}"{shown}><dt>{view.text.get(f"{key}_word", words)}</dt>'
        f'<dd class="track"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rail" width="100" height="10"/>'
        f'<rect id="{escape(key)}_bar" class="fill-{fill}" width="{view.bars[f"{key}_bar"]:g}" height="10"/></svg></dd>'
        f'<dd class="num">{_text(view, key)}</dd><dd class="num share">{_text(view, f"{key}_share")}</dd></div>'
    )
