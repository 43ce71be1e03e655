"""What `kvstore eval` measures: nothing where all is computed again, less with more, and said with its interval."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

torch = pytest.importorskip("torch")

from blend_kit import BASE, tiny  # noqa: E402

from kvstore.cli import blend_plot  # noqa: E402
from kvstore.errors import ConfigError  # noqa: E402
from kvstore_connectors.blend.evaluate import Evaluation, Row, evaluate, least_shares  # noqa: E402
from kvstore_connectors.blend.intervals import bootstrap, wilson  # noqa: E402
from kvstore_connectors.blend.samples import Shape, builtin_texts, cut, read_texts  # noqa: E402
from kvstore_connectors.blend.trial import Sample, divergence, likelihood  # noqa: E402

SHAPE = Shape(chunks=3, chunk_tokens=12, question_tokens=8)


def encode(text: str) -> list[int]:
    return [(7 * byte + place) % BASE["vocab_size"] for place, byte in enumerate(text.encode())]


def samples(count: int = 3, seed: int = 0) -> list[Sample]:
    return cut({"a": "the quick brown fox " * 9, "b": "lorem ipsum " * 20}, encode, count, shape=SHAPE, seed=seed)


@pytest.fixture(scope="module")
def found() -> Evaluation:
    model = tiny()
    return evaluate(
        model, model.rotary, samples(), selectors=("none", "auto", "initial", "external"), shares=(0.5, 1.0)
    )


def row(found: Evaluation, capture: str, selector: str, share: float) -> Row:
    return next(r for r in found.rows if (r.capture, r.selector, r.share) == (capture, selector, share))


@pytest.mark.parametrize("capture", ["isolated", "system", "live"])
def test_everything_computed_again_loses_nothing(found: Evaluation, capture: str) -> None:
    one = row(found, capture, "initial", 1.0)
    assert abs(one.kl) < 1e-6
    assert one.top1 == 1
    assert abs(one.nll) < 1e-4
    assert one.computed == pytest.approx(2 / 3 if capture == "system" else 1)  # its first chunk is exact
    assert one.prompts == 3


def test_nothing_computed_again_loses_most(found: Evaluation) -> None:
    for capture in ("isolated", "system", "live"):
        none = row(found, capture, "none", 0.0)
        assert none.computed == 0
        assert none.kl > row(found, capture, "auto", 0.5).kl > 1e-3
        low, high = none.kl_interval
        assert low <= none.kl <= high
        assert none.saved < 1


def test_the_least_share_that_keeps_a_target(found: Evaluation) -> None:
    exact = least_shares(found.rows, 1e-5)
    assert {(one.capture, one.selector, one.share) for one in exact} == {
        *((capture, name, 1.0) for capture in ("isolated", "system", "live") for name in ("auto", "initial")),
        ("live", "external", 1.0),
    }
    most = max(one.kl_interval[1] for one in found.rows)
    assert row(found, "isolated", "none", 0.0) in least_shares(found.rows, most)
    assert least_shares(found.rows, -1.0) == []


def test_external_is_measured_where_there_is_mass_only(found: Evaluation) -> None:
    assert {r.capture for r in found.rows if r.selector == "external"} == {"live"}


def test_what_can_not_be_measured_is_refused() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="no selector"):
        evaluate(model, model.rotary, samples(1), selectors=("best",))
    for some, shares in ((samples(1), (1.5,)), ([], (0.1,))):
        with pytest.raises(ConfigError):
            evaluate(model, model.rotary, some, shares=shares)


def test_prompts_are_stretches_of_text_and_the_same_for_a_seed(tmp_path: Path) -> None:
    for one, other in zip(samples(seed=4), samples(seed=4), strict=True):
        assert torch.equal(torch.cat([*one.chunks, one.question]), torch.cat([*other.chunks, other.question]))
    assert [one.kind for one in samples(4)] == ["a", "b", "a", "b"]
    text = encode("the quick brown fox " * 9)
    whole = torch.cat([*samples(1)[0].chunks, samples(1)[0].question]).tolist()
    assert any(text[at : at + len(whole)] == whole for at in range(len(text)))
    with pytest.raises(ConfigError, match="prompt has 44"):
        cut({"short": "too short"}, encode, 1, shape=SHAPE)
    for shape in (Shape(0, 12, 8), Shape(3, 0, 8), Shape(3, 12, 1)):
        with pytest.raises(ConfigError, match="there must be"):
            cut({"a": "the quick brown fox " * 9}, encode, 1, shape=shape)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.txt").write_text("two")
    (tmp_path / "notes" / "a.txt").write_text("one")
    assert read_texts([tmp_path / "notes"]) == {str(tmp_path / "notes"): "one\n\ntwo"}
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    for bad in (tmp_path / "raw", tmp_path / "absent"):
        with pytest.raises(ConfigError, match="--texts"):
            read_texts([bad])
    assert min(map(len, builtin_texts().values())) > 50_000


def test_measures() -> None:
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]])  # 1/2, 1/2 and 1/4, 3/4
    assert divergence(p, q) == pytest.approx(0.143841)
    assert divergence(p, p) == 0
    assert likelihood(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == pytest.approx(1.386294)


def test_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1)
    low, high = bootstrap([0.0, 1.0, 2.0, 3.0])
    assert (low, high) == bootstrap([0.0, 1.0, 2.0, 3.0])
    assert 0 <= low < 1.5 < high <= 3
    assert bootstrap([2.0]) == (2.0, 2.0)


def test_table_and_plot_show_every_row(found: Evaluation) -> None:
    lines = blend_plot.table(found.rows)
    assert len([line for line in lines if line[:8].strip() in ("none", "auto", "initial", "external")]) == len(
        found.rows
    )
    root = ElementTree.fromstring(blend_plot.svg(found.rows, "tiny <model>"))
    texts = [one.text or "" for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "tiny <model>, isolated: KL, nats a token" in texts
    assert {"none", "auto", "initial", "external"} <= set(texts)
    lines_drawn = [one for one in root.iter("{http://www.w3.org/2000/svg}polyline") if one.get("points")]
    assert len(lines_drawn) == 3 * 3 + 1
