"""The search server, asked by real clients over real sockets."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from parts import HashingEncoder, small_recipe
from PIL import Image

from retrodiff.cli import main
from retrodiff.databases import ArrayDatabase, ImageFolder, build_database, read_image
from retrodiff.interfaces import Fingerprint, Query
from retrodiff.pictures import to_float
from retrodiff.retrieval import Uniform
from retrodiff.serving import NotFound, Refused, SearchService, ServerLimits, running
from retrodiff.serving.answering import FILTERS, plain

pytest.importorskip("fastapi")
requests = pytest.importorskip("requests")

ROWS, DIM = 60, 8


def pictured(rows: int = ROWS) -> ArrayDatabase:
    """Small pictures, their embeddings, and records with odd values."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8)
    encoder = HashingEncoder(DIM)
    licenses = ["CC0", "CC-BY-4.0", None]
    records = [
        {
            "file": f"{i}.png",
            "label": "even" if i % 2 == 0 else "odd",
            "license": licenses[i % 3],
            "score": float("nan") if i == 0 else float(i),
        }
        for i in range(rows)
    ]
    embeddings = encoder.encode_image(to_float(images))
    return ArrayDatabase(embeddings, encoder.fingerprint, records, images=images)


LIMITS = ServerLimits(
    k=20, upload=2**20, body=2**16, text=500, requests=20, seconds=2, samples=2, steps=4
)


@pytest.fixture(scope="module")
def database():
    return pictured()


@pytest.fixture(scope="module")
def service(database):
    model = small_recipe(HashingEncoder(DIM), database).proposal(Uniform()).build()
    return SearchService(database, HashingEncoder(DIM), model=model, limits=LIMITS)


@pytest.fixture(scope="module")
def address(service):
    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with requests.Session() as session:

        def ask(method, path, **kwargs):
            return session.request(method, address + path, timeout=20, **kwargs)

        yield ask


def png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def nearest(embedding, rows, k, without=None):
    """Row numbers by cosine in float64, from the stored (float16) values."""
    stored = rows.half().double().numpy()
    query = np.asarray(embedding, np.float64)
    cosine = stored @ query / np.linalg.norm(stored, axis=1) / np.linalg.norm(query)
    order = [int(i) for i in np.argsort(-cosine, kind="stable") if i != without]
    return order[:k], cosine


