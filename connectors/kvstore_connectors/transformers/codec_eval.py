"""What each chain of codecs costs a model on one's own texts: for `kvstore calibrate` and `kvstore eval --codecs`.

Texts are cut in two: bases are fitted on the first half of each file, verdicts rest on the second. Each block goes
through the product's own encoder and decoder; the reference is the same model on the same KV as raw blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvstore.codecs import Chain, Context, importance, parse
from kvstore.codecs.basis import Basis
from kvstore.errors import InvalidParams
from kvstore_connectors.transformers.calibrate import Reference, cut, fit, measure, nobody
from kvstore_connectors.transformers.importance import Shares
from kvstore_connectors.transformers.ladder import load
from kvstore_connectors.transformers.probe import Probe

CHAINS = (
    "fp8", "prerope|kv4(k=8,v=8)", "prerope|kv4(k=8,v=4)", "prerope|kv4", "prerope|kv4(k=4,v=3)",
    "prerope|kv4(k=3,v=3)", "prerope|kv4(k=2,v=2)",
)  # fmt: skip
"""Lossy chains that need nothing but the model's rotation: rungs, if they pass."""
STEPS = (5, 10, 15, 20, 40)
"""Steps of `pca` that are tried in the fitted basis."""
WITH_IMPORTANCE = ("prerope|mikv", "prerope|mikv(hi=4,lo=2)")
"""What needs to know which tokens matter: rungs of blocks that carry that in their header, if they pass."""
MAX_CHARACTERS = 1 << 20
Documents = dict[str, list[list[int]]]


