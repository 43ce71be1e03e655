"""What lossy chains cost one model, as measured on it, and which of them may run: the gate.

`kvstore calibrate` writes a profile; the daemon enforces it. A namespace of fidelity ``lossy:NAME`` is refused unless a
profile of that name is here whose model, revision and shape are the namespace's; its blocks then step down the rungs
that passed, and no others. The verdicts are not believed from the file: they follow from its figures and thresholds.

A profile is a JSON file, sealed with its own digest; a basis lies beside it, named by its digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from kvstore.codecs import BlockSpec, Chain, Context, parse
from kvstore.codecs.basis import Basis, load_basis
from kvstore.errors import CannotEncode, CodecError, ConfigError, CorruptBlock
from kvstore.namespaces import is_exact
from kvstore.patterns import PROFILE, in_words
from kvstore.rope import Rotary
from kvstore.standing import called
from kvstore.types import Namespace

VERSION = 1
MAX_FILE = 1 << 20
LOSSY = "lossy:"
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Measured = Annotated[float, msgspec.Meta(ge=0)]


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chain, and what it was seen to cost.

    Attributes
    ----------
    chain : str
        Its name.
    planes : int
        How many planes of it are kept; 0 means all.
    kl : float
        Mean Kullback-Leibler divergence of the next-token distribution, nats a token.
    kl_upper : float
        Upper end of its 95 % confidence interval over contexts.
    top1 : float
        Share of tokens whose most likely successor stays the same.
    nll : float
        Rise of the negative log-likelihood of the true continuation, nats a token; may be below 0.
    ratio : float
        How many times smaller than raw.
    encode_gib_s, decode_gib_s : float
        GiB of raw KV a second and core.
    """

    chain: str
    planes: Annotated[int, msgspec.Meta(ge=0, le=64)]
    kl: Measured
    kl_upper: Measured
    top1: Share
    nll: float
    ratio: Measured
    encode_gib_s: Measured
    decode_gib_s: Measured


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as namespaces name it."""

    model: str
    revision: str


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's profile.

    Attributes
    ----------
    name : str
        What ``lossy:NAME`` says.
    model, revision : str
        As in the namespace.
    also : list of Identity
        The same model as other connectors name it.
    layers, kv_heads, head_dim : int
        Shape of the model's KV.
    frequencies, interleaved, skipped_layers
        The model's rotation.
    basis : str
        Digest of the basis, empty if no rung needs one.
    most_kl, least_top1 : float
        Thresholds of the gate.
    contexts, tokens : int
        How much was measured.
    texts : str
        sha256 of the token ids that the verdicts rest on.
    rungs : list of Rung
        From the most exact to the smallest.
    digest : str
        sha256 over everything else.
    """

    name: Annotated[str, msgspec.Meta(pattern=PROFILE)]
    model: str
    revision: str
    also: list[Identity] = []
    layers: int
    kv_heads: int
    head_dim: int
    frequencies: list[float]
    interleaved: bool = False
    skipped_layers: list[int] = []
    basis: str = ""
    most_kl: Measured = 0.012
    least_top1: Share = 0.95
    contexts: int = 0
    tokens: int = 0
    texts: str = ""
    rungs: list[Rung] = []
    version: int = VERSION
    digest: str = ""

    def sealed(self) -> Profile:
        """The same with its digest; a whole number given for a real one is that, as it will be when it is read."""
        read = msgspec.convert(msgspec.to_builtins(self), Profile)
        return msgspec.structs.replace(read, digest=_digest(read))

    @property
    def passed(self) -> list[Rung]:
        """The rungs that may run, from the largest to the smallest; without those that a smaller one outdoes.

        One that only blocks with importance can take outdoes none that all can.
        """
        found: list[tuple[Rung, bool]] = []
        for rung in sorted(filter(self._is_good, self.rungs), key=lambda rung: (-rung.ratio, rung.kl)):
            weighed = parse(rung.chain).by_importance
            if all(rung.kl < other.kl for other, for_some in found if weighed or not for_some):
                found.append((rung, weighed))
        return [rung for rung, _ in found][::-1]

    @property
    def allowed(self) -> frozenset[tuple[str, int]]:
        """Chains, by the name in the header of a block, and planes that the gate lets be read, outdone ones, too."""
        return frozenset((str(parse(rung.chain)), rung.planes) for rung in filter(self._is_good, self.rungs))

    def _is_good(self, rung: Rung) -> bool:
        return rung.kl_upper <= self.most_kl and rung.top1 >= self.least_top1 and rung.ratio > 1

    def verdicts(self) -> dict[str, str]:
        """Of each chain: ``passed``, ``outdone`` by a smaller one, or ``refused`` by the gate."""
        passed = self.passed
        return {
            rung.chain: "passed" if rung in passed else "outdone" if self._is_good(rung) else "refused"
            for rung in self.rungs
        }

    @property
    def rotary(self) -> Rotary:
        """The model's rotation."""
        return Rotary(tuple(self.frequencies), self.interleaved, frozenset(self.skipped_layers))

    def refuse(self, namespace: Namespace) -> str:
        """Why the profile is not this namespace's; empty if it is."""
        named = Identity(namespace.model, namespace.revision)
        if named not in (Identity(self.model, self.revision), *self.also):
            return f"profile {self.name!r} is of another model or revision than {named.model!r}, {named.revision!r}"
        if namespace.lora:
            return f"profile {self.name!r} was measured without the adapter {namespace.lora!r}"
        for what in ("layers", "kv_heads", "head_dim"):
            own, other = getattr(self, what), getattr(namespace, what)
            if own != other:
                return f"profile {self.name!r} was measured with {what} {own!r}, not {other!r}"
        return "" if self.passed else f"no rung of profile {self.name!r} passed the gate"