def failed(answer, status):
    """The one line of an error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    said = answer.json()["error"]
    assert said
    assert said.isprintable()
    return said


# --- what is found -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(database):
    return database.embeddings(torch.arange(ROWS))


def test_a_text_finds_the_rows_of_highest_cosine(client, stored):
    answer = client("GET", "/search", params={"text": "a red square", "k": 5}).json()
    expected, cosine = nearest(HashingEncoder(DIM).encode_text(["a red square"])[0], stored, 5)
    assert answer["searched"] == ROWS
    assert [hit["row"] for hit in answer["hits"]] == expected
    for hit in answer["hits"]:
        assert hit["similarity"] == pytest.approx(cosine[hit["row"]], abs=1e-6)
        assert hit["record"]["file"] == f"{hit['row']}.png"
        assert hit["license"] == ["CC0", "CC-BY-4.0", None][hit["row"] % 3]
        assert hit["image"] == f"/rows/{hit['row']}/image"
    assert client("POST", "/search", json={"text": "a red square", "k": 5}).json() == answer


def test_an_uploaded_picture_finds_itself_first(client, database):
    data = png(database._images[17])
    answer = client("POST", "/search/image", params={"k": 3}, data=data).json()
    assert answer["hits"][0]["row"] == 17
    assert answer["hits"][0]["similarity"] == pytest.approx(1, abs=1e-3)  # rows are float16


def test_a_row_finds_its_neighbors_and_not_itself(client, stored):
    expected, _ = nearest(stored[9], stored, 4, without=9)
    for answer in (
        client("GET", "/search", params={"row": 9, "k": 4}),
        client("POST", "/search", json={"row": 9, "k": 4}),
    ):
        assert [hit["row"] for hit in answer.json()["hits"]] == expected


def test_an_embedding_of_the_client_finds_the_same_as_its_text(client):
    vector = HashingEncoder(DIM).encode_text(["snow"])[0].tolist()
    by_text = client("GET", "/search", params={"text": "snow"}).json()
    assert client("POST", "/search", json={"embedding": vector}).json() == by_text


def test_rows_under_a_filter_keep_their_numbers(client, stored):
    asked = {"text": "snow", "k": 20, "where": "license in ['CC0'] and label == 'odd'"}
    answer = client("GET", "/search", params=asked).json()
    expected, _ = nearest(HashingEncoder(DIM).encode_text(["snow"])[0], stored, ROWS)
    kept = [row for row in expected if row % 3 == 0 and row % 2 == 1]
    assert answer["searched"] == len(kept) == 10  # fewer than k, and no error
    assert [hit["row"] for hit in answer["hits"]] == kept
    nothing = client("GET", "/search", params={"text": "snow", "where": "label == 'none'"})
    assert nothing.json() == {"searched": 0, "hits": []}


def test_a_row_without_its_filter_is_still_left_out(client):
    answer = client("GET", "/search", params={"row": 3, "k": 20, "where": "label == 'odd'"})
    rows = [hit["row"] for hit in answer.json()["hits"]]
    assert len(rows) == 20
    assert 3 not in rows


def test_records_are_json_whatever_they_hold(client, database):
    about = client("GET", "/rows/0").json()
    assert about["record"]["score"] is None  # NaN is no JSON
    assert about["license"] == "CC0"
    odd = {"a": b"\xff", "b": np.float32(0.5), "c": "caf\udce9", 3: [np.int64(2), float("inf")]}
    assert json.loads(json.dumps(plain(odd), allow_nan=False).encode()) == {
        "a": "b'\\xff'",
        "b": 0.5,
        "c": "caf\\xe9",
        "3": [2, None],
    }


def test_small_copies_are_pictures(client, database):
    answer = client("GET", "/rows/5/image", params={"side": 16})
    assert answer.headers["content-type"] == "image/png"
    assert (read_image(answer.content) == database._images[5]).all()


def test_what_is_served_is_said(client, database):
    about = client("GET", "/database").json()
    assert about["rows"] == ROWS
    assert about["dim"] == DIM
    assert about["rows_hash"] == database.fingerprint.rows
    assert about["columns"] == ["file", "label", "license", "score"]
    assert about["queries"] == ["text", "image", "row", "embedding", "sample"]
    assert about["limits"]["k"] == 20


def test_samples_are_those_of_the_model_with_their_neighbors(client, service):
    asked = {"prompt": "a red square", "n": 2, "seed": 3}
    answer = client("POST", "/sample", json=asked).json()
    out = service.model.sample(prompts=["a red square"] * 2, seed=3)
    for i, (made, picture) in enumerate(zip(answer["images"], out.pil(), strict=True)):
        shown = Image.open(io.BytesIO(base64.b64decode(made["png"])))
        assert (np.asarray(shown) == np.asarray(picture)).all()
        rows = [row for row in out.neighbors.indices[i].tolist() if row >= 0]
        assert [near["row"] for near in made["neighbors"]] == rows
        assert all(near["license"] == near["record"]["license"] for near in made["neighbors"])
    assert len(client("POST", "/sample", json={}).json()["images"]) == 1  # unconditional


# --- many clients --------------------------------------------------------------------------------


def test_answers_to_many_clients_are_not_mixed_up(address, service):
    """16 clients, each with other questions of all kinds; answers are those of one client alone."""
    texts = [f"a picture of number {i}" for i in range(60)]
    asked = [{"text": text, "k": 3} for text in texts] + [{"row": r, "k": 2} for r in range(60)]
    for i, one in enumerate(asked):
        if i % 3 == 0:
            one["where"] = f"score > {i % 7}"
    expected = []
    for one in asked:
        kind = "text" if "text" in one else "row"
        _, hits = getattr(service, kind)(one[kind], one["k"], one.get("where"))
        expected.append([(hit.row, hit.similarity) for hit in hits])

    def ask(i):
        answer = requests.post(f"{address}/search", json=asked[i], timeout=20)
        assert answer.status_code == 200, answer.text
        return [(hit["row"], hit["similarity"]) for hit in answer.json()["hits"]]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(len(asked)))) == expected


def test_more_requests_than_may_wait_are_told_to_come_again(database):
    limits = ServerLimits(requests=2, seconds=5)
    with running(SearchService(database, HashingEncoder(DIM), limits=limits)) as address:
        host, port = address.removeprefix("http://").split(":")
        held = []
        for _ in range(2):  # two requests whose bodies never end
            held.append(socket.create_connection((host, int(port))))
            held[-1].sendall(
                b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            )
        time.sleep(0.3)
        answer = requests.get(f"{address}/database", timeout=5)
        assert failed(answer, 503) == "2 requests are waiting: come again in a moment"
        assert answer.headers["retry-after"] == "1"
        for one in held:
            one.close()
        time.sleep(0.3)
        assert requests.get(f"{address}/database", timeout=5).status_code == 200


# --- bad requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "said"),
    [
        ("GET", "/search", {}, 422, "give one of text, row, not none"),
        ("GET", "/search", {"params": {"text": "a", "row": 1}}, 422, "not text and row"),
        ("GET", "/search", {"params": {"text": ""}}, 422, "text: String should have at least 1"),
        (
            "GET",
            "/search",
            {"params": {"text": "a" * 501}},
            422,
            "text: String should have at most",
        ),
        ("GET", "/search", {"params": {"text": "a", "k": 0}}, 422, "k: Input should be greater"),
        ("GET", "/search", {"params": {"text": "a", "k": 21}}, 422, "k: Input should be less"),
        ("GET", "/search", {"params": {"text": "a", "k": "x"}}, 422, "k: Input should be a valid"),
        ("GET", "/search", {"params": {"text": "a", "n": 1}}, 422, "n: Extra inputs"),
        ("GET", "/search", {"params": {"row": ROWS}}, 404, "there is no row 60: the database has"),
        ("GET", "/search", {"params": {"row": -1}}, 422, "row: Input should be greater"),
        (
            "GET",
            "/search",
            {"params": {"text": "a", "where": "size == 1"}},
            422,
            "unknown column 'size'; columns: file, label, license, score",
        ),
        (
            "GET",
            "/search",
            {"params": {"text": "a", "where": "label == open('/etc/passwd')"}},
            422,
            "unknown column 'open'",
        ),
        ("GET", "/search", {"params": {"text": "a", "where": "label > 3"}}, 422, "does not fit"),
        ("POST", "/search", {"data": b"{"}, 422, "the body is no JSON"),
        ("POST", "/search", {"data": b"\xff\xfe"}, 422, "body"),
        ("POST", "/search", {"json": []}, 422, "Input should be"),
        ("POST", "/search", {"json": {"text": "a", "k": "8"}}, 422, "k: Input should be a valid"),
        ("POST", "/search", {"json": {"embedding": [1.0]}}, 422, "embedding: List should have"),
        ("POST", "/search", {"json": {"embedding": [0.0] * DIM}}, 422, "has no direction"),
        ("POST", "/search", {"json": {"embedding": [1e300] * DIM}}, 422, "has no direction"),
        (
            "POST",
            "/search",
            {"data": b'{"embedding": [' + b"NaN, " * (DIM - 1) + b"NaN]}"},
            422,
            "embedding.0: Input should be a finite number",
        ),
        ("POST", "/search/image", {"data": b""}, 422, "the picture cannot be read: not an image"),
        ("POST", "/search/image", {"data": b"GIF89a"}, 422, "the picture cannot be read"),
        ("POST", "/search/image", {"data": b"x" * (2**20 + 1)}, 413, "more than 1048576 bytes"),
        ("POST", "/search", {"data": b" " * (2**16 + 1)}, 413, "more than 65536 bytes"),
        ("GET", "/rows/60", {}, 404, "there is no row 60"),
        ("GET", "/rows/x", {}, 422, "row: Input should be a valid integer"),
        ("GET", "/rows/99999999999999999999", {}, 422, "row: Input should be less"),
        ("GET", "/rows/0/image", {"params": {"side": 4096}}, 422, "side: Input should be less"),
        ("POST", "/sample", {"json": {"n": 3}}, 422, "n: Input should be less"),
        ("POST", "/sample", {"json": {"k": 0}}, 422, "k: Input should be greater"),
        ("GET", "/nowhere", {}, 404, "there is nothing at this address"),
        ("DELETE", "/search", {}, 405, "Method Not Allowed"),
    ],
)
def test_bad_requests_get_one_line(client, method, path, given, status, said):
    if "data" in given and path == "/search":
        given = {**given, "headers": {"content-type": "application/json"}}
    assert said in failed(client(method, path, **given), status)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in few bytes."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_picture_that_unfolds_too_far_is_refused(client):
    data = bomb(16_000)  # 256 million pixels
    assert len(data) < 100_000
    said = failed(client("POST", "/search/image", data=data), 422)
    assert said == "the picture cannot be read: more than 89478485 pixels"


def test_uploads_in_chunks_are_bounded_too(client):
    answer = client("POST", "/search/image", data=(b"x" * 2**16 for _ in range(20)))
    assert "more than 1048576 bytes" in failed(answer, 413)


def test_a_large_upload_is_refused_before_it_is_sent(address):
    """What asks first (curl does) gets its answer without sending."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(
            b"POST /search/image HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Length: 2000000\r\n\r\n"
        )
        reply = http.client.HTTPResponse(line)
        reply.begin()
        assert reply.status == 413
        assert b"more than 1048576 bytes" in reply.read()


