"""Blending in a real vLLM: exact where all is computed again, nobody else's KV ever, and computed whenever it fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from kit import Answer, Daemon, Engine, engine, numbers

from kvstore.client import chunk_keys
from kvstore.keys import namespace_digest
from kvstore.types import Namespace
from kvstore_connectors import chunk_loads
from kvstore_connectors.blend.selectors import relay
from kvstore_connectors.choice import Blending
from kvstore_connectors.vllm import blend_worker
from kvstore_connectors.vllm.blend_gate import Verdict
from kvstore_connectors.vllm.blend_jobs import BlendJob
from kvstore_connectors.vllm.blend_model import EngineModel
from kvstore_connectors.vllm.blend_scheduler import Blends
from kvstore_connectors.vllm.blend_worker import Blender
from kvstore_connectors.weights import weights_digest

BLOCK = 64
SYSTEM = numbers(128, 90)
DOCS = [numbers(150, seed) for seed in range(91, 94)]
QUESTION = numbers(40, 95)
LONG_QUESTION = random.Random(96).sample(range(100, 40_000), 640)


def prompt_of(*docs: list[int], question: list[int] = QUESTION) -> tuple[list[int], list[list[int]]]:
    """System prompt, documents and question; and where the documents are."""
    tokens, spans = list(SYSTEM), []
    for doc in docs:
        spans.append([len(tokens), len(tokens) + len(doc)])
        tokens += doc
    return tokens + question, spans


def verdict(model: Path, **fields: Any) -> Verdict:
    known = {"share": 0.0, "selector": "question", "prompts": 8, "kl": 0.0, "top1": 1.0, "most_kl": 0.1}
    return Verdict(model=model.name, revision=f"sample:{weights_digest(model)}", least_top1=0.9, **{**known, **fields})


def ask(vllm: Engine, prompt: list[int], wish: dict[str, Any] | None = None, **how: Any) -> Answer:
    extra = None if wish is None else {"kv_transfer_params": {"kvstore": wish}}
    return vllm.ask(prompt, extra_args=extra, **how)[0]


@pytest.fixture(scope="module")
def truth(daemon: Daemon, tiny: Path) -> Callable[[list[int]], list[int]]:
    """What a plain engine answers; asked first, since engines do not run side by side."""
    prompts = [prompt_of(*docs)[0] for docs in (DOCS, DOCS[::-1], DOCS[:2], DOCS[1:], [DOCS[2], DOCS[0]])]
    prompts += [prompt_of(*DOCS, question=LONG_QUESTION)[0]]
    with engine(tiny, None, max_num_batched_tokens=192) as plain:
        known = [(one, plain.ask(one)[0].tokens) for one in prompts]

    def answer(prompt: list[int]) -> list[int]:
        return next(tokens for one, tokens in known if one == prompt)

    return answer


@pytest.fixture(scope="module")
def vllm(daemon: Daemon, tiny: Path, truth: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    gate = tmp_path_factory.mktemp("gate") / "verdict.json"
    gate.write_bytes(msgspec.json.encode(verdict(tiny, reach=2)))
    extra = {"block_tokens": BLOCK, "blend_gate": str(gate), "lookup_deadline_ms": 2000}
    with engine(tiny, daemon.address, extra, max_num_batched_tokens=192) as made:
        assert made.connected()
        yield made


@pytest.fixture(autouse=True)
def _fresh(vllm: Engine, daemon: Daemon) -> None:
    """Nothing is stored but the documents as chunks, captured in isolation."""
    with daemon.client() as client:
        client.drop(None, namespace=namespace(vllm))
    for doc in DOCS:
        ask(vllm, doc, {"capture": True, "spans": [[0, len(doc)]]}, max_tokens=1)


def namespace(vllm: Engine) -> Namespace:
    found = vllm.worker_connector._worker._namespace
    assert found is not None
    return found


def grown(vllm: Engine, before: dict[str, float], name: str) -> float:
    return vllm.metrics().get(f"kvstore_{name}", 0) - before.get(f"kvstore_{name}", 0)


def test_captured_chunks_are_found_by_content(vllm: Engine, daemon: Daemon) -> None:
    prompt, spans = prompt_of(*DOCS)
    with daemon.client() as client:
        found, _ = client.match(prompt, find=True, namespace=namespace(vllm))
    assert [[one.start, one.stop] for one in found] == spans
    assert {one.capture for one in found} == {"isolated"}


@pytest.mark.parametrize("how", ["named", "found"])
def test_what_would_be_computed_nearly_whole_is_left_to_the_engine(vllm: Engine, truth: Any, how: str) -> None:
    prompt, spans = prompt_of(*DOCS[::-1])
    before = vllm.metrics()
    wish = {"blend": True, "share": 0.6, **({"spans": spans, "find": False} if how == "named" else {})}
    assert ask(vllm, prompt, wish).tokens == truth(prompt)
    assert grown(vllm, before, "blend_not_worth") == 1
    assert grown(vllm, before, "blend_prompts") == 0


def test_exact_where_every_token_is_computed(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_connectors.vllm.blend_scheduler.MOST_COMPUTED", 1.0)
    prompt, _ = prompt_of(*DOCS[::-1])
    before = vllm.metrics()
    answer = ask(vllm, prompt, {"blend": True, "share": 1.0})
    assert answer.tokens == truth(prompt)
    assert answer.cached == len(prompt) - 1
    assert grown(vllm, before, "blend_computed_tokens") == len(prompt) - 1
    assert grown(vllm, before, "blend_failures") == 0


def test_a_share_is_computed_and_the_rest_reused(vllm: Engine) -> None:
    prompt, _ = prompt_of(*DOCS[:2])
    before = vllm.metrics()
    answer = ask(vllm, prompt, {"blend": True, "share": 0.15})
    assert answer.cached == len(prompt) - 1
    assert grown(vllm, before, "blended_tokens") == len(prompt) - 1
    assert grown(vllm, before, "blend_reused_tokens") == 300 - 45
    assert grown(vllm, before, "saved_blocks") == 0
    assert answer.tokens == ask(vllm, prompt, {"blend": True, "share": 0.15}).tokens


def test_a_prompt_is_believed_to_ask_if_the_one_before_did(vllm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is repaired as far up as the verdict says."""
    believed: list[bool] = []

    class Watched(blend_worker.Work):
        def __init__(self, *args: Any, asked: bool, **how: Any) -> None:
            believed.append(asked)
            super().__init__(*args, asked=asked, **how)
            assert how["reach"] == 2

    def everywhere(_: Any, work: Any) -> Iterator[int]:
        yield from ()
        return torch.arange(1.0, len(work.prompt.ids) + 1)

    monkeypatch.setattr(blend_worker, "Work", Watched)
    monkeypatch.setattr(relay.Trail, "scores", everywhere)  # random tokens lead nowhere
    prompt, _ = prompt_of(*DOCS[:2])
    answers = []
    for part in (1.0, 1.0, 0.0, 1.0):
        monkeypatch.setattr(relay, "by_words", lambda *_, part=part: part)
        answers.append(ask(vllm, prompt, {"blend": True, "share": 0.15}).tokens)
    assert believed[1:] == [True, True, False]
    assert answers[0] == answers[1] == answers[3]


