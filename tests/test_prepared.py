"""Preprocessed pictures are held within a limit, and no longer than somebody needs them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from qvl_runtime.inputs import prepared
from qvl_runtime.inputs.picture_cache import PictureCache
from qvl_runtime.inputs.prepared import PreparedPictures


def pixels(megabytes: int) -> np.ndarray:
    return np.zeros(megabytes << 18, np.float32)


def test_the_oldest_make_room():
    pictures = PreparedPictures(5 << 20)
    first, second, third = (pictures.hold(pixels(2)) for _ in range(3))
    assert first.values is None and second.values is not None and third.values is not None
    large = pictures.hold(pixels(9))
    assert large.values is not None, "the newest is always held"
    assert second.values is None and third.values is None


def test_what_was_taken_needs_no_room():
    pictures = PreparedPictures(5 << 20)
    first, second = pictures.hold(pixels(2)), pictures.hold(pixels(2))
    assert second.take() is not None and second.take() is None
    pictures.hold(pixels(2))
    assert first.values is not None


def test_what_nobody_needs_is_freed():
    pictures = PreparedPictures(5 << 20)
    first = pictures.hold(pixels(2))
    pictures.hold(pixels(2))  # nobody keeps it
    third = pictures.hold(pixels(2))
    assert first.values is not None and third.values is not None


def test_a_picture_that_made_room_is_prepared_again(demo_model, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 120, 3), np.uint8)
    asked = [{"image": Image.fromarray(noise[0])}, {"image": Image.fromarray(noise[1])}, {"text": "x"}]
    expected = demo_model.generate(asked, max_new_tokens=4, logprobs=1)
    decoded: list = []
    decode = demo_model.pictures.reader.decode
    monkeypatch.setattr(demo_model.pictures.reader, "_prepared", PreparedPictures(1))
    monkeypatch.setattr(demo_model.pictures.reader, "decode", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr(demo_model.pictures, "cache", PictureCache(expected.timings.images, 0))
    demo_model.forget()
    again = demo_model.generate(asked, max_new_tokens=4, logprobs=1)
    assert decoded == [1] and again.logprobs == expected.logprobs
    assert prepared.HELD_BYTES == 256 << 20