def test_a_request_that_never_arrives_is_ended(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        start = time.monotonic()
        reply = http.client.HTTPResponse(line)
        reply.begin()
        assert reply.status == 408
        assert json.loads(reply.read())["error"].startswith("the request did not arrive within 2 s")
        assert time.monotonic() - start < 8


def test_only_its_own_names_reach_a_loopback_server(client):
    """A page on the web may point a name of its own here; the browser then sends that name."""
    answer = client("GET", "/database", headers={"host": "evil.example:80"})
    assert failed(answer, 421).startswith("this server is not called 'evil.example'")
    assert client("GET", "/database", headers={"host": "LOCALHOST:1"}).status_code == 200


def test_an_error_of_our_own_says_nothing_of_the_machine(database, caplog):
    class Broken(HashingEncoder):
        def encode_text(self, prompts):
            raise RuntimeError("/home/me/secret is broken")

    with running(SearchService(database, Broken(DIM))) as address:
        answer = requests.get(f"{address}/search", params={"text": "a"}, timeout=5)
        assert failed(answer, 500) == "the server failed to answer; its log says why"
        assert requests.get(f"{address}/search", params={"row": 1}, timeout=5).status_code == 200
    assert "/home/me/secret" in caplog.text


def test_a_picture_that_is_gone_is_said_without_its_path(caplog):
    encoder = HashingEncoder(DIM)
    rows = ArrayDatabase(
        torch.randn(3, DIM), encoder.fingerprint, [{"file": f"/secret/{i}.png"} for i in range(3)]
    )
    with running(SearchService(rows)) as address:
        answer = requests.get(f"{address}/rows/1/image", timeout=5)
        assert failed(answer, 404) == "the picture of row 1 is not at hand"
        said = failed(requests.get(f"{address}/search?text=a", timeout=5), 422)
        assert said == "this server has no encoder of texts: search with a row or an embedding"
        said = failed(requests.post(f"{address}/search/image", data=b"a", timeout=5), 422)
        assert said == "this server has no encoder: search with a row or an embedding"
        assert failed(requests.post(f"{address}/sample", json={}, timeout=5), 404)
    assert "/secret/1.png" in caplog.text


# --- without the web -----------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused(database):
    with pytest.raises(ValueError, match="encoder and database disagree: weights='1'"):
        SearchService(database, HashingEncoder(DIM, seed=1))
    with pytest.raises(ValueError, match="requests=0: give a whole number"):
        ServerLimits(requests=0)


def test_the_service_answers_without_a_server(service):
    assert service.row(0, 1)[1][0].row != 0
    with pytest.raises(NotFound, match="there is no row 60"):
        service.record(60)
    with pytest.raises(Refused, match="k=21: ask for 1 to 20 neighbors"):
        service.row(0, 21)
    with pytest.raises(Refused, match="has 3 numbers, the database's have 8"):
        service.embedding([1, 2, 3])


def test_filters_are_remembered_and_forgotten(database, monkeypatch):
    service = SearchService(database, HashingEncoder(DIM))
    read = []
    where = type(database).where
    monkeypatch.setattr(
        type(database), "where", lambda self, text: (read.append(text), where(self, text))[1]
    )
    for i in [0, 0, *range(FILTERS + 1), 0]:
        service.row(1, 1, f"score > {i}")
    assert read == [f"score > {i}" for i in [0, *range(1, FILTERS + 1), 0]]


def test_an_empty_database_is_served():
    encoder = HashingEncoder(DIM)
    service = SearchService(ArrayDatabase(torch.empty(0, DIM), encoder.fingerprint), encoder)
    service.warm()
    assert service.text("a") == (0, [])


def test_a_port_that_is_taken_is_said(service):
    with running(service) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port} .*choose another"):
            with running(service, port=port):
                pass


