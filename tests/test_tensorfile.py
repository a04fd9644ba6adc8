"""Untrusted safetensors files: read correctly, or refused before anything is allocated."""

from __future__ import annotations

import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import safetensors_bytes, with_header

from qvl_runtime.errors import QvlError
from qvl_runtime.file.tensorfile import DTYPES, MAX_HEADER, TensorFile

SHARD = GOLDEN / "ckpt/tiny-q7-gptq-asym/model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tensorfile") / "x.safetensors"


def opened(path: Path, content: bytes) -> TensorFile:
    path.write_bytes(content)
    return TensorFile(path)


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(path, code):
    values = np.arange(12).reshape(3, 4).astype(DTYPES[code])
    file = opened(path, safetensors_bytes({"a": np.ones(1, np.uint8), "b": values}, {"k": "v"}))
    array = file.array("b")
    assert array.dtype == DTYPES[code]
    np.testing.assert_array_equal(array, values)
    assert not array.flags.writeable or not np.shares_memory(array, np.frombuffer(file._map, np.uint8))
    assert bytes(file.bytes("b")) == values.tobytes()
    assert file.metadata == {"k": "v"}
    assert "b" in file
    assert "c" not in file


def test_scalars_and_empty_tensors(path):
    tensors = {"s": np.float32(7).reshape(()), "e": np.zeros((0, 5), np.float32), "b": np.zeros(2, ml_dtypes.bfloat16)}
    file = opened(path, safetensors_bytes(tensors))
    assert file.array("s") == 7
    assert file.array("e").shape == (0, 5)
    assert list(file.entries) == ["s", "e", "b"]


def entry(start: int, stop: int, shape: list | None = None, dtype: object = "U8") -> dict:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 1) + b"{}" * 0, "header claims 1 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file.*check the path"),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF file.*qvl convert"),
        (with_header(b"{"), "header is not readable as JSON"),
        (with_header(b"\xff\xfe"), "header is not readable as JSON"),
        (with_header(b"[" * 100_000), "header is not readable as JSON"),
        (with_header([]), "header holds no JSON object"),
        (with_header("text"), "header holds no JSON object"),
        (with_header({"a": 1}), "malformed"),
        (with_header({"a": {}}), "malformed"),
        (with_header({"__metadata__": {"k": 1}}), "malformed.*text"),
        (with_header({"__metadata__": None}), "malformed"),
        (with_header(b'{"a": 1, "a": 2}'), "not readable as JSON .*twice"),
        (with_header({"a": entry(0, 4)}), "truncated"),
        (with_header({"a": entry(0, 4)}, b"12345"), "describes 72; something else follows"),
        (with_header({"a": entry(0, 4), "b": entry(3, 5)}, b"12345"), "overlaps"),
        (with_header({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlaps"),
        (with_header({"a": entry(0, 2), "b": entry(3, 5)}, b"12345"), "gap"),
        (with_header({"a": entry(1, 5)}, b"12345"), "gap"),
        (with_header({"a": entry(0, 4, [5])}, b"1234"), "does not fill"),
        (with_header({"a": entry(4, 0, [4])}, b"1234"), "does not fill"),
        (with_header({"a": entry(0, 4, [2**62, 2**62])}, b"1234"), "does not fill"),
        (with_header({"a": entry(0, 4, [-2, -2])}, b"1234"), "negative"),
        (with_header({"a": entry(0, 4, [4.0])}, b"1234"), "fractional"),
        (with_header({"a": entry(0, 1, [True])}, b"1"), "fractional"),
        (with_header({"a": entry(0, 4, [1] * 9 + [4])}, b"1234"), "10 dimensions"),
        (with_header({"a": entry(0, 4, dtype="F8")}, b"1234"), "unknown dtype 'F8'"),
        (with_header({"a": entry(0, 4, dtype=["U8"])}, b"1234"), "malformed"),
        (with_header({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, b"1234"), "malformed"),
        (with_header({"a": {**entry(0, 4), "shape": 4}}, b"1234"), "malformed"),
        (b'{"a": 1}' + b" " * 20, "not a safetensors file.*check the path"),
    ],
)
def test_attacks(path, content, message):
    with pytest.raises(QvlError, match=message) as caught:
        opened(path, content)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_largest_header(path):
    """One more byte is refused before it is read; the file is large enough for both, and mostly holes."""
    refused = "more than 16777216"
    for length, message in (
        (MAX_HEADER, "header is not readable as JSON"),
        (MAX_HEADER + 1, refused),
        (10**8, refused),
    ):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(8 + length)
        with pytest.raises(QvlError, match=message):
            TensorFile(path)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(QvlError, match="no such file"):
        TensorFile(tmp_path / "missing")
    with pytest.raises(QvlError, match="cannot be read"):
        TensorFile(tmp_path)


def test_unknown_tensor(path):
    with pytest.raises(QvlError, match="has no tensor 'b'"):
        opened(path, safetensors_bytes({"a": np.zeros(3, np.uint8)})).array("b")


def read_or_refused(path: Path, content: bytes) -> None:
    try:
        file = opened(path, content)
        for name, found in file.entries.items():
            assert file.array(name).shape == found.shape
    except QvlError:
        pass


EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    for place, insert, cut in edits:
        at = int(place * len(content))
        content = content[:at] + insert + content[at + cut :]
    return content


@given(edits=EDITS)
@settings(max_examples=300, deadline=None)
def test_mutated_headers_raise_nothing_but_our_error(path, edits):
    content = SHARD.read_bytes()
    length = int.from_bytes(content[:8], "little")
    read_or_refused(path, with_header(edited(content[8 : 8 + length], edits), content[8 + length :]))


@given(edits=EDITS)
@settings(max_examples=100, deadline=None)
def test_mutated_files_raise_nothing_but_our_error(path, edits):
    read_or_refused(path, edited(SHARD.read_bytes()[:6000], edits))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(list(DTYPES)) | JSON, "shape": JSON, "data_offsets": st.lists(JSON, max_size=3)}
)


@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS | JSON), data=st.binary(max_size=16))
@settings(max_examples=300, deadline=None)
def test_random_headers_raise_nothing_but_our_error(path, header, data):
    read_or_refused(path, with_header(header, data))
