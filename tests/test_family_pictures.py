"""How the newer families prepare pictures, against the golden data."""

import json

import numpy as np
import pytest
from families import CHECKPOINTS, GOLDEN, config, read
from helpers import sha256
from PIL import Image, ImageOps

from qvl_runtime.errors import QvlError
from qvl_runtime.families import reading
from qvl_runtime.families.qwen2_vl.family import FAMILY
from qvl_runtime.families.qwen2_vl.preprocessing import Preprocessing, find_settings, resize, smart_resize
from qvl_runtime.families.qwen3_vl.family import FAMILY as QWEN3

PICTURES = read("preprocess.json")
PATCHES = np.load(GOLDEN / "preprocess.npz")


@pytest.mark.parametrize("case", read("smart_resize.json")["rows"], ids=str)
def test_smart_resize(case):
    *arguments, expected = case
    if expected is None:
        with pytest.raises(QvlError, match="200 times"):
            smart_resize(*arguments)
    else:
        assert list(smart_resize(*arguments)) == expected


@pytest.mark.parametrize("preset", PICTURES["presets"])
@pytest.mark.parametrize("name", PICTURES["images"])
def test_patches(name, preset):
    known = PICTURES["images"][name]["presets"][preset]
    settings = PICTURES["presets"][preset]
    vision = config("q3-tied" if "qwen3" in preset else "q2-tied").visual
    preprocessing = Preprocessing.from_dict(settings, vision, "preset")
    picture = ImageOps.exif_transpose(Image.open(GOLDEN / "images" / name)).convert("RGB")
    patches, size = preprocessing.patches(picture, vision.patch_size)
    assert list(size) == known["resized"]
    assert len(patches) == 4 * known["tokens"]
    resized = resize(picture, *size)
    assert sha256(np.asarray(resized)) == known["resized_sha256"]
    assert sha256(patches) == known["patches_sha256"]
    np.testing.assert_array_equal(patches[known["rows"]], PATCHES[f"{name.partition('.')[0]}.{preset}"])


def test_rows_are_filtered_before_columns():
    """Pillow 13 may filter columns first where the height shrinks; these hashes are of Pillow 12.3.0."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 60, 3), np.uint8))
    hashes = [sha256(np.asarray(resize(picture, *size)))[:16] for size in ((90, 40), (40, 90))]
    assert hashes == ["0467ce0d03b42d0f", "23c40f23b5da8c2a"]


@pytest.mark.parametrize(
    ("height", "size", "expected"),
    [
        (700, (28, 392), "c3ad6946aa675890"),
        (700, (28, 728), "a484ad61aa0c59ad"),
        (404, (28, 392), "965e388928af26d8"),
        (400, (28, 392), "8186a64d7820e9fb"),
    ],
)
def test_columns_are_filtered_before_rows_in_a_very_high_picture(height, size, expected):
    """More than 100 times as high as wide, and made lower: Pillow 12.3.0, of which these hashes are, does so."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 4, 3), np.uint8))
    assert sha256(np.asarray(resize(picture, *size)))[:16] == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_settings_of_a_checkpoint(name, tmp_path):
    vision, published = config(name).visual, read(f"ckpt/{name}/preprocessor_config.json")
    assert find_settings(GOLDEN / "ckpt" / name).name == "preprocessor_config.json"
    settings = Preprocessing.from_dict(published, vision, "file")
    assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict())), vision, "blob") == settings
    with pytest.raises(QvlError, match="preprocessor_config"):
        find_settings(tmp_path)


def test_settings_in_a_section(tmp_path):
    """Newer versions of transformers save them in `processor_config.json`."""
    known, path = config("q2-tied"), tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": read("ckpt/q2-tied/preprocessor_config.json")}))
    assert FAMILY.read_preprocessing(tmp_path, known) == FAMILY.read_preprocessing(GOLDEN / "ckpt/q2-tied", known)
    path.write_text(json.dumps({"image_processor": [1]}))
    with pytest.raises(QvlError, match=r"processor_config\.json: 'image_processor' is \[1\]"):
        FAMILY.read_preprocessing(tmp_path, known)


def test_settings_of_videos_in_a_section(tmp_path, monkeypatch):
    known, path = config("q3-tied"), tmp_path / "processor_config.json"
    picture, size = read("ckpt/q3-tied/preprocessor_config.json"), {"shortest_edge": 4096, "longest_edge": 8192}
    path.write_text(json.dumps({"image_processor": picture, "video_processor": {"size": size}}))
    video = {"min_pixels": 4096, "max_pixels": 8192}
    reads = []
    read_regular = reading.read_regular
    monkeypatch.setattr(
        reading, "read_regular", lambda path, **more: reads.append(path.name) or read_regular(path, **more)
    )
    assert QWEN3.read_preprocessing(tmp_path, known)["video"] == video
    assert reads == ["processor_config.json"]
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": {**size, "longest_edge": 4096}}))
    assert QWEN3.read_preprocessing(tmp_path, known)["video"] == {**video, "max_pixels": 4096}
    (tmp_path / "video_preprocessor_config.json").unlink()
    path.write_text(json.dumps({"image_processor": picture, "video_processor": 1}))
    with pytest.raises(QvlError, match=r"processor_config\.json: 'video_processor' is 1"):
        QWEN3.read_preprocessing(tmp_path, known)


def test_settings_of_videos_are_not_read_where_they_do_not_matter(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(read("ckpt/q2-tied/preprocessor_config.json")))
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    assert "video" not in FAMILY.read_preprocessing(tmp_path, config("q2-tied"))


def test_limits():
    published = Preprocessing(3136, 12845056, (0.5,) * 3, (0.5,) * 3)
    assert published.limited(None, None, 28).max_pixels == 1280 * 28 * 28
    assert published.limited(None, 12845056, 28).max_pixels == 12845056
    assert published.limited(None, 1000, 28) == Preprocessing(1000, 1000, (0.5,) * 3, (0.5,) * 3)
    for low, high, message in [(None, 783, "783"), (0, None, "min_pixels is 0"), (5000, 4000, "min_pixels is 5000")]:
        with pytest.raises(QvlError, match=message):
            published.limited(low, high, 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, "'patch_size' is 16; only 14"),
        ({"merge_size": 4}, "merge_size"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"rescale_factor": "x"}, "'rescale_factor' is 'x', expected float"),
        ({"image_mean": [0.5]}, "'image_mean' has 1"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": None}, "'image_std' is missing"),
        ({"min_pixels": None}, "'min_pixels' is missing"),
        ({"max_pixels": 3135}, "contradict"),
    ],
)
def test_settings_that_are_refused(change, message):
    published = read("ckpt/q2-tied/preprocessor_config.json") | change
    with pytest.raises(QvlError, match=message):
        Preprocessing.from_dict(published, config("q2-tied").visual, "file")
