"""What `kvstore doctor` finds."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest
from cli_kit import CAPTURED, alone, said

from kvstore.cli import probes
from kvstore.config import load

__all__ = ["alone"]
pytestmark = pytest.mark.usefixtures("alone")


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
