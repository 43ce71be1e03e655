"""Spans of requests for OpenTelemetry, where `trace.endpoint` names a collector. Needs ``pip install kvstore[trace]``.

A span is made after the request ended, with the times it began and ended, so nothing is added to a request that is not
sampled but one comparison. It says the verb, the error's code if there was one, and what OpenTelemetry says of any
database call. Names of blocks, tokens and tenants are in none.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from kvstore import __version__
from kvstore.errors import ConfigError, KVStoreError

Recorder = Callable[[str, float, KVStoreError | None], None]
"""Told of a request that ended: its verb, how many seconds it took, its error."""


class Tracing:
    """Sends spans of some requests.

    Parameters
    ----------
    provider : opentelemetry.sdk.trace.TracerProvider
        Where spans go.
    ratio : float
        Share of the requests that have a span.
    """

    def __init__(self, provider: Any, ratio: float) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        self._provider = provider
        self._tracer = provider.get_tracer("kvstore", __version__)
        self._ratio = ratio
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def record(self, verb: str, seconds: float, failed: KVStoreError | None) -> None:
        """Make a span of a request that ended just now, if it is one of those to have one."""
        if random.random() >= self._ratio:
            return
        now = time.time_ns()
        attributes = {"db.system.name": "kvstore", "db.operation.name": verb}
        if failed is not None:
            attributes["error.type"] = failed.code
        span = self._tracer.start_span(
            verb, kind=self._kind, attributes=attributes, start_time=now - round(seconds * 1e9)
        )
        if failed is not None:
            span.set_status(self._failed)
        span.end(end_time=now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def start(endpoint: str, ratio: float) -> Tracing:
    """Send spans to an OTLP collector over HTTP, such as ``http://127.0.0.1:4318``.

    Raises
    ------
    ConfigError
        If OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            f"trace.endpoint: {endpoint!r} is given, but OpenTelemetry is not installed.",
            "pip install kvstore[trace], or leave trace.endpoint empty.",
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "kvstore", "service.version": __version__}))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=4096))
    return Tracing(provider, ratio)
