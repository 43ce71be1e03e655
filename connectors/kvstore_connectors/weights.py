"""Which weights these are, told from their files: cheap enough for every start of an engine."""

from __future__ import annotations

import hashlib
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from kvstore.errors import ConfigError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLE = 512
_EVENLY = 64
_MAX_HEADER = 64 << 20


def weights_digest(path: Path, full: bool = False) -> str:
    """Digest of the weights and configuration in a directory (or of one file), cheap enough for every start.

    Covered are, for every weights file: its name and size; for safetensors, the header with every tensor's name, shape
    and place, and 512 bytes from the start, middle and end of every tensor; for other formats, 64 windows of 512 bytes
    spread evenly. Of `config.json` and the quantization settings, everything. Files' times are not part of it, so a
    copy of a model is the same model. Fine-tuning changes nearly every element of the tensors it touches, which these
    samples see; a file with a few bytes patched by hand may pass unseen, and `full` is for who does such things.

    Parameters
    ----------
    path : Path
        Directory, or a single file (GGUF).
    full : bool
        Read every byte.
    """
    stamp = tuple((f.name, s.st_size, s.st_mtime_ns) for f in _files(path) for s in (f.stat(),))
    return _weights_digest(str(path.resolve()), stamp, full)


@lru_cache(maxsize=64)
def _weights_digest(path: str, stamp: tuple[Any, ...], full: bool) -> str:
    digest = hashlib.sha256()
    for file in _files(Path(path)):
        digest.update(struct.pack("<Q", len(file.name)) + file.name.encode() + struct.pack("<Q", file.stat().st_size))
        with file.open("rb") as handle:
            if full or file.suffix not in _WEIGHTS:
                while chunk := handle.read(1 << 20):
                    digest.update(chunk)
            else:
                _sample(handle, file, digest)
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    wanted = [f for f in path.iterdir() if f.is_file() and (f.suffix in _WEIGHTS or _is_settings(f.name))]
    if not any(f.suffix in _WEIGHTS for f in wanted):
        raise ConfigError(f"{path} holds no weights that could be told apart.", "Known are: " + " ".join(_WEIGHTS))
    return sorted(wanted, key=lambda f: f.name)


def _is_settings(name: str) -> bool:
    return name in ("config.json", "quantize_config.json", "hf_quant_config.json", "adapter_config.json", "params.json")


def _sample(handle: Any, file: Path, digest: Any) -> None:
    size = file.stat().st_size
    spans = _tensor_spans(handle, size, digest) if file.suffix == ".safetensors" else None
    if spans is None:
        step = max(size // _EVENLY, 1)
        places = [*range(0, size, step), max(size - _SAMPLE, 0)]
    else:
        places = sorted({max(p, 0) for a, b in spans for p in (a, (a + b - _SAMPLE) // 2, b - _SAMPLE)})
    for place in places:
        digest.update(os.pread(handle.fileno(), _SAMPLE, place))


def _tensor_spans(handle: Any, size: int, digest: Any) -> list[tuple[int, int]] | None:
    """Byte spans of the tensors of a safetensors file, its header going into the digest; None if it is not one."""
    try:
        (length,) = struct.unpack("<Q", handle.read(8))
        if not 2 <= length <= min(size, _MAX_HEADER):
            return None
        raw = handle.read(length)
        digest.update(raw)
        entries = msgspec.json.decode(raw)
        ends = [tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"]
    except (struct.error, msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return None
    return [(8 + length + int(a), 8 + length + int(b)) for a, b in ends]
