"""Features are cached by a picture's contents, within a limit; a damaged file counts as missing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from PIL import Image
from safetensors.numpy import load_file
from shards import safetensors_bytes

import qvl_runtime as qvl
from qvl_runtime.errors import QvlError
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.inputs.picture_cache import PictureCache
from qvl_runtime.inputs.pictures import Access, PictureReader, Pixels

SHAPE = (4, 8)
SIZE = 4 * 8 * 4
IMAGES = ("images/rgb_odd.png", "images/rgba.png")


def _features(value: float) -> np.ndarray:
    return np.full(SHAPE, value, np.float32)


def _key(number: int) -> bytes:
    return bytes([number]) * 32


def _file(folder: Path, number: int) -> Path:
    return folder / f"{_key(number).hex()}.safetensors"


def test_those_used_longest_ago_leave():
    cache = PictureCache(SHAPE[1], 3 * SIZE)
    for number in range(3):
        cache.put(_key(number), _features(number))
    assert np.array_equal(cache.get(_key(0)), _features(0))
    cache.put(_key(3), _features(3))
    assert cache.get(_key(1)) is None
    assert all(cache.get(_key(number)) is not None for number in (0, 2, 3))
    assert cache.nbytes == 3 * SIZE
    nothing = PictureCache(SHAPE[1], 0)
    nothing.put(_key(0), _features(0))
    assert nothing.get(_key(0)) is None and nothing.nbytes == 0


@pytest.mark.skipif(os.name != "posix", reason="other systems protect a user's folders by themselves")
def test_what_others_may_have_written_is_ignored(tmp_path):
    PictureCache(SHAPE[1], 0, tmp_path).put(_key(1), _features(1))
    _file(tmp_path, 1).chmod(0o666)
    assert PictureCache(SHAPE[1], 0, tmp_path).get(_key(1)) is None
    _file(tmp_path, 1).chmod(0o644)
    assert PictureCache(SHAPE[1], 0, tmp_path).get(_key(1)) is not None


def test_a_folder_outlives_the_memory(tmp_path):
    folder = tmp_path / "a" / "cache"
    PictureCache(SHAPE[1], 0, folder).put(_key(1), _features(1))
    assert np.array_equal(PictureCache(SHAPE[1], 0, folder).get(_key(1)), _features(1))
    (file,) = folder.iterdir()
    assert file == _file(folder, 1)
    assert np.array_equal(load_file(file)["features"], _features(1)), "any safetensors tool opens it"
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 and stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_the_folder_has_a_limit(tmp_path, monkeypatch):
    """The least recently used are removed, whichever process used them."""
    cache = PictureCache(SHAPE[1], 0, tmp_path)
    for number in range(3):
        cache.put(_key(number), _features(number))
        os.utime(_file(tmp_path, number), (number, number))
    size = _file(tmp_path, 0).stat().st_size
    others = "notes.txt", "model-00001-of-00002.safetensors"
    for name in others:
        (tmp_path / name).write_text("not ours")
        os.utime(tmp_path / name, (0, 0))
    assert PictureCache(SHAPE[1], 0, tmp_path).get(_key(0)) is not None
    monkeypatch.setattr("qvl_runtime.inputs.picture_cache.FOLDER_BYTES", 3 * size)
    cache.put(_key(3), _features(3))
    assert [cache.get(_key(number)) is not None for number in range(4)] == [True, False, True, True]
    monkeypatch.setattr("qvl_runtime.inputs.picture_cache.FOLDER_BYTES", 1)
    cache.put(_key(4), _features(4))
    assert {path.name for path in tmp_path.iterdir()} == {*others, _file(tmp_path, 4).name}, "the last one stays"


def test_the_folder_keeps_no_files_of_killed_processes(tmp_path):
    cache = PictureCache(SHAPE[1], 0, tmp_path)
    killed, kept = tmp_path / f".{_file(tmp_path, 1).name}.0123abcd.partial", tmp_path / "model.qvl.partial"
    for path in (killed, kept):
        path.write_bytes(b"a part")
        os.utime(path, (0, 0))
    cache.put(_key(1), _features(1))
    assert sorted(tmp_path.iterdir()) == sorted([_file(tmp_path, 1), kept]), "an unfinished conversion stays"


def test_a_store_lists_the_folder_once(tmp_path, monkeypatch):
    cache, listed = PictureCache(SHAPE[1], 0, tmp_path), []

    def counted(function):
        return lambda path: listed.append(path) or function(path)

    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):  # pathlib uses either
            patch.setattr(os, name, counted(getattr(os, name)))
        cache.put(_key(1), _features(1))
    assert [Path(path) for path in listed] == [tmp_path]


def test_a_damaged_file_counts_as_absent(tmp_path):
    cache = PictureCache(SHAPE[1], 0, tmp_path)
    cache.put(_key(1), _features(1))
    (file,) = tmp_path.iterdir()
    right = file.read_bytes()
    for position in range(0, len(right), 7):
        file.write_bytes(right[:position] + bytes([right[position] ^ 1]) + right[position + 1 :])
        assert cache.get(_key(1)) is None, f"byte {position}"
    for length in (0, 7, len(right) // 2, len(right) - 1):
        file.write_bytes(right[:length])
        assert cache.get(_key(1)) is None
    file.write_bytes(right)
    assert cache.get(_key(1)) is not None
    shutil.copy(file, tmp_path / f"{_key(2).hex()}.safetensors")
    assert cache.get(_key(2)) is None, "another picture's"
    assert PictureCache(16, 0, tmp_path).get(_key(1)) is None


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QvlError, match="cache_dir"):
        PictureCache(SHAPE[1], 0, tmp_path / "file")
    for name in ("a\0b", "\ud800", 3, ["a"]):
        refused(lambda name=name: PictureCache(SHAPE[1], 0, name))
    cache = PictureCache(SHAPE[1], SIZE, tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.put(_key(1), _features(1))
    assert cache.get(_key(1)) is not None, "the memory still serves"


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    cache = PictureCache(SHAPE[1], 0, tmp_path)

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        cache.put(_key(1), _features(1))
    assert not list(tmp_path.iterdir())


def _png(value: int, *, level: int = 6) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(out, "PNG", compress_level=level)
    return out.getvalue()


def _reader(identity: str = "weights", decoded: list | None = None) -> PictureReader:
    def preprocess(image):
        if decoded is not None:
            decoded.append(image)
        return Pixels(np.asarray(image, np.float32), 4, (2, 2), image.size, image.size)

    return PictureReader(preprocess, identity)


def test_a_picture_is_its_pixels(tmp_path):
    """Names do not matter, nor how pixels are packed; everything that features depend on does."""
    decoded = []
    reader, other = _reader(decoded=decoded), _reader("other weights")
    (tmp_path / "a").write_bytes(_png(1))
    (tmp_path / "b").write_bytes(_png(1))
    first = reader.read(tmp_path / "a")
    assert reader.read(str(tmp_path / "b")).key == reader.read(_png(1)).key == first.key
    assert len(decoded) == 1, "known bytes are not decoded again"
    assert _png(1, level=0) != _png(1) and reader.read(_png(1, level=0)).key == first.key
    assert reader.read(_png(2)).key != first.key
    assert other.read(_png(1)).key != first.key
    (tmp_path / "a").write_bytes(_png(2))
    assert reader.read(tmp_path / "a").key != first.key


def test_any_text_is_a_salt():
    keys = {_reader().read(_png(1), Access(salt=salt)).key for salt in (None, "", "a", "\ud800", "\udfff")}
    assert len(keys) == 5


def test_what_is_hashed_is_what_is_decoded(tmp_path):
    """A file that is replaced while it is read must not store its features under another picture's name."""
    file, found = tmp_path / "a", []
    file.write_bytes(_png(1))

    def preprocess(image):
        file.write_bytes(_png(2))
        found.append(np.asarray(image))
        return Pixels(np.asarray(image, np.float32), 4, (2, 2), image.size, image.size)

    key = PictureReader(preprocess, "weights").read(file).key
    assert key == _reader().read(_png(1)).key


