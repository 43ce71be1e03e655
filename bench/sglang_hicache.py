"""SGLang's host pool to and from kvstore, by SGLang's own controller, against its file backend and a memcpy.

One batch of pages is stored and loaded as SGLang's controller does it in its threads: through `page_set_func` and
`page_get_func`, with the interface it picks for each backend. The file backend writes to a directory under `--folder`,
into the page cache and never to the device. The limit is a memcpy of as many bytes, in the same process.

    python bench/sglang_hicache.py --out bench/results/sglang_hicache.json
"""

from __future__ import annotations

import sys
import tempfile
import uuid
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import ROOT, arguments, finish, running_daemon, timed, touched

sys.path[1:1] = [str(ROOT / "tests" / "hicache"), str(ROOT / "tests" / "engines")]
import stubs  # noqa: E402

stubs.install()
import pools  # noqa: E402
import torch  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo  # noqa: E402

GIB = 1 << 30
BATCH = 32
HOST = "256MiB"
WARM = 6
"""Rounds until all of the daemon's memory has been touched, and mapped, once."""

LLAMA_8B = {"layers": 32, "head_num": 8, "head_dim": 128}
LAYOUTS = ("layer_first", "page_first", "page_first_direct")
OPERATION = SimpleNamespace(request_id="bench", is_terminated=lambda: False)


class Contestant:
    """One backend behind SGLang's controller."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller
        self.keys: list[str] = []
        self.out = pools.indices(range(BATCH))
        self.back = pools.indices(range(BATCH, 2 * BATCH))

    def store(self) -> None:
        """A batch of pages nobody has stored before."""
        self.keys = [uuid.uuid4().hex * 2 for _ in range(BATCH)]
        if not self.controller.page_set_func(self.keys, self.out, HiCacheStorageExtraInfo()):
            raise SystemExit("a page was not stored")

    def load(self) -> None:
        """The batch stored last, to another place."""
        if self.controller.page_get_func(OPERATION, self.keys, self.back, HiCacheStorageExtraInfo()) != BATCH:
            raise SystemExit("a page was not loaded")

    def check(self) -> None:
        """What came back is what went out."""
        pool = self.controller.storage_host_pool
        for page in range(BATCH):
            if pools.content(pool, page) != pools.content(pool, BATCH + page):
                raise SystemExit("a page came back wrong")


def race(layout: str, address: str, folder: str, rounds: int) -> tuple[dict[str, list[float]], int]:
    """GiB/s of every contestant in every round, in turns; bytes of a page."""
    with (
        pools.controller("mha", layout, {"address": address}, **LLAMA_8B) as ours,
        pools.controller("mha", layout, {"address": address}, **LLAMA_8B) as theirs,
    ):
        theirs.detach_storage_backend()
        theirs.attach_storage_backend("file", storage_backend_extra_config={"file_storage_path": folder})
        contestants = {"kvstore": Contestant(ours), "file": Contestant(theirs)}
        nbytes = ours.storage_backend._transfers.pages.nbytes
        source, target = touched(BATCH * nbytes), touched(BATCH * nbytes)
        seen: dict[str, list[float]] = {}
        for one in contestants.values():
            pools.fill(one.controller.storage_host_pool)
        for number in range(WARM + rounds):
            took = {"memcpy": timed(np.copyto, target, source)}
            for name, one in contestants.items():
                took[f"{name} store"] = timed(one.store)
                took[f"{name} load"] = timed(one.load)
                one.check()
            if number >= WARM:
                for name, seconds in took.items():
                    seen.setdefault(name, []).append(BATCH * nbytes / seconds / GIB)
    return seen, nbytes


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, help="where SGLang's file backend writes (default: a temporary one)")
    args = parser.parse_args()
    pools.PAGE, pools.PAGES = 16, 2 * BATCH
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, running_daemon({"host.bytes": HOST}) as address:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        with pools.engine(model_path="models/tiny"):
            for layout in LAYOUTS:
                seen, nbytes = race(layout, address, folder, args.rounds)
                rates = {name: {"gib_s": median(each), "best": max(each)} for name, each in seen.items()}
                results[layout] = rates | {"page_bytes": nbytes}
                for way in ("store", "load"):
                    mine, file, limit = (rates[name]["gib_s"] for name in (f"kvstore {way}", f"file {way}", "memcpy"))
                    rows.append((layout, way, f"{mine:.2f}", f"{file:.2f}", f"{limit:.2f}", f"{mine / limit:.0%}"))
        torch.distributed.destroy_process_group()
    header = ("layout", "GiB/s", "kvstore", "SGLang's file backend", "memcpy", "share of it")
    finish(args, "sglang_hicache", {"pages": BATCH, "tokens": pools.PAGE, "model": LLAMA_8B, **results}, header, rows)


if __name__ == "__main__":
    main()
