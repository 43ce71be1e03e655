"""What every connector keeps to: an engine never waits long for us, and never fails because of us.

A connector reaches the daemon through a `Link`, one for each thread that calls. All links of a process share a
`Breaker`: the first call that finds the daemon gone or hung opens it, calls are then skipped at once, and a background
thread connects again. So an outage costs an engine one deadline, and a restarted daemon is met without anybody's help.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

from kvstore.errors import (
    AccessError,
    ConfigError,
    FidelityRefused,
    InternalError,
    KVStoreError,
    ProtocolError,
    ShuttingDown,
    Unavailable,
    UnknownNamespace,
)
from kvstore.types import MissReason

log = logging.getLogger("kvstore.connector")

P = ParamSpec("P")
T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
LASTING_PAUSE_S = 30.0
"""Pause after an error that trying again will hardly mend: a wrong token, another protocol version."""


class Client(Protocol):
    """What a link needs of a client; `kvstore.KVStoreClient` has it."""

    def connect(self) -> None:
        """Reach the daemon, if that has not happened yet."""

    def stats(self) -> dict[str, Any]:
        """Any cheap question that proves the daemon answers."""
        ...

    def close(self) -> None:
        """End the connection."""


def is_final(reason: MissReason | None, held: bool) -> bool:
    """Whether a load ends with a block that did not come for this reason (None: all came).

    Blocks on their way up from a lower tier are worth another round, and so is memory that was full while some of it
    was `held` for this load. Anything else is final.
    """
    return reason not in (None, MissReason.DEADLINE) and not (held and reason is MissReason.NO_SPACE)


class Tally:
    """Counters that any thread may raise and one reader drains."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Raise a counter."""
        with self._lock:
            self._counts[name] += amount  # type: ignore[assignment]

    def drain(self) -> dict[str, float]:
        """All counters since the last call."""
        if not self._counts:
            return {}
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def peek(self) -> dict[str, float]:
        """All counters, left as they are."""
        with self._lock:
            return dict(self._counts)


def is_outage(error: KVStoreError) -> bool:
    """Whether an error says that the daemon as a whole can not be used now, rather than this one call."""
    if isinstance(error, UnknownNamespace):
        return False
    return isinstance(error, Unavailable | ShuttingDown | ProtocolError | AccessError | ConfigError)


def is_lasting(error: KVStoreError) -> bool:
    """Whether trying again soon is of no use."""
    return isinstance(error, ProtocolError | AccessError | ConfigError)


