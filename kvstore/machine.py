"""What this machine offers: memory this process may use, free space, and the user's own directories."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

GIB = 1 << 30


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use: the machine's, or the smallest limit of its control groups.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are found; tests give another.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _memory_limit_files(root):
        try:
            text = file.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdigit():  # otherwise "max": no limit here
            limits.append(int(text))
    return min(limits)


def _memory_limit_files(root: Path) -> Iterator[Path]:
    """Limit files of this process's groups and of all groups above them, in both versions of control groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A container may see its group's path from outside but only its own subtree: the base itself is then its group.
        place = base / os.path.normpath(group.lstrip("/"))
        for above in (place, *place.parents):
            if above.is_relative_to(base):
                yield above / name


def free_space(path: Path) -> int:
    """Bytes a normal user may still write on the filesystem that holds `path`, or will hold it once it is made."""
    for place in (path, *path.parents):
        try:
            state = os.statvfs(place)
        except OSError:
            continue
        return state.f_bavail * state.f_frsize
    return 0


def home(env: Mapping[str, str]) -> Path:
    """The user's home directory."""
    return Path(env["HOME"]) if env.get("HOME", "").startswith("/") else Path.home()


def xdg_dir(env: Mapping[str, str], name: str, fallback: str) -> Path:
    """A base directory of the XDG specification, which wants relative values ignored."""
    return Path(env[name]) if env.get(name, "").startswith("/") else home(env) / fallback


def default_socket(env: Mapping[str, str]) -> Path:
    """Where the daemon listens and clients look: in the user's run-time directory, else below the home directory."""
    for place in (env.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.getuid()}"):
        if place.startswith("/") and _is_private_dir(place):
            return Path(place, "kvstore", "kvstore.sock")
    return home(env) / ".kvstore" / "run" / "kvstore.sock"


def _is_private_dir(place: str) -> bool:
    try:
        state = os.stat(place)
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()


def auto_host_bytes() -> int:
    """A quarter of the memory this process may use, at least 256 MiB and at most 64 GiB, in whole MiB."""
    quarter = usable_memory() // 4 >> 20 << 20
    return min(max(quarter, GIB // 4), 64 * GIB)


INDEX_SHARE = 32
"""One part in so many of the host tier's budget is set aside for the index of its blocks."""


def auto_slab_bytes(host_bytes: int) -> int:
    """Slabs few enough that a client with 1,024 descriptors can map them all, small enough to come and go, and of a
    size that leaves next to nothing over: what is too little for a slab would hold no block."""
    most = min(max(1 << (max(host_bytes // 64, 1) - 1).bit_length(), 64 << 20), GIB)
    blocks = host_bytes - host_bytes // INDEX_SHARE
    even = blocks // -(-blocks // most)
    return even >> 21 << 21 if even >= 32 << 20 else even  # of whole huge pages


DISK_SHARE = 0.25
"""Share of free space that the automatic budget of the disk tier is."""


def auto_disk_bytes(path: Path) -> int:
    """A quarter of the free space around `path`, at most 256 GiB, in whole MiB."""
    return min(int(free_space(path) * DISK_SHARE) >> 20 << 20, 256 * GIB)
