"""`kvstore calibrate` on a tiny model: the profile it writes is the one a daemon believes, for this model only."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import model as models
import msgspec
import pytest
import torch
from kit import Daemon
from transformers import AutoModelForCausalLM

from kvstore.codecs import Context, importance, parse
from kvstore.errors import ConfigError, InvalidParams
from kvstore.profile import Profiles, load_profile
from kvstore_connectors.transformers import KVStoreCache, codec_eval
from kvstore_connectors.transformers.calibrate import (
    Reference,
    Sample,
    code,
    code_by_kernels,
    cut,
    fit,
    kernels_take,
    measure,
)
from kvstore_connectors.transformers.probe import Probe
from kvstore_connectors.weights import weights_digest


@pytest.fixture(scope="module")
def probe() -> Probe:
    path = models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16)
    return Probe(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 900, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_kv_and_what_follows_are_those_of_the_model(probe: Probe) -> None:
    tokens, following = ids(150, 0), ids(20, 1)
    block = probe.prefill(tokens)
    with torch.no_grad():
        whole = probe.model(torch.tensor([tokens + following])).logits[0, -20:]
    torch.testing.assert_close(probe.logits(block, following), whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(probe.after_rope(probe.before_rope(block)), block, atol=1e-4, rtol=1e-4)


def test_attention_is_summed_without_ever_being_there(probe: Probe) -> None:
    tokens = ids(300, 2)
    block, queries = probe.prefill(tokens), probe.queries(tokens)
    keys, positions = block[1, 0], torch.arange(300)
    lse = importance.log_sum_exp(queries[1], keys, positions)
    logits = torch.einsum("qhd,khd->hqk", queries[1], keys.repeat_interleave(2, 1)) / 4
    weights = logits.masked_fill(torch.ones(300, 300).triu(1).bool(), float("-inf")).softmax(-1)
    grouped = weights.view(2, 2, 300, 300)
    found = importance.attention_sum(queries[1], keys, lse, positions)
    torch.testing.assert_close(found, grouped.sum(2).mean(1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.full((2,), 300.0))
    found = importance.reconstruction(queries[1], keys, lse, positions)
    torch.testing.assert_close(found, grouped.amax((1, 2)), atol=1e-5, rtol=1e-5)
    found = importance.window(queries[1], keys, lse, positions, last=8)
    torch.testing.assert_close(found, grouped[:, :, -8:].sum(2).mean(1) / 8, atol=1e-5, rtol=1e-5)


def test_exact_chains_cost_nothing_and_worse_ones_more(probe: Probe) -> None:
    samples = cut({"a": [ids(900, 3)]}, 2, (200, 300), 32, seed=0)
    names = ("raw", "lossless", "prerope|kv4(k=8,v=8)", "prerope|kv4", "prerope|kv4(k=2,v=2)")
    references = [Reference(probe, sample) for sample in samples]
    found = measure(references, {name: parse(name) for name in names}, Context(rotary=probe.rotary), block_tokens=128)
    kl = [found[name].summary()["kl"] for name in names]
    assert kl[:2] == [0, 0]
    assert 0 < kl[2] < kl[3] < kl[4]
    assert found["lossless"].ratio > 1


def test_a_larger_step_is_smaller_and_costs_more(probe: Probe) -> None:
    (basis,) = fit(probe, cut({"a": [ids(9000, 4)]}, 6, (300, 300), 64, seed=0), [(3, True)], model="m", revision="r")
    sample = Sample("a", ids(256, 5), ids(32, 6))
    reference = Reference(probe, sample)
    context = Context(rotary=probe.rotary, bases={basis.digest: basis})
    chains = {step: parse(f"prerope|pca(basis={basis.digest},step={step})|zstd") for step in ("1", "4", "16")}
    costs = measure([reference], chains, context)
    by_size = [costs[s].ratio for s in ("1", "4", "16")]
    by_loss = [costs[s].summary()["kl"] for s in ("1", "4", "16")]
    assert by_size == sorted(by_size)
    assert by_loss == sorted(by_loss)
    assert code(parse("raw"), reference.block, context).stored > 0


@pytest.mark.parametrize("chain", ["fp8", "prerope|kv4", "prerope|kv4(k=3,v=3)"])
def test_kernels_code_a_context_as_the_codec_does(chain: str, probe: Probe) -> None:
    """Through the reference of the kernels here; tests/gpu has them against it."""
    reference = Reference(probe, Sample("a", ids(256, 5), ids(32, 6)))
    context = Context(rotary=probe.rotary)
    assert kernels_take(parse(chain), reference.block, 128)
    assert not kernels_take(parse(chain), reference.block, 100)
    assert not kernels_take(parse(f"{chain}|zstd"), reference.block, 128)
    one = code(parse(chain), reference.block, context, 128)
    other = code_by_kernels(parse(chain), reference.block, context, 128)
    assert (one.raw, one.stored) == (other.raw, other.stored)
    assert torch.equal(one.block, other.block)


def calibrated(tmp_path: Path, **options: str) -> Path:
    from kvstore.cli.main import run

    path = models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16)
    text = tmp_path / "text.txt"
    text.parent.mkdir(exist_ok=True)
    text.write_text("The keeper of the lighthouse wrote down each ship that passed, and the colour of the sea. " * 150)
    flags = {"texts": str(text), "out": str(tmp_path / "p"), "contexts": "2", "fit-contexts": "3", "tokens": "256",
             "span": "2", "max-kl": "10", "min-top1": "0", "name": "tiny",
             "plot": str(tmp_path / "p.svg")} | options  # fmt: skip
    assert run(["calibrate", str(path), *(f"--{key}={value}" for key, value in flags.items())]) == 0
    return tmp_path / "p" / "tiny.json"


def test_the_profile_is_for_this_model_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = calibrated(tmp_path)
    assert load_profile(calibrated(tmp_path / "elsewhere", seed="1")).texts != load_profile(path).texts
    assert "passed" in capsys.readouterr().out
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    profile, profiles = load_profile(path), Profiles(path.parent)
    model = AutoModelForCausalLM.from_pretrained(models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16))
    with KVStoreCache(model, address=str(tmp_path / "none"), fidelity="lossy:tiny") as kv:
        own = kv.namespace  # as the connector names the model: nothing was told to either of them
    assert (own.model, own.revision) == (profile.model, profile.revision)
    digest = weights_digest(models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16))
    assert f"sample:{digest}" in [each.revision for each in profile.also]  # as vLLM names the directory
    assert profiles.check(own) == ""
    rungs, context = profiles.rungs(own)
    assert len(rungs) == len(profile.passed) > 2
    kl = [rung.kl for rung, _ in rungs]
    assert kl == sorted(kl)  # each rung is smaller than the one before, and none does better at less
    assert any("pca" in rung.chain for rung, _ in rungs)
    assert profile.basis in context.bases
    assert profiles.check(msgspec.structs.replace(own, fidelity="exact")) == ""
    others = {"model": "x", "revision": "y", "layers": 4, "head_dim": 8, "lora": "a", "fidelity": "lossy:other"}
    for change in ({field: value} for field, value in others.items()):
        assert profiles.check(msgspec.structs.replace(own, **change))
        with pytest.raises(ConfigError):
            profiles.rungs(msgspec.structs.replace(own, **change))


def test_a_profile_that_was_edited_is_refused(tmp_path: Path) -> None:
    path = calibrated(tmp_path, **{"fit-contexts": "0", "max-kl": "0", "min-top1": "1"})
    assert load_profile(path).passed == []
    fields = json.loads(path.read_text())
    fields["most_kl"] = 9.0
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="digest"):
        load_profile(path)
    with pytest.raises(ConfigError):
        Profiles(path.parent)


def test_eval_shows_each_chain_with_its_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstore.cli.main import run

    small = partial(codec_eval.evaluate, fit_contexts=3, tokens=256, span=2)
    monkeypatch.setattr(codec_eval, "evaluate", small)
    path = models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16)
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lighthouse wrote down each ship that passed, and the colour of the sea. " * 150)
    flags = ["--codecs", f"--texts={text}", "--prompts=2", f"--plot={tmp_path / 'p.svg'}", "--json"]
    assert run(["eval", str(path), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["chain"]: row for row in found["chains"]}
    assert rows["lossless"]["kl"] == rows["lossless"]["nll"] == 0.0
    assert rows["lossless"]["ratio"] > 1
    judged = [found["texts"]]
    for seed in ("0", "1"):
        assert run(["eval", str(path), *flags, "--seed", seed]) == 0
        judged.append(json.loads(capsys.readouterr().out)["texts"])
    assert judged[0] == judged[1] != judged[2]
    assert run(["eval", str(path), *flags, "--shares", "0.1"]) == run(["eval", str(path), "--codecs"]) == 2
    assert rows["prerope|kv4"]["kl"] < rows["prerope|kv4(k=2,v=2)"]["kl"]
    assert rows["prerope|kv4"]["ratio"] < rows["prerope|kv4(k=2,v=2)"]["ratio"]
    assert sum("pca" in chain for chain in rows) == len(codec_eval.STEPS)
    assert sum("mikv" in chain for chain in rows) == 2
    assert all(row["kl_interval"] >= 0 and row["top1_interval"] >= 0 for row in rows.values())
    assert (tmp_path / "p.svg").read_text().count("<circle") >= 8


def test_a_prompt_comes_back_from_disk_by_the_rungs_of_its_profile(tmp_path: Path) -> None:
    path = calibrated(tmp_path, **{"fit-contexts": "0", "importance": "true"})
    assert sum("mikv" in rung.chain for rung in load_profile(path).rungs) == 2
    daemon = Daemon(tmp_path / "d", disk=True, flags=["--codecs-profiles", str(path.parent)])
    daemon.start()
    try:
        comes_back(daemon)
    finally:
        daemon.kill()


def comes_back(daemon: Daemon) -> None:
    """Store a prompt exact and lossy, start the daemon again, and load both."""
    model = AutoModelForCausalLM.from_pretrained(models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16))
    prompt = torch.tensor([ids(200, 9)])
    runs = []
    for fidelity in ("exact", "lossy:tiny"):
        with KVStoreCache(model, address=daemon.address, fidelity=fidelity, block_tokens=64) as kv:
            kv.generate(prompt, max_new_tokens=1)
            assert kv.last.store.stored == 3
    daemon.stop()
    daemon.start()
    for fidelity in ("exact", "lossy:tiny"):
        with KVStoreCache(model, address=daemon.address, fidelity=fidelity, block_tokens=64) as kv:
            past = kv.load(prompt)
            assert past.loaded_tokens == 192
            runs.append(torch.stack([torch.stack([layer.keys, layer.values]) for layer in past.layers]))
    exact, lossy = runs
    assert 0 < float((exact - lossy).norm() / exact.norm()) < 0.1
    with daemon.client() as client:
        held = client.stats()["tiers"]["disk"]["codecs"]["held"]
    assert sum(counts["blocks"] for counts in held.values()) == 3
    with KVStoreCache(model, address=daemon.address, fidelity="lossy:other", block_tokens=64) as kv:
        kv.generate(prompt, max_new_tokens=1)  # refused, and so only not cached
        assert kv.last.loaded_tokens == kv.last.store.stored == 0


def test_what_is_no_text_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name, data in (("a.txt", b"four words of it"), ("a.pyc", b"\x00\x01\x02"), (".git/config", b"no text of mine")):
        (tmp_path / name).write_bytes(data)
    encoded: list[str] = []
    halves = codec_eval.split([tmp_path], lambda text: encoded.append(text) or list(range(10)))
    assert encoded == ["four words of it"]
    assert halves == ({"texts": [[0, 1, 2, 3, 4]]}, {"texts": [[5, 6, 7, 8, 9]]})
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InvalidParams, match="no text file"):
        codec_eval.split([tmp_path], lambda text: [])