class Breaker:
    """Stands between an engine's threads and a daemon that may be gone.

    It begins open, until the links have connected in the background. `allow` is asked before every call, `trip` told of
    every outage. One warning is written when an outage begins, one line when it has ended.

    Parameters
    ----------
    name : str
        Whose outages these are, for the log.
    tally : Tally
        Counts ``outages``.
    """

    def __init__(self, name: str, tally: Tally) -> None:
        self._name = name
        self._tally = tally
        self._links: list[Link] = []
        self._change = threading.Condition()
        self._usable = False
        self._tried = False
        self._closed = False
        self._announced = False
        self._thread: threading.Thread | None = None

    def allow(self) -> bool:
        """Whether the daemon may be called now."""
        return self._usable

    def watch(self, link: Link) -> None:
        """Take over connecting a link."""
        with self._change:
            self._links.append(link)

    def start(self, wait_s: float = 0.0) -> bool:
        """Begin to connect, and wait that long at most for the first attempt. True if the daemon was reached."""
        self._connect_in_background()
        with self._change:
            self._change.wait_for(lambda: self._usable or self._tried, wait_s)
        return self._usable

    def trip(self, error: KVStoreError) -> None:
        """Stop calling the daemon until it answers again."""
        with self._change:
            if self._closed:
                return
            was_usable, self._usable = self._usable, False
        if was_usable:
            self._tally.add("outages")
        self._announce(error)
        self._connect_in_background()

    def close(self) -> None:
        """Give up; nothing is called any more."""
        with self._change:
            self._closed = True
            self._usable = False
            self._change.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1.0)

    def _announce(self, error: KVStoreError) -> None:
        if not self._announced:
            self._announced = True
            log.warning("%s: continuing without kvstore until it answers again. %s", self._name, error)

    def _connect_in_background(self) -> None:
        with self._change:
            if self._closed or self._usable or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._connect, name=f"{self._name}-connect", daemon=True)
            self._thread.start()

    def _connect(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._closed:
            error = self._try_all()
            with self._change:
                self._tried = True
                if error is None:
                    # The thread is given up under the lock, so that a trip just after this starts a new one.
                    self._usable, self._thread = not self._closed, None
                self._change.notify_all()
                if error is None:
                    break
            self._announce(error)
            longest = LASTING_PAUSE_S if is_lasting(error) else LONGEST_PAUSE_S
            with self._change:
                self._change.wait_for(lambda: self._closed, pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, longest)
        if self._announced and not self._closed:
            self._announced = False
            log.warning("%s: kvstore answers; using it again.", self._name)

    def _try_all(self) -> KVStoreError | None:
        for link in list(self._links):
            try:
                link.connect()
            except KVStoreError as error:
                return error
            except Exception as error:  # a defect of ours must not end the thread that mends outages
                log.debug("connecting failed", exc_info=True)
                return InternalError(f"connecting failed: {type(error).__name__}: {error}.")
        return None


class Link:
    """One client for one thread, behind the breaker.

    Parameters
    ----------
    open_client : callable
        Makes the client; called by the breaker's thread, so the engine's threads never pay for a connection.
    breaker : Breaker
    tally : Tally
        Counts ``skipped_<operation>`` and ``failed_<operation>``.
    """

    def __init__(self, open_client: Callable[[], Any], breaker: Breaker, tally: Tally) -> None:
        self._open_client = open_client
        self._breaker = breaker
        self._tally = tally
        self._client: Any = None
        breaker.watch(self)

    def connect(self) -> None:
        """Make sure that the daemon answers; raises what the client raises."""
        if self._client is None:
            self._client = self._open_client()
        self._client.connect()
        self._client.stats()  # a hung daemon still accepts connections: only an answer counts

    def run(self, operation: str, work: Callable[[Any], T]) -> T | None:
        """Do some work with the client; None if the daemon is not to be had or the work failed. Never raises."""
        if not self._breaker.allow() or self._client is None:
            self._tally.add(f"skipped_{operation}")
            return None
        try:
            return work(self._client)
        except KVStoreError as error:
            self._tally.add(f"failed_{operation}")
            if is_outage(error):
                self._breaker.trip(error)
            elif isinstance(error, FidelityRefused):
                report_once(str(error))
            else:
                log.debug("%s failed: %s", operation, error)
        except Exception:  # whatever it is, the engine goes on without us
            self._tally.add(f"failed_{operation}")
            report_defect(operation)
        return None

    def close(self) -> None:
        """End the connection; never raises."""
        client, self._client = self._client, None
        if client is not None:
            try:
                client.close()
            except Exception:
                log.debug("closing failed", exc_info=True)


_reported: set[str] = set()


def report_once(what: str) -> None:
    """A warning that is written the first time only."""
    if what not in _reported:
        _reported.add(what)
        log.warning("%s", what)


def check_fidelity(fidelity: str) -> None:
    """Raise `ConfigError` unless a fidelity is one that a namespace may have; if it is to be had, the daemon says."""
    if fidelity != "exact" and not (fidelity.startswith("lossy:") and len(fidelity) > len("lossy:")):
        raise ConfigError(f"fidelity: {fidelity!r} is neither 'exact' nor 'lossy:PROFILE'.", "See docs/codecs.md.")


def report_defect(where: str) -> None:
    """Write down the exception being handled: with its traceback the first time at each place, then as one line."""
    if where not in _reported:
        _reported.add(where)
        log.exception("%s failed inside kvstore's connector; the engine continues without it.", where)
    else:
        log.warning("%s failed inside kvstore's connector again.", where)


def shielded(default: Callable[[], Any] = lambda: None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a hook that an engine calls: an exception is written down and answered with `default()`."""

    def decorate(hook: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(hook)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return hook(*args, **kwargs)
            except Exception:  # nothing may be raised into an engine's step
                report_defect(hook.__qualname__)
                return default()

        return call

    return decorate