def test_what_cannot_be_decoded_is_named_by_its_path(tmp_path, blob):
    model = qvl.load(blob("tiny-vl", bits=16), device="cpu")
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(QvlError, match=r"no\.png"):
        model.generate("x", [tmp_path / "no.png"])


def test_a_known_picture_skips_the_vision_tower(blob, golden, tmp_path, monkeypatch):
    """In the same run, and with `cache_dir` in the next; with other weights it does not."""
    path, folder = blob("tiny-vl", bits=16), tmp_path / "cache"
    options = {"device": "cpu", "conversations": 0}
    picture = golden / IMAGES[0]
    model = qvl.load(path, cache_dir=folder, **options)
    asked = [model.generate("What?", [picture], max_new_tokens=4, logprobs=0) for _ in range(2)]
    assert [a.timings.cached_images for a in asked] == [0, 1]
    later = qvl.load(path, cache_dir=folder, **options)
    monkeypatch.setattr(later.pictures, "vision", None)
    asked.append(later.generate("What?", [picture.read_bytes()], max_new_tokens=4, logprobs=0))
    assert asked[2].timings.cached_images == 1
    assert asked[0].logprobs == asked[1].logprobs == asked[2].logprobs
    with pytest.raises(AttributeError):
        later.generate("What?", [golden / IMAGES[1]], max_new_tokens=1)
    for other in (blob("tiny-vl", "img112", bits=16), blob("tiny-vl", bits=16, vision_bits=8)):
        answer = qvl.load(other, cache_dir=folder, **options).generate("What?", [picture], max_new_tokens=1)
        assert answer.timings.cached_images == 0


def test_memory_of_many_pictures_stays_within_the_limit(blob):
    path = blob("tiny-vl", "img112", bits=16)
    model = qvl.load(path, device="cpu", image_cache_bytes=3 * 256 * 256 * 4)
    rng = np.random.default_rng(0)
    for _ in range(6):
        model.generate("x", [rng.integers(0, 255, (20, 20, 3), np.uint8)], max_new_tokens=1)
    assert model.pictures.cache.nbytes == 3 * 256 * 256 * 4
    with pytest.raises(QvlError, match="image_cache_bytes is -1"):
        qvl.load(path, image_cache_bytes=-1)


def test_features_of_other_adapter_weights_are_not_taken(blob, golden, tmp_path):
    """Features depend on the adapter's weights, too, not only on the vision tower's."""
    path, name = blob("tiny-vl", bits=16), "transformer.visual.attn_pool.query"
    file = TensorFile(path)
    arrays, metadata = {n: np.array(file.array(n)) for n in file.entries}, dict(file.metadata)
    arrays[name] *= 2
    told = json.loads(metadata["hashes"]) | {name: hashlib.sha256(arrays[name].tobytes()).hexdigest()}
    (tmp_path / "other.qvl").write_bytes(safetensors_bytes(arrays, metadata | {"hashes": json.dumps(told)}))
    cached = []
    for which in (path, path, tmp_path / "other.qvl"):
        model = qvl.load(which, device="reference", cache_dir=tmp_path / "cache")
        cached.append(model.generate("x", [golden / IMAGES[0]], max_new_tokens=1).timings.cached_images)
    assert cached == [0, 1, 0]
