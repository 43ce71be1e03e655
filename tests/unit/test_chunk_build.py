"""The builder: what it packs is what each chunk alone gives, split among ranks, and computed once only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from daemons import DaemonProcess, MakeDaemon

torch = pytest.importorskip("torch")

from kvstore.client import KVStoreClient, Loaded, chunk_keys  # noqa: E402
from kvstore.errors import ConfigError, StorageError  # noqa: E402
from kvstore.types import Miss, Namespace  # noqa: E402
from kvstore_connectors.blend.capture import capture  # noqa: E402
from kvstore_connectors.blend.llama import Llama  # noqa: E402
from kvstore_connectors.build import Builder, engine_namespaces  # noqa: E402
from kvstore_connectors.build_model import read_documents, split  # noqa: E402
from kvstore_connectors.build_pack import pack, packs  # noqa: E402
from kvstore_connectors.build_probe import probe  # noqa: E402

LAYERS, HEADS, KV, DIM = 2, 4, 2, 8
CONFIG: dict[str, Any] = {
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "hidden_size": HEADS * DIM, "rms_norm_eps": 1e-5,
    "num_hidden_layers": LAYERS, "rope_theta": 10_000.0, "intermediate_size": 48, "vocab_size": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama:
    shapes = {"model.embed_tokens.weight": (100, HEADS * DIM), "model.norm.weight": (HEADS * DIM,)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part, rows in (("q", HEADS), ("k", KV), ("v", KV)):
            shapes[f"{name}.self_attn.{part}_proj.weight"] = (rows * DIM, HEADS * DIM)
        shapes |= {
            f"{name}.self_attn.o_proj.weight": (HEADS * DIM, HEADS * DIM),
            f"{name}.mlp.gate_proj.weight": (48, HEADS * DIM),
            f"{name}.mlp.up_proj.weight": (48, HEADS * DIM),
            f"{name}.mlp.down_proj.weight": (HEADS * DIM, 48),
            f"{name}.input_layernorm.weight": (HEADS * DIM,),
            f"{name}.post_attention_layernorm.weight": (HEADS * DIM,),
        }
    seeded = torch.Generator().manual_seed(3)
    return Llama(CONFIG, {name: torch.randn(shape, generator=seeded) * 0.3 for name, shape in shapes.items()})


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 100, count).tolist()


def namespace(**fields: Any) -> Namespace:
    known = {"layers": LAYERS, "kv_heads": KV, "head_dim": DIM, "layout": "lkthd1", "block_tokens": 16}
    return Namespace(**{"model": "tiny", "revision": "r", "dtype": "float32", **known, **fields})


def tensor(tokens: list[int]) -> Any:
    return torch.tensor(tokens)


@pytest.mark.parametrize("system", [[], ids(9, 1)])
def test_packed_chunks_are_what_each_alone_gives(model: Llama, system: list[int]):
    chunks = [ids(count, count) for count in (20, 1, 33)]
    prefix = pack(model, [tensor(system)])[1] if system else []
    packed, _ = pack(model, [tensor(chunk) for chunk in chunks], prefix)
    for chunk, kv in zip(chunks, packed, strict=True):
        alone = capture(model, tensor(chunk), tensor(system) if system else None)
        for one, other in zip(kv, alone.kv, strict=True):
            torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-4)


def test_packs_hold_no_more_than_they_may():
    assert packs([5, 5, 5, 30, 1], 10) == [[0, 1], [2], [3], [4]]
    assert packs([], 10) == []


def load(client: KVStoreClient, where: Namespace, prompt: list[int]) -> np.ndarray:
    """Payload of the one chunk in a prompt, as [layer, K|V, token, head, dim]."""
    (found,), _ = client.match(prompt, find=True, namespace=where)
    with client.lease([found.key], namespace=where, headers=True) as lease:
        (block,) = lease.blocks
        assert not isinstance(block, Miss)
        assert block.header is not None
        info = block.header.chunk
    assert info is not None
    assert info.capture == "system"
    loaded = [one for one in client.get_many(chunk_keys(found.key, info), namespace=where) if isinstance(one, Loaded)]
    parts = [np.frombuffer(one.data, np.float32).reshape(LAYERS, 2, -1, where.kv_heads, DIM) for one in loaded]
    return np.concatenate(parts, axis=2)


def test_stored_in_blocks_split_among_ranks_and_only_once(make_daemon: MakeDaemon, model: Llama):
    daemon = make_daemon().start()
    ranks = [namespace(kv_heads=1, tp_rank=rank, tp_size=2) for rank in range(2)]
    system, chunks = ids(9, 1), [ids(count, count) for count in (40, 50, 60)]
    with daemon.client() as client:
        for rank in ranks:
            client.lookup([b"k" * 32], namespace=rank)
        assert engine_namespaces(client, "tiny") == ranks
        builder = Builder(model, ranks, client, system=system)
        seen = list(builder.build(chunks[:2], pack_tokens=45))
        assert [(one.done, one.total, one.computed) for one in seen] == [(0, 2, 0), (1, 2, 40), (2, 2, 90)]
        again = list(Builder(model, ranks, client, system=system).build([*chunks, chunks[2]]))
        assert (again[-1].skipped, again[-1].computed, again[-1].done) == (3, 60, 4)
        alone = capture(model, tensor(chunks[0]), tensor(system))
        for rank, where in enumerate(ranks):
            found = load(client, where, ids(7, 8) + chunks[0])
            for layer in range(LAYERS):
                np.testing.assert_allclose(found[layer, 0][:, 0], alone.kv[layer].keys[:, rank], atol=1e-5)
                np.testing.assert_allclose(found[layer, 1][:, 0], alone.kv[layer].values[:, rank], atol=1e-5)


def test_a_daemon_that_is_full_says_so(make_daemon: MakeDaemon, model: Llama):
    daemon = make_daemon({"host.bytes": "1MiB"}).start()
    with daemon.client() as client:
        where = namespace(block_tokens=8192)
        builder = Builder(model, [where], client)
        with pytest.raises(StorageError, match="not stored"):
            list(builder.build([ids(7000, 1)], pack_tokens=10_000))


def test_engines_that_are_not_known_or_differ(shared_daemon: DaemonProcess):
    with shared_daemon.client() as client:
        with pytest.raises(ConfigError, match="no engine"):
            engine_namespaces(client, "nobody")
        client.lookup([b"k" * 32], namespace=namespace(model="half", tp_size=2))
        with pytest.raises(ConfigError, match="1 of 2"):
            engine_namespaces(client, "half")
        client.lookup([b"k" * 32], namespace=namespace(model="half", block_tokens=32))
        with pytest.raises(ConfigError, match="2 different"):
            engine_namespaces(client, "half")


def test_a_model_of_another_shape_is_refused(model: Llama):
    with pytest.raises(ConfigError, match="5 layers"):
        Builder(model, [namespace(layers=5)], KVStoreClient())


def test_the_probe_measures(model: Llama):
    builder = Builder(model, [namespace()], KVStoreClient(), system=ids(9, 1))
    chunks = [ids(60, seed) for seed in range(6)]

    def verdict(share: float) -> Any:
        return probe(model, model.rotary, builder, namespace(), ids(9, 1), chunks, share=share, prompts=3)

    half, whole = verdict(0.3), verdict(1.0)
    assert (whole.kl < 1e-6, whole.top1, whole.passed) == (True, 1.0, True)
    assert half.kl > 10 * whole.kl
    assert (half.model, half.revision, half.prompts) == ("tiny", "r", 3)
    assert not msgspec.structs.replace(whole, kl=0.2).passed
    with pytest.raises(ConfigError, match="too few"):
        probe(model, model.rotary, builder, namespace(), [], chunks[:2])


def test_documents_are_read_in_order_and_split_at_line_ends(tmp_path: Path):
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoding", (), {"ids": [ord(letter) for letter in text]})

    (tmp_path / "b.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "x"}) + "\n\n" + json.dumps({"tokens": [1, 2]}) + "\n")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    found = list(read_documents(tmp_path, Letters()))
    assert found == [[111, 110, 101], [116, 119, 111], [120], [1, 2]]
    (tmp_path / "c.jsonl").write_text("{nonsense")
    with pytest.raises(ConfigError, match="line 1"):
        list(read_documents(tmp_path, Letters()))
    assert split([1, 2, 9, 3, 4, 5, 6], 4, frozenset({9})) == [[1, 2, 9], [3, 4, 5, 6]]
    assert split([1] * 9, 4, frozenset()) == [[1] * 4, [1] * 4, [1]]
    assert split([], 4, frozenset()) == []
