"""Every setting: its group, type, default and rule. `kvstore.config` makes them out of file, environment and flags.

A setting is one field of one of the groups below: its type, and a `Rule` that says how it is written, what it means and
what it is when nobody says anything. Flags, environment names, `--help`, `kvstore config show` and docs/settings.md all
come from these fields. ``host.bytes`` is ``[host] bytes`` in the file, ``KVSTORE_HOST_BYTES`` in the environment and
``--host-bytes`` as a flag.
"""

# Annotations are read at run time, so they are not postponed here.
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec

from kvstore import machine
from kvstore.rules import Secret, address, choice, duration, integer, path, secret, share, size, switch, text, uids

Values = dict[str, Any]
Env = Mapping[str, str]

ENV_PREFIX = "KVSTORE_"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one setting is written and what it means.

    Attributes
    ----------
    doc : str
        What it does, for `--help` and the docs.
    default : str
        Default as a user would write it; ``auto`` where it depends on the machine.
    parse : callable
        Value out of what was written; raises ValueError with the rule that is broken.
    auto : callable, optional
        Value of ``auto``, given the environment and the settings of the groups before it.
    auto_doc : str
        What ``auto`` means, in words.
    alias : str
        A second, shorter name: ``http`` is also ``--http`` and ``KVSTORE_HTTP``.
    """

    doc: str
    default: str
    parse: Callable[[object], Any]
    auto: Callable[[Env, Values], Any] | None = None
    auto_doc: str = ""
    alias: str = ""


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """Where the daemon listens, and to whom."""

    socket: Annotated[
        Path,
        Rule(
            "Unix socket of the daemon; its directory is made with mode 0700.",
            "auto",
            path(longest=100),
            lambda env, _: machine.default_socket(env),
            "$XDG_RUNTIME_DIR/kvstore/kvstore.sock, else the same in /run/user/<uid>, else ~/.kvstore/run/kvstore.sock",
            alias="socket",
        ),
    ]
    tcp: Annotated[str, Rule("Also listen on this host:port, for clients without shared memory.", "", address())]
    token: Annotated[
        Secret,
        Rule(
            "Token that clients on TCP have to show, 16 characters or more; other users see flags, but not files.",
            "",
            secret(16),
            alias="token",
        ),
    ]
    token_file: Annotated[Path | None, Rule("File to read the token from.", "", path(optional=True))]
    allow_uids: Annotated[
        tuple[int, ...],
        Rule(
            "User ids that may connect to the socket, separated by commas.",
            "auto",
            uids,
            lambda *_: (os.getuid(),),
            "the user that runs the daemon",
        ),
    ]
    max_connections: Annotated[int, Rule("Connections at one time.", "1024", integer(1, 65_536))]


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """Host tier: blocks in shared memory."""

    bytes: Annotated[
        int,
        Rule(
            "Budget of the host tier.",
            "auto",
            size(1 << 20),
            lambda *_: machine.auto_host_bytes(),
            "25 % of the memory this process may use, between 256MiB and 64GiB",
        ),
    ]
    slab_bytes: Annotated[
        int,
        Rule(
            "Size of one shared memory file; larger blocks span several.",
            "auto",
            size(1 << 20, 16 << 30),
            lambda _, values: machine.auto_slab_bytes(values["host.bytes"]),
            "about a 64th of host.bytes, between 32MiB and 1GiB, so that whole ones fill it",
        ),
    ]
    ahead_bytes: Annotated[int, Rule("Memory kept touched and ready ahead of need.", "256MiB", size(0))]
    policy: Annotated[str, Rule("Eviction policy.", "lhd", choice("kvstore.eviction:names"))]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """GPU tier: copies of blocks in the memory of one GPU, for the engines on it."""

    bytes: Annotated[
        int,
        Rule("Memory of the GPU that is taken at start, 16MiB or more; 0 for no such tier.", "0", size(0)),
    ]
    device: Annotated[int, Rule("Which GPU, as CUDA numbers them for the daemon.", "0", integer(0, 63))]
    policy: Annotated[str, Rule("Eviction policy.", "lhd", choice("kvstore.eviction:names"))]
    admission: Annotated[
        str,
        Rule("When a block is copied there: when an engine on that GPU leases it, or at the second time.", "second",
             choice("first", "second")),
    ]  # fmt: skip


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """Disk tier: blocks in files under one directory."""

    path: Annotated[
        Path,
        Rule(
            "Directory of the disk tier.",
            "auto",
            path(),
            lambda env, _: machine.xdg_dir(env, "XDG_DATA_HOME", ".local/share") / "kvstore",
            "$XDG_DATA_HOME/kvstore, else ~/.local/share/kvstore",
        ),
    ]
    bytes: Annotated[
        int,
        Rule(
            "Budget of the disk tier, index and temporary files included; 0 switches it off.",
            "auto",
            size(0),
            lambda _, values: machine.auto_disk_bytes(values["disk.path"]),
            "25 % of the free space there and of what is stored already, at most 256GiB of new space",
        ),
    ]
    threads: Annotated[int, Rule("Threads that read from disk, and as many that write.", "4", integer(1, 64))]
    policy: Annotated[str, Rule("Eviction policy.", "lhd", choice("kvstore.eviction:names"))]
    deadline_s: Annotated[
        float, Rule("Longest time one read or write may take before it counts as failed.", "10s", duration(0.01, 3600))
    ]
    admission: Annotated[
        str,
        Rule("When a block is written there: when it is stored, or at its second sighting.", "first",
             choice("first", "second")),
    ]  # fmt: skip
    max_bandwidth: Annotated[
        int, Rule("Bytes a second that the tier may read and write together; 0 for no bound.", "0", size(0))
    ]


class Redis(msgspec.Struct, frozen=True, kw_only=True):
    """Redis tier: blocks in Redis or Valkey, shared by the daemons of a fleet."""

    url: Annotated[
        Secret,
        Rule(
            "redis://, rediss:// or unix:// URL, with user and password if there are any; empty: no such tier.",
            "",
            secret(1),
            alias="redis",
        ),
    ]
    cluster: Annotated[bool, Rule("Whether the server is a node of a cluster.", "false", switch)]
    bytes: Annotated[int, Rule("Bytes that all daemons with this prefix keep there.", "16GiB", size(1 << 20))]
    prefix: Annotated[str, Rule("What the names of all keys begin with; one for each deployment.", "kvstore", text)]
    key_file: Annotated[
        Path | None,
        Rule("File with 64 hex digits: seal everything there with AES-256-GCM.", "", path(optional=True)),
    ]
    connections: Annotated[int, Rule("Connections over which the parts of one block travel.", "4", integer(1, 64))]
    admission: Annotated[
        str,
        Rule("When a block is written there: when it is stored, or at its second sighting.", "first",
             choice("first", "second")),
    ]  # fmt: skip
    ttl_s: Annotated[float, Rule("How long a block stays after its last use.", "7d", duration(60, 31_536_000))]
    timeout_s: Annotated[float, Rule("Longest time one command may take.", "2s", duration(0.01, 60))]


class Codecs(msgspec.Struct, frozen=True, kw_only=True):
    """Codecs: how lower tiers keep blocks, and what lossy namespaces may be kept by."""

    disk: Annotated[
        str,
        Rule("How the disk tier keeps whole exact blocks: as they are, or smaller without loss.", "raw",
             choice("raw", "lossless")),
    ]  # fmt: skip
    redis: Annotated[str, Rule("The same for the Redis tier.", "raw", choice("raw", "lossless"))]
    profiles: Annotated[
        Path | None,
        Rule(
            "Folder of the profiles of `kvstore calibrate`; without one no block ever loses precision.",
            "",
            path(optional=True),
        ),
    ]
    threads: Annotated[int, Rule("Threads of each tier that encode and decode.", "2", integer(1, 64))]


class Chunks(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks: KV that is found by its own tokens and reused anywhere in a prompt."""

    index_bytes: Annotated[
        int,
        Rule(
            "Memory of the index of chunks; above it those used longest ago are no longer found by content.",
            "auto",
            size(1 << 16),
            lambda _, values: max(16 << 20, values["host.bytes"] // 64),
            "host.bytes / 64, at least 16MiB",
        ),
    ]
    variants: Annotated[
        int, Rule("Variants of one chunk that are kept, each computed in another context.", "5", integer(1, 64))
    ]


class Events(msgspec.Struct, frozen=True, kw_only=True):
    """Events: what came into the tiers of this daemon and what left them."""

    ring: Annotated[
        int, Rule("Events kept for subscribers who ask later; who is further behind gets a snapshot.", "65536",
                  integer(1, 1 << 24))
    ]  # fmt: skip
    share: Annotated[bool, Rule("Publish them at redis.url, and follow those of other daemons there.", "true", switch)]
    stream: Annotated[
        int, Rule("Entries that a daemon keeps in its stream in Redis, roughly.", "4096", integer(1, 1 << 20))
    ]
    name: Annotated[
        str,
        Rule(
            "What this daemon is called there, and by `/v1/where`; no two may have the same name.",
            "auto",
            text,
            lambda _, values: f"{os.uname().nodename}:{values['listen.socket']}",
            "host name and listen.socket, joined by a colon",
        ),
    ]


class Http(msgspec.Struct, frozen=True, kw_only=True):
    """Status page, metrics and health."""

    address: Annotated[
        str,
        Rule("host:port of status page and metrics; beyond loopback only with a token; empty switches them off.",
             "127.0.0.1:7070", address(), alias="http"),
    ]  # fmt: skip


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """OpenTelemetry: spans of requests."""

    endpoint: Annotated[
        str, Rule("OTLP collector that gets them over HTTP, such as http://127.0.0.1:4318; empty for none.", "", text)
    ]
    ratio: Annotated[float, Rule("Share of the requests that have a span.", "0.01", share)]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may ask for."""

    max_block_bytes: Annotated[int, Rule("Largest block.", "1GiB", size(4096, (1 << 32) - 1))]
    lease_ttl_s: Annotated[float, Rule("Longest lease or reservation granted.", "30s", duration(0.1, 86_400))]
    pin_percent: Annotated[int, Rule("Percent of a tier that pins may keep.", "50", integer(0, 90))]
    quota_file: Annotated[
        Path,
        Rule(
            "File that keeps the rules about quotas.",
            "auto",
            path(),
            lambda _, values: values["disk.path"].with_name(values["disk.path"].name + ".quotas.json"),
            "disk.path with .quotas.json appended",
        ),
    ]


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's log, on stderr."""

    level: Annotated[str, Rule("Least severe level shown.", "info", choice("debug", "info", "warning", "error"))]
    json: Annotated[
        bool,
        Rule("Write one JSON object a line.", "auto", switch, lambda *_: not sys.stderr.isatty(),
             "on when stderr is not a terminal"),
    ]  # fmt: skip


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of the daemon, each within its rule. Made by `load`."""

    listen: Listen
    host: Host
    gpu: Gpu
    disk: Disk
    redis: Redis
    codecs: Codecs
    chunks: Chunks
    events: Events
    http: Http
    trace: Trace
    limits: Limits
    log: Log
    drain_s: Annotated[
        float, Rule("Longest time a stopping daemon spends on writing to disk.", "10s", duration(0, 3600))
    ]


# -- names -------------------------------------------------------------------------------------------------------------


def flag_names(key: str) -> tuple[str, ...]:
    """Flags of a setting: ``--http-address`` and, where there is a short name, ``--http``."""
    alias = RULES[key].alias
    return ("--" + re.sub(r"[._]", "-", key), *([f"--{alias}"] if alias else []))


def env_names(key: str) -> tuple[str, ...]:
    """Environment names of a setting; the first one wins."""
    alias = RULES[key].alias
    return (ENV_PREFIX + key.replace(".", "_").upper(), *([ENV_PREFIX + alias.upper()] if alias else []))


def written_as(key: str) -> str:
    """How a setting's value is written, in a word: ``SIZE``, ``DURATION``, ``PATH``, ``HOST:PORT``, ..."""
    group, _, name = key.rpartition(".")
    kind = get_type_hints(GROUPS[group] if group else Settings)[name]
    if key.endswith("_s"):
        return "DURATION"
    if key.endswith("bytes"):
        return "SIZE"
    if kind in (Path, Path | None):
        return "PATH"
    if key in ("listen.tcp", "http.address"):
        return "HOST:PORT"
    return {bool: "true|false", int: "N", float: "N", tuple[int, ...]: "UID,UID", Secret: "SECRET"}.get(kind, "WORD")


def _collect() -> tuple[dict[str, type[msgspec.Struct]], dict[str, Rule]]:
    kinds: dict[str, type[msgspec.Struct]] = {}
    found: dict[str, Rule] = {}
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        if isinstance(kind, type):
            kinds[name] = kind
            for field, hint in get_type_hints(kind, include_extras=True).items():
                found[f"{name}.{field}"] = get_args(hint)[1]
        else:
            found[name] = get_args(kind)[1]
    return kinds, found


GROUPS, RULES = _collect()
"""Type of each group and rule of each setting, by dotted key, in the order above."""
