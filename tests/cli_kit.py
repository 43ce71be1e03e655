"""What the tests of the command line share: nothing of the user's own, and what was said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.cli import out
from kvstore.cli.main import run

CAPTURED = pytest.CaptureFixture[str]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, daemon or disk tier of the user's own."""
    for name in list(os.environ):
        if name.startswith(("KVSTORE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("COLUMNS", "160")
    out.console.cache_clear()


def said(capsys: CAPTURED, *tokens: str) -> tuple[int, str, str]:
    code = run(tokens)
    printed = capsys.readouterr()
    return code, printed.out, printed.err