def test_the_daemon_is_told_what_was_blended_and_by_which_verdict(vllm: Engine, daemon: Daemon, tiny: Path) -> None:
    def told() -> dict[str, Any]:
        with daemon.client() as client:
            (found,) = [each for each in client.stats()["blends"] if each["digest"] == digest]
        return found

    digest, before = namespace_digest(namespace(vllm)).hex(), vllm.metrics()
    first = told()  # from the start on, before anything was blended
    prompt, _ = prompt_of(*DOCS[:2])
    ask(vllm, prompt, {"blend": True, "share": 0.15})
    after = told()
    assert after["prompts"] - first["prompts"] == 1
    assert after["tokens"] - first["tokens"] == grown(vllm, before, "blended_tokens")
    assert after["computed"] - first["computed"] == grown(vllm, before, "blend_computed_tokens")
    assert after["verdict"]["kl"] == verdict(tiny).kl


def test_an_exact_prefix_in_front_stays_shared(vllm: Engine, truth: Any) -> None:
    prompt, _ = prompt_of(*DOCS[1:])
    ask(vllm, SYSTEM + numbers(10, 97))  # stores two blocks of 64
    before = vllm.metrics()
    ask(vllm, prompt, {"blend": True})
    assert grown(vllm, before, "loaded_blocks") == 2
    assert grown(vllm, before, "blended_tokens") == len(prompt) - 1 - 128
    ask(vllm, prompt, {"blend": True}, local=True)  # now the engine has them itself, and nothing of what was blended
    assert grown(vllm, before, "loaded_blocks") == 2
    assert grown(vllm, before, "blended_tokens") == 2 * (len(prompt) - 1 - 128)


