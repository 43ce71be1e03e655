"""`kvstore eval` on a real model: from its directory to figures, a plot, and one line where that can not be."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from model import smollm2

from kvstore.cli.main import run

SMALL = ["--chunks", "2", "--chunk-tokens", "24", "--question-tokens", "12", "--prompts", "1"]


def test_a_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "blend.svg"
    wish = ["--selectors", "none", "initial", "--captures", "isolated", "--shares", "0.25", "1.0", "--plot", str(plot)]
    text = Path(__file__)
    assert run(["eval", str(smollm2()), *SMALL, *wish, "--texts", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["selector"], row["share"]): row for row in found["rows"]}
    assert set(rows) == {("none", 0.0), ("initial", 0.25), ("initial", 1.0)}
    assert rows["none", 0.0]["kl"] > rows["initial", 0.25]["kl"] > 1e-4
    assert abs(rows["initial", 1.0]["kl"]) < 1e-5
    assert rows["initial", 1.0]["top1"] == 1
    assert rows["initial", 0.25]["computed"] == pytest.approx(0.25)
    assert (found["prompts"], found["kinds"]) == (1, [str(text)])
    ElementTree.parse(plot)


def test_what_can_not_be_measured_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    for wish, said in (
        (["--texts", str(tmp_path / "short.txt")], "tokens where a prompt has"),
        (["--selectors", "best"], "no selector"),
        (["--shares", "2"], "not between 0 and 1"),
    ):
        assert run(["eval", str(smollm2()), *SMALL, *wish]) == 2
        assert said in capsys.readouterr().err
    assert run(["eval", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
