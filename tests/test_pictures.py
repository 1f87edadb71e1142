"""Pictures of any kind become tensors or are refused; what is printed and stored of their names."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from retrodiff.numbers import whole
from retrodiff.pictures.converting import (
    PixelRange,
    to_batch,
    to_bytes,
    to_float,
    to_image,
    to_images,
)
from retrodiff.pictures.decoding import UnreadableImage, from_pil, not_a_file, read_image
from retrodiff.text import escaped, markdown, printable, unescaped

DRAW = torch.Generator().manual_seed(0)
PIXELS = torch.randint(0, 256, (4, 3, 24, 20), dtype=torch.uint8, generator=DRAW)
FLOATS = to_float(PIXELS)
HWC = [image.permute(1, 2, 0).numpy() for image in PIXELS]
PIL = [Image.fromarray(array) for array in HWC]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# --- converting ----------------------------------------------------------------------------------

SAME = {
    "uint8": PIXELS,
    "int64": PIXELS.long(),
    "int32": PIXELS.int(),
    "int16": PIXELS.short(),
    "uint16": (PIXELS.int() * 257).to(torch.uint16),
    "float32": FLOATS,
    "float64": FLOATS.double(),
    "numpy": PIXELS.numpy(),
    "numpy float64, big-endian": FLOATS.numpy().astype(">f8"),
    "numpy, not contiguous": PIXELS.flip(0).numpy()[::-1],
    "hwc tensor": PIXELS.permute(0, 2, 3, 1),
    "hwc numpy": np.stack(HWC),
    "list of hwc": HWC,
    "tuple of tensors": tuple(PIXELS),
    "list of float tensors": list(FLOATS),
    "PIL": PIL,
    "encoded": [encoded(image) for image in PIL],
    "memoryview": [memoryview(encoded(image)) for image in PIL],
    "nested lists": [array.tolist() for array in HWC],
    "rgba": torch.cat([PIXELS, torch.full((4, 1, 24, 20), 255, dtype=torch.uint8)], 1),
    "mixed": [PIL[0], PIXELS[1], HWC[2], FLOATS[3]],
}


@pytest.mark.parametrize("kind", SAME)
def test_pictures_of_one_meaning_become_the_same_batch(kind):
    batch = to_batch(SAME[kind])
    assert batch.dtype == torch.float32
    assert torch.allclose(batch, FLOATS, atol=1e-6)
    several = to_images(SAME[kind])
    assert all(
        torch.allclose(to_float(a), b, atol=1e-6) for a, b in zip(several, FLOATS, strict=True)
    )
    one = to_image(SAME[kind][1])
    assert one.dtype in (torch.uint8, torch.float32)
    assert torch.allclose(to_float(one), FLOATS[1], atol=1e-6)


def test_half_precision_gray_and_black_and_white():
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.allclose(to_batch(FLOATS.to(dtype)), FLOATS, atol=4e-3)
    assert torch.equal(to_batch(PIXELS > 127), (PIXELS > 127).float() * 2 - 1)
    many = torch.cat([PIXELS, PIXELS])[:5, 0]  # (5, 24, 20): a stack of gray pictures
    assert torch.equal(to_batch(many), to_float(many)[:, None])
    assert to_batch(PIXELS[:, :1]).shape == (4, 1, 24, 20)
    gray, colored = to_images([PIXELS[0, 0], PIXELS[1]])
    assert torch.equal(gray, PIXELS[0, :1].expand(3, -1, -1))
    assert torch.equal(colored, PIXELS[1])
    half = torch.cat([torch.zeros(3, 5, 5), torch.full((1, 5, 5), 51)]).to(torch.uint8)
    assert (to_image(half) == 204).all()  # black of a fifth's opacity on white


def test_a_right_tensor_is_not_copied_and_keeps_its_gradient():
    assert to_batch(FLOATS).data_ptr() == FLOATS.data_ptr()
    wanted = FLOATS.clone().requires_grad_()
    to_batch(wanted).sum().backward()
    assert wanted.grad is not None
    assert to_batch(FLOATS[:0]).shape == (0, 3, 24, 20)
    assert torch.equal(to_bytes(FLOATS), PIXELS)


def test_paths(tmp_path):
    PIL[0].save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(to_image(path), PIXELS[0])
        assert [len(i) for i in to_images([path, path])] == [3, 3]
        assert len(to_images(path)) == 1  # one path is one picture, not a list of letters
    with pytest.raises(UnreadableImage, match=r"images\[1\]=.*none\.png: No such file"):
        to_images([PIL[0], tmp_path / "none.png"])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (PIXELS.float(), "floats from 0 to 255, expected -1 to 1: divide 0 to 255 by 127.5"),
        (FLOATS * 2.2, "expected -1 to 1"),
        (FLOATS / 0, "not finite"),
        (PIXELS.long() * 257, "int64 from 0 to 65535, which is no clear range"),
        (PIXELS.long() - 5, "int64 from -5"),
        ((PIXELS > 9).long(), "int64 from 0 to 1, which is no clear range"),
        (PIXELS.to(torch.uint16), "uint16 from 0 to 255"),
        (PIXELS[0], r"images has shape \(3, 24, 20\).*images\[None\]"),
        (PIXELS[0, 0], r"shape \(24, 20\)"),
        (PIXELS[:, :2], "with 1, 3 or 4 channels"),
        (np.zeros((4, 3, 9, 3), np.uint8), r"give a torch tensor, since \(b, h, w, c\) fits too"),
        ([np.zeros((3, 9, 3), np.uint8)], r"images\[0\] has shape \(3, 9, 3\), which may be"),
        ([PIXELS], r"images\[0\] has shape \(4, 3, 24, 20\), expected one picture"),
        (FLOATS.to(torch.complex64), "complex64"),
        (np.full((2, 3, 8, 8), None), "an array of object"),
        ([[1, 2], [3]], "expected one picture"),
        ([{"a": 1}], r"images\[0\] is dict, expected a picture"),
        (None, "images is NoneType"),
        (7, "images is int"),
        ([], "is empty: give at least one"),
        ([PIXELS[0], PIXELS[1, :, :9]], r"images\[0\] has 20 x 24 pixels, images\[1\] 20 x 9"),
        (torch.cat([FLOATS, FLOATS[:, :1]], 1), "4 channels of floats"),
    ],
)
def test_what_may_mean_two_things_is_refused_in_one_line(picture, message):
    with pytest.raises(ValueError, match=message) as error:
        to_batch(picture)
    assert "\n" not in str(error.value)


def test_floats_from_zero_to_one_are_warned_of():
    with pytest.warns(PixelRange, match=r"photos holds floats from 0 to 1 .* give photos \* 2 - 1"):
        to_batch(PIXELS.float() / 255, name="photos")
    to_batch(torch.zeros(1, 3, 8, 8))  # of one value: nothing is known


# --- reading -------------------------------------------------------------------------------------


def ramp(h: int = 24, w: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[0:h, 0:w]
    return np.stack([rows * 9, columns * 7, 200 - rows * 3], -1).astype(np.uint8)


def turned(orientation: int) -> np.ndarray:
    from PIL import ImageOps

    image = Image.fromarray(ramp())
    image.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("strip", [2**20, 100])
def test_every_orientation_in_one_strip_and_in_many(orientation, strip, monkeypatch):
    monkeypatch.setattr("retrodiff.pictures.decoding.STRIP", strip)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        read = read_image(encoded(Image.fromarray(ramp()), kind, exif=exif))
        assert np.array_equal(read.permute(1, 2, 0).numpy(), turned(orientation))


def tiff(*entries: tuple[int, int, int, bytes], extra: bytes = b"") -> bytes:
    body = struct.pack("<H", len(entries))
    body += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + body + bytes(4) + extra


ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
BEHIND = struct.pack("<I", 8 + 2 + 24 + 4)
PLAIN = tiff(ORIENTATION, (0x11A, 10, 1, BEHIND), extra=struct.pack("<ii", 1, 1))
EXIF = {
    "turned": (tiff(ORIENTATION), True),
    "-1/0": (tiff(ORIENTATION, (0x11A, 10, 1, BEHIND), extra=struct.pack("<ii", -1, 0)), True),
    "-2^31": (
        tiff(ORIENTATION, (0x11A, 10, 1, BEHIND), extra=struct.pack("<ii", -(2**31), 1)),
        True,
    ),
    "outside": (tiff(ORIENTATION, (0x11A, 5, 1, struct.pack("<I", 9**7))), True),
    "99": (tiff((0x0112, 3, 1, struct.pack("<HH", 99, 0))), False),
    "text": (tiff((0x0112, 2, 2, b"6\0\0\0")), False),
    "none": (b"", False),
    "garbage": (b"\0\x08\0\x02\x01\x12\0\x03", False),
    "cut": (tiff(ORIENTATION)[:15], False),
}


@pytest.mark.parametrize("name", EXIF)
def test_odd_exif_never_costs_the_picture(name):
    exif, upright = EXIF[name]
    image = Image.fromarray(ramp())
    jpeg, png, webp = (encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP"))
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    chunk = b"eXIf" + exif
    files = {
        "JPEG": jpeg[:2] + segment + jpeg[2:],
        "PNG": png[:33] + struct.pack(">I", len(exif)) + chunk
        + struct.pack(">I", zlib.crc32(chunk)) + png[33:],
        "WEBP": encoded(image, "WEBP", exif=b"Exif\0\0" + exif, lossless=True) if exif else webp,
        # Pillow writes no odd Exif into an AVIF: it is put there in place of a plain one.
        "AVIF": encoded(image, "AVIF", exif=PLAIN).replace(PLAIN, exif.ljust(len(PLAIN), b"\0")),
    }  # fmt: skip
    for kind, data in files.items():
        read = read_image(data)
        if kind != "AVIF":  # which says itself how it is turned
            assert read.shape == ((3, 32, 24) if upright else (3, 24, 32)), kind


def test_odd_descriptions_of_a_png_never_cost_the_picture():
    raw = encoded(Image.fromarray(ramp()))

    def with_chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
        checksum = zlib.crc32(kind + data) if checksum is None else checksum
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
        return raw[:33] + chunk + raw[33:]

    for data in (
        with_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 2_000_000)),
        with_chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * 70_000_000)),
        with_chunk(b"iCCP", b"p\0\0" + zlib.compress(b"a" * 2_000_000)),
        with_chunk(b"tEXt", b"a\0b", 7),
        with_chunk(b"gAMA", b"1"),
        with_chunk(b"pHYs", b""),
    ):
        assert np.array_equal(read_image(data).permute(1, 2, 0).numpy(), ramp())
    with pytest.raises(UnreadableImage, match="image"):  # pixels are not made up
        read_image(with_chunk(b"tEXt", b"a\0b", 7)[:-300])


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_values_of_many_bits(mode, monkeypatch):
    monkeypatch.setattr("retrodiff.pictures.decoding.STRIP", 64)
    kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
    small = np.arange(256, dtype=kind).reshape(16, 16)
    for data in (encoded(Image.fromarray(small), "TIFF"), Image.fromarray(small)):
        read = read_image(data) if isinstance(data, bytes) else from_pil(data)
        assert read[0].flatten().tolist() == list(range(256))  # nothing nearly black
    if mode != "F":
        assert from_pil(Image.fromarray(small * 257))[1].flatten().tolist() == list(range(256))
        with pytest.raises(UnreadableImage, match="nothing but the integers 0 and 1"):
            from_pil(Image.fromarray(small % 2))
    else:
        assert from_pil(Image.fromarray(small / 255))[1].flatten().tolist() == list(range(256))
        for value, message in [(np.nan, "not finite"), (np.inf, "not finite"), (9e3, "neither 0")]:
            small[3, 3] = value
            with pytest.raises(UnreadableImage, match=message):
                from_pil(Image.fromarray(small))
    if mode == "I":
        for value in (-1, 70_000):
            small[3, 3] = value
            with pytest.raises(UnreadableImage, match="not 0 to 65535"):
                read_image(encoded(Image.fromarray(small), "TIFF"))


def test_a_png_of_sixteen_bits_says_itself_what_is_white():
    dark = np.full((8, 8), 200, np.uint16)
    assert (read_image(encoded(Image.fromarray(dark))) == 1).all()


def test_no_other_program_is_started_for_a_picture(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(script)
    with pytest.raises(UnreadableImage, match="not an image"):
        read_image(tmp_path / "a.jpg")


def test_only_files_are_opened(tmp_path):
    import socket

    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(tmp_path)  # names of sockets are short
        bound.bind("socket.jpg")
        for path, message in [
            ("pipe.jpg", "a pipe, not a file"),
            ("socket.jpg", "a socket, not a file"),
            ("/dev/zero", "a device, not a file"),
            (".", "a folder, not a file"),
            ("none.jpg", "No such file"),
            ("a\0b", "null"),
        ]:
            assert message in str(not_a_file(path))
            with pytest.raises(UnreadableImage, match=message):
                read_image(path)


def test_a_pil_image_that_cannot_be_decoded():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole_file = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(UnreadableImage, match="broken image: image file is truncated"):
        from_pil(Image.open(io.BytesIO(whole_file[:999])))
    with pytest.raises(UnreadableImage, match=r"photo: broken image"):
        to_image(Image.open(io.BytesIO(whole_file[:999])), name="photo")


# --- names and numbers ---------------------------------------------------------------------------

LATIN = os.fsdecode(b"caf\xe9.png")


def test_text_is_printed_and_stored_without_harm():
    assert printable("日本 é b.png") == "日本 é b.png"
    assert printable("a\x1b]0;x\x07\r\nb") == r"a\x1b]0;x\x07\r\nb"
    assert printable("\u202egnp.exe\u2028\x9b1m") == r"\u202egnp.exe\u2028\x9b1m"
    assert printable(LATIN) == r"caf\xe9.png"
    assert printable(7) == "7"
    assert markdown("<img src=x>|`a`[b](c)\n") == (r"&lt;img src=x&gt;\|\`a\`\[b\]\(c\)\\n")
    assert escaped(LATIN) == r"caf\xe9.png"
    assert escaped("a\n日本\ud800") == "a\n日本\\ud800"
    assert unescaped(escaped(LATIN)) == LATIN
    assert unescaped("日本.png") == "日本.png"
    for text in (LATIN, "\ud800", "a\udce9\ud800"):
        escaped(text).encode()


def test_whole_numbers_of_any_kind():
    for value in (3, np.int64(3), np.uint8(3), torch.tensor(3)):
        assert type(whole("k", value)) is int
        assert whole("k", value) == 3
    for value in (0, -1, 2.0, "3", None, True, np.float32(3), float("nan")):
        with pytest.raises(ValueError, match=r"batch_size=.*: give a whole number, at least 1"):
            whole("batch_size", value)
    assert whole("workers", 0, 0) == 0