def test_the_exact_prompt_after_the_blended_one_sees_nothing_of_it(vllm: Engine, truth: Any) -> None:
    prompt, _ = prompt_of(DOCS[2], DOCS[0])
    vllm.forget()
    blended = ask(vllm, prompt, {"blend": True, "share": 0.0, "find": True}, local=True)
    assert blended.cached == len(prompt) - 1
    through_vllm = ask(vllm, prompt, local=True)
    assert through_vllm.cached <= 128  # the system prompt only, which is exact
    assert through_vllm.tokens == truth(prompt)
    vllm.forget()
    blended = ask(vllm, prompt, {"blend": True, "share": 0.0}, max_tokens=80)
    through_us = ask(vllm, prompt)
    assert through_us.tokens == truth(prompt)


def test_nothing_of_a_blended_prompt_is_stored(vllm: Engine) -> None:
    prompt, _ = prompt_of(*DOCS, question=numbers(90, 98))
    before = vllm.metrics()
    ask(vllm, prompt, {"blend": True}, max_tokens=70)
    assert grown(vllm, before, "blend_prompts") == 1
    assert grown(vllm, before, "saved_blocks") == 0
    assert ask(vllm, prompt).cached <= 128


def test_a_long_tail_is_left_to_the_engine(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_connectors.vllm.blend_scheduler.MOST_COMPUTED", 1.0)
    prompt, _ = prompt_of(*DOCS, question=LONG_QUESTION)
    answer = ask(vllm, prompt, {"blend": True, "share": 1.0})
    assert answer.cached == 128 + 450 + 512
    assert answer.tokens == truth(prompt)


def test_a_salted_request_finds_no_chunks_of_others(vllm: Engine, truth: Any) -> None:
    prompt, _ = prompt_of(*DOCS)
    before = vllm.metrics()
    answer = ask(vllm, prompt, {"blend": True}, salt="mine")
    assert answer.tokens == truth(prompt)
    assert grown(vllm, before, "blend_prompts") == 0


@pytest.mark.parametrize(
    "wish",
    [
        {"blend": True, "spans": [[0, 100], [50, 150]]},
        {"blend": True, "spans": [[0, 10_000]]},
        {"blend": True, "spans": [[9, 3]]},
        {"blend": True, "spans": "all"},
        {"blend": "yes"},
        {"blend": True, "share": 2.0},
        {"blnd": True},
        7,
    ],
)
def test_requests_that_make_no_sense_are_computed(vllm: Engine, truth: Any, wish: Any) -> None:
    prompt, _ = prompt_of(*DOCS)
    before = vllm.metrics()
    assert ask(vllm, prompt, wish).tokens == truth(prompt)
    assert grown(vllm, before, "blend_bad_request") == 1


def test_prompts_of_one_batch(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_connectors.vllm.blend_scheduler.MOST_COMPUTED", 1.0)
    prompts = [prompt_of(*docs)[0] for docs in (DOCS, DOCS[::-1], DOCS[1:])]
    wish = {"kv_transfer_params": {"kvstore": {"blend": True, "share": 1.0}}}
    answers = vllm.ask(*prompts, extra_args=wish)
    assert [answer.tokens for answer in answers] == [truth(prompt) for prompt in prompts]


# -- capture -----------------------------------------------------------------------------------------------------------


def captured(vllm: Engine, daemon: Daemon, prompt: list[int], **how: Any) -> list[tuple[int, str]]:
    with daemon.client() as client:
        found, _ = client.match(prompt, find=True, namespace=namespace(vllm), **how)
    return [(one.start, one.capture) for one in found]


def test_documents_of_a_prompt_are_captured_where_they_stand(vllm: Engine, daemon: Daemon, truth: Any) -> None:
    with daemon.client() as client:
        client.drop(None, namespace=namespace(vllm))
    prompt, spans = prompt_of(*DOCS)
    before = vllm.metrics()
    assert ask(vllm, prompt, {"capture": True, "spans": spans}).tokens == truth(prompt)
    assert grown(vllm, before, "captured_chunks") == 3
    assert captured(vllm, daemon, prompt) == [(128, "system"), (278, "live"), (428, "live")]
    with daemon.client() as client:
        mine = namespace_digest(namespace(vllm)).hex()
        (record,) = (one for one in client.stats()["namespaces"] if one["digest"] == mine)
    # Nine blocks of the prompt, and of each document what no such block is: the first two of the first are two.
    assert record["blocks"]["host"] == 9 + 1 + 3 + 3
    again = ask(vllm, prompt, {"capture": True, "spans": spans})
    assert again.tokens == truth(prompt)
    assert grown(vllm, before, "captured_chunks") == 3  # all of them are there, made behind these very tokens


def test_what_was_captured_there_serves_another_prompt(
    vllm: Engine, daemon: Daemon, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon.client() as client:
        client.drop(None, namespace=namespace(vllm))
    prompt, spans = prompt_of(*DOCS)
    ask(vllm, prompt, {"capture": True, "spans": spans})
    monkeypatch.setattr("kvstore_connectors.vllm.blend_scheduler.MOST_COMPUTED", 1.0)
    other, _ = prompt_of(*DOCS[::-1])
    before = vllm.metrics()
    assert ask(vllm, other, {"blend": True, "share": 1.0}).tokens == truth(other)
    assert grown(vllm, before, "blend_prompts") == 1
    part = ask(vllm, other, {"blend": True, "share": 0.2})
    assert part.cached == len(other) - 1


def test_an_exact_prompt_in_which_no_variant_fits_brings_a_better_one(vllm: Engine, daemon: Daemon) -> None:
    prompt, spans = prompt_of(*DOCS[:2])
    assert captured(vllm, daemon, prompt) == [(128, "isolated"), (278, "isolated")]
    ask(vllm, prompt, {"capture": True, "spans": spans})
    assert captured(vllm, daemon, prompt) == [(128, "system"), (278, "live")]


def test_who_lacks_the_labels_gets_nothing(vllm: Engine, daemon: Daemon, truth: Any) -> None:
    with daemon.client() as client:
        client.drop(None, namespace=namespace(vllm))
    prompt, spans = prompt_of(*DOCS)
    ask(vllm, prompt, {"capture": True, "spans": spans, "labels": ["board"]})
    with daemon.client() as client:  # its exact prefix is no secret: leave only the chunks behind
        assert captured(vllm, daemon, prompt) == []
        assert len(captured(vllm, daemon, prompt, labels=["board"])) == 3
    other, _ = prompt_of(*DOCS[::-1])
    before = vllm.metrics()
    assert ask(vllm, other, {"blend": True}).tokens == truth(other)
    assert grown(vllm, before, "blend_prompts") == 0
    ask(vllm, prompt_of(DOCS[2], DOCS[1])[0], {"blend": True, "labels": ["board", "staff"]})
    assert grown(vllm, before, "blend_prompts") == 1


# -- faults ------------------------------------------------------------------------------------------------------------


def failing(vllm: Engine, truth: Any, prompt: list[int], wish: dict[str, Any] | None = None) -> None:
    before = vllm.metrics()
    answer = ask(vllm, prompt, {"blend": True, **(wish or {})})
    assert answer.reason != "error"
    assert grown(vllm, before, "blend_failures") == 1
    assert answer.tokens == truth(prompt)
    assert ask(vllm, prompt, local=True).tokens == truth(prompt)


def test_a_chunk_that_is_evicted_between_lookup_and_load(
    vllm: Engine, truth: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = Blender.blend

    def late(self: Blender, link: Any, job: BlendJob, load: Any) -> set[int]:
        with daemon.client() as client:
            client.drop([next(iter(job.spans[1].keys.values()))], namespace=namespace(vllm))
        return blend(self, link, job, load)

    monkeypatch.setattr(Blender, "blend", late)
    failing(vllm, truth, prompt_of(*DOCS)[0])


def test_a_block_in_the_middle_of_a_chunk_that_is_gone(
    vllm: Engine, truth: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = chunk_loads.describe

    def late(client: Any, ns: Namespace, *args: Any) -> Any:
        described = describe(client, ns, *args)
        assert described is not None
        with daemon.client() as other:
            other.drop(chunk_keys(described[0].wanted.key, described[0].info)[1:2], namespace=ns)
        return described

    monkeypatch.setattr(chunk_loads, "describe", late)
    before = vllm.metrics()
    failing(vllm, truth, prompt_of(*DOCS)[0])
    assert grown(vllm, before, "blend_chunk_missing") == 1


def test_a_lease_that_ends_while_chunks_are_blended(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    repair = Blender._repair

    def late(self: Blender, model: Any, job: BlendJob, gathered: Any) -> Any:
        gathered.load._lease._expires = 0.0
        return repair(self, model, job, gathered)

    monkeypatch.setattr(Blender, "_repair", late)
    before = vllm.metrics()
    failing(vllm, truth, prompt_of(*DOCS)[0])
    assert grown(vllm, before, "load_expired") == 1


def test_a_rank_that_can_not_begin_leaves_no_lease(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, loads = Blender._gather, []

    def seen(self: Blender, *args: Any) -> Any:
        found = gather(self, *args)
        assert found is not None
        assert found.load._lease is not None
        loads.append(found.load)
        return found

    monkeypatch.setattr(Blender, "_gather", seen)
    monkeypatch.setattr(EngineModel, "agree", lambda *_: False)
    failing(vllm, truth, prompt_of(*DOCS)[0])
    assert [load._lease for load in loads] == [None]


def test_chunks_on_their_way_are_let_go_where_what_is_before_them_is_missing(
    vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, loads = Blender._gather, []

    def seen(self: Blender, *args: Any) -> Any:
        found = gather(self, *args)
        assert found is not None
        loads.append(found.load)
        return found

    monkeypatch.setattr(Blender, "_gather", seen)
    monkeypatch.setattr(Blender, "_load_exact", lambda _, job, load: job.table)
    failing(vllm, truth, prompt_of(*DOCS)[0])
    assert [load._lease for load in loads] == [None]


def test_wrong_tokens_under_a_key_are_not_believed(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    span = Blends._span

    def crossed(chunk: Any, plan: Any) -> Any:
        found = span(chunk, plan)
        return found._replace(keys=plan.spans[0].keys)

    monkeypatch.setattr(Blends, "_span", staticmethod(crossed))
    before = vllm.metrics()
    failing(vllm, truth, prompt_of(*DOCS)[0])
    assert grown(vllm, before, "blend_wrong_tokens") == 1


def test_a_defect_of_ours(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Blender, "_repair", broken)
    failing(vllm, truth, prompt_of(*DOCS)[0])


def test_a_device_without_memory_for_the_prompt(vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Blender, "_zeros", none)
    before = vllm.metrics()
    failing(vllm, truth, prompt_of(*DOCS)[0])
    assert grown(vllm, before, "blend_no_memory") == 1


def test_memory_of_one_prompt_serves_the_next_and_says_nothing_of_it(vllm: Engine) -> None:
    blender: Any = vllm.worker_connector._worker._blender
    first = blender._zeros((2, 2, 48, 3, 8))
    first.fill_(float("nan"))
    second = blender._zeros((2, 2, 32, 3, 8))
    assert second.data_ptr() == first.data_ptr()
    assert not second.any()
    assert second.shape == (2, 2, 32, 3, 8)


def test_what_is_sooner_computed_than_blended_is_computed(
    vllm: Engine, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = vllm.scheduler_connector._scheduler._decisions
    monkeypatch.setattr(decisions, "_always", False)
    monkeypatch.setattr(decisions, "blending", Blending())
    whole = Blender._repair

    def slowly(self: Blender, *how: Any) -> Any:
        time.sleep(1.0)
        return whole(self, *how)

    monkeypatch.setattr(Blender, "_repair", slowly)
    before = vllm.metrics()
    for docs in (DOCS, DOCS[:2]):  # the first teaches nothing
        ask(vllm, prompt_of(*docs)[0], {"blend": True})
    assert grown(vllm, before, "blend_prompts") == 2
    for docs in (DOCS[::-1], DOCS[1:]):
        prompt, _ = prompt_of(*docs)
        assert ask(vllm, prompt, {"blend": True}).tokens == truth(prompt)
    assert grown(vllm, before, "blend_prompts") == 2
    assert grown(vllm, before, "blend_slower") == 2


def test_a_selector_that_does_not_exist(vllm: Engine, truth: Any) -> None:
    failing(vllm, truth, prompt_of(*DOCS)[0], {"selector": "tea-leaves"})


def test_a_daemon_killed_in_the_middle(
    vllm: Engine, truth: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = chunk_loads.describe

    def late(*args: Any) -> Any:
        described = describe(*args)
        daemon.kill()
        return described

    monkeypatch.setattr(chunk_loads, "describe", late)
    try:
        failing(vllm, truth, prompt_of(*DOCS)[0])
    finally:
        monkeypatch.undo()
        daemon.start()
    assert vllm.connected()
