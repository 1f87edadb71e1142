"""What clients send and get, as pydantic models: the OpenAPI description is made of them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from retrodiff.serving.server_limits import ServerLimits

LARGEST = 2**63 - 1


class Failure(BaseModel):
    """Why a request was not answered."""

    error: str = Field(description="one line")


class Found(BaseModel):
    """A row that was found, with what is known about it."""

    row: int = Field(description="its number in the database")
    similarity: float = Field(description="cosine with the query, higher is nearer")
    license: str | None = Field(description="as its record says; null: it says nothing")
    record: dict[str, Any] = Field(description="where it comes from: file, patch box, label, ...")
    image: str = Field(description="path of its small copy on this server")


class Answer(BaseModel):
    """What a search found, nearest first."""

    searched: int = Field(description="rows that were searched: all, or those the filter leaves")
    hits: list[Found]


class Row(BaseModel):
    """One row of the database."""

    row: int
    license: str | None
    record: dict[str, Any]
    image: str = Field(description="path of its small copy on this server")


class About(BaseModel):
    """What is served."""

    rows: int
    encoder: str
    preprocessing: str
    dim: int = Field(description="width of an embedding")
    rows_hash: str = Field(description="of the rows in their order: it changes when they do")
    columns: list[str] = Field(description="names that a filter may use")
    queries: list[str] = Field(description="what can be asked with on this server")
    limits: dict[str, int]


class Sample(BaseModel):
    """A generated image."""

    png: str = Field(description="the image, PNG in base64")
    neighbors: list[Found] = Field(description="rows that conditioned it, to be credited")


class Samples(BaseModel):
    """Generated images."""

    images: list[Sample]


def request_models(
    limits: ServerLimits, dim: int
) -> tuple[type[BaseModel], type[BaseModel], type[BaseModel], type[BaseModel]]:
    """The models of what clients send, with a server's limits in them.

    Returns:
        Those of a search's parameters, a search's body, an upload's parameters, a sample's body.
    """
    k: Any = (int, Field(min(8, limits.k), ge=1, le=limits.k, description="neighbors"))
    where: Any = (
        str | None,
        Field(
            None,
            max_length=limits.text,
            description="condition on the columns, such as license in ['CC0', 'CC-BY-4.0']",
            examples=["label == 'dog'"],
        ),
    )
    text: Any = (
        str | None,
        Field(None, min_length=1, max_length=limits.text, description="find rows like this text"),
    )
    row: Any = (
        int | None,
        Field(None, ge=0, le=LARGEST, description="find rows like this row", examples=[0]),
    )
    embedding: Any = (
        list[float] | None,
        Field(
            None,
            min_length=dim,
            max_length=dim,
            description="find rows like this embedding, made by the client",
        ),
    )
    loose = ConfigDict(extra="forbid")
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    in_path = create_model(
        "SearchParameters", __config__=loose, __validators__=_one_of("text", "row"),
        text=text, row=row, k=k, where=where,
    )  # fmt: skip
    names = ("text", "row", "embedding")
    only: Any = {**strict, "json_schema_extra": {"oneOf": [{"required": [n]} for n in names]}}
    in_body = create_model(
        "Search", __config__=only, __validators__=_one_of(*names),
        text=text, row=row, embedding=embedding, k=k, where=where,
    )  # fmt: skip
    upload = create_model("UploadParameters", __config__=loose, k=k, where=where)
    sample = create_model(
        "SampleRequest",
        __config__=strict,
        prompt=(
            str | None,
            Field(
                None, min_length=1, max_length=limits.text, description="null: rows are drawn"
            ),
        ),
        n=(int, Field(1, ge=1, le=limits.samples, description="images")),
        k=(int | None, Field(None, ge=1, le=limits.k, description="null: the model's")),
        steps=(int | None, Field(None, ge=1, le=limits.steps, description="null: the model's")),
        guidance=(float | None, Field(None, ge=0, le=100, description="null: the model's")),
        seed=(int, Field(0, ge=0, le=LARGEST)),
    )  # fmt: skip
    return in_path, in_body, upload, sample


def _one_of(*names: str) -> dict[str, Any]:
    """A validator: exactly one of the fields is given."""

    def check(given: Any) -> Any:
        said = [name for name in names if getattr(given, name) is not None]
        if len(said) != 1:
            found = "none" if not said else " and ".join(said)
            raise ValueError(f"give one of {', '.join(names)}, not {found}")
        return given

    return {"one_of": model_validator(mode="after")(check)}