@dataclass(frozen=True, slots=True)
class Row:
    """A chain and what it was seen to cost; intervals are half widths at 95 %, over contexts.

    Attributes
    ----------
    chain : str
        Its name.
    kl, kl_interval, kl_worst : float
        Mean divergence of the next-token distribution from that with raw KV, nats a token; that of the worst context.
    top1, top1_interval : float
        Share of tokens whose most likely successor stays the same.
    nll, nll_interval : float
        Rise of the negative log-likelihood of the true continuation, nats a token.
    ratio : float
        How many times smaller than raw.
    encode_gib_s, decode_gib_s : float
        GiB of raw KV a second and core; on a GPU, of the device for chains that it has kernels for.
    """

    chain: str
    kl: float
    kl_interval: float
    kl_worst: float
    top1: float
    top1_interval: float
    nll: float
    nll_interval: float
    ratio: float
    encode_gib_s: float
    decode_gib_s: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured.

    Attributes
    ----------
    probe : Probe
        The model.
    basis : Basis or None
        What the chains with ``pca`` use.
    contexts, tokens : int
        How many contexts the rows rest on, and tokens of each.
    texts : str
        sha256 of the token ids that the rows rest on.
    rows : list of Row
        From the largest to the smallest.
    """

    probe: Probe
    basis: Basis | None
    contexts: int
    tokens: int
    texts: str
    rows: list[Row]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "contexts": self.contexts,
            "tokens": self.tokens,
            "texts": self.texts,
            "basis": "" if self.basis is None else self.basis.digest,
            "basis_bytes": 0 if self.basis is None else len(self.basis.to_bytes()),
            "chains": [asdict(row) for row in self.rows],
        }


def evaluate(
    model: Path,
    texts: Sequence[Path],
    *,
    contexts: int = 8,
    fit_contexts: int = 24,
    tokens: int = 1024,
    following: int = 64,
    span: int = 5,
    seed: int = 0,
    device: str = "cpu",
    chains: Sequence[str] = CHAINS,
    steps: Sequence[int] = STEPS,
    weighed: bool = False,
    identity: tuple[str, str] = ("", ""),
    told: Callable[[str], None] = nobody,
) -> Evaluation:
    """Measure chains on a model.

    Parameters
    ----------
    model : Path
        Directory of the model, as transformers reads it.
    texts : sequence of Path
        Text files, or folders of them.
    contexts, tokens, following : int
        Contexts that the rows rest on, tokens of each, and tokens behind it that are judged.
    fit_contexts : int
        Contexts that the basis is fitted on; 0 for no basis and no chain that needs one.
    span : int
        Layers that share a basis.
    seed : int
        Of the places in the texts, of what the basis is fitted on and of what is judged.
    device : str
        Where the model computes.
    chains, steps
        Chains without a basis, and steps of ``pca`` in the fitted one.
    weighed : bool
        Also chains that need the importance of tokens, as blocks carry it (`stored_importance`).
    identity : (str, str)
        Name and revision that are written into the basis.
    told : callable
        Is given a line after each context.

    Raises
    ------
    ConfigError, InvalidParams
        The model cannot be used, or there is not enough text.
    """
    probe, encode = load(model, device)
    halves = split(texts, encode)
    basis: Basis | None = None
    names = [*chains, *(WITH_IMPORTANCE if weighed else ())]
    if fit_contexts:
        samples = cut(halves[0], fit_contexts, (tokens, tokens), 256, seed=2 * seed + 1)
        shape = (min(span, probe.shape.layers), True)
        (basis,) = fit(probe, samples, [shape], model=identity[0], revision=identity[1], told=told)
        names += [pca(basis, step) for step in steps]
    judged = cut(halves[1], contexts, (tokens, tokens), following, seed=2 * seed + 2)
    context = Context(rotary=probe.rotary, bases={} if basis is None else {basis.digest: basis})
    references = [Reference(probe, sample) for sample in judged]
    weights = stored_importance if weighed else None
    rows = compare(references, {name: parse(name) for name in names}, context, weights, told)
    digest = hashlib.sha256(repr([(s.tokens, s.following) for s in judged]).encode()).hexdigest()
    return Evaluation(probe, basis, len(judged), tokens, digest, sorted(rows, key=lambda row: row.ratio))


def compare(
    references: Sequence[Reference],
    chains: Mapping[str, Chain],
    context: Context,
    weights: Callable[[Reference], torch.Tensor] | None = None,
    told: Callable[[str], None] = nobody,
) -> list[Row]:
    """What chains cost over contexts, against raw blocks."""
    costs = measure(references, {"raw": parse("raw"), **chains}, context, importance=weights, told=told)
    exact = costs.pop("raw")
    rows = []
    for name, cost in costs.items():
        found = cost.summary(exact)
        rows.append(Row(name, **{field: found[field] for field in Row.__slots__ if field != "chain"}))
    return rows


def pca(basis: Basis, step: int) -> str:
    """The chain of a basis and a step."""
    return f"prerope|pca(basis={basis.digest},step={step})|zstd"


def stored_importance(reference: Reference) -> torch.Tensor:
    """Importance of each token of a context as the connector measures it and headers carry it: what mikv will get."""
    probe, tokens, shares = reference.probe, len(reference.sample.tokens), Shares()
    keys = reference.block[:, 0].transpose(1, 2)
    for layer, queries in enumerate(probe.queries(reference.sample.tokens)):
        shares.add(queries.transpose(0, 1)[None], keys[layer][None], queries.shape[-1] ** -0.5)
    found = importance.unpack(shares.of(0, 0, tokens), tokens)
    if found is None:
        raise InvalidParams("a token of a context that no query has seen has no importance.")
    return found


def mean_attention(reference: Reference) -> torch.Tensor:
    """Importance of each token of a context: attention by visibility, over all layers and heads."""
    probe, block = reference.probe, reference.block
    keys = block[:, 0].float()
    positions = torch.arange(block.shape[2], device=keys.device)
    total = torch.zeros(block.shape[2], device=keys.device)
    for layer, queries in enumerate(probe.queries(reference.sample.tokens)):
        lse = importance.log_sum_exp(queries, keys[layer], positions)
        total += importance.attention_mean(queries, keys[layer], lse, positions).mean(0)
    return total


def split(paths: Sequence[Path], encode: Callable[[str], list[int]]) -> tuple[Documents, Documents]:
    """Token ids to fit on and to judge on, all as one kind; a file is cut in two so that both see all kinds.

    Hidden files of a folder, and files that are no text, are passed over.
    """
    halves: tuple[Documents, Documents] = ({"texts": []}, {"texts": []})
    for file in _files(paths):
        with file.open(encoding="utf-8", errors="replace") as text:
            read = text.read(MAX_CHARACTERS)
        if "\0" not in read:
            ids = encode(read)
            halves[0]["texts"].append(ids[: len(ids) // 2])
            halves[1]["texts"].append(ids[len(ids) // 2 :])
    if not halves[0]["texts"]:
        raise InvalidParams("--texts: no text file there.", "Name text files, or folders of them.")
    return halves


def _files(paths: Sequence[Path]) -> list[Path]:
    found = [path for path in paths if path.is_file()]
    for folder in paths:
        inside = (file for file in folder.rglob("*") if file.is_file())
        found += [file for file in inside if not any(part[0] == "." for part in file.relative_to(folder).parts)]
    return sorted(found)
