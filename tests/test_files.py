"""Special files, folders, link loops and impossible names are refused wherever a file is opened."""

from __future__ import annotations

import faulthandler
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from conftest import GOLDEN
from helpers import linked, refused

import qvl_runtime as qvl
from qvl_convert import calibration
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.lora import Merged
from qvl_convert.plan import Source
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import open_regular, read_regular
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.inputs.images import load_image

VL, BIN = GOLDEN / "ckpt/tiny-vl", GOLDEN / "ckpt/tiny-vl-bin"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(target: str):
    return lambda path: path.symlink_to(target)


SPECIAL = {
    "pipe": pipe,
    "zero": link("/dev/zero"),
    "terminal": link("/dev/tty"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(autouse=True)
def impatient():
    """Waiting for a pipe or reading a device to its end must not block the tests."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def folder(tmp_path):
    """``folder(source, missing)``: a checkpoint of links, without one file."""

    def make(source: Path, missing: str) -> Path:
        return linked(source, tmp_path, missing)

    return make


@pytest.mark.parametrize("kind", SPECIAL)
def test_in_checkpoints(folder, kind):
    for source, name in (
        (VL, "config.json"),
        (VL, "generation_config.json"),
        (VL, "qwen.tiktoken"),
        (VL, "model.safetensors.index.json"),
        (VL, "model-00002-of-00003.safetensors"),
        (VL, "quantize_config.json"),
        (BIN, "pytorch_model-00001-of-00002.bin"),
    ):
        path = folder(source, name) / name
        SPECIAL[kind](path)
        refused(lambda path=path: Source(Checkpoint(path.parent)), name)
        for entry in path.parent.iterdir():
            entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@pytest.mark.parametrize("kind", SPECIAL)
def test_everywhere_else(tmp_path, speaker, kind):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, action in {
        "model.qvl": lambda path: qvl.load(path, device="reference"),
        "picture.png": load_image,
        "other.png": speaker.reader.read,
        "weights.safetensors": TensorFile,
        "adapter/adapter_config.json": lambda path: Merged(VL, path.parent),
        "data.json": lambda path: calibration.load(path, speaker),
        "data.jsonl": lambda path: calibration.load(path, speaker),
    }.items():
        if kind == "folder" and name.startswith("data"):
            continue  # calibration data may be a folder
        SPECIAL[kind](tmp_path / name)
        refused(lambda action=action, name=name: action(tmp_path / name), name)


@pytest.fixture(scope="module")
def speaker():
    return Checkpoint(VL)


def test_a_caption_that_is_no_file(tmp_path, speaker):
    shutil.copy(GOLDEN / "images/rgb_odd.png", tmp_path / "a.png")
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    refused(lambda: calibration.load(tmp_path, speaker), "a.txt")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff\n", "", "nowhere/at/all"])
def test_names_that_no_file_has(name):
    for action in (open_regular, TensorFile, load_image, qvl.load, Checkpoint, lambda n: Merged(VL, n)):
        with pytest.raises(QvlError) as caught:
            action(name)
        assert "\n" not in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 2000


@pytest.mark.parametrize("value", [None, 0, 3.5, ["a"], {"a": 1}])
def test_what_is_no_path(value):
    for action in (open_regular, TensorFile, load_image, qvl.load, Checkpoint, lambda v: Merged(VL, v)):
        with pytest.raises(QvlError):
            action(value)


def test_sizes_are_limited(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(11))
    assert read_regular(path, limit=11) == bytes(11)
    with pytest.raises(QvlError, match="larger than the 10 bytes"):
        read_regular(path, limit=10)
    with pytest.raises(QvlError, match="larger than the 10 bytes"):
        read_regular("/proc/self/maps", limit=10)  # its size is 0
    with path.open("wb") as file:
        file.truncate(20 << 20)
    refused(lambda: read_regular(path, limit=16 << 20), "larger than the 16 MiB")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc")
def test_a_file_that_opens_but_cannot_be_read():
    refused(lambda: load_image("/proc/self/mem"), "/proc/self/mem: cannot be read (Input/output error)")


def test_a_small_file_takes_little_memory_whatever_its_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    tracemalloc.start()
    try:
        assert read_regular(path, limit=4 << 30) == b"abc"
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
