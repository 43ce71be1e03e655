"""What tests of codecs share: blocks by single chains, and blocks of a model whose profile has three rungs, in tiers
that keep them encoded.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from kvstore import Namespace
from kvstore.codecs import BlockSpec, Context, parse
from kvstore.codecs.basis import Basis
from kvstore.codecs.fit import Moments
from kvstore.encoding import form_of, pages
from kvstore.keys import namespace_digest
from kvstore.ladder import Ladder
from kvstore.profile import Identity, Profile, Profiles, Rung, save_profile
from kvstore.rope import Rotary
from kvstore.testing.codec_suite import block_of
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockHeader, BlockId, Hit, Miss, MissReason, Scope


def rotary(dim: int) -> Rotary:
    """The usual frequencies of a head."""
    return Rotary(tuple(10_000.0 ** (-i / dim) for i in range(0, dim, 2)))


def error(got: object, true: torch.Tensor) -> float:
    """Relative error of a block that was read."""
    assert isinstance(got, torch.Tensor)
    return float((got.float() - true.float()).norm() / true.float().norm())


# -- one block, one chain ----------------------------------------------------------------------------------------------

SPEC = BlockSpec(4, 64, 2, 16)


def made_basis(
    spec: BlockSpec = SPEC, *, model: str = "m", turned: Rotary | None = None, joint: bool = True, seeds: int = 1
) -> Basis:
    """A basis of blocks like those of the suite."""
    turned = turned or rotary(spec.head_dim)
    moments = Moments(spec.layers, spec.kv_heads, spec.head_dim, 2, joint=joint)
    many = BlockSpec(spec.layers, 400, spec.kv_heads, spec.head_dim)
    for seed in range(seeds):
        gradient = torch.randn(many.shape, generator=torch.Generator().manual_seed(seed))
        moments.add(block_of(many, seed).float(), gradient)
    return moments.basis(rotary=turned.digest, model=model, revision="1", finest=1e-3)


BASIS = made_basis()
PCA = f"prerope|pca(basis={BASIS.digest},step=50)|zstd"
CONTEXT = Context(rotary=rotary(16), bases={BASIS.digest: BASIS}, importance=torch.arange(64.0), identity=b"me")


def packed(
    chain: str, block: torch.Tensor | None = None, spec: BlockSpec = SPEC, context: Context = CONTEXT
) -> np.ndarray:
    """A block, encoded; by default the suite's."""
    made = parse(chain)
    out = np.empty(made.bound(spec, context), np.uint8)
    return out[: made.encode(block_of(spec) if block is None else block, spec, out, context)].copy()


def opened(
    chain: str, data: np.ndarray, spec: BlockSpec = SPEC, context: Context = CONTEXT, planes: int | None = None
) -> torch.Tensor:
    """An encoded block, decoded."""
    out = torch.empty(spec.shape, dtype=spec.torch_dtype)
    parse(chain).decode(data, spec, out, context, planes=planes)
    return out


# -- blocks of a model with a profile ----------------------------------------------------------------------------------

EXACT = Namespace(model="m", revision="1", dtype="bfloat16", layers=4, kv_heads=2, head_dim=32, layout="lkthd1",
                  block_tokens=64)  # fmt: skip
LOSSY = msgspec.structs.replace(EXACT, fidelity="lossy:small")
NAMES = {Scope("u0", namespace_digest(n)): n for n in (EXACT, LOSSY)}
SHAPE = (4, 2, -1, 2, 32)
WHOLE = 2 * 2 * 4 * 64 * 2 * 32
"""Bytes of a block."""
CHAINS = ("prerope|kv4(k=8,v=8)", "prerope|kv4", "prerope|kv4(k=2,v=2)")


def key(number: int) -> bytes:
    """Name of a block."""
    return number.to_bytes(32, "little")


def block_id(number: int, namespace: Namespace = EXACT) -> BlockId:
    """The same in a namespace."""
    return BlockId(Scope("u0", namespace_digest(namespace)), key(number))


def payload(number: int, tokens: int = 64) -> torch.Tensor:
    """The values of a block."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, 2, tokens, 2, 32, generator=generator).to(torch.bfloat16)


def as_tensor(data: bytes | bytearray | memoryview) -> torch.Tensor:
    """What `as_pages` or an engine made bytes of."""
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(SHAPE)


def as_pages(block: torch.Tensor) -> memoryview:
    """A block as memory that tiers take."""
    raw = block.contiguous().view(-1).view(torch.uint8).numpy()
    view = pages(raw.size)
    view[:] = raw.data
    return view


def rung(chain: str, ratio: float, planes: int = 0, kl: float = 0.001) -> Rung:
    """A rung with figures made up: what they say is not what is tested with it."""
    return Rung(chain, planes, kl * ratio, kl * ratio, 0.99, 0.0, ratio, 1.0, 1.0)


def profiles(folder: Path, rungs: list[Rung] | None = None, revision: str = "1") -> Profiles:
    """Write a profile of the model under its second name; the folder's profiles."""
    found = rungs or [rung(chain, 2.0 + i) for i, chain in enumerate(CHAINS)]
    profile = Profile(name="small", model="another name", revision="", also=[Identity("m", revision)], layers=4,
                      kv_heads=2, head_dim=32, frequencies=list(rotary(32).frequencies), rungs=found)  # fmt: skip
    save_profile(profile, folder)
    return Profiles(folder)


async def ladder(place: Path, capacity: int = 64 << 20, **options: object) -> Ladder:
    """A disk tier that keeps blocks encoded, started."""
    tier = Ladder(DiskTier(place / "disk", capacity), NAMES.get, **options)  # pyright: ignore[reportArgumentType]
    await tier.start()
    return tier


async def store(tier: Tier, number: int, namespace: Namespace = EXACT, tokens: int = 64) -> object:
    """Store a block as its engine has it."""
    view = as_pages(payload(number, tokens))
    return await tier.put(block_id(number, namespace), BlockHeader(position=64 * number), [view], view.nbytes)


async def load(tier: Tier, number: int, namespace: Namespace = EXACT) -> torch.Tensor | Miss:
    """The values of a block, as the tier gives them."""
    block = block_id(number, namespace)
    nbytes = tier.size(block)
    if nbytes is None:
        return Miss(MissReason.ABSENT)
    view = pages(nbytes)
    outcome = await tier.get(block, [view])
    if isinstance(outcome, Miss):
        return outcome
    assert isinstance(outcome, Hit)
    assert outcome.nbytes == nbytes
    return as_tensor(view)


def encoded_by_an_engine(number: int, chain: str = CHAINS[1], *, position: int | None = None) -> memoryview:
    """A frame as an engine stores it, in the length that says so."""
    form = form_of(LOSSY)
    assert form is not None
    spec = form.spec(BlockHeader(position=64 * number if position is None else position))
    data = packed(chain, payload(number), spec, Context(rotary=rotary(32)))
    out = pages(form.marked(data.size, by_engine=True))
    out[: data.size] = data.data
    assert len(out) % 2 == 1
    return out
