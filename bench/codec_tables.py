"""Tables of `bench/codec_quality.py` beside that of the chains: single tensors, evictions, exact answers.

Single tensors and evictions are no chains of the store: they show why its codecs are as they are. A task file is a JSON
list of ``{"kind", "context", "question", "answer"}``, each a list of token ids but the first; an answer counts if
every token of it is the most likely one, which is what greedy decoding would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from kvstore.codecs import Chain, Context, hadamard, importance, minicache
from kvstore.codecs.basis import Basis, Part
from kvstore.codecs.h2o import H2O
from kvstore_connectors.transformers.calibrate import Cost, Reference, code
from kvstore_connectors.transformers.probe import Probe

SINKS = 4


def fake(values: torch.Tensor, bits: int, axis: int, group: int = 0) -> torch.Tensor:
    """Quantize along an axis, in groups if asked for, and back, with float16 numbers."""
    moved = values.transpose(axis, -1)
    count = moved.shape[-1]
    size = group or count
    padded = torch.cat([moved, moved[..., -1:].expand(*moved.shape[:-1], -count % size)], -1)
    parts = padded.reshape(*moved.shape[:-1], -1, size)
    low = parts.amin(-1, keepdim=True).half().float()
    step = ((parts.amax(-1, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-8).half().float().clamp(min=1e-8)
    back = ((parts - low) / step).round().clamp(0, 2**bits - 1) * step + low
    return back.reshape(padded.shape)[..., :count].transpose(axis, -1)


def low_rank(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Best approximation of ``[…, token, channel]`` of a rank."""
    _, vectors = torch.linalg.eigh(rows.double().mT @ rows.double())
    right = vectors[..., -rank:]
    return (rows.double() @ right @ right.mT).float()


def project(rows: torch.Tensor, part: Part, rank: int) -> torch.Tensor:
    """Rows through the first components of a calibrated transform."""
    mean_, forward, inverse = (x.to(rows.device) for x in (part.mean, part.forward[:, :rank], part.inverse[:rank]))
    return (rows - mean_) @ forward @ inverse + mean_


@cache
def principal(part: Part) -> Part:
    """The principal components of the texts that a basis was fitted on: what it is without the weight of the loss."""
    inverse = part.inverse.double()
    values, vectors = torch.linalg.eigh((inverse.T * part.spread.double() ** 2) @ inverse)
    turn = vectors.flip(1).float()
    return Part(part.mean, turn, turn.T.contiguous(), values.flip(0).clamp(min=0).sqrt().float())


