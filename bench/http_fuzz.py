"""Ask a daemon over HTTP for everything its own description allows, and for much that it does not.

Schemathesis reads /v1/openapi.json and makes requests of it: well-formed ones, wrong ones, missing ones. Wanted are no
answer of 500 and none that the description does not know, by status, type or shape. Needs ``pip install schemathesis``,
here or in another environment whose `schemathesis` is on the path.

    python bench/http_fuzz.py --cases 300 --out bench/results/http_fuzz.json
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, finish, running_daemon

TOKEN = "a token of this bench alone"
SKIPPED = {
    "/v1/events": "a stream that never ends; tests/unit/test_http.py reads it",
    "/v1/drain": "it would make /readyz answer 503 from then on, as it should",
}


def fuzz(port: int, cases: int, seed: int) -> dict[str, Any]:
    """One run of schemathesis against a daemon; what it found."""
    tool = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    if tool is None:
        raise SystemExit("schemathesis is not installed: pip install schemathesis")
    skipped = [word for path in SKIPPED for word in ("--exclude-path", path)]
    command = [
        *(tool, "run", f"http://127.0.0.1:{port}/v1/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", *skipped),
        *("--phases", "examples,coverage,fuzzing", "-n", str(cases), "--seed", str(seed), "--continue-on-failure"),
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        run = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-4000:], run.stderr[-1000:], file=sys.stderr)
    counted = re.search(r"(\d+) generated(?:, \d+ found (\d+) unique failures)?", run.stdout)
    if counted is None:
        raise SystemExit("schemathesis did not say how many requests it made")
    operations = re.search(r"Operations:\s+(\d+) selected", run.stdout)
    return {
        "requests": int(counted[1]),
        "operations": int(operations[1]) if operations else 0,
        "unique_failures": int(counted[2] or 0),
        "exit_code": run.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "skipped": SKIPPED,
    }


def main() -> int:
    """Run it; 1 if something was found."""
    parser = arguments(__doc__)
    parser.add_argument("--cases", type=int, default=300, help="requests of each operation in the last phase")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "http.address": f"127.0.0.1:{port}",
        "listen.token": TOKEN,
        "host.bytes": "64MiB",
        "disk.bytes": "64MiB",
    }
    with running_daemon(settings):
        found = fuzz(port, args.cases, args.seed)
    row = (found["operations"], found["requests"], found["unique_failures"], found["seconds"])
    finish(args, "http_fuzz", found, ("operations", "requests", "failures", "seconds"), [row])
    return int(found["exit_code"] != 0)


if __name__ == "__main__":
    sys.exit(main())
