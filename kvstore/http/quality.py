"""The section of the dashboard about what may differ from exact KV: what was measured, and how much of it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvstore.http.numbers import NOTHING, compact, percent, whole
from kvstore.http.view import View, shown_text, states_of
from kvstore.obs import Snapshot, count, listed, namespaces, number, numbers, part
from kvstore.standing import called
from kvstore.units import format_duration, format_size

MAX_ROWS = 100

LOSSLESS = {"raw", "lossless", "byteplanes", "zstd", "seal"}
"""Steps of a chain that lose nothing."""


def quality(view: View, snapshot: Snapshot, tiers: list[str]) -> None:
    """Lossy namespaces, profiles, codecs by tier, chunks and blending."""
    states = states_of(snapshot, tiers)
    cost = costs(snapshot)
    view.rows["fidelity"] = list(_lossy(snapshot))[:MAX_ROWS]
    view.rows["gates"] = list(_gates(snapshot))[:MAX_ROWS]
    view.rows["codecs"] = [row for tier, state in states.items() for row in _chains(tier, state, cost)][:MAX_ROWS]
    view.rows["ladder"] = [_ladder(tier, part(state, "codecs")) for tier, state in states.items() if _steps(state)]
    view.rows["blends"] = list(_blends(snapshot))[:MAX_ROWS]
    chunks = part(snapshot, "chunks")
    known = count(chunks, "chunks") > 0 or count(chunks, "stored") > 0
    names = ("chunks", "variants", "stored", "replaced", "forgotten", "refused")
    view.rows["chunks"] = [[whole(count(chunks, name)) for name in names]] if known else []


def _lossy(snapshot: Snapshot) -> Iterator[list[str]]:
    for each in namespaces(snapshot):
        if each.get("fidelity", "exact") != "exact":
            yield [
                shown_text(each.get("model") or "unnamed"),
                shown_text(each.get("digest", ""))[:12],
                shown_text(each.get("fidelity")),
                format_size(sum(numbers(each, "bytes").values())),
                whole(sum(numbers(each, "hit").values())),
            ]


# -- profiles: what the gate says of each chain ------------------------------------------------------------------------


def _gates(snapshot: Snapshot) -> Iterator[list[str]]:
    for profile in listed(snapshot, "profiles"):
        name = shown_text(profile.get("name"))
        for place, rung in enumerate(listed(profile, "rungs")):
            yield [
                name if place else f"{name}: {shown_text(profile.get('model'))}",
                rung_name(rung),
                _times(number(rung, "ratio")),
                _kl(number(rung, "kl")),
                _kl(number(rung, "kl_upper")),
                percent(count(rung, "top1"), 1),
                _rung_verdict(profile, rung),
            ]


def rung_name(rung: Mapping[str, Any]) -> str:
    """A rung as it is called: its chain, and how much of it is kept."""
    return called(shown_text(rung.get("chain")), int(count(rung, "planes")))


def _rung_verdict(profile: Mapping[str, Any], rung: Mapping[str, Any]) -> str:
    if rung.get("passed"):
        return "passed"
    most, least = count(profile, "most_kl"), count(profile, "least_top1")
    if count(rung, "kl_upper") > most:
        return f"refused: KL may be above {most:g}"
    if count(rung, "top1") < least:
        return f"refused: the first choice stays in less than {percent(least, 1)}"
    if count(rung, "ratio") <= 1:
        return "refused: it saves nothing"
    return "left out: a smaller one costs less"


def costs(snapshot: Snapshot) -> dict[str, float]:
    """The most that each rung was seen to cost, by its name in full: KL in nats a token."""
    found: dict[str, float] = {}
    for profile in listed(snapshot, "profiles"):
        for rung in listed(profile, "rungs"):
            chain, kl = shown_text(rung.get("held_as") or rung.get("chain")), number(rung, "kl")
            if kl is not None and rung.get("passed"):
                found[chain] = max(kl, found.get(chain, 0.0))
    return found


# -- codecs: what tiers keep on which rung -----------------------------------------------------------------------------


def _chains(tier: str, state: Mapping[str, Any], cost: Mapping[str, float]) -> Iterator[list[str]]:
    for name, held in part(state, "codecs", "held").items():
        stored, raw = count(held, "stored_bytes"), count(held, "logical_bytes")
        steps = {step.partition("(")[0] for step in name.split("|")}
        loss = "none" if steps <= LOSSLESS else _kl(cost.get(name))
        yield [
            tier,
            shown_text(name),
            whole(count(held, "blocks")),
            format_size(raw),
            format_size(stored),
            _times(raw / stored if stored else None),
            loss,
        ]


def _steps(state: Mapping[str, Any]) -> bool:
    codecs = part(state, "codecs")
    return bool(part(codecs, "since_start") or part(codecs, "held") or count(codecs, "undecodable"))


def _ladder(tier: str, codecs: Mapping[str, Any]) -> list[str]:
    passed = part(codecs, "since_start").values()
    return [
        tier,
        whole(sum(count(each, "blocks") for each in passed)),
        whole(count(codecs, "can_step")),
        whole(count(codecs, "stepped_down")),
        format_size(count(codecs, "bytes_freed")),
        whole(count(codecs, "lost_stepping") + count(codecs, "undecodable")),
        format_duration(count(codecs, "busy_s")),
    ]


# -- blending: what engines tell ---------------------------------------------------------------------------------------


def _blends(snapshot: Snapshot) -> Iterator[list[str]]:
    for each in listed(snapshot, "blends"):
        ranks, tokens, computed = count(each, "tp_size"), count(each, "tokens"), count(each, "computed")
        yield [
            shown_text(each.get("model") or "unnamed"),
            f"{count(each, 'tp_rank'):.0f} of {ranks:.0f}" if ranks > 1 else NOTHING,
            whole(count(each, "prompts")),
            compact(tokens),
            percent(computed, tokens),
            percent(tokens - computed, tokens),
            verdict_words(part(each, "verdict")),
        ]


def verdict_words(verdict: Mapping[str, Any]) -> str:
    """What a probe found, and whether that is good enough."""
    if not verdict:
        return "not told by this engine"
    kl, top1 = count(verdict, "kl"), count(verdict, "top1")
    most, least = count(verdict, "most_kl"), count(verdict, "least_top1")
    passed = count(verdict, "prompts") > 0 and kl <= most and top1 >= least
    return (
        f"{'passed' if passed else 'failed'}: KL {_kl(kl)} (at most {most:g}), same first choice {percent(top1, 1)} "
        f"(at least {percent(least, 1)}); {whole(count(verdict, 'prompts'))} prompts by "
        f"{shown_text(verdict.get('selector'))}, {percent(count(verdict, 'share'), 1)} computed"
    )


def _kl(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} ×"
