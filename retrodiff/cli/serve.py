"""``retrodiff serve``: a search server for a database."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="serve searches of a database over HTTP",
        description="Serves a database to programs on this machine: search by text, picture, row "
        "or embedding, with filters; records with licenses; small copies; samples of a model. "
        "JSON, described at /openapi.json. Ctrl-C ends it.",
    )
    parser.add_argument(
        "database", type=types.path, help="folder, or hf://, lance:// or parquet:// address"
    )
    parser.add_argument(
        "--encoder",
        help="that the database was built with: open_clip:NAME:TAG, timm:NAME or a folder; if not "
        "given: the model's, else texts and pictures cannot be asked with",
    )
    parser.add_argument(
        "--preprocessing", help="of the encoder: rdm, openai or plain; its default if not given"
    )
    parser.add_argument("--image-size", type=types.count, help="side that the encoder sees")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights of an encoder")
    parser.add_argument("--model", type=types.path, help="saved model that samples are asked of")
    parser.add_argument("--device", type=types.device, default="cpu", help="of encoder and model")
    parser.add_argument("--index", help="a saved index, or exact; chosen by the rows if not given")
    parser.add_argument(
        "--root", type=types.path, help="folder of the pictures, if they have moved"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; any but a loopback address lets other machines ask",
    )
    parser.add_argument(
        "--port", type=types.integer(0, 65535), default=8000, help="0: any that is free"
    )
    parser.add_argument(
        "--max-k", type=types.count, default=100, help="most neighbors that may be asked for"
    )
    parser.add_argument(
        "--max-upload", type=types.count, default=16, metavar="MB", help="largest picture sent"
    )
    parser.add_argument(
        "--max-requests", type=types.count, default=32, help="requests that may wait at a time"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Opens, loads, serves."""
    from retrodiff.databases import open_database
    from retrodiff.encoders import encoder_from_string
    from retrodiff.serving import SearchService, ServerLimits, serve
    from retrodiff.serving.launching import is_loopback

    database = open_database(options.database, options.index, root=options.root)
    encoder = model = None
    named = {n: v for n in ("preprocessing", "image_size") if (v := getattr(options, n))}
    if options.encoder is not None:
        encoder = encoder_from_string(
            options.encoder,
            pretrained=not options.no_pretrained,
            device=options.device,
            **named,
        )
    elif named or options.no_pretrained:
        raise ValueError("--preprocessing, --image-size and --no-pretrained need --encoder")
    if options.model is not None:
        from retrodiff.model import Model
        from retrodiff.retrieval import Uniform

        parts: dict[str, Any] = {} if encoder is None else {"encoder": encoder}
        model = Model.load(options.model, database=database, proposal=Uniform(), **parts)
        model = model.to(options.device)
    limits = ServerLimits(
        k=options.max_k, upload=options.max_upload * 10**6, requests=options.max_requests
    )
    service = SearchService(database, encoder, model=model, limits=limits)
    service.warm()
    if not is_loopback(options.host):
        print(
            f"retrodiff: {options.host} is no loopback address: whoever reaches it may search, see "
            "records and pictures, and use this machine's time",
            file=sys.stderr,
        )

    def ready(address: str) -> None:
        print(f"{len(database):,} rows at {address}", flush=True)

    serve(service, host=options.host, port=options.port, ready=ready)
    return 0
