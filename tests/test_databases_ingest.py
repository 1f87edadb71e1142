"""Building databases: bad pictures, refusals, interruption at any moment."""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_databases import Pooled, files_of, pictures

from retrodiff.databases import (
    ImageFolder,
    Images,
    Part,
    UnreadableImage,
    append_to_database,
    build_database,
    delete_rows,
    import_embeddings,
    open_database,
    read_image,
)
from retrodiff.databases.build import edit
from retrodiff.databases.build import ingest as ingest_module
from retrodiff.databases.build.work import MixedColumn
from retrodiff.disk import tensors
from retrodiff.disk.tensors import map_tensors, write_tensors
from retrodiff.interfaces import Query


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def ramp(h: int = 24, w: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[0:h, 0:w]
    return np.stack([rows * 9, columns * 7, 200 - rows * 3], -1).astype(np.uint8)


# --- reading -------------------------------------------------------------------------------------


def test_plain_pictures_are_exact():
    read = read_image(encoded(Image.fromarray(ramp())))
    assert read.dtype == torch.uint8
    assert torch.equal(read, torch.from_numpy(ramp()).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("kind", "image", "options", "tolerance"),
    [
        ("PNG", Image.fromarray(ramp()).quantize(256), {}, 12),
        ("JPEG", Image.fromarray(ramp()).convert("CMYK"), {"quality": 95}, 12),
        ("PNG", Image.fromarray(ramp()).convert("RGBA"), {}, 0),
        pytest.param(
            "TIFF",
            Image.fromarray(ramp()).convert("YCbCr"),
            {},
            4,
            marks=pytest.mark.skipif(
                int(PIL.__version__.split(".")[0]) < 13,
                reason="Pillow below 13 cannot read the TIFF that it writes of YCbCr",
            ),
        ),
        ("WEBP", Image.fromarray(ramp()), {"lossless": True}, 0),
    ],
)
def test_modes_become_rgb(kind, image, options, tolerance):
    read = read_image(encoded(image, kind, **options)).permute(1, 2, 0).numpy()
    assert np.abs(read.astype(int) - ramp()).max() <= tolerance


def test_sixteen_bits_keep_their_brightness():
    values = np.linspace(0, 65535, 24 * 32).reshape(24, 32)
    read = read_image(encoded(Image.fromarray(values.astype(np.uint16))))
    assert np.abs(read[0].numpy() - values / 257).max() <= 1
    assert torch.equal(read[0], read[2])


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be seen
    read = read_image(encoded(Image.fromarray(ramp()), "PNG", exif=exif))
    assert torch.equal(read, torch.from_numpy(np.rot90(ramp(), -1).copy()).permute(2, 0, 1))


def test_transparency_lies_on_white():
    image = Image.fromarray(ramp()).convert("RGBA")
    image.putalpha(0)
    assert (read_image(encoded(image)) == 255).all()


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(ramp() // n) for n in (1, 2)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert torch.equal(read_image(data), read_image(encoded(frames[0])))


def test_unreadable(tmp_path, monkeypatch):
    whole = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    )
    for data, message in [
        (whole[: len(whole) // 2], "broken image"),
        (b"hello", "not an image"),
        (b"", "not an image"),
    ]:
        with pytest.raises(UnreadableImage, match=message):
            read_image(data)
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "none.png")
    for limit in (64 * 64 - 1, 64 * 16):  # where Pillow warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match=f"more than {limit} pixels"):
            read_image(whole)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_read_or_refused(seed):
    rng = np.random.default_rng(seed)
    whole = {k: encoded(Image.fromarray(ramp()), k) for k in ("PNG", "JPEG", "WEBP", "TIFF", "GIF")}
    for data in whole.values():
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                broken[at] = rng.integers(0, 256)
            with contextlib.suppress(UnreadableImage):
                assert read_image(bytes(broken)).shape[0] == 3


@pytest.mark.parametrize("n", [0, 1, 37])
def test_files_of_tensors_are_those_of_safetensors(n, tmp_path):
    generator = torch.Generator().manual_seed(n)
    sets = [
        {"embeddings": torch.randn(n, 6, generator=generator).half(), "norms": torch.rand(n)},
        {"bytes": torch.arange(n, dtype=torch.uint8), "offsets": torch.arange(n)},
    ]
    for some in sets:
        about = write_tensors(tmp_path / "a", some)
        data = safetensors.torch.save(some)
        assert (tmp_path / "a").read_bytes() == data
        assert about == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# --- building ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for i, image in enumerate(pictures(9, 12)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"p{i}.png")
    return root


def test_bad_files_are_skipped_counted_and_named(folder, tmp_path, monkeypatch):
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes()[:99])
    (folder / "notes.txt").write_text("not a picture")
    Image.new("RGB", (100, 100)).save(folder / "p7b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match=r"3 skipped: notes\.txt.*p2\.png.*p7b\.png") as seen:
        database = build_database(tmp_path / "d", ImageFolder(folder), Pooled(), progress=False)
    assert len(seen) == 1
    assert len(database) == 8
    assert dict(database.manifest.skipped) == {
        "notes.txt": "not an image",
        "p2.png": dict(database.manifest.skipped)["p2.png"],
        "p7b.png": "more than 1000 pixels",
    }
    assert [r["file"] for r in database.records(torch.tensor([1, 2]))] == ["p1.png", "p3.png"]


def test_nothing_readable(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        ImageFolder(tmp_path / "photos")
    (tmp_path / "photos/a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no picture could be read; 1 skipped: a\.txt"):
        build_database(tmp_path / "d", ImageFolder(tmp_path / "photos"), Pooled(), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]
    with pytest.raises(FileNotFoundError, match="not a folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="2 images, but 1 records"):
        Images(pictures(2), [{}])


def test_existing_output(folder, tmp_path):
    out, source = tmp_path / "d", ImageFolder(folder)
    build_database(out, source, Pooled(), progress=False)
    before = files_of(out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        build_database(out, source, Pooled(), progress=False)
    assert files_of(out) == before
    # Resuming what is finished opens it, if it is the same.
    assert len(build_database(out, source, Pooled(), resume=True, progress=False)) == 9
    with pytest.raises(ValueError, match="weights='x' against weights='w'"):
        build_database(out, source, Pooled("x"), resume=True, progress=False)
    build_database(out, Images(pictures(3)), Pooled("x"), overwrite=True, progress=False)
    assert len(open_database(out)) == 3
    with pytest.raises(FileExistsError, match=r"has no manifest\.json, so it is not ours"):
        build_database(folder, source, Pooled(), overwrite=True, progress=False)
    assert len(list(folder.iterdir())) == 9


def test_output_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*: choose another folder"):
        build_database(tmp_path / "file/d", ImageFolder(folder), Pooled(), progress=False)


@pytest.fixture
def nobody(tmp_path_factory):
    """A folder that others may enter; root gives up its right to write everywhere."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    root = os.geteuid() == 0
    yield base, (lambda: os.seteuid(65534) if root else None)
    if root:
        os.seteuid(0)
    for folder in base.rglob("*"):
        folder.chmod(0o755)
    shutil.rmtree(base)


def test_read_only_folders(folder, nobody):
    base, become_nobody = nobody
    source = Images(pictures(5))
    build_database(base / "d", source, Pooled(), progress=False)
    before = files_of(base / "d")
    (base / "d").chmod(0o555)
    base.chmod(0o555)
    become_nobody()
    with pytest.raises(PermissionError, match=r"cannot write into .*e\.partial .*choose another"):
        build_database(base / "e", source, Pooled(), progress=False)
    with pytest.raises(PermissionError, match="cannot write into"):
        append_to_database(base / "d", source, Pooled(), progress=False)
    with pytest.raises(PermissionError, match="cannot write into"):
        delete_rows(base / "d", [1])
    database = open_database(base / "d")
    assert len(database.search(Query(torch.randn(1, 48)), 3)) == 1
    assert database.verify() == []
    assert files_of(base / "d") == before


def test_nan_names_file_row_and_encoder(folder, tmp_path):
    class Broken(Pooled):
        def encode_image(self, images):
            out = super().encode_image(images)
            out[images[:, 0, 0, 0] == (pictures(9, 12) / 127.5 - 1)[4, 0, 0, 0]] = torch.nan
            return out

    with pytest.raises(ValueError, match=r"p4\.png \(row 4\) by pooled holds NaN"):
        build_database(tmp_path / "d", ImageFolder(folder), Broken(), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_disk_full_leaves_the_database_as_it_was(folder, tmp_path, monkeypatch):
    source = ImageFolder(folder)
    build_database(tmp_path / "d", source, Pooled(), shard_rows=4, progress=False)
    before = files_of(tmp_path / "d")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        append_to_database(tmp_path / "d", source, Pooled(), progress=False)
    with pytest.raises(OSError, match="No space left"):
        build_database(tmp_path / "d", source, Pooled(), overwrite=True, progress=False)
    monkeypatch.undo()
    assert {k: v for k, v in files_of(tmp_path / "d").items() if "partial" not in k} == before
    assert open_database(tmp_path / "d").verify() == []
    assert (
        len(append_to_database(tmp_path / "d", source, Pooled(), resume=True, progress=False)) == 18
    )


@contextlib.contextmanager
def files_at_most(size):
    """The system refuses to let any file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [700, 1200, 2500])
def test_a_full_disk_can_be_cleared_and_the_build_resumed(size, folder, tmp_path):
    """Wherever it fails: in vectors, records, or the state of the build."""
    parts = [Part(np.random.default_rng(0).normal(size=(300, 48)).astype(np.float16))]

    def built(name, **options):
        options = {**OPTIONS, "shard_rows": 3, **options}
        return build_database(tmp_path / name, ImageFolder(folder), Pooled(), **options)

    def imported(name, **options):
        options = {"shard_rows": size // 60, "progress": False, **options}
        return import_embeddings(tmp_path / name, parts, Pooled().fingerprint, **options)

    for make in (built, imported):
        make("whole")
        with files_at_most(size), pytest.raises(OSError, match="make room") as error:
            make("cut")
        assert "\n" not in str(error.value)
        make("cut", resume=True)
        assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
        for name in ("cut", "whole"):
            shutil.rmtree(tmp_path / name)


def test_one_writer_at_a_time(folder, tmp_path):
    source = ImageFolder(folder)
    build_database(tmp_path / "d", source, Pooled(), progress=False)

    class Meanwhile(Pooled):
        def encode_image(self, images):
            with pytest.raises(BlockingIOError, match="being written by another"):
                append_to_database(tmp_path / "d", source, Pooled(), progress=False)
            assert len(open_database(tmp_path / "d")) == 9
            return super().encode_image(images)

    assert len(append_to_database(tmp_path / "d", source, Meanwhile(), progress=False)) == 18


def test_two_builds_of_one_folder(folder, tmp_path):
    source = ImageFolder(folder)
    parts = [Part(np.zeros((2, 48), np.float16))]

    class Meanwhile(Pooled):
        def encode_image(self, images):
            for resume, error in ((False, FileExistsError), (True, BlockingIOError)):
                options = {"resume": resume, "progress": False}
                with pytest.raises(error, match=r"unfinished build|being written by another"):
                    build_database(tmp_path / "d", source, Pooled(), **options)
                with pytest.raises(error, match=r"unfinished build|being written by another"):
                    import_embeddings(tmp_path / "d", parts, self.fingerprint, **options)
            return super().encode_image(images)

    assert len(build_database(tmp_path / "d", source, Meanwhile(), progress=False)) == 9


def test_a_folder_of_odd_pictures(tmp_path):
    """Every readable one becomes the same row as its plain version, the others are named."""
    plain, photos = Image.fromarray(ramp()), tmp_path / "photos"
    photos.mkdir()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        # What a camera held this way stores: the inverse of what a viewer does.
        method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(turn)
        turned = plain if method is None else plain.transpose(Image.Transpose(method))
        turned.save(photos / f"exif{turn}.png", exif=exif)
    plain.save(photos / "gif.gif", save_all=True, append_images=[plain.rotate(180)])
    webp = {"lossless": True, "save_all": True, "append_images": [plain.rotate(180)]}
    plain.save(photos / "webp.webp", **webp)
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(photos / "palette.png")
    plain.convert("CMYK").save(photos / "cmyk.tif")
    plain.convert("RGBA").save(photos / "alpha.png")
    gray = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(photos / "sixteen.png")
    Image.fromarray(gray).save(photos / "sixteen.tif")
    whole = encoded(plain, "JPEG", quality=95)
    (photos / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (photos / "page.jpg").write_bytes(b"<html>404</html>")
    (photos / "empty.png").touch()
    with pytest.warns(UserWarning, match="3 skipped: empty") as warned:
        database = build_database(tmp_path / "d", ImageFolder(photos), Pooled(), progress=False)
    for name in ("empty.png (not an image)", "page.jpg (not an image)", "truncated.jpg (broken"):
        assert name in str(warned[0].message)
    assert [name for name, _ in database.manifest.skipped] == [
        "empty.png", "page.jpg", "truncated.jpg",
    ]  # fmt: skip
    color = Pooled().encode_image(torch.from_numpy(ramp()).permute(2, 0, 1)[None] / 127.5 - 1)
    dim = torch.from_numpy(gray // 257).expand(1, 3, -1, -1) / 127.5 - 1
    for row, file in enumerate(database.column("file").tolist()):
        expected = Pooled().encode_image(dim) if "sixteen" in file else color
        off = (database.embeddings(torch.tensor([row])) - expected).abs().max()
        assert off < (0.5 if file in ("gif.gif", "palette.png", "cmyk.tif") else 0.02), file


# --- interruption --------------------------------------------------------------------------------

OPTIONS = {"shard_rows": 8, "batch_size": 3, "thumbnails": 8, "progress": False}
POINTS = [
    "vectors written",
    "records written",
    "thumbnails written",
    "shard recorded",
    "manifest written",
    "ready to move",
]

KILL = """
import os, signal, sys, warnings
sys.path.insert(0, {tests!r})
from retrodiff.databases import Patchify, ImageFolder, append_to_database, build_database
from retrodiff.disk import files
from retrodiff.databases.build import edit
from retrodiff.databases import row_files as shards
from retrodiff.databases.build import work
from test_databases import Pooled
import torch
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a killed process loses no written pages
warnings.simplefilter("ignore")

def kill_at(point, nth):
    def reached(name):
        nonlocal nth
        nth -= name == point
        if name == point and nth == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    edit.fault_point = work.fault_point = shards.fault_point = files.fault_point = reached

for job, point, nth, out, folder, options in {jobs!r}:
    child = os.fork()
    if child == 0:
        kill_at(point, nth)
        source = Patchify(size=6, n=3).over(ImageFolder(folder))
        (build_database if job == "build" else append_to_database)(out, source, Pooled(), **options)
        os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (point, nth, status)
"""


def run_killed(jobs) -> None:
    code = KILL.format(tests=str(Path(__file__).parent), jobs=jobs)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_killed_builds_and_appends_resume_to_the_same_bytes(folder, tmp_path, monkeypatch):
    from retrodiff.databases import Patchify

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (folder / "p3.txt").write_text("skipped")
    source = Patchify(size=6, n=3).over(ImageFolder(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_database(tmp_path / "whole", source, Pooled(), **OPTIONS)
        expected = files_of(tmp_path / "whole")
        assert len(json.loads(expected["manifest.json"])["shards"]) == 4

        builds = {(p, n): tmp_path / f"{p} {n}" for p in POINTS[:4] for n in (1, 3)}
        builds |= {(p, 1): tmp_path / p for p in POINTS[4:]}
        jobs = [("build", p, n, str(out), str(folder), OPTIONS) for (p, n), out in builds.items()]
        build_database(tmp_path / "base", Images(pictures(20)), Pooled(), **OPTIONS)
        appended = {}
        before = ("records written", "shard recorded", "append linked")
        after = ("append recorded", "append half removed")
        for point in before + after:
            appended[point] = tmp_path / f"append {point}"
            build_database(appended[point], Images(pictures(20)), Pooled(), **OPTIONS)
            jobs.append(
                ("append", point, 1, str(appended[point]), str(folder), {"progress": False})
            )
        run_killed(jobs)

        for (point, _), out in builds.items():
            assert not out.exists(), point
            if point != "ready to move":
                with pytest.raises(FileExistsError, match="--resume"):
                    build_database(out, source, Pooled(), **OPTIONS)
            build_database(out, source, Pooled(), resume=True, **OPTIONS)
            assert files_of(out) == expected, point
            assert not out.with_name(out.name + ".partial").exists()

        append_to_database(tmp_path / "base", source, Pooled(), progress=False)
        for point, out in appended.items():
            assert len(open_database(out)) == (20 if point in before else 47)
            assert open_database(out).verify() == []
            found = append_to_database(out, source, Pooled(), resume=True, progress=False)
            assert len(found) == 47, point
            assert files_of(out) == files_of(tmp_path / "base"), point


def recorded_append(path, source, monkeypatch):
    """A database to which a source was appended, killed before it could tidy up."""

    def killed(point: str) -> None:
        if point == "append recorded":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(edit, "fault_point", killed)
        with pytest.raises(KeyboardInterrupt):
            append_to_database(path, source, Pooled(), progress=False)
    assert (path / "append.partial" / "build.json").is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_an_append_that_was_recorded_does_not_hinder_another(resume, tmp_path, monkeypatch):
    first = Images(pictures(3), [{"id": i} for i in range(3)])
    second = Images(pictures(2, seed=1), [{"id": i} for i in (3, 4)])
    third = Images(pictures(4, seed=2), [{"id": i} for i in range(5, 9)])
    build_database(tmp_path / "d", first, Pooled(), progress=False)
    recorded_append(tmp_path / "d", second, monkeypatch)
    if resume:  # its ids are there already, which is no reason to refuse it
        again = append_to_database(tmp_path / "d", second, Pooled(), resume=True, progress=False)
        assert again.column("id").tolist() == [0, 1, 2, 3, 4]
        recorded_append(tmp_path / "d", third, monkeypatch)
        third = Images(pictures(1, seed=3), [{"id": 9}])
    longer = append_to_database(tmp_path / "d", third, Pooled(), resume=resume, progress=False)
    assert longer.column("id").tolist() == list(range(10 if resume else 9))
    assert not (tmp_path / "d" / "append.partial").exists()
    assert longer.verify() == []


def test_an_unfinished_append_is_not_taken_for_a_recorded_one(tmp_path, monkeypatch):
    build_database(tmp_path / "d", Images(pictures(3)), Pooled(), progress=False)

    def killed(point: str) -> None:
        if point == "append linked":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(edit, "fault_point", killed)
        with pytest.raises(KeyboardInterrupt):
            append_to_database(tmp_path / "d", Images(pictures(2)), Pooled(), progress=False)
    with pytest.raises(FileExistsError, match="unfinished append"):
        append_to_database(tmp_path / "d", Images(pictures(2)), Pooled(), progress=False)


@pytest.mark.parametrize("damage", ["shape", "dtype", "offsets"])
def test_a_damaged_file_of_tensors_is_one_line(damage, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(4, 2)}, tmp_path / "x.safetensors")
    old, new = {
        "shape": (b"[4,2]", b"[4,3]"), "dtype": (b"F32", b"F99"), "offsets": (b"[0,32]", b"[0,31]")
    }[damage]  # fmt: skip
    data = (tmp_path / "x.safetensors").read_bytes()
    assert old in data
    (tmp_path / "x.safetensors").write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged .*: restore it") as caught:
        map_tensors(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_a_map_is_copied_on_write(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.arange(5)})
    before = (tmp_path / "x.safetensors").read_bytes()
    mapped = map_tensors(tmp_path / "x.safetensors")["x"]
    mapped += 1
    assert mapped.tolist() == [1, 2, 3, 4, 5]
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert map_tensors(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2, 3, 4]


def test_a_column_of_another_type_becomes_text(tmp_path):
    """Refusing would lose rows that are encoded already."""
    build_database(
        tmp_path / "d", Images(pictures(3), [{"n": i} for i in range(3)]), Pooled(), progress=False
    )
    halves = Images(pictures(1), [{"n": 0.5}])  # a number is a number
    found = append_to_database(tmp_path / "d", halves, Pooled(), progress=False)
    assert found.column("n").tolist() == [0, 1, 2, 0.5]
    words = Images(pictures(2), [{"n": "a", "file": "x.png"}, {"n": "b", "file": "y.png"}])
    with pytest.warns(
        MixedColumn, match=r"'n' is stored as text: it is double in the rows before, but 'a' in x"
    ):
        found = append_to_database(tmp_path / "d", words, Pooled(), progress=False)
    assert found.column("n").tolist() == ["0", "1", "2", "0.5", "a", "b"]
    assert found.verify() == []


def test_ctrl_c_then_resume(folder, tmp_path, monkeypatch):
    source = ImageFolder(folder)
    options = {**OPTIONS, "shard_rows": 4}
    build_database(tmp_path / "whole", source, Pooled(), **options)

    class Interrupted(Pooled):
        calls = 0

        def encode_image(self, images):
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().encode_image(images)

    with pytest.raises(KeyboardInterrupt):
        build_database(tmp_path / "d", source, Interrupted(), **options)
    with pytest.raises(FileNotFoundError, match="unfinished: resume it"):
        open_database(tmp_path / "d")
    with pytest.raises(ValueError, match="batch_size=3, now batch_size=5"):
        build_database(
            tmp_path / "d", source, Pooled(), resume=True, **{**options, "batch_size": 5}
        )
    replaced = tmp_path / "r"
    build_database(replaced, Images(pictures(2)), Pooled(), progress=False)
    with pytest.raises(KeyboardInterrupt):
        build_database(replaced, source, Interrupted(), overwrite=True, **options)
    assert len(open_database(replaced)) == 2
    build_database(replaced, source, Pooled(), overwrite=True, resume=True, **options)
    assert files_of(replaced) == files_of(tmp_path / "whole")
    again = Interrupted()
    again.calls = 4
    build_database(tmp_path / "d", source, again, resume=True, **options)
    assert again.calls - 4 < 4  # the first shard was not encoded again
    assert files_of(tmp_path / "d") == files_of(tmp_path / "whole")
    assert ingest_module.skipped_message([("a", "b")] * 12).endswith(
        "(see skipped in manifest.json)"
    )
