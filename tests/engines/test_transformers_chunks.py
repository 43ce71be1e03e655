"""Chunks in `generate()`: exact where all is computed again, under no exact name ever, and computed where it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kit import Daemon, numbers

from kvstore.errors import ConfigError, InvalidParams, Unavailable
from kvstore.keys import prefix_keys
from kvstore_connectors import chunk_loads
from kvstore_connectors.blend.recompute import prefill
from kvstore_connectors.blend.samples import builtin_texts
from kvstore_connectors.transformers import Chunks, KVStoreCache, chunks
from kvstore_connectors.transformers.opened import OpenedModel
from kvstore_connectors.transformers.support import check_model

BLOCK = 32
SYSTEM = numbers(40, 1)
DOCS = [numbers(n, 10 + n) for n in (70, 45, 64)]
QUESTION = numbers(20, 2)

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip


def prompt_of(*docs: list[int], question: list[int] = QUESTION) -> tuple[Any, list[tuple[int, int]]]:
    """Token ids [1, n] of system prompt, documents and question; and where the documents are."""
    tokens, spans = list(SYSTEM), []
    for doc in docs:
        spans.append((len(tokens), len(tokens) + len(doc)))
        tokens += doc
    return torch.tensor([tokens + question]), spans


def run(generate: Callable[..., Any], ids: Any, **options: Any) -> tuple[list[int], Any]:
    """Greedy tokens, and the logits [token, vocabulary] they were chosen by."""
    out = generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture
def attach(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Callable[..., KVStoreCache]]:
    """Make connectors of the module's daemon; each test is a tenant of its own."""
    made: list[KVStoreCache] = []

    def make(model: Any, **options: Any) -> KVStoreCache:
        defaults: dict[str, Any] = {"address": daemon.address, "block_tokens": BLOCK, "tenant": request.node.name}
        made.append(KVStoreCache(model, **{**defaults, **options}))
        assert made[-1]._breaker.start(5.0)
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def kv(attach: Any, model: Any) -> KVStoreCache:
    return attach(model)


def stored(kv: KVStoreCache, daemon: Daemon, ids: Any) -> int:
    """Blocks that a prompt begins with, in the store."""
    with daemon.client() as client:
        return len(client.lookup(prefix_keys(kv.namespace, ids.reshape(-1).numpy()), namespace=kv.namespace))


# -- the opened model --------------------------------------------------------------------------------------------------


def made(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    known = {**SIZES, **config}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**known)).eval()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama", {"attention_bias": True}),
        ("Llama", {"rope_parameters": YARN}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("SmolLM3", {"pad_token_id": 0}),
    ],
)
@torch.no_grad()
def test_an_opened_model_computes_what_the_model_does(name: str, config: dict[str, Any]) -> None:
    model = made(name, **config)
    ids = torch.arange(3, 203)
    hidden, _ = prefill(OpenedModel(model, check_model(model)), ids)
    opened = OpenedModel(model, check_model(model)).logits(hidden)
    torch.testing.assert_close(opened, model(ids[None]).logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config"),
    [("Granite", {"residual_multiplier": 0.5}), ("GPTNeoX", {"num_key_value_heads": 4}), ("Cohere", {})],
)
def test_a_model_that_is_built_in_another_way_is_refused(name: str, config: dict[str, Any]) -> None:
    model = made(name, **config)
    with pytest.raises(ConfigError, match="chunks"):
        OpenedModel(model, check_model(model))


# -- blending ----------------------------------------------------------------------------------------------------------


def test_all_computed_again_is_the_models_own_answer(kv: KVStoreCache, model: Any) -> None:
    ids, _ = prompt_of(*DOCS[::-1])
    truth, exact = run(model.generate, ids)
    some = Chunks(kv, system=SYSTEM)
    some.store(DOCS)
    tokens, logits = run(some.generate, ids, share=1.0)
    assert some.last == (ids.shape[1], 0, 3, sum(map(len, DOCS)), ids.shape[1] - len(DOCS[2]))
    assert tokens == truth
    torch.testing.assert_close(logits, exact, rtol=1e-3, atol=1e-3)


def test_a_share_is_computed_again_and_brings_the_answer_nearer(kv: KVStoreCache, model: Any) -> None:
    ids, spans = prompt_of(*DOCS[::-1])
    _, exact = run(model.generate, ids)
    some = Chunks(kv)  # without a system prompt: captured in isolation
    progress = some.store(DOCS)
    assert (progress.done, progress.skipped) == (3, 0)
    assert some.store([*DOCS, SYSTEM]).skipped == 3
    away = []
    for share in (0.0, 0.15, 0.6):
        _, logits = run(some.generate, ids, share=share, spans=spans, find=False)
        away.append(float((logits[0] - exact[0]).abs().mean()))
        reused = sum(map(len, DOCS))
        assert some.last.computed_tokens == ids.shape[1] - reused + int(share * reused + 0.5)
    assert away[0] > away[1] > away[2] > 0


