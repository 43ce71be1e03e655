"""`kvstore build`: compute documents ahead of time and store them as chunks, for prompts that will hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import Json
from kvstore.errors import ConfigError


def build(
    docs: Annotated[Path, Parameter(help="Text file, .jsonl with `text` or `tokens` a line, or a folder of these.")],
    /,
    *,
    model: Annotated[Path, Parameter(help="Directory of the model that the engine runs.")],
    address: Annotated[str, Parameter(help="Socket of the daemon.")] = "",
    system: Annotated[Path | None, Parameter(help="Text file with what stands in front of every prompt.")] = None,
    chunk_tokens: Annotated[int, Parameter(help="Longest chunk; documents are split at line ends.")] = 512,
    pack_tokens: Annotated[int, Parameter(help="Tokens computed in one forward pass.")] = 2048,
    device: Annotated[str, Parameter(help="Where to compute: cpu, cuda.")] = "cpu",
    probe: Annotated[
        Path | None, Parameter(help="Also measure what blending costs, and write the verdict here.")
    ] = None,
    share: Annotated[float, Parameter(help="Share of reused tokens computed again in the probe.")] = 0.15,
    json: Json = False,
) -> None:
    """Compute documents behind a system prompt and store them as chunks; what is stored already is passed over."""
    if chunk_tokens < 32 or pack_tokens < 1:
        raise ConfigError("--chunk-tokens: less than 32, or --pack-tokens: less than 1.", "")
    try:
        from kvstore_connectors.build import Builder, engine_namespaces
        from kvstore_connectors.build_model import line_breaks, load_model, load_tokenizer, read_documents, split
        from kvstore_connectors.build_probe import probe as measure
    except ImportError as error:
        raise ConfigError(f"build: {error}.", "It needs torch: pip install 'kvstore[torch]'.") from None
    from kvstore.client import KVStoreClient
    from kvstore_connectors.blend.rope import movable

    tokenizer = load_tokenizer(model)
    breaks = line_breaks(tokenizer)
    chunks = [piece for one in read_documents(docs, tokenizer) for piece in split(one, chunk_tokens, breaks)]
    front: list[int] = next(read_documents(system, tokenizer)) if system is not None else []
    with KVStoreClient(address or None, name="build") as client:
        namespaces = engine_namespaces(client, model.resolve().name)
        loaded, config = load_model(model, device)
        builder = Builder(loaded, namespaces, client, system=front, device=device)
        last = None
        for last in builder.build(chunks, pack_tokens):
            out.progress(f"{last.done}/{last.total} chunks, {last.computed} tokens computed, {last.seconds:.1f} s")
        verdict = None
        if probe is not None:
            verdict = measure(loaded, movable(config), builder, namespaces[0], front, chunks, share=share,
                              told=lambda done: out.progress(f"probe: {done} prompts"))  # fmt: skip
            probe.write_bytes(msgspec.json.format(msgspec.json.encode(verdict)) + b"\n")
    out.progress("")
    if last is not None and json:
        out.print_json({**last._asdict(), "verdict": None if verdict is None else msgspec.structs.asdict(verdict)})
    elif last is not None:
        print(f"{last.total} chunks: {last.total - last.skipped} computed ({last.computed} tokens), "
              f"{last.skipped} were there, {last.seconds:.1f} s")  # fmt: skip
    if verdict is not None and not json:
        print(f"probe: KL {verdict.kl:.4f} (at most {verdict.most_kl}), same first choice {verdict.top1:.1%} "
              f"(at least {verdict.least_top1:.0%}): {'passed' if verdict.passed else 'failed'}")  # fmt: skip
        print(f"       chunks are read in {verdict.reach} of {loaded.layers} layers")
