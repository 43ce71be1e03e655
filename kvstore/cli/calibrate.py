"""`kvstore calibrate`: measure what each lossy rung costs a model on one's own texts, and write its profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from kvstore.cli import codec_plot, out
from kvstore.cli.flags import Json
from kvstore.errors import ConfigError


def calibrate(
    model: Annotated[Path, Parameter(help="Directory of the model, as transformers reads it.")],
    /,
    *,
    texts: Annotated[
        list[Path],
        Parameter(
            negative="", consume_multiple=True, help="Text files or folders of them; more than one kind is better."
        ),
    ],
    out_folder: Annotated[Path, Parameter(name="--out", help="Folder for the profile.")] = Path("profiles"),
    name: Annotated[str, Parameter(help="Name of the profile; `lossy:NAME` asks for it.")] = "",
    revision: Annotated[str, Parameter(help="Revision in the namespace; by default as the connectors name it.")] = "",
    contexts: Annotated[int, Parameter(help="Contexts that the verdict rests on.")] = 8,
    fit_contexts: Annotated[int, Parameter(help="Contexts that the basis is fitted on; 0: no basis.")] = 24,
    tokens: Annotated[int, Parameter(help="Tokens of a context.")] = 1024,
    span: Annotated[int, Parameter(help="Layers that share a basis.")] = 5,
    importance: Annotated[
        bool,
        Parameter(negative="", help="Also rungs for blocks that carry the importance of their tokens (transformers)."),
    ] = False,
    max_kl: Annotated[
        float, Parameter(help="Most divergence (upper end of the interval) of a rung that may run.")
    ] = 0.012,
    min_top1: Annotated[float, Parameter(help="Least share of unchanged first choices.")] = 0.95,
    seed: Annotated[int, Parameter(help="Of the places in the texts: another seed tells whether a verdict holds.")] = 0,
    device: Annotated[str, Parameter(help="Where to compute: cpu, cuda.")] = "cpu",
    plot: Annotated[Path | None, Parameter(help="Also draw size against loss, as SVG.")] = None,
    json: Json = False,
) -> None:
    """Measure the precision ladder on a model, and write the profile that allows its rungs in a daemon."""
    try:
        from kvstore_connectors.transformers.codec_eval import evaluate
        from kvstore_connectors.transformers.ladder import identities
    except ImportError as error:
        raise ConfigError(f"calibrate: {error}.", "It needs torch and transformers in this environment.") from None
    from kvstore.profile import Identity, Profile, Rung, save_profile

    first, *others = [Identity(*each) for each in identities(model)]
    first, others = (Identity(first.model, revision), []) if revision else (first, others)
    found = evaluate(
        model, texts, contexts=contexts, fit_contexts=fit_contexts, tokens=tokens, span=span, seed=seed, device=device,
        weighed=importance, identity=(first.model, first.revision), told=out.progress,
    )  # fmt: skip
    out.progress("")
    shape, rotary, basis = found.probe.shape, found.probe.rotary, found.basis
    profile = Profile(
        name=name or model.resolve().name.lower(), model=first.model, revision=first.revision, also=others,
        layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim, frequencies=list(rotary.frequencies),
        interleaved=rotary.interleaved, skipped_layers=sorted(rotary.skipped_layers),
        basis="" if basis is None else basis.digest, most_kl=max_kl, least_top1=min_top1, contexts=found.contexts,
        tokens=found.tokens, texts=found.texts,
        rungs=[Rung(row.chain, 0, row.kl, row.kl + row.kl_interval, row.top1, row.nll, row.ratio, row.encode_gib_s,
                    row.decode_gib_s) for row in found.rows],
    ).sealed()  # fmt: skip
    path = save_profile(profile, out_folder, basis)
    if plot is not None:
        plot.write_text(codec_plot.svg(found.rows, model.resolve().name, max_kl))
    if json:
        out.print_json({**msgspec.to_builtins(profile), "path": str(path)})
        return
    print(f"{profile.model}, {profile.contexts} contexts of {profile.tokens} tokens")
    print(f"gate: KL at most {max_kl} at the end of its interval, top-1 at least {min_top1}")
    print("\n".join(codec_plot.table(found.rows, profile.verdicts())))
    print(f"\n{path}: a daemon with --codecs-profiles {path.parent} keeps namespaces of fidelity lossy:{profile.name}")
