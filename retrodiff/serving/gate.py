"""Stands before the application: how large, how many and how slow requests may be.

An ASGI middleware. A body is read whole, within its limit and its time, before anything looks at
it; requests beyond the number that may wait are told at once to come again. A server that only this
machine reaches answers only to its own names, so that a page on the web cannot reach it through a
name that it has pointed here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from retrodiff.serving.server_limits import ServerLimits
from retrodiff.text import printable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

UPLOADS = ("/search/image",)
"""Where pictures are sent to; bodies of other requests are small."""

DRAINED = 4
"""How many times its limit of a body that is too large is read and forgotten, so that the client
hears why before the connection ends."""


class Gate:
    """Bounds what reaches an ASGI application.

    Args:
        application: what answers.
        limits: of requests.
        hosts: names that clients may call this server by; None: any.
    """

    def __init__(
        self,
        application: Application,
        limits: ServerLimits,
        hosts: Collection[str] | None = None,
    ):
        self.application, self.limits = application, limits
        self.hosts = None if hosts is None else frozenset(hosts)
        self.busy = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the application's start and end."""
        if scope["type"] != "http":
            return await self.application(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.hosts is not None and (name := _host(headers)) not in self.hosts:
            said = f"this server is not called {printable(name)!r}: ask it as 127.0.0.1"
            return await _refuse(send, 421, said)
        if self.busy >= self.limits.requests:
            said = f"{self.busy} requests are waiting: come again in a moment"
            return await _refuse(send, 503, said, {"retry-after": "1"})
        self.busy += 1
        try:
            await self._admitted(scope, headers, receive, send)
        finally:
            self.busy -= 1

    async def _admitted(
        self, scope: Message, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        limits = self.limits
        most = limits.upload if scope["path"] in UPLOADS else limits.body
        too_large = f"the request has more than {most} bytes: send less"
        claimed = headers.get(b"content-length", b"0")
        hopeless = not claimed.isdigit() or int(claimed) > DRAINED * most
        if hopeless or (b"expect" in headers and int(claimed) > most):
            return await _refuse(send, 413, too_large)
        try:
            async with asyncio.timeout(limits.seconds):
                body = await _body(receive, most)
        except TimeoutError:
            said = f"the request did not arrive within {limits.seconds} s: send it faster"
            return await _refuse(send, 408, said)
        except _Gone:
            return None
        if body is None:
            return await _refuse(send, 413, too_large)

        async def again() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message: Message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        return await self.application(scope, again, send)


class _Gone(Exception):
    """The client left before its request was whole."""


async def _body(receive: Receive, most: int) -> bytes | None:
    """The body of a request; None: it is larger than ``most``."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        part = message.get("body", b"")
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > DRAINED * most:
            return b"".join(parts) if size <= most else None


def _host(headers: dict[bytes, bytes]) -> str:
    """The name that a client calls this server by, without its port."""
    name = headers.get(b"host", b"").decode("latin-1").lower()
    return name[: name.rfind("]") + 1] if name.startswith("[") else name.partition(":")[0]


async def _refuse(
    send: Send, status: int, said: str, headers: dict[str, str] | None = None
) -> None:
    """One line of JSON, after which the connection ends."""
    body = json.dumps({"error": said}).encode()
    about = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **(headers or {}),
    }
    encoded = [(name.encode(), value.encode()) for name, value in about.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
