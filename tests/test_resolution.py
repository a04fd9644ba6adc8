"""Pictures with a resolution of their own, in Python and over HTTP."""

from __future__ import annotations

import numpy as np
import pytest
from families import GOLDEN
from PIL import Image
from serving import data_uri, png, serving

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.preprocessing import Preprocessing
from qvl_runtime.inputs.pictures import LOCAL
from qvl_runtime.inputs.resolution import Resolution

MOST = 64 * 64 * 4
"""Largest number of pixels of a picture of `served`."""


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module", params=["q25-tied", "q3-tied"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("resolution") / f"{request.param}.qvl"
    convert(GOLDEN / "ckpt" / request.param, path, group_size=32)
    return path


@pytest.fixture(scope="module")
def model(path):
    return qvl.load(path, device="cpu", max_pixels=MOST)


@pytest.fixture(scope="module")
def served(model):
    with serving(model) as server:
        yield server


# ------------------------------------------------------------------------------------------------------- reading
def test_the_keys_of_a_part():
    assert Resolution.of_part({"image": "x"}) is None
    assert Resolution.of_part({"image": "x", "max_pixels": None, "detail": "high"}) is None
    assert Resolution.of_part({"image_url": "x", "min_pixels": 3, "max_pixels": 9}) == Resolution(3, 9)
    for part in ({"detail": "low"}, {"image_url": {"url": "x", "detail": "low"}}):
        assert Resolution.of_part(part) == Resolution(low=True)
    for resolution in (Resolution(3, 9), Resolution(resized_width=2, resized_height=4), Resolution(low=True)):
        assert Resolution.of_part(resolution.to_part()) == resolution


@pytest.mark.parametrize(("part", "message"), [
    ({"max_pixels": 0}, "'max_pixels' of a picture is 0"),
    ({"max_pixels": 1.5}, "1.5; expected a number of pixels"),
    ({"min_pixels": True}, "'min_pixels' of a picture is True"),
    ({"min_pixels": "9"}, "is '9'"),
    ({"max_pixels": 1 << 41}, "'max_pixels'"),
    ({"resized_width": 28}, "give both"),
    ({"resized_height": 28}, "give both"),
])  # fmt: skip
def test_wrong_keys(part, message):
    with pytest.raises(QvlError, match=message):
        Resolution.of_part(part)


# What qwen_vl_utils 0.0.14 computes for patches of 14 and of 16 pixels.
@pytest.mark.parametrize(("size", "part", "of_14", "of_16"), [
    ((640, 480), {"max_pixels": 50176}, (252, 168), (256, 192)),
    ((640, 480), {"min_pixels": 50176, "max_pixels": 50176}, (252, 168), (256, 192)),
    ((100, 30), {"min_pixels": 100352}, (588, 196), (608, 192)),
    ((2000, 900), {"min_pixels": 200704, "max_pixels": 1003520}, (1484, 644), (1472, 640)),
    ((640, 480), {"resized_height": 280, "resized_width": 420}, (420, 280), (416, 288)),
    ((640, 480), {"resized_height": 1, "resized_width": 1}, (56, 56), (64, 64)),
    ((33, 2000), {"resized_height": 100, "resized_width": 90}, (84, 112), (96, 96)),
    ((50, 50), {"resized_height": 9000, "resized_width": 9000}, (3584, 3584), (4096, 4096)),
])  # fmt: skip
def test_the_size_is_that_of_the_published_helper(monkeypatch, size, part, of_14, of_16):
    sizes: list = []
    monkeypatch.setattr(Preprocessing, "frame_patches", lambda self, frames, patch, size: sizes.append(size))
    for patch in (14, 16):
        settings = Preprocessing(4 * (2 * patch) ** 2, 16384 * (2 * patch) ** 2, (0.5,) * 3, (0.5,) * 3)
        settings.patches(Image.new("RGB", size), patch, Resolution.of_part(part))
    assert sizes == [of_14, of_16]


def test_low_detail_lowers_the_limits():
    settings = Preprocessing(4 * 28**2, 1280 * 28**2, (0.5,) * 3, (0.5,) * 3)
    assert settings.wanted(Resolution(low=True), 28).max_pixels == 512 * 512
    small = Preprocessing(4 * 28**2, 100 * 28**2, (0.5,) * 3, (0.5,) * 3)
    assert small.wanted(Resolution(low=True), 28).max_pixels == 100 * 28**2
    assert settings.wanted(Resolution(max_pixels=90_000, low=True), 28).max_pixels == 90_000
    with pytest.raises(QvlError, match="min_pixels is 90000"):
        small.wanted(Resolution(min_pixels=90_000), 28)


