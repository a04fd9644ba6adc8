"""Reading and preprocessing pictures: the golden data, and every kind of bad input."""

import base64
import contextlib
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import sha256
from PIL import Image

from qvl_runtime.cli.main import main
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.preprocessing import patches, preprocess
from qvl_runtime.inputs.images import load_image

GOLDEN = Path(__file__).parent / "golden"
DATA = json.loads((GOLDEN / "preprocess.json").read_text(encoding="utf-8"))["images"]
ODD = GOLDEN / "images/rgb_odd.png"


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG with this size in its header."""

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
    read = io.BytesIO(data)
    read.seek(100)
    sources = [str(ODD), data, bytearray(data), Image.open(ODD), expected, expected[::-1][::-1], alpha, url]
    sources += [memoryview(data), read, ODD.open("rb"), ODD.as_uri(), url.replace("data:", "DATA:")]
    for source in sources:
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


BIG = png(10_000, 10_000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "cannot read image no/such/file.png: no such file"),
        ("a\0b.png", "NUL"),
        (GOLDEN, "a folder, not a regular file"),
        (b"", "empty.*get the file again"),
        (b"no image at all", "known format.*save it as PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (ODD.read_bytes()[:5000], "broken.*get the file again"),
        (png(16, 16), "broken"),
        (png(0, 16), "image data"),
        (BIG, "pixels"),
        (png(60_000, 60_000), "pixels"),
        (Image.new("1", (10_000, 10_000)), "10000 x 10000"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.full((4, 4, 3), 255, np.float32), "from 0 to 1"),
        (np.full((4, 4), np.nan), "from 0 to 1"),
        (np.zeros(4, np.uint8), r"\[4\]"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "not finite: save it"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "32-bit"),
        (io.StringIO("text"), "gives str, not bytes"),
        (io.BytesIO(), "empty"),
        ("file://[::1", "no file URI"),
        ("file://elsewhere/a.png", "another machine"),
        ("file:///no/such/file.png", "/no/such/file.png: no such file"),
        ("x" * 5000, "cannot read image x+…x+: "),
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
    assert all(warning.category is Image.DecompressionBombWarning for warning in recwarn), "Pillow's own alone"


def test_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(QvlError, match=r"empty\.png' is empty"):
        load_image(path)


def test_grey_pictures_of_16_bits_are_scaled(tmp_path):
    """Pillow's conversion turns everything above 255 into white."""
    values = np.array([[0, 128, 257, 0x7FFF, 0x8000, 65535]], np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name))[0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]
    (tmp_path / "a.pgm").write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    assert np.asarray(load_image(tmp_path / "a.pgm"))[0, :, 1].tolist() == [0, 0, 1, 127, 128, 255]
    scaled = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert np.asarray(load_image(scaled))[0, :, 2].tolist() == [0, 128, 255]


def test_arrays_that_are_grey_or_floating_point():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (5, 7, 3), np.uint8)
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(load_image((colours / 255).astype(dtype)), colours)
    grey = colours[:, :, 0]
    for array in (grey, grey[:, :, None], grey / 255):
        np.testing.assert_array_equal(load_image(array), np.repeat(grey[:, :, None], 3, axis=2))


def test_exif_is_ignored_unless_it_is_asked_for(tmp_path):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:8, :8] = 255
    turned = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turned |= {6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, -1)}
    turned |= {5: lambda a: a.transpose(1, 0, 2), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2)}
    for orientation, turn in turned.items():
        stored = Image.fromarray(np.ascontiguousarray(turn(upright)))
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(load_image(tmp_path / "a.png"), stored)
        np.testing.assert_array_equal(load_image(tmp_path / "a.png", exif=True), upright)
    Image.fromarray(upright).save(tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0 damaged")
    assert load_image(tmp_path / "a.jpg", exif=True).size == (30, 20)


@pytest.mark.parametrize("source", [str(ODD), ODD, ODD.as_uri(), ODD.as_uri().replace("file", "FILE", 1)])
def test_paths_can_be_switched_off(source):
    assert load_image(source).size == (173, 91)
    with pytest.raises(QvlError, match="no file is opened here"):
        load_image(source, allow_paths=False)
    assert load_image(ODD.read_bytes(), allow_paths=False).size == (173, 91)


def test_a_small_jpeg2000_file_cannot_ask_for_much_memory(tmp_path):
    path = tmp_path / "a.jp2"
    Image.new("RGB", (5000, 5000)).save(path)
    assert path.stat().st_size < 20_000
    with pytest.raises(QvlError, match="5000 x 5000 pixels"):
        load_image(path)
    Image.new("RGB", (400, 300)).save(path)
    assert load_image(path).size == (400, 300)


def test_a_small_bitmap_cannot_ask_for_much_time():
    """Pillow decodes run-length encoding in Python, and fills a row that ends early one pixel after the other."""

    def bitmap(width: int) -> bytes:
        runs, palette = b"\1\1\0\0", bytes(1024)
        head = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, len(runs), 0, 0, 256, 0) + palette
        return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(runs), 0, 0, 14 + len(head)) + head + runs

    assert load_image(bitmap(300)).size == (300, 1)
    for content in (bitmap(80_000_000), b"P1 9000 9000\n" + b"1" * 100):
        with pytest.raises(QvlError, match="pixels, more than 16777216"):
            load_image(content)


def test_a_jpeg_cannot_ask_for_a_pass_with_every_few_bytes():
    out = io.BytesIO()
    Image.open(ODD).convert("RGB").save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(QvlError, match="the image data is a JPEG of more than 100 scans"):
        load_image(whole[:-2] + scan * 100 + whole[-2:])
    comment, pixels = b"\xff\xfe" + struct.pack(">H", 502) + scan[:2] * 250, np.asarray(load_image(whole))
    for like in (whole + scan * 100, whole[:2] + comment + whole[2:]):  # what is no scan of the picture
        assert (np.asarray(load_image(like)) == pixels).all()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_damaged_files_never_crash(seed):
    rng = np.random.default_rng(seed)
    name = sorted(os.listdir(GOLDEN / "images"))[seed % 8]
    data = np.frombuffer((GOLDEN / "images" / name).read_bytes(), np.uint8).copy()
    places = rng.integers(0, min(len(data), 400), 8)
    data[places] = rng.integers(0, 256, 8)
    with contextlib.suppress(QvlError):
        assert load_image(data.tobytes()).mode == "RGB"


def test_the_filters_of_warnings_are_left_to_the_application(monkeypatch):
    """They are the process's: where two threads change and restore them, one may restore the other's."""
    found, opened = [], Image.open

    def opening(*arguments, **options):
        found.append(list(warnings.filters))
        return opened(*arguments, **options)

    monkeypatch.setattr(Image, "open", opening)
    load_image(ODD.read_bytes())
    assert found == [list(warnings.filters)]


def test_the_command_line_hides_warnings_of_pillow(recwarn, monkeypatch):
    monkeypatch.setattr("sys.warnoptions", [])
    with pytest.raises(SystemExit):
        main(["--version"])
    with pytest.raises(QvlError, match="pixels"):
        load_image(BIG)
    assert not recwarn.list


def test_a_palette_with_alpha_gives_its_colours_without_a_warning(recwarn):
    image, file = Image.new("P", (2, 1)), io.BytesIO()
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(file, "PNG", transparency=b"\x00\x80")
    assert np.asarray(load_image(file.getvalue())).tolist() == [[[10, 20, 30], [40, 50, 60]]]
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
