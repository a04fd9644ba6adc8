"""Export is the inverse of import, bit for bit, and what was quantized here can be read again."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
from conftest import GOLDEN
from helpers import sha256
from safetensors import SafetensorError
from shards import all_tensors

import qvl_runtime as qvl
from qvl_convert import export as export_module
from qvl_convert.convert import convert
from qvl_convert.export import autogptq_arrays, export
from qvl_kernels.packing import pack
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError

CKPT = GOLDEN / "ckpt"
KEPT = {"vision_bits": 16, "head_bits": 16}


@pytest.mark.parametrize("name", ["tiny-q7-gptq-actorder", "tiny-q7-gptq-asym", "tiny-vl-gptq"])
def test_an_imported_model_comes_out_bit_for_bit(blob, tmp_path, name):
    export(Blob(blob(name, **KEPT)), tmp_path / "out")
    want, got = all_tensors(CKPT / name), all_tensors(tmp_path / "out")
    assert set(got) == set(want)
    for tensor, array in want.items():
        assert got[tensor].dtype == array.dtype, tensor
        np.testing.assert_array_equal(got[tensor], array, err_msg=tensor)
    settings, original = (json.loads((f / "quantize_config.json").read_text()) for f in (tmp_path / "out", CKPT / name))
    assert {k: settings[k] for k in ("bits", "group_size", "sym", "desc_act")} == {
        k: original[k] for k in ("bits", "group_size", "sym", "desc_act")
    }


def test_what_is_exported_can_be_converted_again_to_the_same_logits(blob, tmp_path):
    first = blob("tiny-vl", group_size=32, **KEPT)
    export(Blob(first), tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again.qvl", **KEPT)
    models = [qvl.load(path, device="reference") for path in (first, tmp_path / "again.qvl")]
    a, b = (m.logits("What is this? 这是什么？") for m in models)
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-2)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        np.testing.assert_array_equal(models[0].blob.matrix(name).codes(), models[1].blob.matrix(name).codes())


def test_a_model_at_16_bits_becomes_a_plain_one(blob, tmp_path, monkeypatch):
    """In several files, too."""
    monkeypatch.setattr(export_module, "SHARD", 100_000)
    export(Blob(blob("tiny-vl", bits=16)), tmp_path / "out")
    want, got = all_tensors(CKPT / "tiny-vl"), all_tensors(tmp_path / "out")
    assert set(got) == set(want) and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for tensor, array in want.items():
        np.testing.assert_array_equal(got[tensor], array.astype(np.float16), err_msg=tensor)
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    convert(tmp_path / "out", tmp_path / "again.qvl", bits=16)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_what_the_layout_says(bits, rng):
    n, k, top = 16, 64, 2**bits
    codes = rng.integers(0, top, (n, k), dtype=np.uint8)
    scales, zeros = rng.random((n, 2)).astype(np.float16), rng.integers(1, top, (n, 2), dtype=np.uint8)
    arrays = autogptq_arrays(pack(codes, scales, bits, 32, zeros=zeros), "m")
    per = 32 // bits
    words = arrays["qweight"].view(np.uint32).astype(np.uint64)
    for column in (0, 1, per - 1, per, k - 1):
        got = (words[column // per] >> (bits * (column % per))) & (top - 1)
        np.testing.assert_array_equal(got, codes[:, column])
    words = arrays["qzeros"].view(np.uint32).astype(np.uint64)
    got = (words[1, 9 // per] >> (bits * (9 % per))) & (top - 1)
    assert got + 1 == zeros[9, 1]
    np.testing.assert_array_equal(arrays["scales"], scales.T)


def test_what_the_layout_cannot_hold_is_refused(blob, tmp_path, rng):
    codes, scales = rng.integers(0, 16, (16, 64), dtype=np.uint8), np.ones((16, 2), np.float16)
    with pytest.raises(QvlError, match="zero point of 0"):
        autogptq_arrays(pack(codes, scales, 4, 32, zeros=np.zeros((16, 2), np.uint8)), "m")
    with pytest.raises(QvlError, match="multiples of 8"):
        autogptq_arrays(pack(codes[:15], scales[:15], 4, 32), "m")


def test_an_existing_folder_is_kept_and_a_failure_leaves_nothing(blob, tmp_path, monkeypatch):
    model = Blob(blob("tiny-vl", **KEPT))
    (tmp_path / "out").mkdir()
    with pytest.raises(QvlError, match="exists already"):
        export(model, tmp_path / "out")
    export(model, tmp_path / "out", force=True)
    monkeypatch.setattr(export_module, "autogptq_arrays", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_an_export_and_nothing_else(blob, tmp_path, monkeypatch):
    model, out = Blob(blob("tiny-vl", **KEPT)), tmp_path / "out"
    export(model, out)
    (tmp_path / "link").symlink_to(out)
    (out / "config.json").write_text("old")
    export(model, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and json.loads((out / "config.json").read_text())
    for name in ("thesis.txt", "modeling_qwen.py"):
        (out / name).write_text("precious")
        with pytest.raises(QvlError, match=f"out: holds '{name}', which no export writes"):
            export(model, out, force=True)
        (out / name).unlink()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(QvlError, match="file: is a file and is not replaced"):
        export(model, tmp_path / "file", force=True)
    monkeypatch.chdir(out)
    for name in (".", "..", out, tmp_path, "../out"):
        with pytest.raises(QvlError, match="holds the current folder"):
            export(model, name, force=True)
        with pytest.raises(QvlError, match="exists already"):
            export(model, name)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link", "file"}


@pytest.mark.parametrize("force", [False, True])
def test_a_path_through_a_missing_folder_removes_nothing(blob, tmp_path, monkeypatch, force):
    model, photos = Blob(blob("tiny-vl", **KEPT)), tmp_path / "photos"
    photos.mkdir()
    monkeypatch.chdir(photos)
    for name in ("config.json", "dear.jpg"):  # a name of an export, and another
        (photos / name).write_text("precious")
        for folder in ("../typo/../photos", "typo/..", tmp_path / "typo" / ".." / "photos"):
            with pytest.raises(QvlError, match="its folder does not exist"):
                export(model, folder, force=force)
        assert (photos / name).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_partial_folder_is_replaced_only_by_force_and_only_if_it_is_an_exports(blob, tmp_path):
    model, out, partial = Blob(blob("tiny-vl", **KEPT)), tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("precious")
    for force, message in ((False, "exists already"), (True, "holds 'thesis.txt', which no export writes")):
        with pytest.raises(QvlError, match=rf"out\.partial: {message}"):
            export(model, out, force=force)
    assert (partial / "thesis.txt").read_text() == "precious"
    (partial / "thesis.txt").rename(partial / "00000.safetensors")
    export(model, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_the_name_of_an_exports_file_is_kept(blob, tmp_path):
    out = tmp_path / "out"
    (out / "config.json").mkdir(parents=True)
    (out / "config.json" / "letter").write_text("precious")
    with pytest.raises(QvlError, match=r"out: holds 'config\.json', which is no regular file, and is not replaced"):
        export(Blob(blob("tiny-vl", **KEPT)), out, force=True)
    assert (out / "config.json" / "letter").read_text() == "precious"


def test_the_source_file_is_not_replaced(blob, tmp_path):
    source = tmp_path / "models" / "config.json"
    source.parent.mkdir()
    shutil.copy(blob("tiny-vl", **KEPT), source)
    before = sha256(source)
    for folder in (source.parent, tmp_path):
        with pytest.raises(QvlError, match=r"holds the file .*config\.json and is not replaced"):
            export(Blob(source), folder, force=True)
    with pytest.raises(QvlError, match="is not replaced"):
        export(Blob(source), source, force=True)
    assert sha256(source) == before


def test_a_folder_that_appears_meanwhile_is_kept(blob, tmp_path, monkeypatch):
    write, out = export_module._write_weights, tmp_path / "out"

    def appear(arrays, folder):
        write(arrays, folder)
        out.mkdir()
        (out / "thesis.txt").write_text("precious")

    monkeypatch.setattr(export_module, "_write_weights", appear)
    with pytest.raises(QvlError, match=r"out: exists already.*the export is complete in .*out\.partial"):
        export(Blob(blob("tiny-vl", bits=16)), out)
    assert (out / "thesis.txt").read_text() == "precious"
    assert set(all_tensors(tmp_path / "out.partial")) == set(all_tensors(CKPT / "tiny-vl"))


def test_the_files_are_as_readable_as_any_other(blob, tmp_path):
    old = os.umask(0o022)
    try:
        export(Blob(blob("tiny-vl", **KEPT)), tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_one_line_and_leaves_nothing(blob, tmp_path, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(QvlError, match=r"out: cannot be written \(No space left on device\); make room"):
        export(Blob(blob("tiny-vl", **KEPT)), tmp_path / "out")
    with pytest.raises(QvlError, match="out: its folder does not exist; create it first"):
        export(Blob(blob("tiny-vl", **KEPT)), tmp_path / "no" / "out")
    with pytest.raises(QvlError, match="expected a path"):
        export(Blob(blob("tiny-vl", **KEPT)), None)
    assert not list(tmp_path.iterdir())
