"""The command line: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_kit import CAPTURED, alone, said
from rich.console import Console

import kvstore
from kvstore.cli.app import app
from kvstore.cli.view import render
from kvstore.settings import RULES, flag_names

__all__ = ["alone"]
pytestmark = pytest.mark.usefixtures("alone")


# -- version and help --------------------------------------------------------------------------------------------------


def test_version_is_asked_often_and_so_it_loads_little() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(sorted(sys.modules)));"
    code += "from kvstore.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    version, modules = done.stdout.splitlines()
    assert version == f"kvstore {kvstore.__version__}"
    for heavy in ("cyclopts", "rich", "msgspec", "numpy", "asyncio", "aiohttp", "torch"):
        assert f"'{heavy}'" not in modules


def test_version_command_names_protocol_and_disk_format(capsys: CAPTURED) -> None:
    code, text, _ = said(capsys, "version", "--json")
    facts = json.loads(text)
    assert code == 0
    assert facts["kvstore"] == kvstore.__version__
    assert facts["protocol"] == 1
    assert facts["disk format"] == 1
    assert "msgspec" in facts


def test_help_of_serve_has_every_setting_with_flag_and_default(capsys: CAPTURED) -> None:
    code, text, _ = said(capsys, "serve", "--help")
    flat = " ".join(text.replace("│", " ").split())
    assert code == 0
    for key, rule in RULES.items():
        assert flag_names(key)[0] in flat
        assert rule.doc in flat
        assert f"Default: {rule.auto_doc or rule.default or 'none'}." in flat


COMMANDS = [
    *("serve", "status", "top", "explain", "leases", "policy", "drop", "quota list", "quota set", "quota remove"),
    *("plan", "check", "config show", "doctor", "bench", "completion", "version"),
]


def test_commands_that_are_tried_here_are_there() -> None:
    def names(place: Any, *words: str) -> Iterator[str]:
        for name in place:
            if not name.startswith("-"):
                inner = list(names(place[name], *words, name))
                yield from inner or [" ".join((*words, name))]

    assert set(COMMANDS) <= set(names(app))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: CAPTURED) -> None:
    code, text, _ = said(capsys, *command.split(), "--help")
    assert code == 0
    assert f"kvstore {command}" in text


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "code", "words"),
    [
        (["bogus"], 2, ['Unknown command "bogus"', "`kvstore --help`"]),
        (["config", "sho"], 2, ['Did you mean "show"?', "`kvstore config --help`"]),
        (["serve", "--host-byte", "1"], 2, ["--host-byte", "Did you mean --host-bytes?", "`kvstore serve --help`"]),
        (["serve", "x"], 2, ["x"]),
        (["serve", "--host-bytes"], 2, ["requires an argument"]),
        (["serve", "--host-bytes", "8G"], 2, ["[KV100] host.bytes: '8G' (--host-bytes)", "write 8GiB"]),
        (["serve", "--http", "0.0.0.0:80"], 2, ["[KV100]", "beyond loopback"]),
        (["config", "show", "--config", "/none/kvstore.toml"], 2, ["/none/kvstore.toml: No such file"]),
        (["status"], 3, ["[KV5", "kvstore serve"]),
        (["top", "--once", "--interval", "never"], 2, ["--interval: 'never'"]),
        (["check", "--disk-bytes", "0"], 2, ["no disk tier"]),
        (["check"], 2, ["does not exist"]),
        (["explain", "1,2"], 3, ["kvstore serve"]),
        (["policy", "host"], 1, ["a tier needs the name of a policy"]),
        (["bench", "--block", "3G"], 2, ["--block: '3G'"]),
        (["bench", "--block", "1KiB"], 2, ["not between"]),
        (["completion", "tcsh"], 2, ["tcsh"]),
    ],
)
def test_what_goes_wrong_is_one_line_on_stderr_and_an_exit_code(
    tokens: list[str], code: int, words: list[str], capsys: CAPTURED
) -> None:
    got, printed, complaint = said(capsys, *tokens)
    assert got == code
    assert printed == ""
    assert len(complaint.splitlines()) == 1
    for word in words:
        assert word in complaint


def test_a_hostile_value_cannot_steer_the_terminal(capsys: CAPTURED) -> None:
    _, _, complaint = said(capsys, "serve", "--log-level", "\x1b[2J\n[red]x")
    assert "\x1b" not in complaint
    assert len(complaint.splitlines()) == 1
    assert "[red]x" in complaint


def test_a_reader_that_goes_away_is_not_an_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m kvstore config show | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# -- config show -------------------------------------------------------------------------------------------------------


def test_config_show_tells_value_and_origin_and_masks_secrets(
    capsys: CAPTURED, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "kvstore.toml"
    file.write_text("[disk]\nthreads = 7\n")
    monkeypatch.setenv("KVSTORE_TOKEN", "0123456789abcdef")
    tokens = ["config", "show", "--config", str(file), "--host-bytes", "1GiB"]
    code, text, _ = said(capsys, *tokens, "--json")
    shown = json.loads(text)
    assert code == 0
    assert shown["file"] == str(file)
    assert set(shown["settings"]) == set(RULES)
    assert shown["settings"]["disk.threads"] == {"value": "7", "origin": str(file)}
    assert shown["settings"]["host.bytes"] == {"value": "1GiB", "origin": "--host-bytes"}
    assert shown["settings"]["listen.token"] == {"value": "***", "origin": "KVSTORE_TOKEN"}
    _, table, _ = said(capsys, *tokens)
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert rows["host.bytes"] == ["host.bytes", "1GiB", "--host-bytes"]
    assert "0123456789abcdef" not in text + table


# -- status ------------------------------------------------------------------------------------------------------------

SNAPSHOT: dict[str, Any] = {
    "boot": "aa" * 16, "version": "0.1.0", "pid": 7, "uptime_s": 61.0, "ready": True, "draining": False,
    "sessions": 2, "leases": 1, "reservations": 0, "asked_blocks": 10, "hit_blocks": {"host": 5},
    "queue": {"blocks": 3, "bytes": 3 << 20},
    "tiers": {
        "host": {"capacity": 8 << 30, "used": 2 << 30, "blocks": 1234, "hits": 11, "misses": 22, "stored": 33,
                 "evicted": 44, "dropped": {"host_full": 55}, "corrupt": 0, "bytes_read": 4 << 30,
                 "leased_bytes": 1 << 20},
        "disk": {"capacity": 9 << 30, "used": 0, "path": "/data/kv", "direct_io": False, "breaker": {"state": "open"}},
    },
    "namespaces": [{"digest": "ab" * 32, "model": "llama", "blocks": {"host": 4, "disk": 6}, "bytes": {"host": 9}}],
    "requests": {"lookup": {"count": 100, "errors": 1, "seconds": 0.01}},
    "errors": {"KV303": 2, "KV999": 1},
}  # fmt: skip


def drawn(
    now: Mapping[str, Any], before: Mapping[str, Any] | None = None, seconds: float = 1.0, width: int = 160
) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(render(now, before, seconds))
    return captured.get()


def test_status_shows_tiers_sessions_queue_namespaces_and_trouble() -> None:
    text = drawn(SNAPSHOT)
    for words in (
        "ready", "pid 7", "up 1 min 1 s", "2 sessions, 1 lease, 0 reservations", "2 GiB", "8 GiB", "1,234", "/data/kv",
        "3 blocks (3 MiB) on their way", "5 of 10 blocks asked for were here (50.0 %)", "breaker open", "no O_DIRECT",
        "1 MiB leased", "llama", "abababababab", "100 µs", "ForeignHandle", "unknown to this version", "host_full",
    ):  # fmt: skip
        assert words in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["host"] == ["host", "11", "22", "33", "44", "55", "0"]
    assert rows["lookup"][:3] == ["lookup", "100", "1"]
    assert "host 4, disk 6" in text


def test_rungs_are_told_apart_however_narrow_the_screen() -> None:
    chain = f"prerope|pca(basis={'ab' * 16},step=%d,sinks=4)|zstd(level=1)"
    held = {chain % step: {"blocks": step, "stored_bytes": 1 << 20, "logical_bytes": step << 20} for step in (10, 15)}
    for width in (70, 160):
        text = drawn({"tiers": {"disk": {"codecs": {"held": held}}}}, width=width)
        assert [word for word in text.split() if word in ("10.00x", "15.00x")] == ["10.00x", "15.00x"]
        for step in (10, 15):
            assert f"step={step}" in "".join(text.split())  # folded, not cut off


def test_rates_are_the_growth_between_two_looks_at_one_daemon() -> None:
    before = SNAPSHOT | {
        "tiers": {"host": SNAPSHOT["tiers"]["host"] | {"bytes_read": 0}},
        "requests": {"lookup": {"count": 0}},
    }
    text = drawn(SNAPSHOT, before, seconds=2.0)
    assert "2 GiB/s" in text
    assert "50.0/s" in text
    restarted = drawn(SNAPSHOT, before | {"boot": "bb" * 16}, seconds=2.0)
    assert "GiB/s" not in restarted


@pytest.mark.parametrize("snapshot", [{}, {"tiers": None}, {"tiers": {"host": 3}}, {"namespaces": [{}], "queue": []},
                                      {"requests": {"x": {}}, "errors": {"y": "z"}, "uptime_s": "soon"}])  # fmt: skip
def test_a_snapshot_of_another_version_is_shown_as_far_as_it_goes(snapshot: dict[str, Any]) -> None:
    assert "kvstore" in drawn(snapshot)


def test_what_clients_named_cannot_steer_the_terminal() -> None:
    hostile = {"namespaces": [{"model": "\x1b]0;owned\x07[bold]m", "digest": "\x1b[2J"}], "requests": {"\x1b[1m": {}}}
    text = drawn(hostile)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]m" in text


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    assert max(map(len, drawn(SNAPSHOT, SNAPSHOT, width=width).splitlines())) <= width
    assert "…" not in drawn(SNAPSHOT, SNAPSHOT, width=width)
