"""The command line beside a real daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_kit import CAPTURED, alone, said

import kvstore
from kvstore import KVStoreClient, Namespace
from kvstore.cli import bench
from kvstore.errors import Unavailable
from kvstore.keys import prefix_keys
from kvstore.types import Stored

__all__ = ["alone"]
pytestmark = pytest.mark.usefixtures("alone")


def _answers() -> bool:
    try:
        with kvstore.KVStoreClient() as client:
            return bool(client.stats())
    except Unavailable:
        time.sleep(0.02)
        return False


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    flags = ["--host-bytes", "256MiB", "--disk-bytes", "256MiB", "--disk-path", str(tmp_path / "disk"), "--http", ""]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "serve", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 30
    while process.poll() is None and not _answers():
        if time.monotonic() > deadline:
            process.kill()
    if process.poll() is not None:
        pytest.fail(f"the daemon did not start: {process.communicate()[0]}")
    yield process
    process.kill()
    process.communicate()


def test_status_top_doctor_and_check_beside_a_running_daemon(
    daemon: subprocess.Popen[str], capsys: CAPTURED, tmp_path: Path
) -> None:
    code, text, _ = said(capsys, "status", "--json")
    assert code == 0
    assert json.loads(text)["pid"] == daemon.pid
    assert "disk" in json.loads(text)["tiers"]

    code, text, _ = said(capsys, "status")
    assert code == 0
    assert f"pid {daemon.pid}" in text

    code, text, _ = said(capsys, "top", "--once", "--interval", "200ms")
    assert code == 0
    assert "/s" in text

    _, text, _ = said(capsys, "doctor", "--json")
    assert json.loads(text)["daemon"]["state"] == "ok"

    code, _, complaint = said(capsys, "check", "--disk-path", str(tmp_path / "disk"))
    assert code == 1
    assert "[KV603]" in complaint
    assert "in use" in complaint

    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(timeout=20) == 0
    assert not (tmp_path / "run" / "kvstore" / "kvstore.sock").exists()

    code, text, _ = said(capsys, "check", "--disk-path", str(tmp_path / "disk"))
    assert code == 0
    assert "nothing wrong" in text


def test_a_daemon_whose_reader_is_gone_ends_as_any_other(capsys: CAPTURED, tmp_path: Path) -> None:
    flags = ["--host-bytes", "256MiB", "--disk-bytes", "256MiB", "--disk-path", str(tmp_path / "disk"), "--http", ""]
    command = [sys.executable, "-m", "kvstore", "serve", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        assert daemon.stdout.readline()
        daemon.stdout.close()  # `kvstore serve | head -1`
        with kvstore.KVStoreClient(namespace=kvstore.Namespace(model="toy")) as client:
            assert client.put(bytes(32), b"not on disk yet") == kvstore.Stored()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=20) == 0
        assert daemon.stderr.read() == ""
    assert not (tmp_path / "run" / "kvstore" / "kvstore.sock").exists()
    assert "1 block" in said(capsys, "check", "--disk-path", str(tmp_path / "disk"))[1]


def test_check_finds_damage_says_so_and_mends_it(
    daemon: subprocess.Popen[str], capsys: CAPTURED, tmp_path: Path
) -> None:
    namespace = kvstore.Namespace(model="toy")
    with kvstore.KVStoreClient(namespace=namespace) as client:
        for place in range(4):
            key = bytes([place]) * 32
            assert client.put(key, os.urandom(100_000), durable=True) == kvstore.Stored()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=20) == 0
    files = [
        path for path in (tmp_path / "disk" / "blocks").rglob("*") if path.stat().st_size >= 100_000 and path.is_file()
    ]
    assert len(files) == 4
    raw = bytearray(files[0].read_bytes())
    raw[-50_000] ^= 1
    files[0].write_bytes(raw)

    tokens = ["check", "--disk-path", str(tmp_path / "disk")]
    code, text, _ = said(capsys, *tokens, "--json")
    report = json.loads(text)
    assert code == 1
    assert [finding["fixed"] for finding in report["findings"]] == [False]

    code, text, _ = said(capsys, *tokens)
    assert code == 1
    assert "1 wrong" in text
    assert "--fix" in text

    code, text, _ = said(capsys, *tokens, "--fix")
    assert code == 0
    assert "0 wrong, 1 mended" in text
    code, text, _ = said(capsys, *tokens)
    assert code == 0
    assert "3 blocks" in text


# -- operating ---------------------------------------------------------------------------------------------------------


TOKENS = list(range(256 * 4))
SPACE = Namespace(model="org/m-8B", dtype="bfloat16", layers=2, tenant="acme")


@pytest.fixture
def kept(daemon: subprocess.Popen[str]) -> Iterator[list[bytes]]:
    """Three of the four blocks of a prompt, the second one dropped."""
    keys = prefix_keys(SPACE, TOKENS)
    with KVStoreClient(namespace=SPACE) as client:
        for key in keys[:3]:
            assert isinstance(client.put(key, key * 64), Stored)
        client.drop([keys[1]])
        yield keys


def test_explain_tells_of_each_block_where_it_is_or_why_not(
    kept: list[bytes], capsys: CAPTURED, tmp_path: Path
) -> None:
    code, text, _ = said(capsys, "explain", ",".join(map(str, TOKENS)), "--json")
    assert code == 1
    told = json.loads(text)
    assert told["usable"] == 1
    assert [block["key"] for block in told["blocks"]] == [key.hex() for key in kept]
    assert [block["reason"] for block in told["blocks"]] == ["", "dropped", "", "never_stored"]
    assert "host" in told["blocks"][0]["tiers"]

    (tmp_path / "prompt.json").write_text(json.dumps(TOKENS[:256]))
    code, text, _ = said(capsys, "explain", str(tmp_path / "prompt.json"), "--model", "org/*")
    assert code == 0
    assert "1 of 1 blocks can be used in org/m-8B" in text

    code, text, _ = said(capsys, "explain", f"{kept[1].hex()} {kept[2].hex()}", "--namespace", told["namespace"][:10])
    assert code == 1
    assert "dropped by somebody" in text
    assert "behind a hole" in text


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["hello"], "neither token ids nor keys"),
        (["1 2 3"], "less than one block"),
        (["z" * 64], "not hexadecimal"),
        (["1", "--model", "other*"], "no such namespace"),
        (["1", "--namespace", "ffff"], "no such namespace"),
    ],
)
def test_a_prompt_that_makes_no_sense_is_an_error(
    kept: list[bytes], tokens: list[str], words: str, capsys: CAPTURED
) -> None:
    code, printed, complaint = said(capsys, "explain", *tokens)
    assert (code, printed) == (1, "")
    assert words in complaint


def test_where_several_namespaces_fit_one_has_to_be_named(kept: list[bytes], capsys: CAPTURED) -> None:
    with KVStoreClient(namespace=Namespace(model="other")) as other:
        other.lookup([bytes(32)])
        code, _, complaint = said(capsys, "explain", "1")
    assert code == 1
    assert "2 namespaces fit" in complaint


def test_leases_policy_and_drop(kept: list[bytes], capsys: CAPTURED, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(capsys, "leases") == (0, "Nobody reads at this moment.\n", "")
    with KVStoreClient(namespace=SPACE) as client, client.lease(kept[:1]):
        _, text, _ = said(capsys, "leases", "--json")
        assert json.loads(text)[0]["blocks"] == 1
        _, text, _ = said(capsys, "leases")
        assert "org/m-8B" in text

    _, text, _ = said(capsys, "policy", "--json")
    assert json.loads(text)["policies"] == {"host": "lhd", "disk": "lhd"}
    code, text, _ = said(capsys, "policy", "host", "lru")
    assert code == 0
    assert "host     lru" in text
    code, _, complaint = said(capsys, "policy", "host", "bogus")
    assert (code, "bogus" in complaint) == (2, True)

    monkeypatch.setattr("builtins.input", lambda: "n")
    code, text, _ = said(capsys, "drop")
    assert (code, "Nothing was dropped" in text) == (1, True)
    code, text, _ = said(capsys, "drop", "--key", kept[0].hex(), "--yes")
    assert (code, text) == (0, "1 blocks were forgotten.\n")
    monkeypatch.setattr("builtins.input", lambda: "y")
    code, text, _ = said(capsys, "drop", "--model", "org/*")
    assert (code, "1 blocks were forgotten" in text) == (0, True)
    with KVStoreClient(namespace=SPACE) as client:
        assert not any(client.get(key) for key in kept)


def test_top_prints_snapshots_as_lines(daemon: subprocess.Popen[str], capsys: CAPTURED) -> None:
    code, text, _ = said(capsys, "top", "--once", "--json")
    assert code == 0
    (line,) = text.splitlines()
    assert json.loads(line)["pid"] == daemon.pid


def test_bench_measures_beside_limits_and_leaves_nothing(
    capsys: CAPTURED, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "BATCH", 4 << 20)
    monkeypatch.setattr(bench, "CALLS", 20)
    monkeypatch.setattr(bench, "TURNS", 2)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "kvstore").mkdir()  # as a runtime directory has it: it is not the package
    monkeypatch.chdir(tmp_path)
    code, text, _ = said(capsys, "bench", "--json", "--block", "1MiB")
    assert code == 0
    figures = {figure["name"]: figure for figure in json.loads(text)["figures"]}
    assert len(figures) == 8
    assert all(figure["value"] > 0 for figure in figures.values())
    assert all(figures[name]["limit"] > 0 for name in ("load from memory", "store to disk, durable"))
    assert not list(tmp_path.glob("kvb-*"))


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_scripts_know_the_commands(name: str, capsys: CAPTURED) -> None:
    code, text, _ = said(capsys, "completion", name)
    assert code == 0
    assert "explain" in text
    assert "quota" in text
