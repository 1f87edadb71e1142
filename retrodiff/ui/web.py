"""Puts the page on the web: in a thread (`shown`), or until it is stopped (`serve_page`)."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from retrodiff.serving.gate import Application, Message, Receive, Send
from retrodiff.serving.launching import (
    LOOPBACK,
    address_of,
    listening_at,
    running_in_thread,
    web_server,
)
from retrodiff.ui.studio import Studio

NEEDED = re.compile(
    r"/|/(assets|static|svelte)/.*|/(theme\.css|config|config/|info|favicon\.ico|manifest\.json)"
    r"|/gradio_api/(queue/(join|data)|run/\w+|cancel|reset|heartbeat/\w+|startup-events|info|app_id)/?"
)
"""Paths that the page asks for; Gradio's own upload, files, proxy and tools have no use here."""

HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
"""The browser itself refuses whatever lies elsewhere."""


class Narrow:
    """Answers only what the page needs, with headers that keep the browser on this server.

    Args:
        application: what answers.
    """

    def __init__(self, application: Application):
        self.application = application

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.application(scope, receive, send)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        if NEEDED.fullmatch(scope["path"]):
            return await self.application(scope, receive, sent)
        start = {"type": "http.response.start", "status": 404, "headers": []}
        await sent(start)
        await send({"type": "http.response.body", "body": b"not here"})
        return None


@contextmanager
def shown(
    studio: Studio,
    *,
    examples: Sequence[str] = (),
    about: str = "",
    host: str = LOOPBACK,
    port: int = 0,
) -> Iterator[str]:
    """Serves the page in a thread until the end of the block; gives its address.

    Args:
        studio: does the work.
        examples: prompts to click.
        about: a sentence below the name.
        host: address to listen at. Any but a loopback address lets other machines in, too.
        port: 0: any that is free.

    Raises:
        ImportError: Gradio is missing.
        OSError: the port is taken.

    Examples:
        >>> with shown(studio) as address:  # doctest: +SKIP
        ...     print(address)
    """
    application = page_application(studio, examples, about)
    server = web_server(application, studio.limits, host)
    logging.getLogger("uvicorn.error").addFilter(_worth_telling)
    with running_in_thread(server, listening_at(host, port)) as address:
        yield address


def serve_page(
    studio: Studio,
    *,
    examples: Sequence[str] = (),
    about: str = "",
    host: str = LOOPBACK,
    port: int = 7860,
    ready: Callable[[str], Any] = lambda address: None,
) -> None:
    """Serves the page until Ctrl-C or SIGTERM, in the main thread; arguments as for `shown`.

    Args:
        studio: does the work.
        examples: prompts to click.
        about: a sentence below the name.
        host: address to listen at.
        port: 0: any that is free.
        ready: told the address, before the first request is taken.

    Raises:
        ImportError: Gradio is missing.
        OSError: the port is taken.
    """
    application = page_application(studio, examples, about)
    with listening_at(host, port) as listening:
        server = web_server(application, studio.limits, host)
        logging.getLogger("uvicorn.error").addFilter(_worth_telling)
        ready(address_of(listening))
        server.run(sockets=[listening])


def page_application(studio: Studio, examples: Sequence[str] = (), about: str = "") -> Any:
    """The ASGI application of the page.

    It has no limits on sizes and numbers of requests of its own: put it behind
    `retrodiff.serving.gate.Gate`, as `shown` does.

    Raises:
        ImportError: Gradio is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    check_gradio()
    import gradio as gr
    from fastapi import FastAPI
    from gradio import themes

    from retrodiff.ui.layout import SCRIPT, STYLE, build

    blocks = build(studio, examples, about)
    theme = themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        color_accent="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    return Narrow(
        gr.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            blocks,
            path="/",
            footer_links=[],
            run_history=False,
            show_error=False,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            max_file_size=1,
            theme=theme,
            css=STYLE.read_text("utf-8"),
            head=f"<script>{SCRIPT.read_text('utf-8')}</script>",
        )
    )


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not that a page was still open when the server ended."""
    ended = record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError
    return not ended and not str(record.msg).startswith("Cancel ")


def check_gradio() -> None:
    """Whether the page can be made, said in one line where it cannot.

    Raises:
        ImportError: Gradio is missing, or older than what the page is written for.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f'the page needs {error.name or "gradio"}: pip install "retrodiff[ui]"'
        ) from None
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise ImportError(
            f'the page needs gradio 6, not {gradio.__version__}: pip install "retrodiff[ui]"'
        )
