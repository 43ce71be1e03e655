"""What an engine tells the daemon of itself, for those who look at it; nothing depends on it."""

from __future__ import annotations

import contextlib

from kvstore.client.effects import Call
from kvstore.client.sync import KVStoreClient
from kvstore.errors import InvalidParams, UnknownMethod
from kvstore.types import Namespace
from kvstore.wire.messages import Report, Verdict


def report_blend(
    client: KVStoreClient,
    namespace: Namespace,
    *,
    prompts: int = 0,
    tokens: int = 0,
    computed: int = 0,
    verdict: Verdict | None = None,
) -> None:
    """Report what was put together from chunks since the last report.

    Parameters
    ----------
    namespace : Namespace
        In which the chunks were found.
    prompts, tokens, computed : int
        Prompts, the tokens of them behind their exact part, and how many of these were computed.
    verdict : Verdict, optional
        What the probe of this model measured.

    Raises
    ------
    KVStoreError
    """

    def build(ns: bytes) -> Call:
        return Call("report", Report(ns, prompts, tokens, computed, verdict))

    # A daemon from before there were reports, or a verdict with figures out of any range: then nobody is told.
    with contextlib.suppress(UnknownMethod, InvalidParams):
        client.drive(client.core.in_namespace(namespace, build), None)
