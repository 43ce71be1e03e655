"""Settings: every origin, every rule, every refusal."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import machine
from kvstore.arena import Arena
from kvstore.banner import place_of
from kvstore.config import Loaded, find_file, load
from kvstore.errors import ConfigError
from kvstore.lower_tiers import check_codecs
from kvstore.machine import INDEX_SHARE, auto_slab_bytes
from kvstore.rules import Secret, is_loopback, show_size, split_address
from kvstore.settings import GROUPS, RULES, env_names, flag_names, written_as
from kvstore.units import format_duration, format_size, parse_duration, parse_size

GIB = 1 << 30


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "kvstore.toml"
    file.write_text(text)
    return file


def refused(flags: dict[str, str] | None = None, env: dict[str, str] | None = None, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, env or {}, file)
    return caught.value.cause


# -- origins -----------------------------------------------------------------------------------------------------------


def test_without_anything_every_setting_has_a_value_and_a_default_origin() -> None:
    loaded = load({}, {})
    assert set(loaded.origins) == set(RULES)
    assert set(loaded.origins.values()) == {"default", "default (auto)"}
    assert loaded.settings.host.slab_bytes >= 60 << 20
    assert loaded.settings.limits.max_block_bytes == GIB
    assert loaded.settings.http.address == "127.0.0.1:7070"
    assert loaded.settings.drain_s == 10.0


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = toml(tmp_path, '[host]\nbytes = "1GiB"\npolicy = "lru"\n[disk]\nthreads = 2\n[log]\nlevel = "debug"\n')
    loaded = load({"host.bytes": "3GiB"}, {"KVSTORE_HOST_BYTES": "2GiB", "KVSTORE_DISK_THREADS": "8"}, file)
    assert loaded.settings.host.bytes == 3 * GIB
    assert loaded.origins["host.bytes"] == "--host-bytes"
    assert loaded.settings.disk.threads == 8
    assert loaded.origins["disk.threads"] == "KVSTORE_DISK_THREADS"
    assert loaded.settings.log.level == "debug"
    assert loaded.origins["log.level"] == str(file)
    assert loaded.origins["drain_s"] == "default"
    assert loaded.file == file


@pytest.mark.parametrize("key", RULES)
def test_each_setting_can_be_given_by_flag_environment_and_file(key: str, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("0123456789abcdef\n")
    odd = {
        "listen.socket": "/tmp/x.sock",
        "listen.tcp": "127.0.0.1:1",
        "listen.token": "0123456789abcdef",
        "listen.token_file": str(token_file),
        "listen.allow_uids": "1,2",
        "disk.path": str(tmp_path),
        "http.address": "[::1]:8",
        "log.level": "error",
        "log.json": "true",
        "host.policy": "lru",
        "gpu.policy": "lru",
        "gpu.admission": "first",
        "disk.policy": "lru",
        "disk.admission": "second",
        "redis.admission": "second",
        "redis.url": "redis://:a-password@host:6379",
        "limits.quota_file": str(tmp_path / "quotas.json"),
        "redis.cluster": "true",
        "redis.prefix": "other",
        "redis.key_file": str(tmp_path / "key"),
        "redis.ttl_s": "2h",
        "events.share": "false",
        "events.name": "me",
        "trace.endpoint": "http://127.0.0.1:4318",
        "trace.ratio": "0.5",
        "codecs.disk": "lossless",
        "codecs.redis": "lossless",
        "codecs.profiles": str(tmp_path),
    }
    text = odd.get(key) or {"SIZE": "64MiB", "DURATION": "1500ms", "N": "3"}[written_as(key)]
    group, _, name = key.rpartition(".")
    value = text if written_as(key) == "N" else f'"{text}"'
    file = toml(tmp_path, (f"[{group}]\n" if group else "") + f"{name} = {value}\n")
    base = {"host.slab_bytes": {"host.bytes": "256MiB"}, "listen.tcp": {"listen.token": "x" * 16}}.get(key, {})

    by_flag, by_env, by_file = load(base | {key: text}, {}), load(base, {env_names(key)[0]: text}), load(base, {}, file)
    assert by_flag.value(key) == by_env.value(key) == by_file.value(key)
    assert by_flag.origins[key] == flag_names(key)[0]
    assert by_env.origins[key] == env_names(key)[0]
    assert by_file.origins[key] == str(file)
    if key in ("listen.token", "redis.url"):
        assert text not in repr(by_flag) + repr(by_flag.rows()) + str(by_flag.settings)


def test_short_names_work_and_yield_to_long_ones() -> None:
    assert str(load({}, {"KVSTORE_SOCKET": "/tmp/a"}).settings.listen.socket) == "/tmp/a"
    both = load({}, {"KVSTORE_SOCKET": "/tmp/a", "KVSTORE_LISTEN_SOCKET": "/tmp/b"})
    assert str(both.settings.listen.socket) == "/tmp/b"
    assert both.origins["listen.socket"] == "KVSTORE_LISTEN_SOCKET"


def test_no_two_settings_share_a_flag_or_an_environment_name() -> None:
    flags = [name for key in RULES for name in flag_names(key)]
    names = [name for key in RULES for name in env_names(key)]
    assert len(flags) == len(set(flags))
    assert len(names) == len(set(names))


def test_file_is_found_by_flag_then_environment_then_in_the_users_own_place(tmp_path: Path) -> None:
    own = tmp_path / "kvstore" / "kvstore.toml"
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert find_file(None, env) is None
    own.parent.mkdir()
    own.touch()
    assert find_file(None, env) == own
    assert find_file(None, env | {"KVSTORE_CONFIG": "/b"}) == Path("/b")
    assert find_file("/a", env | {"KVSTORE_CONFIG": "/b"}) == Path("/a")


def test_settings_cannot_be_changed() -> None:
    settings = load({}, {}).settings
    with pytest.raises(AttributeError):
        settings.drain_s = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        settings.host.bytes = 1  # pyright: ignore[reportAttributeAccessIssue]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("host.bytes", "8G", "is not a size"),
        ("host.bytes", "-1", "is not a size"),
        ("host.bytes", "1KiB", "is less than 1MiB"),
        ("host.slab_bytes", "1TiB", "is more than 16GiB"),
        ("disk.bytes", "9999999TiB", "is more than"),
        ("disk.deadline_s", "10 parsecs", "is not a duration"),
        ("disk.deadline_s", "0", "is less than 0.01s"),
        ("disk.threads", "four", "is not a whole number"),
        ("disk.threads", "65", "is more than 64"),
        ("disk.path", "", "is not a path"),
        ("disk.path", "~nobody-like-this/x", "without a home directory"),
        ("host.policy", "mru", "is not one of"),
        ("log.level", "loud", "is not one of debug, info, warning, error"),
        ("log.json", "perhaps", "is neither true nor false"),
        ("listen.socket", "/" + "x" * 120, "more than 100 bytes"),
        ("listen.allow_uids", "root", "is not a list of user ids"),
        ("listen.allow_uids", "", "is not a list of user ids"),
        ("listen.tcp", "7070", "is not an address"),
        ("listen.tcp", "::1:7070", "in brackets"),
        ("listen.tcp", "127.0.0.1:70700", "is not an address"),
        ("http.address", "0.0.0.0:7070", "is beyond loopback"),
        ("http.address", "example.org:80", "is beyond loopback"),
        ("limits.max_block_bytes", "5GiB", "is more than"),
    ],
)
def test_a_broken_rule_is_refused_with_setting_value_origin_and_rule(key: str, value: str, rule: str) -> None:
    by_flag, by_env = refused({key: value}), refused(env={env_names(key)[0]: value})
    for cause, origin in ((by_flag, flag_names(key)[0]), (by_env, env_names(key)[0])):
        assert cause.startswith(f"{key}: {value!r} ({origin}) ")
        assert rule in cause


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[host]\nbytes = true\n", "host.bytes: True"),
        ("[host]\nbytes = 1.5\n", "host.bytes: 1.5"),
        ("[host]\nbytes = []\n", "host.bytes: []"),
        ("[disk]\ndeadline_s = nan\n", "disk.deadline_s: nan"),
        ("[disk]\ndeadline_s = true\n", "disk.deadline_s: True"),
        ("[disk]\npath = 3\n", "disk.path: 3"),
        ('[disk]\npath = "a\\u0000b"\n', "zero byte"),
        ("[listen]\nallow_uids = [-1]\n", "listen.allow_uids: [-1]"),
        ("[listen]\nallow_uids = [true]\n", "listen.allow_uids: [True]"),
        ('[log]\njson = "x"\n', "log.json: 'x'"),
        ("host = 3\n", "host is a group"),
        ("[drain_s]\n", "drain_s"),
        ("[drain_s]\nx = 1\n", "'drain_s.x' is not a setting"),
        ("[hots]\nbytes = 1\n", "did you mean 'host.bytes'?"),
        ("[hots]\n", "'hots' is not a setting"),
        ("[host]\nbyte = 1\n", "did you mean 'host.bytes'?"),
        ("[host.bytes]\nx = 1\n", "host.bytes: {'x': 1}"),
        ("[host\n", "not TOML"),
        ("[host]\nbytes = 1\nbytes = 2\n", "not TOML"),
    ],
)
def test_a_bad_file_is_refused_and_named(text: str, named: str, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    cause = refused(file=file)
    assert named in cause
    assert str(file) in cause


def test_a_missing_unreadable_or_binary_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(file=tmp_path / "none.toml")
    assert "directory" in refused(file=tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    assert "not TOML" in refused(file=tmp_path / "b.toml")


def test_unknown_names_are_refused_with_the_nearest_one() -> None:
    assert "did you mean 'KVSTORE_HOST_BYTES'?" in refused(env={"KVSTORE_HOST_BYTE": "1"})
    assert "did you mean 'host.bytes'?" in refused({"host.byts": "1"})
    assert refused(env={"KVSTORE_ZZZ": "1"}) == "KVSTORE_ZZZ in the environment is not a setting."


@pytest.mark.parametrize(
    "name",
    ["KVSTORE_CONFIG", "KVSTORE_CLIENT_TOKEN", "KVSTORE_VLLM_X", "KVSTORE_SERVICE_HOST", "KVSTORE_PORT",
     "KVSTORE_PORT_7070_TCP_ADDR", "KVSTORES", "HOME"],
)  # fmt: skip
def test_names_of_others_are_left_alone(name: str) -> None:
    """Kubernetes sets KVSTORE_PORT and more in every container beside a Service called kvstore."""
    assert isinstance(load({}, {name: "tcp://10.0.0.1:7070"}), Loaded)


@given(st.sampled_from(sorted(set(RULES) - {"listen.token_file"})), st.text(max_size=30))
@settings(max_examples=1000)
def test_any_text_is_taken_or_refused_with_a_config_error(key: str, text: str) -> None:
    with contextlib.suppress(ConfigError):
        load({key: text}, {})


# -- tokens and addresses ----------------------------------------------------------------------------------------------


def test_codecs_are_refused_at_start_where_torch_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codecs = load({"codecs.redis": "lossless"}, env={}).settings.codecs
    check_codecs(codecs)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_codecs(load({}, env={}).settings.codecs)
    for refused in (codecs, load({"codecs.profiles": str(tmp_path)}, env={}).settings.codecs):
        with pytest.raises(ConfigError, match="torch"):
            check_codecs(refused)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"path": "/d", "direct_io": True}, "in /d (direct I/O)"),
        ({"path": "/d", "direct_io": False, "direct_io_reason": "tmpfs"}, "in /d (buffered I/O: tmpfs)"),
        ({"connected": True, "last_error": ""}, "for all its daemons"),
        ({"connected": False, "last_error": "refused"}, "not reached yet (refused)"),
    ],
)
def test_the_banner_says_where_a_tier_keeps_its_blocks(state: dict[str, object], words: str) -> None:
    assert place_of(state) == words


def test_tcp_needs_a_token() -> None:
    for address in ("0.0.0.0:7071", "kv.internal:7071", "127.0.0.1:7071"):
        assert "there is no token" in refused({"listen.tcp": address})
    opened = load({"listen.tcp": "0.0.0.0:7071"}, {"KVSTORE_TOKEN": "0123456789abcdef"})
    assert opened.settings.listen.token.reveal() == "0123456789abcdef"


def test_a_short_token_is_refused_without_being_shown() -> None:
    cause = refused({"listen.token": "hunter2"})
    assert "fewer than 16 characters" in cause
    assert "hunter2" not in cause


def test_token_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  0123456789abcdef\n")
    loaded = load({"listen.token_file": str(file)}, {})
    assert loaded.settings.listen.token == Secret("0123456789abcdef")
    assert loaded.origins["listen.token"] == str(file)
    assert "both given" in refused({"listen.token_file": str(file), "listen.token": "0123456789abcdef"})
    file.write_text("short")
    assert "fewer than 16" in refused({"listen.token_file": str(file)})
    file.write_text("\n")
    assert "is empty" in refused({"listen.token_file": str(file)})
    assert "No such file" in refused({"listen.token_file": str(tmp_path / "none")})


def test_a_secret_shows_itself_to_nobody_who_does_not_ask() -> None:
    secret = Secret("0123456789abcdef")
    shown = f"{secret} {secret!r} {secret!s} {[secret]} %s" % (secret,)
    assert "0123" not in shown
    assert secret.reveal() == "0123456789abcdef"
    assert not Secret("")


@pytest.mark.parametrize(
    ("written", "parts", "loopback"),
    [
        ("127.0.0.1:1", ("127.0.0.1", 1), True),
        ("127.9.9.9:0", ("127.9.9.9", 0), True),
        ("[::1]:7070", ("::1", 7070), True),
        ("localhost:65535", ("localhost", 65535), True),
        ("0.0.0.0:1", ("0.0.0.0", 1), False),
        ("[::]:1", ("::", 1), False),
        ("localhost.example.org:1", ("localhost.example.org", 1), False),
        ("127.0.0.1.example.org:1", ("127.0.0.1.example.org", 1), False),
    ],
)
def test_addresses(written: str, parts: tuple[str, int], loopback: bool) -> None:
    assert split_address(written) == parts
    assert is_loopback(written) is loopback


# -- what depends on the machine ---------------------------------------------------------------------------------------


def test_a_small_host_tier_takes_a_smaller_slab_but_a_named_one_is_held_against_it() -> None:
    assert load({"host.bytes": "32MiB"}, {}).settings.host.slab_bytes == 31 << 20
    assert load({"host.bytes": "1GiB"}, {}).settings.host.slab_bytes == 62 << 20
    assert load({"host.bytes": "9GiB"}, {}).settings.host.slab_bytes == 254 << 20
    assert load({"host.bytes": "900GiB"}, {}).settings.host.slab_bytes == 1022 << 20
    assert "is more than host.bytes, 32MiB" in refused({"host.bytes": "32MiB", "host.slab_bytes": "64MiB"})


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(8 * GIB, 2 * GIB), (GIB // 2, GIB // 4), (1024 * GIB, 64 * GIB), (5 * GIB + 12345, 1280 << 20)],
)
def test_host_budget_is_a_quarter_of_usable_memory_within_bounds(
    memory: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_memory", lambda: memory)
    assert load({}, {}).settings.host.bytes == expected
    assert load({}, {"KVSTORE_HOST_BYTES": "auto"}).origins["host.bytes"] == "KVSTORE_HOST_BYTES (auto)"


def test_disk_budget_follows_the_free_space_of_its_own_filesystem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = {str(tmp_path): 40 * GIB}
    monkeypatch.setattr(machine, "free_space", lambda path: free.get(str(path), 4000 * GIB))
    assert load({"disk.path": str(tmp_path)}, {}).settings.disk.bytes == 10 * GIB
    assert load({"disk.path": "/elsewhere"}, {}).settings.disk.bytes == 256 * GIB
    assert load({"disk.bytes": "0"}, {}).settings.disk.bytes == 0


def test_free_space_of_a_directory_yet_to_be_made(tmp_path: Path) -> None:
    assert machine.free_space(tmp_path / "a" / "b") > 0


def _groups(root: Path, lines: str, limits: dict[str, str]) -> int:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return machine.usable_memory(root)


def test_memory_limits_of_control_groups_count_and_the_smallest_wins(tmp_path: Path) -> None:
    two = {"memory.max": "max\n", "a/memory.max": "2000000\n", "a/b/memory.max": "3000000\n"}
    assert _groups(tmp_path / "v2", "0::/a/b\n", two) == 2_000_000
    one = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/x/memory.limit_in_bytes": "1000000\n"}
    assert _groups(tmp_path / "v1", "4:memory:/x\n3:cpu:/\n", one) == 1_000_000
    # Inside a container the path is the outer one and only the base exists.
    assert _groups(tmp_path / "c", "0::/../outer/1\n", {"memory.max": "500000\n"}) == 500_000
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert _groups(tmp_path / "none", "", {}) == physical


def test_default_socket_prefers_the_users_runtime_directory(tmp_path: Path) -> None:
    assert machine.default_socket({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "kvstore" / "kvstore.sock"
    for unusable in ("", "relative", str(tmp_path / "none")):
        found = machine.default_socket({"XDG_RUNTIME_DIR": unusable, "HOME": str(tmp_path)})
        runtime = Path(f"/run/user/{os.getuid()}")
        home = tmp_path / ".kvstore" / "run" / "kvstore.sock"
        assert found == (runtime / "kvstore" / "kvstore.sock" if runtime.is_dir() else home)


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("4096", 4096), ("1KiB", 1024), ("1.5GiB", 3 << 29), ("500MB", 500_000_000), (" 8 gib ", 8 * GIB),
     ("9007199254740993", 9007199254740993), ("8388608TiB", 1 << 63)],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1G", "1k", "1e9", "-1", "+1", "0x10", "1 2", "nan", "٣", "1.GiB", "1,5GiB"]
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("10s", 10), ("1.5", 1.5), ("5m", 300), ("2h", 7200), ("1d", 86400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.integers(min_value=0, max_value=1 << 62))
def test_a_shown_size_reads_back_as_the_same_number(nbytes: int) -> None:
    assert parse_size(show_size(nbytes)) == nbytes


@given(st.floats(min_value=0, max_value=1e15))
def test_formats_never_fail(value: float) -> None:
    assert format_size(value)
    assert format_duration(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (25e-6, "25 µs"),
        (0.25, "250 ms"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (93_600, "1 d 2 h"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# -- the example in the docs is a file that works ----------------------------------------------------------------------


def test_the_example_file_of_the_docs_changes_nothing(tmp_path: Path) -> None:
    from kvstore.cli.docs import settings_page

    text = settings_page().partition("```toml\n")[2].partition("```")[0]
    assert set(tomllib.loads(text)) == set(GROUPS) | {key for key in RULES if "." not in key}
    with_example, without = load({}, {}, toml(tmp_path, text)), load({}, {})
    assert with_example.settings == without.settings


@pytest.mark.parametrize("mib", [2, 16, 32, 64, 100, 256, 300, 512, 1024, 1500, 6144, 9216, 65536, 921600])
def test_slabs_fill_what_the_index_leaves_of_the_host_tier(mib: int) -> None:
    budget = mib << 20
    arena = Arena(budget - budget // INDEX_SHARE, auto_slab_bytes(budget))
    assert arena.capacity >= 0.98 * (budget - budget // INDEX_SHARE)
    assert arena.capacity // arena.slab_bytes < 1000, "a client maps each"
