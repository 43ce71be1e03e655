"""Spans of requests: which have one, what it says, and what it never says."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from daemons import NAMESPACE, MakeDaemon, free_port, key, store

from kvstore import KVStoreClient
from kvstore.errors import ConfigError, LeaseExpired

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="pip install -e .[trace]")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from kvstore.obs import trace  # noqa: E402


def traced(ratio: float) -> tuple[trace.Tracing, InMemorySpanExporter]:
    """Tracing whose spans can be looked at."""
    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return trace.Tracing(provider, ratio), exporter


def test_a_span_says_verb_time_and_error():
    tracing, exporter = traced(1.0)
    tracing.record("lease", 0.25, None)
    tracing.record("commit", 0.01, LeaseExpired("a secret cause."))
    good, bad = exporter.get_finished_spans()
    assert good.name == "lease"
    assert good.end_time - good.start_time == 250_000_000
    assert dict(good.attributes) == {"db.system.name": "kvstore", "db.operation.name": "lease"}
    assert bad.attributes["error.type"] == "KV401"
    assert not bad.status.is_ok
    assert "secret" not in bad.to_json()


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.0, 0, 0), (0.2, 120, 280), (1.0, 1000, 1000)])
def test_only_a_share_has_spans(ratio: float, low: int, high: int):
    tracing, exporter = traced(ratio)
    for _ in range(1000):
        tracing.record("lookup", 1e-4, None)
    assert low <= len(exporter.get_finished_spans()) <= high


def test_a_daemon_sends_them_to_a_collector(make_daemon: MakeDaemon):
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    port = free_port()
    collector = HTTPServer(("127.0.0.1", port), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    daemon = make_daemon({"trace.endpoint": f"http://127.0.0.1:{port}", "trace.ratio": "1", "disk.bytes": "0"}).start()
    with KVStoreClient(daemon.socket, namespace=NAMESPACE) as client:
        store(client, [key(1)])
        assert client.stats()["ready"]
    daemon.stop()
    collector.shutdown()
    assert {path for path, _ in got} == {"/v1/traces"}
    sent = b"".join(body for _, body in got)
    assert b"reserve" in sent
    assert key(1) not in sent


def test_without_opentelemetry_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"kvstore\[trace\]"):
        trace.start("http://127.0.0.1:4318", 1.0)