def test_as_much_is_computed_again_as_loading_takes_time_for(kv: KVStoreCache) -> None:
    chunks = Chunks(kv)
    chunks.store(DOCS)
    ids, _ = prompt_of(*DOCS[::-1])
    chunks.load(ids, share=0.2)
    least = chunks.last.computed_tokens
    for _ in range(20):
        chunks._controller.loaded(1 << 20, 1e3)
    chunks.load(ids, share=0.2, amount="loading")
    assert chunks.last.computed_tokens == ids.shape[1] > least
    for _ in range(200):
        chunks._controller.loaded(1 << 20, 1e-9)
    chunks.load(ids, share=0.2, amount="loading")
    assert chunks.last.computed_tokens == least
    with pytest.raises(InvalidParams, match="amount"):
        chunks.load(ids, amount="all")  # type: ignore[arg-type]


def test_captured_chunks_bring_what_external_needs(kv: KVStoreCache) -> None:
    ids, spans = prompt_of(*DOCS)
    some = Chunks(kv)
    some.capture(ids, spans)
    other, _ = prompt_of(DOCS[0], DOCS[2], DOCS[1])
    past = some.load(other, selector="external")
    assert (some.last.chunks, some.last.reused_tokens) == (3, sum(map(len, DOCS)))
    assert past.loaded_tokens == other.shape[1] - 1
    again = some.load(ids)  # the very prompt: nothing in its chunks needs to be computed
    assert some.last.computed_tokens == ids.shape[1] - sum(map(len, DOCS))
    assert again.store().refused


def test_an_exact_prefix_in_front_is_loaded_and_stays_shared(kv: KVStoreCache, daemon: Daemon, model: Any) -> None:
    ids, _ = prompt_of(*DOCS[1:])
    run(kv.generate, torch.tensor([SYSTEM + numbers(30, 5)]))
    some = Chunks(kv, system=SYSTEM)
    some.store(DOCS)
    run(some.generate, ids)
    assert (some.last.exact_tokens, some.last.chunks) == (BLOCK, 2)
    assert stored(kv, daemon, ids) == 1


def test_the_exact_prompt_after_the_blended_one_sees_nothing_of_it(
    kv: KVStoreCache, daemon: Daemon, model: Any
) -> None:
    ids, _ = prompt_of(*DOCS[::-1], question=numbers(80, 7))
    truth, exact = run(model.generate, ids)
    some = Chunks(kv)
    some.store(DOCS)
    _, logits = run(some.generate, ids, share=0.0)
    assert some.last.reused_tokens == sum(map(len, DOCS))
    assert not torch.allclose(logits[0], exact[0], atol=1e-3)
    assert stored(kv, daemon, ids) == 0
    assert "approximate" in kv.last.store.refused
    again, found = run(kv.generate, ids)
    assert kv.last.loaded_tokens == 0
    assert again == truth
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_no_way_to_copy_or_change_a_blended_cache_makes_it_storable(kv: KVStoreCache, daemon: Daemon) -> None:
    ids, _ = prompt_of(*DOCS)
    some = Chunks(kv)
    some.store(DOCS)
    past = some.load(ids)
    twin = copy.deepcopy(past)
    past.crop(BLOCK * 4)
    past.batch_repeat_interleave(2)
    for one in (past, twin, copy.deepcopy(twin)):
        assert one.store().refused
        assert kv.store(one).refused
    past.reset()
    assert past.store().refused
    assert stored(kv, daemon, ids) == 0


def test_beams_begin_behind_a_blended_prompt(kv: KVStoreCache, model: Any) -> None:
    ids, _ = prompt_of(*DOCS)
    some = Chunks(kv)
    some.store(DOCS)
    wish: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    truth = model.generate(ids, attention_mask=torch.ones_like(ids), **wish)
    assert some.generate(ids, attention_mask=torch.ones_like(ids), share=1.0, **wish).tolist() == truth.tolist()
    assert some.last.chunks == 3


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(kv: KVStoreCache) -> None:
    ids, spans = prompt_of(*DOCS)
    some = Chunks(kv)
    some.store(DOCS)
    for bad in ([(5, 9), (8, 12)], [(9, 9)], [(200, 4000)]):
        with pytest.raises(InvalidParams, match="spans"):
            some.load(ids, spans=bad)
        with pytest.raises(InvalidParams, match="spans"):
            some.capture(ids, bad)
    with pytest.raises(InvalidParams, match="batch"):
        some.generate(input_ids=ids.repeat(2, 1))
    with pytest.raises(InvalidParams, match="share"):
        some.load(ids, share=1.5)
    with pytest.raises(ConfigError, match="no selector"):
        some.load(ids, selector="best")
    with pytest.raises(ConfigError, match="external mass"):
        some.load(ids, selector="external", spans=spans)
    with pytest.raises(InvalidParams, match="1 to"):
        some.store([numbers(40_000)])
    with pytest.raises(InvalidParams, match="no passage"):
        some.measure([])


