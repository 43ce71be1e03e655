"""Real texts that every machine with Python has, in four kinds, cut in two halves that share no file.

``reference``: Python's language reference (``pydoc_data.topics``); ``code``: the standard library; ``readme``:
descriptions of installed packages; ``docstrings``: documentation inside torch and the standard library.

    python bench/texts.py --folder texts
    python bench/texts.py MODEL --out tokens.npz

writes them as files, for `kvstore calibrate`, or tokenized, for a machine that has a model but no tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

MOST_CHARACTERS = 60_000
Documents = dict[str, list[list[int]]]


def _files(folder: str, *patterns: str) -> list[tuple[str, str]]:
    root = Path(folder)
    found = sorted(file for pattern in patterns for file in root.glob(pattern))
    return [(str(file.relative_to(root)), file.read_text(errors="ignore")) for file in found]


def texts() -> dict[str, list[tuple[str, str]]]:
    """Named documents by kind."""
    from pydoc_data.topics import topics

    library, packages = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    sources = _files(library, "*.py", "asyncio/*.py", "email/*.py")
    documented = _files(packages, "torch/nn/modules/*.py", "torch/optim/*.py") + _files(library, "*.py")
    strings = [(name, "\n\n".join(re.findall(r'"""(.{600,}?)"""', text, re.DOTALL))) for name, text in documented]
    return {
        "reference": sorted(topics.items()),
        "code": [(name, text) for name, text in sources if len(text) > 8000],
        "readme": [
            (name, text.split("\n\n", 1)[-1])
            for name, text in _files(packages, "*.dist-info/METADATA")
            if len(text) > 6000
        ],
        "docstrings": [(name, text) for name, text in strings if text],
    }


def tokenized(encode: Callable[[str], list[int]]) -> tuple[Documents, Documents]:
    """Token ids by kind: to calibrate on, and to evaluate on. A document is in one half by the hash of its name."""
    halves: tuple[Documents, Documents] = ({}, {})
    for kind, documents in texts().items():
        for half in halves:
            half[kind] = []
        for name, text in documents:
            halves[hashlib.sha256(name.encode()).digest()[0] % 2][kind].append(encode(text[:MOST_CHARACTERS]))
    return halves


def write(folder: Path) -> None:
    """Write the texts as files, a folder for each kind."""
    for kind, documents in texts().items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number, (_, text) in enumerate(documents):
            (folder / kind / f"{number:03}.txt").write_text(text[:MOST_CHARACTERS])


def save(halves: tuple[Documents, Documents], path: Path) -> None:
    """Write tokenized texts as one file of arrays."""
    arrays: dict[str, np.ndarray] = {}
    for number, half in enumerate(halves):
        for kind, documents in half.items():
            arrays[f"{number}_{kind}"] = np.concatenate([np.array(d, np.uint32) for d in documents])
            arrays[f"{number}_{kind}_lengths"] = np.array([len(d) for d in documents], np.uint32)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def load(path: Path) -> tuple[Documents, Documents]:
    """Read what `save` wrote."""
    halves: tuple[Documents, Documents] = ({}, {})
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            number, kind = name.split("_", 1)
            if not kind.endswith("_lengths"):
                ends = np.cumsum(arrays[f"{name}_lengths"])[:-1]
                halves[int(number)][kind] = [part.tolist() for part in np.split(arrays[name], ends)]
    return halves


def encoder(model: str) -> Callable[[str], list[int]]:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the texts, as they are or tokenized.")
    parser.add_argument("model", nargs="?", help="whose tokenizer")
    parser.add_argument("--folder", type=Path, help="write the texts here as files")
    parser.add_argument("--out", type=Path, help="write them here tokenized")
    args = parser.parse_args()
    if args.folder is not None:
        write(args.folder)
    if args.model and args.out is not None:
        save(tokenized(encoder(args.model)), args.out)
