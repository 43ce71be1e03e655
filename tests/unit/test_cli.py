"""The command line: what it prints, where, and how it exits. Against a real daemon where one is needed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import kvstore
from kvstore import KVStoreClient, Namespace
from kvstore.cli import bench, out, probes
from kvstore.cli.app import app
from kvstore.cli.main import run
from kvstore.cli.view import render
from kvstore.config import load
from kvstore.errors import Unavailable
from kvstore.keys import prefix_keys
from kvstore.settings import RULES, flag_names
from kvstore.types import Stored

CAPTURED = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
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


def shell(*tokens: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *tokens], capture_output=True, text=True, timeout=60, check=False, **more
    )


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


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_answers_for_every_probe_and_leaves_nothing_behind(capsys: CAPTURED, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, text, _ = said(capsys, "doctor", "--json")
    results = json.loads(text)
    assert set(results) == set(probes.PROBES)
    for name, result in results.items():
        assert result["state"] in ("ok", "warn", "fail"), name
        assert result["found"], name
        assert result["state"] == "ok" or result["fix"], name
    assert results["memory files"]["state"] == "ok"
    assert results["daemon"]["state"] == "warn"
    assert code == int(any(result["state"] == "fail" for result in results.values()))
    assert sorted(tmp_path.rglob("*")) == before


def _probe(name: str, **flags: str) -> probes.Result:
    return probes.run(probes.PROBES[name], load({key.replace("__", "."): v for key, v in flags.items()}, os.environ))


def test_doctor_sees_what_is_wrong(tmp_path: Path) -> None:
    assert _probe("memory", host__bytes="900TiB").state == "fail"
    assert _probe("disk space", disk__bytes="900TiB").state == "warn"
    assert _probe("disk space", disk__path="/proc/nothing").state == "warn"
    assert _probe("disk I/O", disk__path="/proc/nothing", disk__bytes="1GiB").state == "fail"
    assert _probe("disk I/O", disk__bytes="0") == ("ok", "the disk tier is off", "", "")
    assert (
        _probe("open files", listen__max_connections="65536", host__bytes="60TiB", host__slab_bytes="1MiB").state
        == "warn"
    )
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    open_to_all.chmod(0o755)
    found = _probe("socket directory", listen__socket=str(open_to_all / "k.sock"))
    assert (found.state, found.fix) == ("fail", f"chmod 700 {open_to_all}")
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    assert _probe("token file", listen__token_file=str(token)).state == "warn"
    token.chmod(0o600)
    assert _probe("token file", listen__token_file=str(token)).state == "ok"


@pytest.mark.parametrize(
    ("answers", "state", "words"),
    [
        ([b"+PONG\r\n", b"$22\r\nredis_version:7.4.1\r\nx\r\n"], "ok", "redis 7.4.1"),
        ([b"+PONG\r\n", b"$21\r\nredis_version:5.0.14\r\n\r\n"], "warn", "redis 5.0.14"),
        ([b"-NOAUTH Authentication required.\r\n"], "fail", "NOAUTH"),
        ([b"HTTP/1.1 400 Bad Request\r\n"], "fail", "not Redis"),
        ([b""], "fail", "not Redis"),
    ],
)
def test_doctor_meets_a_redis_server(answers: list[bytes], state: str, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            sock, _ = listening.accept()
            with sock:
                for answer in answers:
                    sock.recv(4096)
                    sock.sendall(answer)

        server = threading.Thread(target=serve)
        server.start()
        result = _probe("Redis", **{"redis.url": f"redis://127.0.0.1:{listening.getsockname()[1]}"})
        server.join()
    assert (result.state, words in result.found) == (state, True), result


def test_doctor_says_that_redis_is_not_there() -> None:
    assert _probe("Redis").state == "ok"
    gone = _probe("Redis", **{"redis.url": "unix:///nowhere/redis.sock"})
    assert (gone.state, "No such file" in gone.found) == ("fail", True)


def test_a_probe_that_breaks_is_a_finding() -> None:
    def broken(loaded: object) -> probes.Result:
        raise ZeroDivisionError("of course")

    assert "ZeroDivisionError: of course" in probes.run(broken, load({}, {})).found


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


# -- a real daemon -----------------------------------------------------------------------------------------------------


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
