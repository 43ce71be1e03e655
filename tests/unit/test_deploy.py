"""What stands in docker/: linted, rendered and checked against the schemas of its readers; the entry script runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from daemons import free_port

from kvstore.cli.reference import engine_counters
from kvstore.config import load
from kvstore.obs.metrics import TABLE
from kvstore.settings import RULES, env_names

yaml = pytest.importorskip("yaml", reason="pip install -e .[deploy]")

DOCKER = Path(__file__).parents[2] / "docker"
CHART = DOCKER / "helm" / "kvstore"
SERIES = {
    name
    for row in TABLE
    for name in ([f"{row.name}_{end}" for end in ("bucket", "sum", "count")] if row.type == "histogram" else [row.name])
}
SETTINGS = {name for key in RULES for name in env_names(key)}


def tool(name: str) -> str:
    """A tool of the environment, or skip."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e .[deploy]")
    return found


def documents(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [each for each in yaml.safe_load_all(text) if each]


# -- images ------------------------------------------------------------------------------------------------------------


def test_the_dockerfile_and_the_entry_script_are_clean():
    subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], check=True)
    subprocess.run([tool("shellcheck"), str(DOCKER / "entrypoint.sh")], check=True)


def test_the_image_installs_what_pyproject_names_but_torch_and_cupy():
    project = DOCKER.parent / "pyproject.toml"
    command = [sys.executable, str(DOCKER / "requirements.py"), str(project)]
    out = subprocess.run([*command, "--without", "torch", "cupy-cuda13x"], check=True, capture_output=True, text=True)
    named = tomllib.loads(project.read_text())["project"]["dependencies"]
    assert out.stdout.split("\n")[:-1] == [each for each in named if not re.match("torch|cupy", each)]
    wrong = subprocess.run([*command, "--without", "trch"], check=False, capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "trch" in wrong.stderr


@pytest.fixture
def container(workdir: Path) -> dict[str, str]:
    """The environment of the image, with its directories elsewhere."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return {
        "PATH": path,
        "HOME": str(workdir),
        "KVSTORE_SOCKET": str(workdir / "run/private/kvstore.sock"),
        "KVSTORE_DISK_PATH": str(workdir / "blocks"),
        "KVSTORE_DISK_BYTES": "64MiB",
        "KVSTORE_HOST_BYTES": "64MiB",
        "KVSTORE_HTTP": f"127.0.0.1:{free_port()}",
    }


def entry(environment: dict[str, str], *words: str) -> list[str]:
    """The entry script as the image starts it."""
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK)
    return [
        "env",
        "-i",
        *[f"{name}={value}" for name, value in environment.items()],
        str(DOCKER / "entrypoint.sh"),
        *words,
    ]


def test_the_entry_script_runs_the_daemon_and_hands_it_signals(container: dict[str, str], workdir: Path):
    asleep = subprocess.run(entry(container, "healthy"), check=False, capture_output=True, text=True)
    assert asleep.returncode == 1
    assert "not ready" in asleep.stderr
    daemon = subprocess.Popen(entry(container), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 60
        while subprocess.run(entry(container, "healthy"), check=False, capture_output=True).returncode:
            assert time.monotonic() < end, "the daemon did not come up"
            assert daemon.poll() is None, daemon.communicate()[0]
            time.sleep(0.1)
        assert (workdir / "run/private").stat().st_mode & 0o777 == 0o700
        with urllib.request.urlopen(f"http://{container['KVSTORE_HTTP']}/readyz", timeout=5) as answer:
            assert json.load(answer)["ready"] is True
        version = subprocess.run(entry(container, "version", "--json"), check=True, capture_output=True, text=True)
        assert "kvstore" in json.loads(version.stdout)
        daemon.send_signal(signal.SIGTERM)
        said, _ = daemon.communicate(timeout=30)
        assert daemon.returncode == 0, said
        assert "Bye." in said
    finally:
        daemon.kill()


def test_the_entry_script_says_what_is_wrong_with_a_directory(container: dict[str, str], workdir: Path):
    (workdir / "file").write_text("")
    wrong = subprocess.run(
        entry(container | {"KVSTORE_SOCKET": f"{workdir}/file/kvstore.sock"}),
        check=False,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert "KVSTORE_SOCKET" in wrong.stderr


# -- compose -----------------------------------------------------------------------------------------------------------


def test_compose_knows_only_settings_that_there_are():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    daemon = compose["services"]["kvstore"]
    assert set(daemon["environment"]) <= SETTINGS
    assert daemon["read_only"] is True
    assert daemon["cap_drop"] == ["ALL"]
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "nothing beyond this host"
        assert ":latest" not in service["image"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or source == "./run" or (DOCKER / source).exists(), source
        assert set(service.get("depends_on", [])) <= set(compose["services"])


def test_prometheus_and_grafana_find_what_compose_mounts():
    prometheus = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    for file in prometheus["rule_files"]:
        assert (DOCKER / "prometheus" / file).is_file()
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/kvstore.yaml").read_text())
    mounts = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert any(provider["providers"][0]["options"]["path"] in mount for mount in mounts)


# -- queries -----------------------------------------------------------------------------------------------------------


def selectors(query: str) -> set[str]:
    """Names of the series in a query; the query is parsed as Prometheus would."""
    parser = pytest.importorskip("promql_parser", reason="pip install -e .[deploy]")
    plain = query.replace("$__rate_interval", "1m").replace("$instance", ".*")
    parser.parse(plain)
    bare = re.sub(r'"[^"]*"|{[^}]*}', " ", plain)
    known = ("kvstore_", "vllm:kvstore_")
    return {name for name in re.findall(r"[a-z_:][a-z0-9_:]*", bare) if name.startswith(known) or name == "up"}


def labels_of(query: str) -> set[str]:
    """Labels that a query asks for."""
    return set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)) | {
        word for group in re.findall(r"(?:by|on|ignoring)\s*\(([^)]*)\)", query) for word in re.findall(r"\w+", group)
    }


QUERIES = [
    rule["expr"]
    for group in yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
] + [
    target["expr"]
    for panel in json.loads((DOCKER / "grafana/kvstore.json").read_text())["panels"]
    for target in panel.get("targets", [])
]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_for_series_and_labels_that_there_are(query: str):
    names = selectors(query)
    assert names
    assert names <= SERIES | {f"vllm:kvstore_{name}_total" for name in engine_counters()} | {"up"}
    known = {label for row in TABLE for label in row.reading.labels} | {"instance", "job", "le"}
    assert labels_of(query) <= known


def test_the_board_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("board", DOCKER / "grafana/board.py")
    assert spec is not None
    assert spec.loader is not None
    board = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(board)
    assert (DOCKER / "grafana/kvstore.json").read_text() == board.text(), "python docker/grafana/board.py"
    ids = [panel["id"] for panel in board.board()["panels"]]
    assert len(ids) == len(set(ids))


# -- Kubernetes --------------------------------------------------------------------------------------------------------


def is_valid(resource: dict[str, Any]) -> None:
    """Check a resource against the schemas of Kubernetes; what is not of Kubernetes itself has none there."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e .[deploy]")
    if resource["apiVersion"].startswith("monitoring.coreos.com/"):
        return
    validate.validate(resource, "1.33", strict=True)


