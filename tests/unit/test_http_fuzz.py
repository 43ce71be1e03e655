"""A short run of what bench/http_fuzz.py does at length: requests made out of the daemon's own description."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_answer_is_a_defect_or_unknown_to_the_description(tmp_path: Path):
    pytest.importorskip("schemathesis", reason="pip install -e .[deploy]")
    command = [sys.executable, str(ROOT / "bench/http_fuzz.py"), "--cases", "5", "--out", str(tmp_path / "found.json")]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["unique_failures"] == 0
    assert found["requests"] > 500
    assert found["operations"] == 20