def _digest(profile: Profile) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(profile, digest=""), order="sorted")).hexdigest()


def save_profile(profile: Profile, folder: Path, basis: Basis | None = None) -> Path:
    """Write ``NAME.json``, and the basis as ``DIGEST.basis``, into a folder; the path of the profile."""
    folder.mkdir(parents=True, exist_ok=True)
    if basis is not None:
        _write(folder / f"{basis.digest}.basis", basis.to_bytes())
    path = folder / f"{profile.name}.json"
    _write(path, msgspec.json.format(msgspec.json.encode(profile.sealed()), indent=1) + b"\n")
    return path


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises
    ------
    ConfigError
        The file is none, was changed after it was written, is of another version, or names a chain that is unknown.
    """
    remedy = "Run `kvstore calibrate` again."
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError(f"{path}: too large for a profile.", remedy)
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        for rung in profile.rungs:
            parse(rung.chain)
    except (OSError, msgspec.DecodeError, CodecError) as error:
        raise ConfigError(f"{path}: {in_words(error)}.", remedy) from None
    if profile.version != VERSION:
        raise ConfigError(f"{path}: version {profile.version}, this build reads {VERSION}.", remedy)
    if profile.digest != _digest(profile):
        raise ConfigError(f"{path}: changed after it was written: its digest is wrong.", remedy)
    return profile


class Profiles:
    """The profiles of a folder, and what their chains need.

    Parameters
    ----------
    folder : Path or None
        Read once; none at all without it.

    Raises
    ------
    ConfigError
        It is no folder, or a profile in it cannot be used.
    """

    def __init__(self, folder: Path | None) -> None:
        self._found: dict[str, tuple[Profile, list[tuple[Rung, Chain]], Context]] = {}
        self._allowed: dict[str, frozenset[tuple[str, int]]] = {}
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"codecs.profiles: {folder} is no folder.", "`kvstore calibrate` makes one.")
        for path in sorted(folder.glob("*.json")) if folder is not None else ():
            profile = load_profile(path)
            if path.stem != profile.name:
                raise ConfigError(
                    f"{path}: holds profile {profile.name!r}, which stands in {profile.name}.json.",
                    "Two of one name would be told apart by nobody: remove it, or calibrate with another --name.",
                )
            bases = {profile.basis: _basis_of(profile, path.parent)} if profile.basis else {}
            chains = [(rung, parse(rung.chain)) for rung in profile.passed]
            try:
                context = Context(rotary=profile.rotary, bases=bases)
                for rung, chain in chains:
                    _try(profile, rung, chain, context)
            except (CodecError, ConfigError, CorruptBlock) as error:
                raise ConfigError(f"{path}: {error.cause}", "Run `kvstore calibrate` again.") from None
            self._allowed[profile.name] = profile.allowed
            self._found[profile.name] = (profile, chains, context)

    def __len__(self) -> int:
        return len(self._found)

    def state(self) -> list[dict[str, Any]]:
        """For the snapshot: each profile, its thresholds, and its rungs with what the gate says of them."""
        return [_shown(profile) for profile, _, _ in self._found.values()]

    def check(self, namespace: Namespace) -> str:
        """Why a namespace's fidelity is not to be had here; empty if it is. Exact namespaces need no profile."""
        if is_exact(namespace):
            return ""
        if not namespace.fidelity.startswith(LOSSY):
            return f"a fidelity is `exact` or `{LOSSY}PROFILE`"
        name = namespace.fidelity.removeprefix(LOSSY)
        found = self._found.get(name)
        return found[0].refuse(namespace) if found else f"there is no profile {name!r} here"

    def rungs(self, namespace: Namespace) -> tuple[list[tuple[Rung, Chain]], Context]:
        """Chains of a lossy namespace's rungs, from the largest to the smallest, and what they need.

        Raises
        ------
        ConfigError
            `check` has something against it.
        """
        if reason := self.check(namespace):
            raise ConfigError(f"{reason}.", "Run `kvstore calibrate` for this model, or use fidelity `exact`.")
        _, chains, context = self._found[namespace.fidelity.removeprefix(LOSSY)]
        return chains, context

    def allows(self, namespace: Namespace, chain: str, planes: int) -> bool:
        """Whether blocks of a lossy namespace may be read from so many planes of a chain; 0 means all.

        A block may stand on what an earlier profile of the name allowed.
        """
        return (chain, planes) in self._allowed.get(namespace.fidelity.removeprefix(LOSSY), ())