def test_the_sidecar_is_valid_and_starts_before_the_engine():
    resources = documents((DOCKER / "kubernetes/sidecar.yaml").read_text())
    for resource in resources:
        is_valid(resource)
    pod = resources[0]["spec"]["template"]["spec"]
    sidecar = pod["initContainers"][0]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert {each["name"] for each in sidecar["env"]} <= SETTINGS
    mounts = [{m["name"] for m in c["volumeMounts"]} for c in (sidecar, pod["containers"][0])]
    assert "socket" in mounts[0] & mounts[1]
    assert pod["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"createToken": False},
        {"disk": {"bytes": "0"}, "env": {"KVSTORE_LOG_LEVEL": "debug"}},
        {
            "redis": {"urlSecret": "valkey"},
            "podMonitor": {"enabled": True},
            "alerts": {"enabled": True},
            "grafanaDashboard": {"enabled": True},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "podAnnotations": {"a": "b"},
        },
    ],
)
def test_the_chart_renders_to_valid_resources(values: dict[str, Any]):
    helm = pytest.importorskip("helm_python.chart", reason="pip install -e .[deploy]")
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values=values, name="demo")
    resources = [each for name, text in rendered.items() if name.endswith(".yaml") for each in documents(text)]
    for resource in resources:
        is_valid(resource)
    kinds = {each["kind"] for each in resources}
    assert {"DaemonSet", "NetworkPolicy"} <= kinds
    daemon = next(each for each in resources if each["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    environment = {each["name"]: each.get("value") for each in daemon["containers"][0]["env"]}
    assert set(environment) <= SETTINGS
    wide = not str(environment["KVSTORE_HTTP"]).startswith("127.")
    assert wide == ("KVSTORE_LISTEN_TOKEN_FILE" in environment), "beyond loopback only with a token"
    plain = {name: value for name, value in environment.items() if value is not None and "TOKEN" not in name}
    load(env=plain | ({"KVSTORE_TOKEN": "0123456789abcdef"} if wide else {}))
    if values.get("alerts"):
        rule = next(each for each in resources if each["kind"] == "PrometheusRule")
        assert rule["spec"] == yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())
        board = next(each for each in resources if each["kind"] == "ConfigMap")
        assert json.loads(board["data"]["kvstore.json"])["uid"] == "kvstore"


@pytest.mark.parametrize(
    "values",
    [{"hots": {}}, {"host": {"bytes": "16G"}}, {"runAsUser": 0}, {"http": {"port": 80}}, {"env": {"PATH": "/"}}],
)
def test_the_chart_refuses_wrong_values(values: dict[str, Any]):
    helm = pytest.importorskip("helm_python.chart", reason="pip install -e .[deploy]")
    with helm.Chart.load(CHART) as chart, pytest.raises(Exception, match=r"schema|additional|match|minimum"):
        chart.render(values=values, name="demo")


def test_the_chart_is_clean():
    helm = pytest.importorskip("helm_python.chart", reason="pip install -e .[deploy]")
    report = helm.lint(CHART)
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > 1] == []


# -- systemd -----------------------------------------------------------------------------------------------------------


def test_the_unit_is_valid_and_hardened(workdir: Path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    unit = (DOCKER / "systemd/kvstore.service").read_text()
    here = workdir / "kvstore.service"
    here.write_text(unit.replace("/opt/kvstore/bin/kvstore", shutil.which("true") or "/bin/true"))
    checked = subprocess.run([analyze, "verify", str(here)], check=False, capture_output=True, text=True)
    assert checked.stderr == ""
    assert checked.returncode == 0
    said = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", str(here)],
        check=False,
        capture_output=True,
        text=True,
    )
    if "Unknown" not in said.stderr and "unrecognized" not in said.stderr:  # an old systemd has no such option
        assert said.returncode == 0, said.stdout[-400:]
    names = {
        name
        for line in unit.splitlines()
        if (name := line.removeprefix("Environment=").split("=")[0]).startswith("KVSTORE_")
    }
    assert names <= SETTINGS
