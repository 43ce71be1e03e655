"""`kvstore calibrate`: measure what each lossy rung costs a model on one's own texts, and write its profile."""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import Json
from kvstore.errors import ConfigError, InvalidParams

FIXED = (
    "fp8", "prerope|kv4(k=8,v=8)", "prerope|kv4(k=8,v=4)", "prerope|kv4", "prerope|kv4(k=4,v=3)",
    "prerope|kv4(k=3,v=3)", "prerope|kv4(k=2,v=2)",
)  # fmt: skip
STEPS = (5, 10, 20, 40)
MAX_CHARACTERS = 1 << 20


def calibrate(
    model: Annotated[Path, Parameter(help="Directory of the model, as transformers reads it.")],
    /,
    *,
    texts: Annotated[list[Path], Parameter(help="Text files or folders of them; more than one kind is better.")],
    out_folder: Annotated[Path, Parameter(name="--out", help="Folder for the profile.")] = Path("profiles"),
    name: Annotated[str, Parameter(help="Name of the profile; `lossy:NAME` asks for it.")] = "",
    revision: Annotated[str, Parameter(help="Revision in the namespace; by default as the connectors name it.")] = "",
    contexts: Annotated[int, Parameter(help="Contexts that the verdict rests on.")] = 8,
    fit_contexts: Annotated[int, Parameter(help="Contexts that the basis is fitted on; 0: no basis.")] = 24,
    tokens: Annotated[int, Parameter(help="Tokens of a context.")] = 1024,
    span: Annotated[int, Parameter(help="Layers that share a basis.")] = 5,
    max_kl: Annotated[
        float, Parameter(help="Most divergence (upper end of the interval) of a rung that may run.")
    ] = 0.012,
    min_top1: Annotated[float, Parameter(help="Least share of unchanged first choices.")] = 0.95,
    device: Annotated[str, Parameter(help="Where to compute: cpu, cuda.")] = "cpu",
    plot: Annotated[Path | None, Parameter(help="Also draw size against loss, as SVG.")] = None,
    json: Json = False,
) -> None:
    """Measure the precision ladder on a model, and write the profile that allows its rungs in a daemon."""
    try:
        from kvstore_connectors.transformers.calibrate import Reference, cut, fit, measure
        from kvstore_connectors.transformers.ladder import identities, load
    except ImportError as error:
        raise ConfigError(f"calibrate: {error}.", "It needs torch and transformers in this environment.") from None
    from kvstore.codecs import Context, parse
    from kvstore.profile import Identity, Profile, Rung, save_profile

    probe, encode = load(model, device)
    first, *others = [Identity(*each) for each in identities(model)]
    first, others = (Identity(first.model, revision), []) if revision else (first, others)
    title = name or model.resolve().name.lower()
    halves = _halves(texts, encode)
    bases = []
    if fit_contexts:
        samples = cut(halves[0], fit_contexts, (tokens, tokens), 256, seed=1)
        shape = [(min(span, probe.shape.layers), True)]
        bases = fit(probe, samples, shape, model=first.model, revision=first.revision)
    chains = {chain: parse(chain) for chain in FIXED}
    for basis in bases:
        chains |= {c: parse(c) for c in (f"prerope|pca(basis={basis.digest},step={step})|zstd" for step in STEPS)}
    judged = cut(halves[1], contexts, (tokens, tokens), 64, seed=2)
    context = Context(rotary=probe.rotary, bases={basis.digest: basis for basis in bases})
    costs = measure([Reference(probe, sample) for sample in judged], {"raw": parse("raw"), **chains}, context)
    exact = costs.pop("raw").summary()["nll"]
    rungs = []
    for chain, cost in costs.items():
        found = cost.summary()
        rungs.append(
            Rung(chain, 0, found["kl"], found["kl"] + found["kl_interval"], found["top1"], found["nll"] - exact,
                 found["ratio"], found["encode_gib_s"], found["decode_gib_s"])
        )  # fmt: skip
    profile = Profile(
        name=title, model=first.model, revision=first.revision, also=others, layers=probe.shape.layers,
        kv_heads=probe.shape.kv_heads, head_dim=probe.shape.head_dim, frequencies=list(probe.rotary.frequencies),
        interleaved=probe.rotary.interleaved, skipped_layers=sorted(probe.rotary.skipped_layers),
        basis=bases[0].digest if bases else "", most_kl=max_kl, least_top1=min_top1, contexts=len(judged),
        tokens=tokens, texts=hashlib.sha256(repr([(s.tokens, s.following) for s in judged]).encode()).hexdigest(),
        rungs=sorted(rungs, key=lambda rung: rung.ratio),
    ).sealed()  # fmt: skip
    path = save_profile(profile, out_folder, bases[0] if bases else None)
    if plot is not None:
        plot.write_text(_svg(profile))
    show(profile, path, json=json)


