"""`kvstore`: runs a command; what goes wrong is one line with its remedy, and an exit code that says what kind.

Exit codes: 0 done; 1 something is wrong (a finding, a failed probe, storage in trouble); 2 command line or setting is
wrong; 3 the daemon cannot be reached; 70 a defect of kvstore; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from kvstore import __version__

EXIT_WRONG, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_DEFECT, EXIT_INTERRUPTED = 1, 2, 3, 70, 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if tokens in (["--version"], ["-V"]):  # before anything is imported: scripts ask this often
        print(f"kvstore {__version__}")
        sys.exit(0)
    sys.exit(run(tokens))


def run(tokens: Sequence[str]) -> int:
    """Run one command; the exit code."""
    from cyclopts import CycloptsError

    from kvstore.cli import out
    from kvstore.cli.app import app
    from kvstore.errors import ConfigError, InternalError, KVStoreError, Unavailable

    try:
        result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        out.error(str(error).strip(), f"`{_help_command(tokens)}` shows what it takes.")
        return EXIT_USAGE
    except KVStoreError as error:
        out.error(f"[{error.code}] {error.cause}", error.remedy)
        kinds: dict[type[KVStoreError], int] = {
            ConfigError: EXIT_USAGE,
            Unavailable: EXIT_UNREACHABLE,
            InternalError: EXIT_DEFECT,
        }
        return next((code for kind, code in kinds.items() if isinstance(error, kind)), EXIT_WRONG)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _help_command(tokens: Sequence[str]) -> str:
    from kvstore.cli.app import app

    words, place = ["kvstore"], app
    for token in tokens:
        if token.startswith("-") or token not in list(place):
            break
        words, place = [*words, token], place[token]
    return " ".join([*words, "--help"])
