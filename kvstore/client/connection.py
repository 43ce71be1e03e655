"""A client's connection to the daemon: greeting it, naming namespaces to it, telling it what has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore import __version__
from kvstore.client.device import Importer
from kvstore.client.effects import Call, Flow, Link
from kvstore.client.slabs import SlabMap
from kvstore.errors import InvalidParams, ProtocolError, UnknownNamespace
from kvstore.keys import namespace_digest
from kvstore.types import Namespace, TierCode
from kvstore.wire import messages as m


class Connection:
    """What a client is, and what it is connected to; its operations are `kvstore.client.core.Core`.

    Parameters
    ----------
    namespace : Namespace or None
        Used where an operation names none.
    name : str
        How the daemon lists this client.
    token : str
        Secret for a daemon on another host.
    device : Importer, optional
        How to reach the daemon's memory of this process's GPU.
    """

    def __init__(self, namespace: Namespace | None, name: str, token: str, device: Importer | None = None) -> None:
        self.namespace, self.device = namespace, device
        self.name = name or f"python/{__version__}"
        self.token = token
        self.link: Link | None = None
        self.speeds: dict[TierCode, tuple[float, float, float]] = {}
        self._epoch = 0

    def hello(self, fd_path: str | None, timeout_s: float) -> Flow[None]:
        """Greet the daemon on a fresh connection."""
        namespaces = [] if self.namespace is None else [self.namespace]
        hello = m.Hello(m.PROTOCOL_VERSION, self.name, namespaces, self.token)
        reply: m.HelloReply = yield Call("hello", hello)
        slabs = None
        if reply.shared_memory:
            if fd_path is None:
                raise ProtocolError("the daemon offers shared memory over TCP.")
            slabs = SlabMap(fd_path, reply.session, reply.boot, timeout_s)
        self._epoch += 1
        known = {namespace_digest(n) for n in namespaces}
        self.link = Link(self._epoch, reply.boot, slabs, reply.max_block_bytes, known)

    def unlink(self) -> None:
        """Forget a connection that ended."""
        if self.link is not None and self.link.slabs is not None:
            self.link.slabs.close()
        self.link = None

    def current(self, epoch: int) -> bool:
        """Whether the connection of that epoch is still the one in use."""
        return self.link is not None and self.link.epoch == epoch

    def need_link(self) -> Link:
        if self.link is None:
            raise ProtocolError("an operation was begun without a connection.")
        return self.link

    def scope(self, namespace: Namespace | None) -> tuple[bytes, Namespace]:
        """Digest and fields of the namespace to use; raises `InvalidParams` if there is none."""
        chosen = namespace or self.namespace
        if chosen is None:
            raise InvalidParams("namespace: none was given, neither here nor when the client was made.", "")
        return namespace_digest(chosen), chosen

    def in_namespace(self, namespace: Namespace | None, build: Callable[[bytes], Call]) -> Flow[Any]:
        """Run a verb in a namespace, introducing it first if the daemon may not know it."""
        digest, fields = self.scope(namespace)
        link = self.need_link()
        if digest not in link.known:
            yield from self.introduce([fields])
        try:
            return (yield build(digest))
        except UnknownNamespace:  # the daemon forgot an idle namespace
            yield from self.introduce([fields])
            return (yield build(digest))

    def introduce(self, namespaces: list[Namespace]) -> Flow[None]:
        """Tell the daemon what namespaces are, by all their fields."""
        yield Call("hello", m.Hello(m.PROTOCOL_VERSION, self.name, namespaces, self.token))
        known = self.need_link().known
        if len(known) > 4096:
            known.clear()
        known |= {namespace_digest(n) for n in namespaces}

    def release(self, lease: int, epoch: int) -> None:
        """End a lease without waiting for an answer; nothing to do if its connection is gone."""
        if self.current(epoch):
            self.forget(lease)
            self.tell("release", m.Release([lease]))

    def abort(self, reservation: int, epoch: int) -> None:
        """End a reservation without waiting for an answer; nothing to do if its connection is gone."""
        if self.current(epoch):
            self.tell("abort", m.Abort(reservation))

    def tell(self, method: str, params: m.Message) -> None:
        """Send a notice; set by the face that owns the connection."""
        raise NotImplementedError

    def forget(self, lease: int) -> None:
        """Drop what still arrives for a lease; set by the face that owns the connection."""
        raise NotImplementedError
