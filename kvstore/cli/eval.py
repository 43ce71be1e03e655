"""`kvstore eval`: what approximate reuse costs a model on one's own texts, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kvstore.cli import blend_plot, codec_plot, out
from kvstore.cli.flags import Json
from kvstore.errors import ConfigError

KL_LIMIT = 0.012
"""Divergence marked in the plot of codecs: the gate of `kvstore calibrate`, unless it is told otherwise."""

CaptureName = Literal["isolated", "system", "live"]


def evaluate(
    model: Annotated[Path, Parameter(help="Directory of the model: config.json, tokenizer.json, *.safetensors.")],
    /,
    *,
    texts: Annotated[
        list[Path] | None,
        Parameter(
            negative="",
            consume_multiple=True,
            help="Text files or folders, each one kind; by default Python's language reference and library.",
        ),
    ] = None,
    selectors: Annotated[
        list[str] | None,
        Parameter(
            negative=(), consume_multiple=True, help="How tokens are chosen: `none`, `auto`, or names of selectors."
        ),
    ] = None,
    captures: Annotated[
        list[CaptureName] | None,
        Parameter(
            negative=(), consume_multiple=True, help="How chunks were captured: isolated, system, live; by default all."
        ),
    ] = None,
    shares: Annotated[
        list[float] | None,
        Parameter(negative=(), consume_multiple=True, help="Shares of the reused tokens to compute again."),
    ] = None,
    prompts: Annotated[int, Parameter(help="Prompts that the figures rest on; of codecs, contexts.")] = 8,
    chunks: Annotated[int, Parameter(help="Chunks in a prompt.")] = 6,
    chunk_tokens: Annotated[int, Parameter(help="Tokens of a chunk.")] = 128,
    question_tokens: Annotated[int, Parameter(help="Tokens behind the chunks, on which is measured.")] = 48,
    system: Annotated[str, Parameter(help="Text in front of every prompt; by default `Continue the text.`")] = "",
    seed: Annotated[int, Parameter(help="Of the places in the texts; the same seed gives the same prompts.")] = 0,
    device: Annotated[str, Parameter(help="Where to compute: cpu, cuda.")] = "cpu",
    max_kl: Annotated[
        float | None,
        Parameter(
            help="Name the least share of each selector that keeps the KL below this, or mark it in the plot of codecs."
        ),
    ] = None,
    codecs: Annotated[
        bool, Parameter(negative=(), help="Measure codecs of the precision ladder instead of blending.")
    ] = False,
    plot: Annotated[Path | None, Parameter(help="Also draw it, as SVG.")] = None,
    json: Json = False,
) -> None:
    """Measure divergence from full prefill, agreement and time saved, of blended chunks or of codecs, on a model."""
    if codecs:
        for flag, value in (("--selectors", selectors), ("--captures", captures), ("--shares", shares)):
            if value:
                raise ConfigError(f"eval --codecs: {flag} is of blending.", "Leave out --codecs, or that.")
        _codecs(model, texts, prompts, seed, device, KL_LIMIT if max_kl is None else max_kl, plot, json)
        return
    try:
        from kvstore_connectors.blend.evaluate import CAPTURES, DEFAULT, SHARES, least_shares
        from kvstore_connectors.blend.evaluate import evaluate as measure
        from kvstore_connectors.blend.samples import SYSTEM, Shape, builtin_texts, cut, read_texts
        from kvstore_connectors.build_model import load_model, load_tokenizer
    except ImportError as error:
        raise ConfigError(f"eval: {error}.", "It needs torch: pip install 'kvstore[torch]'.") from None
    tokenizer = load_tokenizer(model)
    loaded, _ = load_model(model, device)
    samples = cut(
        read_texts(texts) if texts else builtin_texts(),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        prompts, shape=Shape(chunks, chunk_tokens, question_tokens), system=system or SYSTEM, seed=seed, device=device,
    )  # fmt: skip
    found = measure(
        loaded, loaded.rotary, samples, selectors=selectors or DEFAULT, kinds=captures or CAPTURES,
        shares=shares or SHARES, told=lambda done: out.progress(f"{done} of {len(samples)} prompts"),
    )  # fmt: skip
    out.progress("")
    name = model.resolve().name
    enough = [] if max_kl is None else least_shares(found.rows, max_kl)
    if plot is not None:
        plot.write_text(blend_plot.svg(found.rows, name))
    if json:
        settings = {"seed": seed, "chunks": chunks, "chunk_tokens": chunk_tokens, "question_tokens": question_tokens}
        least = [{"capture": row.capture, "selector": row.selector, "share": row.share} for row in enough]
        out.print_json({"model": name, **settings, "max_kl": max_kl, "least_shares": least, **found.to_json()})
        return
    print(f"{name}: {found.prompts} prompts of {found.prompt_tokens} tokens ({', '.join(found.kinds)}); "
          f"full prefill takes {found.prefill_seconds:.2f} s, NLL {found.nll:.3f}; "
          f"it reads chunks in {found.reach} layers")  # fmt: skip
    print("\n".join(blend_plot.table(found.rows)))
    if max_kl is not None:
        print(f"\nKL at most {max_kl} at the end of its interval:" + ("" if enough else " none"))
        print("\n".join(f"  {row.capture:9} {row.selector:18} {row.share:4.0%}" for row in enough))


def _codecs(
    model: Path, texts: list[Path] | None, contexts: int, seed: int, device: str, limit: float, plot: Path | None,
    json: bool,
) -> None:  # fmt: skip
    if not texts:
        raise ConfigError("eval --codecs: there are no texts.", "Name text files or folders with --texts.")
    try:
        from kvstore_connectors.transformers.codec_eval import CHAINS
        from kvstore_connectors.transformers.codec_eval import evaluate as measure
    except ImportError as error:
        raise ConfigError(f"eval: {error}.", "It needs torch and transformers in this environment.") from None
    found = measure(
        model, texts, contexts=contexts, seed=seed, device=device, chains=("lossless", *CHAINS), weighed=True,
        told=out.progress,
    )  # fmt: skip
    out.progress("")
    name = model.resolve().name
    if plot is not None:
        plot.write_text(codec_plot.svg(found.rows, name, limit))
    if json:
        out.print_json({"model": name, "seed": seed, **found.to_json()})
        return
    print(f"{name}: {found.contexts} contexts of {found.tokens} tokens")
    print("\n".join(codec_plot.table(found.rows)))
