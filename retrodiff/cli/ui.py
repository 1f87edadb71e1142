"""``retrodiff ui``: a page in the browser on which a model is asked."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "ui",
        help="ask a model on a page in the browser",
        description="Opens a page on this machine: type a prompt or drop a picture, see its "
        "neighbors with their licenses, pin or drop some, watch samples form and what each "
        "neighbor painted, compare databases, download pictures with their origin. Without "
        "arguments it opens the pictograms. Ctrl-C ends it.",
    )
    parser.add_argument(
        "databases",
        nargs="*",
        type=types.path,
        metavar="DATABASE",
        help="folders, or hf://, lance:// or parquet:// addresses, to be open in place of the "
        "model's own",
    )
    parser.add_argument(
        "--model",
        type=types.path,
        default="pictograms",
        help="folder of a saved model, or the name of one with a package",
    )
    parser.add_argument("--device", type=types.device, default="cpu", help="of encoder and model")
    parser.add_argument(
        "--trust-database",
        action="store_true",
        help="open the database wherever a model that others saved says that it is",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; any but a loopback address lets other machines in",
    )
    parser.add_argument(
        "--port", type=types.integer(0, 65535), default=7860, help="0: any that is free"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Opens, loads, serves."""
    from retrodiff.serving.launching import is_loopback
    from retrodiff.ui.starting import opened
    from retrodiff.ui.web import check_gradio, serve_page

    check_gradio()
    studio, examples, about = opened(
        options.databases,
        options.model,
        device=options.device,
        trust_database=options.trust_database,
    )
    studio.warm()
    if not is_loopback(options.host):
        print(
            f"retrodiff: {options.host} is no loopback address: whoever reaches it may use the "
            "page, see records and pictures, and use this machine's time",
            file=sys.stderr,
        )

    def ready(address: str) -> None:
        print(f"{studio.name} at {address} (Ctrl-C ends it)", flush=True)
        if options.open:
            import webbrowser

            webbrowser.open(address)

    serve_page(
        studio,
        examples=examples,
        about=about,
        host=options.host,
        port=options.port,
        ready=ready,
    )
    return 0
