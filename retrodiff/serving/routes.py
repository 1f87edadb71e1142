"""The web application of a search server: routes, errors of one line, OpenAPI."""

import base64
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from retrodiff.serving.answering import Hit, NotFound, Refused, SearchService
from retrodiff.serving.messages import (
    LARGEST,
    About,
    Answer,
    Failure,
    Found,
    Row,
    Sample,
    Samples,
    request_models,
)
from retrodiff.text import printable

log = logging.getLogger(__name__)

THREADS = 40
"""Requests that are worked on in threads of their own, if no more may wait."""


def application(service: SearchService) -> FastAPI:
    """The ASGI application of a service, for any ASGI server; `running` and `serve` use uvicorn.

    It has no limits on sizes and numbers of requests of its own: put it behind `Gate`.
    """
    limits = service.limits

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = max(
            THREADS, limits.requests
        )
        yield

    app = FastAPI(
        title="retrodiff search server",
        summary="Searches one database of pictures by text, picture, row or embedding.",
        version=_version(),
        docs_url=None,
        redoc_url=None,
        lifespan=life,
        responses={"4XX": {"model": Failure}, "5XX": {"model": Failure}},
    )
    in_path, in_body, upload, sampling = request_models(limits, service.database.fingerprint.dim)
    numbered = Annotated[int, Path(ge=0, le=LARGEST, description="number of the row")]

    @app.get("/database", summary="What is served, and its limits")
    def database() -> About:
        return About(**service.about())

    @app.get("/search", summary="Search by text or by row")
    def search(asked: Annotated[in_path, Query()]) -> Answer:  # type: ignore[valid-type]
        return _search(service, asked)

    @app.post("/search", summary="Search by text, row or embedding")
    def search_body(asked: in_body) -> Answer:  # type: ignore[valid-type]
        return _search(service, asked)

    @app.post(
        "/search/image",
        summary="Search by a picture",
        description="The body is the picture file, as it is: no form.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    def search_image(
        asked: Annotated[upload, Query()],  # type: ignore[valid-type]
        data: Annotated[bytes, Depends(_body)],
    ) -> Answer:
        given: Any = asked
        return _answer(service.picture(data, given.k, given.where))

    @app.get("/rows/{row}", summary="License and record of a row")
    def record(row: numbered) -> Row:  # type: ignore[valid-type]
        license, about = service.record(row)
        return Row(row=row, license=license, record=about, image=_image_of(row))

    @app.get(
        "/rows/{row}/image",
        summary="A small copy of a row's picture",
        response_class=Response,
        responses={200: {"content": {"image/png": {}, "image/jpeg": {}}}},
    )
    def image(
        row: numbered,  # type: ignore[valid-type]
        side: Annotated[int, Query(ge=16, le=limits.side, description="longest, in pixels")] = 256,
    ) -> Response:
        data = service.image(row, side)
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Response(data, media_type=kind)

    if service.model is not None:

        @app.post("/sample", summary="Generate images")
        def sample(asked: sampling) -> Samples:  # type: ignore[valid-type]
            made = service.sample(**asked.model_dump())  # type: ignore[attr-defined]
            return Samples(
                images=[
                    Sample(png=base64.b64encode(png).decode("ascii"), neighbors=_found(near))
                    for png, near in made
                ]
            )

    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(Exception, _failed)
    return app


async def _body(request: Request) -> bytes:
    return await request.body()


def _search(service: SearchService, asked: Any) -> Answer:
    if asked.text is not None:
        return _answer(service.text(asked.text, asked.k, asked.where))
    if asked.row is not None:
        return _answer(service.row(asked.row, asked.k, asked.where))
    return _answer(service.embedding(asked.embedding, asked.k, asked.where))


def _answer(found: tuple[int, list[Hit]]) -> Answer:
    searched, hits = found
    return Answer(searched=searched, hits=_found(hits))


def _found(hits: list[Hit]) -> list[Found]:
    return [Found(**vars(hit), image=_image_of(hit.row)) for hit in hits]


def _image_of(row: int) -> str:
    return f"/rows/{row}/image"


def _version() -> str:
    from retrodiff import __version__

    return __version__


# --- errors: one line of JSON each ---------------------------------------------------------------


def _error(status: int, said: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": printable(said)}, status, headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(422, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    where = [str(part) for part in first["loc"] if part not in ("query", "body", "path")]
    said = first["msg"].removeprefix("Value error, ")
    return _error(422, f"{'.'.join(where)}: {said}" if where else said)


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = {404: "there is nothing at this address: see /openapi.json"}
    return _error(error.status_code, known.get(error.status_code, error.detail), error.headers)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    if error.__cause__ is not None:
        log.warning("%s: %s", error, error.__cause__)
    return _error(404 if isinstance(error, NotFound) else 422, str(error))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "the server failed to answer; its log says why")
