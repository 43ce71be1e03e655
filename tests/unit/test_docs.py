"""The docs say what is the case: links lead somewhere, every page is in the site, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from daemons import MakeDaemon

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = sorted([*DOCS.glob("*.md"), *TOP])
SNIPPETS = [
    (page.name, i, text)
    for page in (ROOT / "README.md", DOCS / "quickstart.md")
    for i, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        where = page.parent / unquote(name) if name else page
        assert where.exists(), target
        if anchor and where.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", where.read_text("utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path):
    if page.name in ("log.md", "CHANGELOG.md"):  # they tell of the past, too
        return
    named = re.findall(r"`((?:kvstore|connectors|gpu|bench|tests|docker|docs)/[\w./-]+\.\w+)`", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_site():
    yaml = pytest.importorskip("yaml", reason="pip install -e .[deploy]")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    listed = [page for group in nav for each in group.values() for page in ([each] if isinstance(each, str) else
              [name for entry in each for name in entry.values()])]  # fmt: skip
    assert len(listed) == len(set(listed))
    missing = {page.name for page in DOCS.glob("*.md")} - set(listed)
    assert set(listed) <= {page.name for page in DOCS.glob("*.md")}
    assert not missing, "add it to nav in mkdocs.yml"


@pytest.mark.parametrize(("page", "i", "text"), SNIPPETS, ids=[f"{page}-{i}" for page, i, _ in SNIPPETS])
def test_snippets_run(make_daemon: MakeDaemon, page: str, i: int, text: str):
    daemon = make_daemon({"host.bytes": "64MiB", "disk.bytes": "0"}).start()
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={"KVSTORE_CLIENT_ADDRESS": str(daemon.socket), "PATH": "/usr/bin:/bin"},
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Stored()" in done.stdout


def test_every_file_of_the_daemon_is_in_the_structures():
    text = (DOCS / "structures.md").read_text("utf-8")
    named = set(re.findall(r"[\w]+\.py", text))
    files = [file for file in [*ROOT.glob("kvstore/*.py"), *ROOT.glob("kvstore/*/*.py")] if file.stem[:2] != "__"]
    whole = set(re.findall(r"`(kvstore/\w+)/`", text))
    missing = [
        place for file in files if file.name not in named and str((place := file.relative_to(ROOT)).parent) not in whole
    ]
    assert not missing, "add a row"


def test_every_dependency_is_justified():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    wanted = {re.split(r"[^\w-]", line)[0] for line in asked}
    listed = set(re.findall(r"^\| `([\w-]+)`", (DOCS / "dependencies.md").read_text("utf-8"), re.M))
    assert listed == wanted


def test_every_paper_that_the_code_names_is_among_the_methods():
    files = [file for place in ("kvstore", "connectors", "gpu") for file in (ROOT / place).rglob("*.py")]
    named = {paper for file in files for paper in re.findall(r"\b2[0-9]{3}\.[0-9]{5}\b", file.read_text("utf-8"))}
    assert len(named) > 10
    assert named - set(re.findall(r"\b2[0-9]{3}\.[0-9]{5}\b", (DOCS / "methods.md").read_text("utf-8"))) == set()


def test_pictures_are_described():
    for page in DOCS.glob("*.md"):
        assert not re.findall(r"!\[\]\(", page.read_text("utf-8")), page.name