def projected(tensor: torch.Tensor, parts: Sequence[Part], span: int, share: int) -> torch.Tensor:
    """Keys or values ``[layer, token, kv_head, dim]`` with a share of the components; sinks as they are."""
    got = tensor.clone()
    for group, part in enumerate(parts):
        rows = tensor[group * span : (group + 1) * span].permute(1, 0, 2, 3).flatten(1)
        back = project(rows, part, len(part.mean) * share // 100)
        got[group * span : (group + 1) * span] = back.view(len(rows), -1, *tensor.shape[2:]).transpose(0, 1)
    got[:, :SINKS] = tensor[:, :SINKS]
    return got


def tensors(references: Sequence[Reference], bases: list[Basis], forms: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    """Divergence with one tensor lossy at a time, by method."""
    found: dict[str, Cost] = {}
    by_form = dict(zip(forms, bases, strict=True))
    for one in references:
        pre = one.probe.before_rope(one.block)
        post = one.block.float()
        turned = lambda keys, one=one, pre=pre: one.probe.after_rope(torch.stack([keys, pre[:, 1]], 1))[:, 0]  # noqa: E731

        def run(label: str, keys: torch.Tensor, values: torch.Tensor, one: Reference = one) -> None:
            with torch.no_grad():
                logs = one.probe.logits(torch.stack([keys, values], 1), one.sample.following).log_softmax(-1)
            one.judge(logs, found.setdefault(label, Cost()))

        k, v, kr = pre[:, 0], pre[:, 1], post[:, 0]
        flat = lambda x: x.flatten(2)  # noqa: E731
        for share in (12, 25, 50):
            rank = k.shape[2] * k.shape[3] * share // 100
            run(f"K before RoPE, SVD, rank {share} %", turned(low_rank(flat(k), rank).view(k.shape)), v)
            run(f"K after RoPE, SVD, rank {share} %", low_rank(flat(kr), rank).view(k.shape), v)
        for (span, joint), basis in by_form.items():
            for way, form in (("PCA", principal), ("weighed basis", lambda part: part)) if not joint else ():
                for share in (12, 25, 50):
                    for which, name, tensor in ((0, "K", k), (1, "V", v)):
                        parts = [form(group[which]) for group in basis.groups]
                        got = projected(tensor, parts, span, share)
                        label = f"{name} calibrated {way}, {span} layers, {share} %"
                        run(label, turned(got) if which == 0 else kr, v if which == 0 else got)
        for bits in (4, 2):
            run(f"K{bits} per token, after RoPE", fake(flat(kr), bits, -1).view(k.shape), v)
            for group in (32, 128):
                run(f"K{bits} per channel g{group}, after RoPE", fake(kr, bits, 1, group), v)
                run(f"K{bits} per channel g{group}, before RoPE", turned(fake(k, bits, 1, group)), v)
            run(f"K{bits} per token, Hadamard", turned(_rotated(k, bits)), v)
            run(f"V{bits} per token", kr, fake(v, bits, -1))
            run(f"V{bits} per token, Hadamard", kr, _rotated(v, bits))
            run(f"K{bits} channel + V{bits} Hadamard", turned(fake(k, bits, 1, 32)), _rotated(v, bits))
            kept_k, kept_v = fake(k, bits, 1, 32), _rotated(v, bits)
            kept_k[:, :SINKS], kept_v[:, :SINKS] = k[:, :SINKS], v[:, :SINKS]
            run(f"K{bits} channel + V{bits} Hadamard, sinks kept", turned(kept_k), kept_v)
        for first, label in ((len(k) // 2, "from the middle"), (len(k) - 4, "last 2 pairs"), (len(k) - 2, "last pair")):
            merged = [_merged(x, first // 2 * 2) for x in (k, v)]
            run(f"MiniCache {label}", turned(merged[0]), merged[1])
        found.setdefault("angle between layers, K (rad)", Cost()).kl.append(
            float(minicache.similarity(pre)[:, 0].mean())
        )
        found.setdefault("angle between layers, V (rad)", Cost()).kl.append(
            float(minicache.similarity(pre)[:, 1].mean())
        )
    return {label: cost.kl for label, cost in found.items()}


def _rotated(values: torch.Tensor, bits: int) -> torch.Tensor:
    own = values.cpu()
    return hadamard.rotate(fake(hadamard.rotate(own), bits, -1)).to(values.device)


def _merged(tensor: torch.Tensor, start: int, gamma: float = 0.05) -> torch.Tensor:
    """Layers merged in pairs from one on, with MiniCache's own retention: the farthest band of the angles."""
    out = tensor.clone()
    for layer in range(start, len(tensor) - 1, 2):
        direction, lengths, angle = minicache.merge(tensor[layer], tensor[layer + 1], 0.6)
        kept = angle > angle.max() - gamma * (angle.max() - angle.min())
        for which in (0, 1):
            merged = direction * lengths[which][..., None]
            out[layer + which] = torch.where(kept[:, None, None], tensor[layer + which], merged)
    return out


def evictions(references: Sequence[Reference]) -> dict[str, Any]:
    """Divergence when half of the tokens are dropped, each head its own, by source of importance."""
    found: dict[str, Cost] = {}
    for one in references:
        probe, keys, values = one.probe, one.block[:, 0].float(), one.block[:, 1].float()
        count = keys.shape[1]
        positions = torch.arange(count, device=keys.device)
        queries = probe.queries(one.sample.tokens)
        lses = [importance.log_sum_exp(q, k, positions) for q, k in zip(queries, keys, strict=True)]
        again = probe.queries(one.sample.tokens, one.block)
        after = torch.arange(count, 2 * count, device=keys.device).clamp(max=count - 1)

        def scored(source: Callable[..., torch.Tensor], queries: Any = queries, keys: Any = keys, lses: Any = lses,
                   positions: Any = positions) -> torch.Tensor:  # fmt: skip
            return torch.stack([source(q, k, s, positions) for q, k, s in zip(queries, keys, lses, strict=True)])

        half = count // 2
        back = [_before(probe, q) for q in queries]
        repeated = [
            importance.reconstruction(q, k, importance.log_sum_exp(q, k, after), after)
            for q, k in zip(again, keys, strict=True)
        ]
        ahead = [
            importance.expected_attention(q[SINKS:], k, v, probe.rotary)
            for q, k, v in zip(back, keys, values, strict=True)
        ]
        flat = torch.zeros(keys.shape[0], keys.shape[2], count, device=keys.device)
        noise = torch.rand(flat.shape, generator=torch.Generator().manual_seed(count)).to(flat.device)
        rows = {
            "H2O sum, half of the budget recent": (scored(importance.attention_sum), H2O(half, half // 2, 0)),
            "H2O sum, 32 recent": (scored(importance.attention_sum), H2O(half)),
            "mean by visibility, 32 recent": (scored(importance.attention_mean), H2O(half)),
            "SnapKV, last 32 queries": (scored(importance.window), H2O(half)),
            "Expected Attention": (torch.stack(ahead), H2O(half, 0)),
            "repeated context (KVzip)": (torch.stack(repeated), H2O(half)),
            "sinks and recent": (flat, H2O(half, half - SINKS)),
            "random": (noise, H2O(half)),
        }
        for label, (scores, rule) in rows.items():
            kept = rule.keep(scores).transpose(1, 2)[..., None].expand(-1, -1, -1, keys.shape[3])
            layers = list(zip(keys.gather(1, kept), values.gather(1, kept), strict=True))
            with torch.no_grad():
                logs = probe.logits_of(layers, one.sample.following, position=count).log_softmax(-1)
            one.judge(logs, found.setdefault(label, Cost()))
    return {label: cost.kl for label, cost in found.items()}


def _before(probe: Probe, queries: torch.Tensor) -> torch.Tensor:
    table = probe.rotary.table(torch.arange(len(queries), device=queries.device))
    return probe.rotary.turn(queries, table, back=True)


def tasks(
    wanted: Sequence[Mapping[str, Any]], probe: Probe, chains: Mapping[str, Chain], context: Context, threads: int
) -> dict[str, list[float]]:
    """Whether each answer came out exactly, by chain: the context's KV is coded, the question computed behind it."""
    right: dict[str, list[float]] = {"uncompressed": []} | {label: [] for label in chains}
    with ThreadPoolExecutor(threads) as pool:
        for task in wanted:
            block = probe.prefill(task["context"]).bfloat16()
            own = block.cpu()
            here = Context(context.rotary, context.bases, context.keys, torch.ones(own.shape[2]))
            jobs = {label: pool.submit(code, chain, own, here) for label, chain in chains.items()}
            asked, answer = [*task["question"], *task["answer"]], torch.tensor(task["answer"])
            for label in right:
                coded = block if label == "uncompressed" else jobs[label].result().block.to(probe.device)
                with torch.no_grad():
                    said = probe.logits(coded, asked).argmax(-1)[-len(answer) - 1 : -1].cpu()
                right[label].append(float(bool((said == answer).all())))
    return right


def retrieval(task: Mapping[str, Any], probe: Probe) -> dict[str, list[float]]:
    """What dropping tokens, and keeping them in fewer bits, costs an answer that stands in the context.

    Important are those that got most attention by visibility before the question was known, by layer and head. KL is
    over the answer's tokens; "exact" is whether they all come out.
    """
    asked, answer = [*task["question"], *task["answer"]], torch.tensor(task["answer"], device=probe.device)
    block = probe.prefill(task["context"])
    count, heads = block.shape[2], block.shape[3]
    positions = torch.arange(count, device=block.device)
    scores = torch.stack(
        [
            importance.attention_mean(q, k, importance.log_sum_exp(q, k, positions), positions)
            for q, k in zip(probe.queries(task["context"]), block[:, 0], strict=True)
        ]
    )
    pre = probe.before_rope(block)
    found: dict[str, list[float]] = {}
    full: list[torch.Tensor] = []

    def ask(label: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        with torch.no_grad():
            layers = list(zip(keys, values, strict=True))
            logs = probe.logits_of(layers, asked, position=count)[-len(answer) - 1 : -1].log_softmax(-1)
        full.append(logs)
        found[f"{label}: exact"] = [float(bool((logs.argmax(-1) == answer).all()))]
        if len(full) > 1:
            found[f"{label}: KL"] = [float((full[0].exp() * (full[0] - logs)).sum(-1).mean())]

    ask("uncompressed", block[:, 0], block[:, 1])
    coded = {}
    for bits in (2, 3, 4):
        keys = probe.after_rope(torch.stack([fake(pre[:, 0], bits, 1, 32), pre[:, 1]], 1))[:, 0]
        coded[bits] = torch.stack([keys, _rotated(pre[:, 1], bits)], 1)
        ask(f"all in {bits} bits", coded[bits][:, 0], coded[bits][:, 1])
    for share in (50, 25):
        kept = H2O(max(count * share // 100, 40)).keep(scores)
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, block.shape[4])
        if share == 50:
            ask("50 % kept, the rest dropped", block[:, 0].gather(1, index), block[:, 1].gather(1, index))
        mask = torch.zeros(len(block), heads, count, dtype=torch.bool, device=block.device).scatter_(2, kept, True)
        mask = mask.transpose(1, 2)[:, None, ..., None]
        for bits, lossy in coded.items():
            mixed = torch.where(mask, block.float(), lossy)
            ask(f"{share} % kept, the rest in {bits} bits", mixed[:, 0], mixed[:, 1])
    return found
