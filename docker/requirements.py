"""Print the dependencies of pyproject.toml, without some of them: the daemon needs neither torch nor CuPy.

python docker/requirements.py pyproject.toml --without torch cupy-cuda13x
python docker/requirements.py pyproject.toml --only cupy-cuda13x
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path


def name_of(requirement: str) -> str:
    """The distribution that a requirement names, in its normal form."""
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if found is None:
        raise SystemExit(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def chosen(file: Path, without: list[str], only: list[str]) -> list[str]:
    """The requirements that are wanted; a name that is not there is a mistake of whoever named it."""
    listed = {name_of(each): each for each in tomllib.loads(file.read_text("utf-8"))["project"]["dependencies"]}
    unknown = {*without, *only} - set(listed)
    if unknown:
        raise SystemExit(f"{file}: {', '.join(sorted(unknown))} is not among its dependencies")
    return [each for name, each in listed.items() if name not in without and (not only or name in only)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    print("\n".join(chosen(given.file, given.without, given.only)))
