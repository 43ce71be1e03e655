"""What importing costs, and what shipped code must not contain."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kvstore

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("kvstore", "gpu", "connectors") for path in (ROOT / folder).rglob("*.py"))
HEAVY = {"torch", "cupy", "redis", "aiohttp", "transformers", "vllm", "prometheus_client"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kvstore.client",
        "from kvstore import KVStoreClient, AsyncKVStoreClient",
        "import kvstore.config",
        "import kvstore.cli.app",
    ],
)
def test_what_an_engine_or_a_shell_imports_loads_no_heavy_library(statement: str) -> None:
    assert not loaded_by(statement) & HEAVY


def test_the_package_itself_loads_nothing() -> None:
    assert not loaded_by("import kvstore") & (HEAVY | {"numpy", "msgspec", "rich", "cyclopts", "asyncio"})


def test_importing_the_command_line_does_not_load_the_daemon() -> None:
    code = "import sys, kvstore.cli.app; sys.exit('kvstore.daemon' in sys.modules or 'kvstore.client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- public names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kvstore.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kvstore, name) is not None
    assert name in dir(kvstore)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kvstore.Nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_what_the_lazy_import_gives() -> None:
    """The block for type checkers names the same things, from the same modules, as the table used at run time."""
    tree = ast.parse((ROOT / "kvstore" / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(seen) | {"__version__"} == set(kvstore.__all__)
    for name, module in seen.items():
        assert module
        assert getattr(importlib.import_module(module), name) is getattr(kvstore, name)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "kvstore" / "py.typed").is_file()


# -- what is never in shipped code -------------------------------------------------------------------------------------

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def _calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def _modules(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_bytes_become_code(path: Path) -> None:
    """No pickle, marshal, torch.load or eval anywhere: what a peer or a file says is data."""
    tree = ast.parse(path.read_text("utf-8"))
    assert not _modules(tree) & BANNED_MODULES
    calls = _calls(tree)
    assert not calls & (BANNED_CALLS | {"torch.load"})
    assert not any(name.endswith((".loads_pickle", ".load_pickle")) for name in calls)


@pytest.mark.parametrize(
    "path",
    [path for path in SHIPPED if "testing" not in path.parts],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_guard_vanishes_under_optimization(path: Path) -> None:
    """`assert` is not there under `python -O`; checks that matter raise."""
    tree = ast.parse(path.read_text("utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_a_tier_that_encodes_nothing_does_not_load_torch() -> None:
    """It takes seconds, in which the daemon would answer nobody."""
    code = """
import sys
from kvstore import BlockHeader, Namespace
from kvstore.encoding import Encoding, form_of
shape = dict(layers=2, block_tokens=16, kv_heads=1, head_dim=8)
form = form_of(Namespace(model="m", dtype="float16", layout="lkthd1", **shape))
assert form is not None
assert Encoding("raw", None).first(form, BlockHeader(), form.whole, durable=False) is None
assert "torch" not in sys.modules, "torch"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
