"""Reading and preprocessing pictures: the golden data, and every kind of bad input."""

import base64
import contextlib
import hashlib
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.preprocessing import patches, preprocess
from qvl_runtime.inputs.images import load_image

GOLDEN = Path(__file__).parent / "golden"
DATA = json.loads((GOLDEN / "preprocess.json").read_text(encoding="utf-8"))["images"]
ODD = GOLDEN / "images/rgb_odd.png"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that claims this size, whatever it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", DATA)
def test_golden_pixels(name):
    image = load_image(GOLDEN / "images" / name)
    assert image.size == tuple(DATA[name]["size"])
    if not name.endswith(".jpg"):  # JPEG decoders may differ by a rounding step; PNG ones may not
        assert sha256(image.tobytes()) == DATA[name]["rgb_sha256"]
    else:
        image = Image.open(GOLDEN / "images_ref" / name.replace(".jpg", "_decoded.png"))
    for size, expected in DATA[name]["resized"].items():
        pixels = preprocess(image, int(size))
        assert pixels.dtype == np.float32
        assert pixels.shape == (3, int(size), int(size))
        assert sha256(pixels.tobytes()) == expected["f32_sha256"]


def test_jpeg_decodes_like_the_golden_one():
    for name in ("rgb_photo", "exif6"):
        image = np.asarray(load_image(GOLDEN / f"images/{name}.jpg"), np.int16)
        expected = np.asarray(Image.open(GOLDEN / f"images_ref/{name}_decoded.png"), np.int16)
        assert image.shape == expected.shape
        assert np.abs(image - expected).max() <= 2


def test_every_kind_of_source():
    expected = np.asarray(load_image(ODD))
    data = ODD.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    alpha = np.dstack([expected, np.zeros(expected.shape[:2], np.uint8)])
    for source in (str(ODD), data, bytearray(data), Image.open(ODD), expected, expected[::-1][::-1], alpha, url):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


BIG = png(10_000, 10_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "no/such/file.png.*No such file"),
        ("a\0b.png", "null"),
        (GOLDEN, "irectory"),
        (b"", "empty"),
        (b"no image at all", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (ODD.read_bytes()[:5000], "broken"),
        (png(16, 16), "broken"),
        (png(0, 16), "image bytes"),
        (BIG, "pixels"),
        (png(60_000, 60_000), "pixels"),
        (Image.new("1", (10_000, 10_000)), "10000 x 10000"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), np.uint8), r"\[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8)[:, :, :2], r"\[3, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (17, "int"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png,abc", "base64"),
        ("https://example.com/a.png", "unless you allow it.*https://example.com/a.png"),
    ],
)
def test_bad_images(source, message, recwarn):
    with pytest.raises(QvlError, match=message) as error:
        load_image(source)
    assert "\n" not in str(error.value)
    assert not recwarn.list


def test_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(QvlError, match=r"empty\.png' is empty"):
        load_image(path)


def test_url_is_fetched_when_allowed(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(ODD.read_bytes()))
    assert load_image("http://example.com/a.png", allow_urls=True).size == (173, 91)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(bytes((64 << 20) + 1)))
    with pytest.raises(QvlError, match="64 MiB"):
        load_image("http://example.com/a.png", allow_urls=True)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_never_crash(seed, recwarn):
    rng = np.random.default_rng(seed)
    name = sorted(os.listdir(GOLDEN / "images"))[seed % 8]
    data = np.frombuffer((GOLDEN / "images" / name).read_bytes(), np.uint8).copy()
    places = rng.integers(0, min(len(data), 400), 8)
    data[places] = rng.integers(0, 256, 8)
    with contextlib.suppress(QvlError):
        assert load_image(data.tobytes()).mode == "RGB"
    assert not recwarn.list


def test_patches_are_the_convolution():
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((3, 28, 28), dtype=np.float32)
    weight = rng.standard_normal((5, 3, 14, 14), dtype=np.float32)
    out = patches(pixels, 14) @ weight.reshape(5, -1).T
    for row in range(2):
        for column in range(2):
            window = pixels[:, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            expected = np.einsum("cyx,ocyx->o", window, weight)
            np.testing.assert_allclose(out[row * 2 + column], expected, rtol=1e-4, atol=1e-4)


def test_patches_of_a_wrong_size():
    with pytest.raises(QvlError, match=r"30.*14"):
        patches(np.zeros((3, 30, 30), np.float32), 14)