def _halves(paths: list[Path], encode: Any) -> tuple[dict[str, list[list[int]]], dict[str, list[list[int]]]]:
    """Token ids to fit on and to judge on, all as one kind; a file is cut in two so that both see all kinds."""
    files = sorted(f for path in paths for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
    if not files:
        raise InvalidParams("--texts: no file there.", "Name text files, or folders of them.")
    halves: tuple[dict[str, list[list[int]]], dict[str, list[list[int]]]] = ({"texts": []}, {"texts": []})
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as text:
            ids = encode(text.read(MAX_CHARACTERS))
        halves[0]["texts"].append(ids[: len(ids) // 2])
        halves[1]["texts"].append(ids[len(ids) // 2 :])
    return halves


def show(profile: Any, path: Path | None = None, *, json: bool = False) -> None:
    """Print a profile's table: what `kvstore eval --codecs` shows, too."""
    import msgspec

    if json:
        out.print_json({**msgspec.to_builtins(profile), "path": str(path or "")})
        return
    allowed = {rung.chain for rung in profile.passed}
    print(f"{profile.model}, {profile.contexts} contexts of {profile.tokens} tokens, "
          f"gate: KL at most {profile.most_kl}, top-1 at least {profile.least_top1}")  # fmt: skip
    print(f"{'chain':58} smaller      KL  (up to)  top-1     NLL  enc GiB/s  dec  gate")
    for rung in profile.rungs:
        print(
            f"{_short(rung.chain):58} {rung.ratio:7.2f} {rung.kl:7.4f} {rung.kl_upper:8.4f} {rung.top1:6.3f} "
            f"{rung.nll:+7.4f} {rung.encode_gib_s:10.2f} {rung.decode_gib_s:4.2f}  "
            f"{'passed' if rung.chain in allowed else 'refused'}"
        )
    if path is not None:
        print(
            f"\n{path}: a daemon with --codecs-profiles {path.parent} keeps namespaces of fidelity lossy:{profile.name}"
        )


def _short(chain: str) -> str:
    return chain if len(chain) <= 58 else f"{chain[:24]}…{chain[-30:]}"


def _svg(profile: Any) -> str:
    """Divergence (logarithmic) against size, one dot a rung."""
    import math

    width, height, pad = 640, 400, 60
    rungs = [r for r in profile.rungs if r.kl > 0] or profile.rungs
    low, high = (math.log10(max(f(r.kl for r in rungs), 1e-6)) for f in (min, max))
    low, high = math.floor(low), math.ceil(high + 1e-9)
    most = max(r.ratio for r in rungs) * 1.1
    x = lambda ratio: pad + (width - 2 * pad) * ratio / most  # noqa: E731
    y = lambda kl: height - pad - (height - 2 * pad) * (math.log10(max(kl, 1e-6)) - low) / max(high - low, 1)  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def line(at: float, look: str) -> None:
        parts.append(f'<line x1="{pad}" x2="{width - pad}" y1="{at:.1f}" y2="{at:.1f}" {look}/>')

    def text(left: float, top: float, words: str, anchor: str = "middle") -> None:
        parts.append(f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{words}</text>')

    for power in range(low, high + 1):
        line(y(10**power), 'stroke="#ddd"')
        text(pad - 6, y(10**power) + 4, f"1e{power}", "end")
    for tick in range(0, int(most) + 1, max(1, int(most) // 8)):
        text(x(tick), height - pad + 16, f"{tick}x")
    line(y(profile.most_kl), 'stroke="#c33" stroke-dasharray="4"')
    for rung in rungs:
        label = rung.chain.removeprefix("prerope|").removesuffix("|zstd").replace(f"basis={profile.basis},", "")
        parts.append(f'<circle cx="{x(rung.ratio):.1f}" cy="{y(rung.kl):.1f}" r="4" fill="#27c"/>')
        text(x(rung.ratio) + 6, y(rung.kl) - 5, label, "start")
    text(width / 2, height - 12, "times smaller than raw")
    text(pad, 24, f"KL, nats a token, {html.escape(profile.model)} (dashed: gate)", "start")
    return "\n".join([*parts, "</svg>"]) + "\n"