def test_chunks_of_others_are_not_found(attach: Any, model: Any) -> None:
    ids, _ = prompt_of(*DOCS)
    Chunks(attach(model), system=SYSTEM, labels=["board"], salt="a").store(DOCS)
    cases = [("a", ["board"], {}, 3), ("a", [], {}, 0), ("b", ["board"], {}, 0), ("a", ["board"], {"tenant": "x"}, 0)]
    for salt, labels, options, found in cases:
        some = Chunks(attach(model, **options), labels=labels, salt=salt)
        some.load(ids)
        assert some.last.chunks == found


@pytest.mark.parametrize("how", ["evicted", "other tokens"])
def test_a_chunk_that_goes_or_lies_is_computed(
    kv: KVStoreCache, daemon: Daemon, model: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    ids, _ = prompt_of(*DOCS)
    truth, _ = run(model.generate, ids)
    some = Chunks(kv)
    some.store(DOCS)
    wanted = chunks._wanted

    def late(*args: Any) -> Any:
        found = wanted(*args)
        if how == "evicted":
            with daemon.client() as client:
                client.drop(None, namespace=kv.namespace)
            return found
        return [one._replace(key=found[0].key, offset=0) for one in found]

    monkeypatch.setattr(chunks, "_wanted", late)
    assert run(some.generate, ids)[0] == truth
    assert (some.last.chunks, kv.last.loaded_tokens) == (0, 0)
    counted = "blend_chunk_missing" if how == "evicted" else "blend_wrong_tokens"
    assert kv.counters()[counted] == 1


def test_without_a_daemon_nothing_is_lost(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = prompt_of(*DOCS)
    truth, _ = run(model.generate, ids)
    daemon = Daemon(tmp_path)
    daemon.start()
    with KVStoreCache(model, address=daemon.address, block_tokens=BLOCK) as kv:
        assert kv._breaker.start(5.0)
        some = Chunks(kv)
        some.store(DOCS)
        describe = chunk_loads.describe

        def killed(*args: Any) -> Any:
            daemon.kill()
            return describe(*args)

        monkeypatch.setattr(chunk_loads, "describe", killed)
        assert run(some.generate, ids)[0] == truth  # killed while chunks were being loaded
        assert run(some.generate, ids)[0] == truth
        with pytest.raises(Unavailable):
            some.store(DOCS)


# -- the real model ----------------------------------------------------------------------------------------------------

NOTES = [
    (
        "Note: The lighthouse of Orvik was painted green in the spring, and its keeper is called Tomas Lind. "
        "He lives there with two dogs and writes a letter every evening.\n"
    ),
    (
        "Note: The harbour office opens at nine. Ships wait at the outer pier until a pilot has come aboard. "
        "In winter the pier is closed after dark.\n"
    ),
    (
        "Note: The bakery beside the church sells rye bread on Mondays and closes early when it snows. "
        "Cakes have to be ordered two days before.\n"
    ),
]


def test_smollm2_answers_from_blended_notes(attach: Any) -> None:
    from model import smollm2

    folder = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    front = ids("<|im_start|>system\nAnswer from the notes.<|im_end|>\n<|im_start|>user\n")
    asked = ids("What is the name of the keeper of the lighthouse?<|im_end|>\n<|im_start|>assistant\n")
    notes = [ids(note) for note in NOTES]
    prompt = torch.tensor([front + notes[1] + notes[2] + notes[0] + asked])
    truth, exact = run(model.generate, prompt)
    some = Chunks(attach(model), system=front)
    some.store(notes)
    tokens, logits = run(some.generate, prompt, share=0.15)
    assert (some.last.chunks, some.last.reused_tokens) == (3, sum(map(len, notes)))
    assert some.last.computed_tokens < 0.65 * prompt.shape[1]
    assert tokens[0] == truth[0]
    p, q = exact[0].log_softmax(-1), logits[0].log_softmax(-1)
    assert float((p.exp() * (p - q)).sum()) < 0.2

    text = ids(builtin_texts()["reference"][:4000])
    assert some.measure([text[at : at + 90] for at in range(0, 720, 90)]) in range(24, 28)  # of 30 layers
    assert run(some.generate, prompt, share=0.15)[0][0] == truth[0]
