"""Reading `.qvl` files: everything that was written is found, and all damage is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import safetensors_bytes

from qvl_runtime.blob import Blob
from qvl_runtime.cli.info import describe
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.tensors import tensors
from qvl_runtime.families.specs import MatrixSpec, VectorSpec
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.loading import load

SCALES, QWEIGHT = "lm_head.scales", "lm_head.qweight"


@pytest.fixture(scope="module")
def good(blob) -> Path:
    return blob("tiny-vl-bin")


@pytest.fixture(scope="module")
def spoilt(good, tmp_path_factory) -> Callable[..., Path]:
    """``spoilt(change)``: a copy after ``change(arrays, metadata)``, with correct hashes and lengths."""
    path = tmp_path_factory.mktemp("spoilt") / "x.qvl"

    def make(change: Callable[[dict, dict], object]) -> Path:
        file = TensorFile(good)
        arrays, metadata = {name: np.array(file.array(name)) for name in file.entries}, dict(file.metadata)
        change(arrays, metadata)
        path.write_bytes(safetensors_bytes(arrays, metadata))
        return path

    return make


def everything(path: Path) -> Blob:
    """Open a file and read everything that a model reads."""
    blob = Blob(path)
    for spec in tensors(blob.config):
        blob.matrix(spec.name) if isinstance(spec, MatrixSpec) else blob.vector(spec.name)
    assert blob.ranks
    return blob


def test_arrays_are_views_of_the_file(good):
    blob = Blob(good)
    mapped = np.frombuffer(blob.file._map, np.uint8)
    for spec in tensors(blob.config):
        if isinstance(spec, VectorSpec):
            assert np.shares_memory(blob.vector(spec.name), mapped)
        else:
            matrix = blob.matrix(spec.name)
            for array in (matrix.weight, matrix.scales, matrix.bias):
                assert array is None or (np.shares_memory(array, mapped) and not array.flags.writeable)


def test_part_sizes_are_all_tensors_but_the_tokenizer(good):
    blob = Blob(good)
    assert sum(blob.part_sizes().values()) + len(blob.ranks) == sum(
        e.stop - e.start for e in blob.file.entries.values()
    )
    assert set(blob.part_sizes()) == {"vision", "adapter", "decoder", "embedding", "head"}


def test_check_counts_every_byte(good):
    blob, seen = Blob(good), []
    blob.check(seen.append)
    assert sum(seen) == sum(e.stop - e.start for e in blob.file.entries.values())


def test_unchanged_copy_is_accepted(spoilt):
    everything(spoilt(lambda arrays, metadata: None)).check()


def drop(name: str) -> Callable:
    return lambda arrays, metadata: arrays.pop(name)


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    return lambda arrays, metadata: arrays.update({name: change(arrays[name])})


def meta(key: str, value: object) -> Callable:
    return lambda arrays, metadata: metadata.update({key: value if isinstance(value, str) else json.dumps(value)})


def config(**values: object) -> Callable:
    return lambda arrays, metadata: metadata.update(config=json.dumps(json.loads(metadata["config"]) | values))


def set_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QWEIGHT), "no tensor 'lm_head.qweight'"),
        (drop(SCALES), "no tensor 'lm_head.scales'"),
        (drop("transformer.ln_f.weight"), "no tensor 'transformer.ln_f.weight'"),
        (drop("tokenizer.ranks"), "no tensor 'tokenizer.ranks'"),
        (put(QWEIGHT, lambda a: a[1:]), "its config asks for"),
        (put(QWEIGHT, lambda a: a.reshape(-1)), "no matrix of 3, 4 or 8 bits"),
        (put(QWEIGHT, lambda a: a[:, :0]), "no matrix of 3, 4 or 8 bits"),
        (put(QWEIGHT, lambda a: a[:, :, :7]), "no matrix of 3, 4 or 8 bits"),
        (put(SCALES, lambda a: a.reshape(-1)), "no matrix of 3, 4 or 8 bits"),
        (put(SCALES, lambda a: a[:, :0]), "no matrix of 3, 4 or 8 bits"),
        (put(SCALES, lambda a: np.repeat(a, 3, axis=1)), "no matrix of 3, 4 or 8 bits"),
        (put(SCALES, lambda a: a[1:]), "its config asks for"),
        (put(SCALES, lambda a: a.astype(np.float32)), "float32"),
        (put(SCALES, set_first(np.nan)), "'lm_head.scales' holds a value that is not finite"),
        (put(SCALES, set_first(-np.inf)), "'lm_head.scales' holds a value that is not finite"),
        (put("transformer.ln_f.weight", lambda a: a[1:]), "its config asks for"),
        (put("transformer.ln_f.weight", lambda a: a.astype(np.float16)), "float16"),
        (lambda a, m: a.update({"lm_head.perm": np.zeros(128, np.int32)}), "no permutation"),
        (lambda a, m: a.update({"lm_head.bias": np.zeros(5, np.float32)}), "lm_head.bias"),
        (config(num_hidden_layers=3), "no tensor 'transformer.h.2"),
        (config(vocab_size=1024), "its config asks for"),
        (config(model_type="llama"), "model_type is 'llama'"),
        (config(seq_length=None), "'seq_length' is missing"),
        (meta("config", "{"), "'config' is not readable as JSON"),
        (meta("hashes", "[]"), "'hashes' holds no JSON object"),
        (meta("generation_config", {"top_p": "x"}), "'top_p'"),
        (meta("generation_config", {"top_p": "x" * 100_000}), r"^.{,300}$"),
        (meta("generation_config", {"eos_token_id": [3, 10**9]}), "'eos_token_id' is 1000000000"),
        (meta("generation_config", {"eos_token_id": -1}), "'eos_token_id' is -1"),
        (lambda a, m: m.pop("quantization"), "'quantization' is missing"),
        (meta("version", "2"), "format version '2'"),
        (meta("format", "other"), r"is no \.qvl file"),
        (lambda a, m: m.clear(), r"is no \.qvl file"),
    ],
)
def test_contradictions_are_refused(spoilt, change, message):
    path = spoilt(change)
    with pytest.raises(QvlError, match=message) as caught:
        everything(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [{}, {"decoder": 4}, {"decoder": {"bytes": "many", "bits": [4]}}])
def test_whatever_the_metadata_say_about_quantization_can_be_shown(spoilt, said):
    facts = describe(Blob(spoilt(meta("quantization", said))))
    assert facts["parts"]["decoder"]["bytes"] > 0
    assert facts["parts"]["decoder"].keys() == {"label", "bytes", "bits", "group_size", "method"}


def test_check_names_the_damaged_tensor(good, tmp_path):
    content = bytearray(good.read_bytes())
    content[TensorFile(good).entries[QWEIGHT].start + 100] ^= 4
    (tmp_path / "x.qvl").write_bytes(content)
    with pytest.raises(QvlError, match=r"x\.qvl: tensor 'lm_head.qweight' is damaged"):
        Blob(tmp_path / "x.qvl").check()


def test_check_notices_changed_metadata(spoilt):
    path = spoilt(config(layer_norm_epsilon=2e-6))
    with pytest.raises(QvlError, match="metadata is damaged"):
        everything(path).check()


@pytest.fixture(scope="module")
def flipped(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flipped") / "x.qvl"


# The header is a small part of the file, and the part where a flipped bit can do most: look there every other time.
@given(place=st.one_of(st.integers(0, 60_000), st.integers(0, 2**40)), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_no_flipped_bit_passes_the_check(good, flipped, place, bit):
    content = bytearray(good.read_bytes())
    content[place % len(content)] ^= 1 << bit
    flipped.write_bytes(content)
    with pytest.raises(QvlError):
        Blob(flipped).check()


@given(edits=st.lists(st.tuples(st.integers(0, 60_000), st.binary(max_size=4), st.integers(0, 4)), max_size=3))
@settings(max_examples=200, deadline=None)
def test_mutated_files_raise_nothing_but_our_error(good, flipped, edits):
    content = good.read_bytes()
    for place, insert, cut in edits:
        content = content[:place] + insert + content[place + cut :]
    flipped.write_bytes(content)
    try:
        everything(flipped).check()
    except QvlError as error:
        assert re.match(r"[^\n]+$", str(error))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_small_tensors_that_are_not_finite_are_refused_at_once(spoilt, good, value):
    file, count = TensorFile(good), 0
    for name in file.entries:
        array = file.array(name)
        if array.dtype.kind != "f" or (array.ndim == 2 and name.endswith(".weight")):
            continue
        count += 1

        def change(arrays, metadata, name=name):
            arrays[name].reshape(-1)[-1] = value

        with pytest.raises(QvlError, match=f"'{re.escape(name)}' holds a value that is not finite"):
            everything(spoilt(change))
    assert count == 53


def test_check_looks_at_the_large_ones_too(blob, tmp_path):
    """With a correct hash, as from a program that wrote such values."""
    file, name = TensorFile(blob("tiny-vl", bits=16)), "transformer.h.0.mlp.w1.weight"
    arrays, metadata = {n: np.array(file.array(n)) for n in file.entries}, dict(file.metadata)
    arrays[name][3, 5] = np.nan
    hashes = json.loads(metadata["hashes"])
    hashes[name] = hashlib.sha256(arrays[name].tobytes()).hexdigest()
    metadata["hashes"] = json.dumps(hashes)
    (tmp_path / "x.qvl").write_bytes(safetensors_bytes(arrays, metadata))
    with pytest.raises(QvlError, match=f"'{re.escape(name)}' holds a value that is not finite"):
        everything(tmp_path / "x.qvl").check()


@pytest.mark.parametrize("key", ["config", "generation_config", "preprocessing", "quantization", "source", "hashes"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "", '{"a": 1, "a": 2}', "9" * 5000])
def test_metadata_of_any_form(spoilt, key, text):
    with pytest.raises(QvlError, match=f"its metadata '{key}'"):
        everything(spoilt(lambda arrays, metadata: metadata.update({key: text})))


def test_numbers_beyond_a_float(spoilt):
    def change(arrays, metadata):
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"layer_norm_epsilon": 10**400})

    with pytest.raises(QvlError, match=r"'layer_norm_epsilon' is inf"):
        everything(spoilt(change))


@pytest.mark.parametrize(
    "wrong", [{"mean": "x"}, {"mean": [1, 2]}, {"mean": ["", 1, 1]}, {"mean": [[1], 1, 1]}, {"std": [0, 1, 1]}]
)
def test_preprocessing_that_cannot_be_computed_is_refused(spoilt, wrong):
    path = spoilt(meta("preprocessing", wrong))
    with pytest.raises(QvlError, match=f"^{re.escape(str(path))}: preprocessing: '{next(iter(wrong))}'"):
        load(path, device="cpu")
