"""Puts a search service on the web: in a thread (`running`), or until it is stopped (`serve`)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any

from retrodiff.serving.gate import Gate
from retrodiff.text import printable

if TYPE_CHECKING:
    from retrodiff.serving.answering import SearchService
    from retrodiff.serving.server_limits import ServerLimits

LOOPBACK = "127.0.0.1"
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
CONNECTIONS = 512
"""Open connections; beyond them uvicorn refuses."""


@contextmanager
def running(service: SearchService, *, host: str = LOOPBACK, port: int = 0) -> Iterator[str]:
    """Serves in a thread until the end of the block; gives the server's address.

    Args:
        service: what is served.
        host: address to listen at. Any but a loopback address lets other machines ask, too.
        port: 0: any that is free.

    Raises:
        ImportError: FastAPI or uvicorn is missing.
        OSError: the port is taken.

    Examples:
        >>> from retrodiff.serving import SearchService, running
        >>> from retrodiff.testing import small_database
        >>> with running(SearchService(small_database())) as address:
        ...     print(address)  # doctest: +ELLIPSIS
        http://127.0.0.1:...
    """
    listening = listening_at(host, port)
    try:
        server = _server(service, host)
    except ImportError:
        listening.close()
        raise
    with running_in_thread(server, listening) as address:
        yield address


def serve(
    service: SearchService,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    ready: Callable[[str], Any] = lambda address: None,
) -> None:
    """Serves until Ctrl-C or SIGTERM, in the main thread.

    Args:
        service: what is served.
        host: address to listen at. Any but a loopback address lets other machines ask, too.
        port: 0: any that is free.
        ready: told the address, before the first request is taken.

    Raises:
        ImportError: FastAPI or uvicorn is missing.
        OSError: the port is taken.
    """
    with listening_at(host, port) as listening:
        server = _server(service, host)
        ready(address_of(listening))
        server.run(sockets=[listening])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def web_server(application: Any, limits: ServerLimits, host: str) -> Any:
    """A uvicorn server of an ASGI application behind a `Gate`; run it with its sockets.

    Args:
        application: what answers.
        limits: of requests.
        host: the address it listens at; at a loopback address it answers to its own names only.

    Raises:
        ImportError: uvicorn is missing.
    """
    import uvicorn

    shown = f"[{host}]" if ":" in host else host.lower()
    hosts = {*OWN_NAMES, shown} if is_loopback(host) else None
    return uvicorn.Server(
        uvicorn.Config(
            Gate(application, limits, hosts),
            http="h11",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
    )


def listening_at(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"cannot listen at {printable(host)}:{port} ({reason}): choose another port, or "
            "port=0, any that is free"
        ) from None


def address_of(listening: socket.socket) -> str:
    """What a browser is told: ``http://127.0.0.1:8000``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def running_in_thread(server: Any, listening: socket.socket) -> Iterator[str]:
    """Runs a `web_server` in a thread until the end of the block; gives its address."""
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    try:
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.01)
        if not server.started:
            raise RuntimeError("the server could not start; its log says why")
        yield address_of(listening)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def _server(service: SearchService, host: str) -> Any:
    try:
        from retrodiff.serving.routes import application

        return web_server(application(service), service.limits, host)
    except ImportError as error:
        raise ImportError(
            f"a search server needs {error.name}: pip install 'retrodiff[serve]'"
        ) from None