# --------------------------------------------------------------------------------------------------------- Python
def test_a_picture_is_as_if_the_model_had_its_limits(path, model):
    small = qvl.load(path, device="cpu", max_pixels=MOST // 4)
    first, second = noise(150, 100), noise(90, 130)
    part = {"type": "image", "image": png(first), "max_pixels": MOST // 4}
    asked = [part, {"type": "text", "text": "x"}]
    alone = model.generate(asked, max_new_tokens=4, logprobs=2)
    assert alone.token_ids == small.generate([{"image": png(first)}, asked[1]], max_new_tokens=4).token_ids
    assert alone.prompt_tokens < model.generate([{"image": png(first)}, asked[1]], max_new_tokens=1).prompt_tokens
    # beside another, and the same picture in two resolutions
    both = [{"image": png(first)}, part, {"image": png(second), "detail": "low"}, asked[1]]
    slots = model.prompts.build(both, None, LOCAL).slots
    assert slots[0].picture.key != slots[1].picture.key
    assert [slot.picture.resized for slot in slots][1] == small.pictures.reader.read(png(first)).resized
    again = model.prompts.build(both, None, LOCAL).slots[1].picture
    assert again.prepared is None, "the second time it is known"
    np.testing.assert_array_equal(
        model.pictures.reader.decode(again.content).values, small.pictures.reader.decode(png(first)).values
    )


def test_a_conversation_keeps_it(model):
    picture = noise(150, 100)
    asked = [{"image": picture, "resized_width": 64, "resized_height": 64}, {"text": "x"}]
    first = model.chat(asked, max_new_tokens=2)
    second = model.chat("y", first.history, max_new_tokens=2)
    begun = model.prompts.build([{"role": "user", "content": asked}], None, LOCAL)
    assert second.prompt_tokens > first.prompt_tokens == len(begun.ids)
    kept = first.history[0][0][0]
    assert (kept["resized_width"], kept["resized_height"]) == (64, 64) and kept["image"] is picture
    images = [{"type": "image", "max_pixels": 4096}, {"text": "x"}]
    place = model.prompts.build(images, [picture], LOCAL).slots[0].picture
    assert place.resized[0] * place.resized[1] <= 4096


def test_qwen_vl_has_one_size(demo_model):
    picture = noise(60, 40)
    with pytest.raises(QvlError, match="pictures of any size"):
        demo_model.generate([{"image": picture, "max_pixels": 9000}, {"text": "x"}], max_new_tokens=1)
    answers = [
        demo_model.generate([{"image": picture, **more}, {"text": "x"}], max_new_tokens=3).token_ids
        for more in ({}, {"detail": "low"})
    ]
    assert answers[0] == answers[1]


# ---------------------------------------------------------------------------------------------------------- HTTP
def parts(**more):
    image = {"type": "image_url", "image_url": {"url": data_uri(png(noise(150, 100)))}, **more}
    return [image, {"type": "text", "text": "x"}]


def test_over_http(served, model):
    counts = {}
    asked = {"all": {}, "less": {"max_pixels": MOST // 4}, "exact": {"resized_width": 64, "resized_height": 64}}
    for name, more in asked.items():
        answer = served.chat(parts(**more), max_tokens=3, temperature=0).json()
        own = model.generate([{"image": png(noise(150, 100)), **more}, {"text": "x"}], max_new_tokens=3)
        assert answer["choices"][0]["message"]["content"] == own.text
        counts[name] = answer["usage"]["prompt_tokens"]
        item = {"type": "input_image", "image_url": data_uri(png(noise(150, 100))), **more}
        body = {"input": [{"role": "user", "content": [item, {"type": "input_text", "text": "x"}]}]}
        made = served.http.post("/v1/responses", json={**body, "max_output_tokens": 1}).json()
        assert made["usage"]["input_tokens"] == counts[name]
    assert counts["all"] > counts["less"] > 0


def test_low_detail_over_http(served, model, monkeypatch):
    monkeypatch.setattr("qvl_runtime.families.qwen2_vl.preprocessing.LOW_PIXELS", MOST // 4)
    image = parts()[0]["image_url"]
    low = served.chat([{"type": "image_url", "image_url": {**image, "detail": "low"}}], max_tokens=1).json()
    item = {"type": "input_image", "image_url": image["url"], "detail": "low"}
    body = {"input": [{"role": "user", "content": [item]}], "max_output_tokens": 1}
    made = served.http.post("/v1/responses", json=body).json()
    full = served.chat([parts()[0]], max_tokens=1).json()
    assert low["usage"]["prompt_tokens"] == made["usage"]["input_tokens"] < full["usage"]["prompt_tokens"]


@pytest.mark.parametrize("more", [
    {"max_pixels": MOST + 1}, {"resized_width": 65, "resized_height": 4 * 64}, {"min_pixels": MOST + 1},
    {"max_pixels": "x"}, {"resized_width": 64},
])  # fmt: skip
def test_a_client_cannot_ask_for_more_than_others_get(served, more):
    response = served.chat(parts(**more), max_tokens=1)
    assert response.status_code == 400, response.text


def test_a_box_lies_on_the_picture_as_the_model_sees_it(served, model):
    """Qwen2.5-VL's boxes are in pixels of the resized picture."""
    box = {"type": "box", "pixels": [15, 10, 75, 50]}
    texts = []
    for more in ({}, {"max_pixels": MOST // 4}):
        body = {"messages": [{"role": "user", "content": [*parts(**more), box]}]}
        texts.append(model.tokenizer.decode(served.http.post("/v1/tokenize", json=body).json()["tokens"]))
    written = [text.rpartition("[")[2].partition("]")[0] for text in texts]
    resized = [
        model.prompts.build([{"image": png(noise(150, 100)), **more}], None, LOCAL).slots[0].picture.resized
        for more in ({}, {"max_pixels": MOST // 4})
    ]
    for numbers, (width, height) in zip(written, resized):
        scale = (width, height) if "q25" in str(model.blob.path) else (1000, 1000)
        expected = [scale[0] / 10, scale[1] / 10, scale[0] / 2, scale[1] / 2]
        np.testing.assert_allclose([float(n) for n in numbers.split(",")], expected, atol=1)
