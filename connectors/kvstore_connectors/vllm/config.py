"""Settings of the vLLM connector: the keys of `kv_connector_extra_config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvstore.errors import ConfigError
from kvstore_connectors.base import check_fidelity

_REMEDY = "It is a key of `kv_connector_extra_config` in --kv-transfer-config."


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """What a user may set; all of it has a default.

    Attributes
    ----------
    address : str
        Path of the daemon's Unix socket. Empty for KVSTORE_CLIENT_ADDRESS, else the user's daemon.
    token : str
        Secret that the daemon asks for.
    block_tokens : int
        Tokens in a stored block, a multiple of vLLM's block size. 0 for 256, or the next multiple above it.
    lookup_deadline_ms : float
        After this time an unanswered lookup is a miss.
    load_deadline_ms : float
        After this time a load takes what has arrived and the rest is recomputed.
    save_deadline_ms : float
        Longest time the engine waits for the daemon when it stores.
    load : str
        ``faster``: load, and blend, what brings the first token sooner than computing it, by measured speeds.
        ``always``: whatever the daemon has.
    async_load : bool
        Load beside the running batch, instead of before it.
    weights_digest : str
        How the weights in a local directory are told apart: ``sample`` reads a little of every tensor, ``full`` every
        byte, once per start.
    tenant : str
        Blocks are shared only inside one tenant.
    fidelity : str
        ``exact``, or ``lossy:PROFILE``: lower tiers may keep blocks by the rungs of that profile (docs/codecs.md).
    chain : str
        With a lossy fidelity: this engine stores its blocks encoded by this chain, a rung of the profile, so that they
        are smaller in host memory and across PCIe, too. ``fp8`` or ``prerope|kv4(…)`` on GPUs. Empty: kept as they are.
    blend_gate : str
        File with the verdict of a probe on this model; without one nothing is blended (docs/chunks.md).
    blend : bool
        Blend requests that do not say whether they want it.
    blend_share : float
        Share of reused tokens that is computed again, where a request names none.
    blend_selector : str
        How these are chosen, where a request does not say.
    blend_amount : str
        ``share``: that share; ``loading``: as many as take as long as the loading, but no less than that share.
    blend_separator : str
        Token ids, separated by commas, between which chunks stand, where a request names none.
    capture : bool
        Store the chunks of requests that are computed exactly, where a request does not say.
    """

    address: str = ""
    token: str = ""
    block_tokens: int = 0
    lookup_deadline_ms: float = 50.0
    load_deadline_ms: float = 3000.0
    save_deadline_ms: float = 150.0
    load: str = "faster"
    async_load: bool = True
    weights_digest: str = "sample"
    tenant: str = ""
    fidelity: str = "exact"
    chain: str = ""
    blend_gate: str = ""
    blend: bool = False
    blend_share: float = 0.15
    blend_selector: str = "auto"
    blend_amount: str = "share"
    blend_separator: str = ""
    capture: bool = False

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Read `kv_connector_extra_config`.

        Raises
        ------
        ConfigError
            On an unknown key, naming the nearest, and on a value that breaks its rule.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in extra.items():
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known are: {', '.join(defaults)}."
                raise ConfigError(f"vllm: there is no setting {key!r}.{hint}", _REMEDY)
            values[key] = _checked(key, value, defaults[key])
        if values.get("load", "faster") not in ("faster", "always"):
            raise ConfigError(f"load: {values['load']!r} is neither 'faster' nor 'always'.", _REMEDY)
        if values.get("weights_digest", "sample") not in ("sample", "full"):
            raise ConfigError(f"weights_digest: {values['weights_digest']!r} is neither 'sample' nor 'full'.", _REMEDY)
        check_fidelity(values.get("fidelity", "exact"))
        if values.get("chain") and values.get("fidelity", "exact") == "exact":
            raise ConfigError("chain: exact blocks are stored as they are; fidelity has to name a profile.", _REMEDY)
        return cls(**values)


def _checked(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: {value!r} is neither true nor false.", _REMEDY)
        return value
    if isinstance(default, str):
        if not isinstance(value, str):
            raise ConfigError(f"{key}: {value!r} is not text.", _REMEDY)
        return value
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(default, int) and value != int(value))
    ):
        raise ConfigError(f"{key}: {value!r} is not a {'whole ' if isinstance(default, int) else ''}number.", _REMEDY)
    if value < 0 or (value == 0 and isinstance(default, float)):
        raise ConfigError(f"{key}: {value!r} is not positive.", _REMEDY)
    return int(value) if isinstance(default, int) else float(value)


def block_tokens_for(config: ConnectorConfig, engine_block: int) -> int:
    """Tokens in a stored block, given vLLM's block size.

    Raises
    ------
    ConfigError
        If a size was set that is no multiple of it.
    """
    if config.block_tokens == 0:
        return -(-256 // engine_block) * engine_block
    if config.block_tokens % engine_block:
        raise ConfigError(
            f"block_tokens: {config.block_tokens} is not a multiple of vLLM's block size {engine_block}.", _REMEDY
        )
    return config.block_tokens