def _shown(profile: Profile) -> dict[str, Any]:
    passed = profile.passed
    rungs = [
        msgspec.structs.asdict(rung)
        | {"held_as": called(str(parse(rung.chain)), rung.planes), "passed": rung in passed}
        for rung in profile.rungs
    ]
    names = ("name", "model", "revision", "most_kl", "least_top1", "contexts", "tokens")
    return {name: getattr(profile, name) for name in names} | {"rungs": rungs}


def _try(profile: Profile, rung: Rung, chain: Chain, context: Context) -> None:
    """Send some tokens of the model's shape through a rung: what is missing for it shows here, not as blocks that stay
    raw. Raises a `CodecError`, `CorruptBlock` or `ConfigError` if it does not work.
    """
    import torch

    if not chain.lossy:
        raise CannotEncode(f"{chain} loses nothing, so blocks would never step down from it: it is no rung.")
    spec = BlockSpec(profile.layers, 8, profile.kv_heads, profile.head_dim, position=256)
    block, weights = torch.zeros(spec.shape, dtype=spec.torch_dtype), torch.ones(spec.tokens)
    context = replace(context, importance=weights)
    out = np.empty(chain.bound(spec, context), np.uint8)
    size = chain.encode(block, spec, out, context)
    chain.decode(out[:size], spec, block, context, planes=rung.planes or None)


def _basis_of(profile: Profile, folder: Path) -> Basis:
    path = folder / f"{profile.basis}.basis"
    try:
        basis = load_basis(path)
    except (OSError, CodecError) as error:
        raise ConfigError(f"{path}: {error}", "Run `kvstore calibrate` again.") from None
    shape = (basis.layers, basis.kv_heads, basis.head_dim, basis.model, basis.revision, basis.rotary, basis.digest)
    wanted = (
        profile.layers, profile.kv_heads, profile.head_dim, profile.model, profile.revision, profile.rotary.digest,
        profile.basis,
    )  # fmt: skip
    if shape != wanted:
        raise ConfigError(f"{path}: the basis is of another model than profile {profile.name!r}.", "")
    return basis