# --- the command line ----------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    """As a program of its own, ended by Ctrl-C."""
    import signal
    import subprocess
    import sys

    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    from retrodiff.encoders import encoder_from_string

    named = "timm:test_resnet,image_size=32"
    encoder = encoder_from_string(named, pretrained=False)
    source = ImageFolder(tmp_path / "pictures")
    build_database(tmp_path / "d.rdb", source, encoder, thumbnails=32, progress=False)
    command = [sys.executable, "-m", "retrodiff", "serve", str(tmp_path / "d.rdb"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--encoder", named, "--no-pretrained"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        address = said.split()[-1]
        assert said == f"6 rows at {address}\n"
        data = (tmp_path / "pictures" / "4.png").read_bytes()
        answer = requests.post(f"{address}/search/image?k=1", data=data, timeout=20).json()
        assert answer["hits"][0]["record"]["file"] == "4.png"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert errors == "retrodiff: interrupted\n"
    assert process.returncode == 130


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A database in a folder, made by an encoder that no command can name."""
    place = tmp_path_factory.mktemp("served")
    (place / "pictures").mkdir()
    for i in range(3):
        pixels = torch.full((3, 8, 8), 50 * i, dtype=torch.uint8)
        (place / "pictures" / f"{i}.png").write_bytes(png(pixels))
    build_database(
        place / "d.rdb", ImageFolder(place / "pictures"), HashingEncoder(DIM), progress=False
    )
    return str(place / "d.rdb")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--port", "70000"], "argument --port: 70000 is above the most allowed, 65535"),
        (["--encoder", "timm:test_resnet", "--no-pretrained"], "disagree: dim=96 against dim=8"),
        (["--no-pretrained"], "need --encoder"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_commands_get_one_line(folder, capsys, given, said):
    assert main(["serve", folder, *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# --- the OpenAPI description ---------------------------------------------------------------------


OPERATIONS = [
    "GET /database",
    "GET /search",
    "POST /search",
    "POST /search/image",
    "GET /rows/{row}",
    "GET /rows/{row}/image",
    "POST /sample",
]


@pytest.fixture(scope="module")
def described(address):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    found = [operation.ok() for operation in schema.get_all_operations()]
    return {f"{one.method.upper()} {one.path}": one for one in found}


def test_everything_is_described(described):
    assert list(described) == OPERATIONS


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_server_is_as_its_description_says(described, name, mode):
    """schemathesis makes requests, good and bad, and compares the answers with the description."""
    if name == "GET /database" and mode == "negative":
        pytest.skip("it takes nothing that could be wrong")
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    operation = described[name]

    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    def check(case):
        # A filter or a picture may be no filter or picture, which no schema can say.
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=20)
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert list(answer.json()) == ["error"]

    check()


def test_the_fingerprint_of_an_unserved_encoder_is_shown():
    mark = Fingerprint(encoder="other\x1b", weights="", preprocessing="", dim=2)
    rows = ArrayDatabase(torch.eye(2), mark)
    assert SearchService(rows).about()["encoder"] == "other\\x1b"
    assert rows.search(Query(torch.eye(2)), 1).indices.flatten().tolist() == [0, 1]
