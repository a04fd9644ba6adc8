"""Conversion: the contents of the file, the state after an interruption, and that a refusal leaves nothing."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from helpers import conversion_refused, refused, sha256
from safetensors.numpy import load_file
from shards import all_tensors, changed_copy

from qvl_convert import writer as writer_module
from qvl_convert.convert import convert
from qvl_convert.rtn import quantize
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.tensors import tensors
from qvl_runtime.families.specs import MatrixSpec, VectorSpec
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.saving import check_path

CKPT = GOLDEN / "ckpt"
VL, BIN = CKPT / "tiny-vl", CKPT / "tiny-vl-bin"


def published(source: dict[str, np.ndarray], spec: MatrixSpec) -> np.ndarray:
    """The weight a matrix was made from, found independently of the converter."""
    weight = source[spec.source].astype(np.float32)
    weight = weight.reshape(len(weight), -1)
    return (weight.T if spec.transposed else weight)[spec.first_row : spec.first_row + spec.n]


@pytest.mark.parametrize("name", ["tiny-vl", "tiny-vl-bin"])
def test_16_bits_hold_every_published_value(blob, name):
    made, source = Blob(blob(name, bits=16)), all_tensors(CKPT / name)
    for spec in tensors(made.config):
        if isinstance(spec, VectorSpec):
            np.testing.assert_array_equal(made.vector(spec.name), source[spec.name].astype(np.float32))
            continue
        matrix = made.matrix(spec.name)
        assert matrix.bits == 16
        np.testing.assert_array_equal(matrix.weight, published(source, spec).astype(np.float16))
        if not spec.biases:
            assert matrix.bias is None
        else:
            (bias,) = spec.biases
            rows = slice(spec.first_row, spec.first_row + spec.n)
            np.testing.assert_array_equal(matrix.bias, source[bias][rows].astype(np.float32))
    assert made.ranks == (CKPT / name / "qwen.tiktoken").read_bytes()


def test_the_transposed_and_the_stacked_weights_are_where_they_belong(blob):
    # Random square matrices: any mistake in orientation or order shows.
    made, source = Blob(blob("tiny-vl", bits=16)), all_tensors(VL)
    proj = source["transformer.visual.proj"].astype(np.float16)
    np.testing.assert_array_equal(made.matrix("transformer.visual.proj").weight, proj.T)
    stacked = source["transformer.visual.attn_pool.attn.in_proj_weight"].astype(np.float16)
    parts = [made.matrix(f"transformer.visual.attn_pool.attn.{p}_proj").weight for p in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), stacked)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, {"decoder": 4, "vision": 8, "adapter": 8, "embedding": 8, "head": 8}),
        ({"bits": 16}, {"decoder": 16, "vision": 16, "adapter": 16, "embedding": 16, "head": 16}),
        ({"bits": 16, "head_bits": 8}, {"decoder": 16, "vision": 16, "adapter": 16, "embedding": 8, "head": 8}),
        (
            {"bits": 8, "vision_bits": 4, "head_bits": 16, "group_size": 32},
            {"decoder": 8, "vision": 4, "adapter": 4, "embedding": 16, "head": 16},
        ),
    ],
)
def test_bits_by_part(blob, options, bits):
    made, source = Blob(blob("tiny-vl", **options)), all_tensors(VL)
    assert {part: values["bits"] for part, values in made.metadata["quantization"].items()} == bits
    for spec in tensors(made.config):
        if isinstance(spec, MatrixSpec):
            matrix = made.matrix(spec.name)
            assert matrix.bits == bits[spec.part]
            if matrix.bits != 16:
                group_size = options.get("group_size", 128)
                assert matrix.group_size == group_size
                expected = quantize(published(source, spec), matrix.bits, group_size)
                np.testing.assert_array_equal(matrix.weight, expected.weight)
                np.testing.assert_array_equal(matrix.scales, expected.scales)


def test_file_is_plain_safetensors_aligned_and_without_gaps(blob):
    path = blob("tiny-vl", bits=4, vision_bits=16)
    loaded, file = load_file(path), TensorFile(path)
    assert set(loaded) == set(file.entries)
    for name, entry in file.entries.items():
        assert entry.start % entry.dtype.itemsize == 0
        np.testing.assert_array_equal(loaded[name], file.array(name))
    first = min(entry.start for entry in file.entries.values())
    assert first % 4096 == 0
    packed = [e.start for name, e in file.entries.items() if name.endswith((".qweight", ".scales"))]
    assert all((start - first) % 64 == 0 for start in packed)


def test_qwen_7b_has_no_picture_parts(blob):
    made = Blob(blob("tiny-q7-gptq-asym"))
    assert made.config.visual is None
    assert set(made.metadata["quantization"]) == {"decoder", "embedding", "head"}
    assert made.metadata["preprocessing"] == {}
    assert not [name for name in made.file.entries if ".visual." in name]


def test_metadata_tell_where_the_file_comes_from(blob):
    metadata = Blob(blob("tiny-vl-bin")).metadata
    assert metadata["source"]["name"] == "tiny-vl-bin"
    assert set(metadata["source"]["files"]) == {p.name for p in BIN.glob("*.bin")}
    assert metadata["preprocessing"]["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert metadata["preprocessing"]["std"] == pytest.approx([0.26862954, 0.26130258, 0.27577711])


def test_conversion_is_reproducible(tmp_path):
    for name in ("a.qvl", "b.qvl"):
        convert(BIN, tmp_path / name)
    assert sha256(tmp_path / "a.qvl") == sha256(tmp_path / "b.qvl")


def test_progress_grows_to_the_size_of_the_file(tmp_path):
    seen = []
    convert(BIN, tmp_path / "a.qvl", progress=lambda name, done, total: seen.append((done, total)))
    size = (tmp_path / "a.qvl").stat().st_size
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {size}
    assert seen[-1] == (size, size)


class Interrupt:
    """Stops a conversion after some matrices, as Ctrl-C does."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self, name: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def made_in_two(source: Path, out: Path, after: int, spoil=lambda partial: None, **options) -> list[str]:
    """Interrupt a conversion, damage its partial file, resume; returns the matrices that were made again."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=Interrupt(after), **options)
    assert not out.exists()
    spoil(out.with_name(f"{out.name}.partial"))
    names = []
    convert(source, out, resume=True, progress=lambda name, done, total: names.append(name), **options)
    return names[:-1]


@pytest.mark.parametrize("after", [1, 7, 20])
def test_resume_gives_the_same_file_and_does_nothing_twice(tmp_path, after):
    convert(BIN, tmp_path / "whole.qvl")
    names = made_in_two(BIN, tmp_path / "x.qvl", after)
    assert sha256(tmp_path / "x.qvl") == sha256(tmp_path / "whole.qvl")
    matrices = [s.name for s in tensors(Blob(tmp_path / "x.qvl").config) if isinstance(s, MatrixSpec)]
    assert names == matrices[after:]
    assert not (tmp_path / "x.qvl.partial").exists()


def test_resume_makes_damaged_tensors_anew(tmp_path):
    convert(BIN, tmp_path / "whole.qvl")

    def spoil(partial: Path) -> None:
        entry = TensorFile(partial).entries["transformer.visual.conv1.qweight"]
        with open(partial, "r+b") as file:
            file.seek(entry.start + 5)
            file.write(b"\x00\x01\x02\x03")

    names = made_in_two(BIN, tmp_path / "x.qvl", 7, spoil)
    assert names[0] == "transformer.visual.conv1"
    assert sha256(tmp_path / "x.qvl") == sha256(tmp_path / "whole.qvl")


def test_resume_without_anything_to_resume_begins(tmp_path):
    convert(BIN, tmp_path / "x.qvl", resume=True)
    Blob(tmp_path / "x.qvl").check()


def test_with_force_an_unfinished_file_is_replaced(tmp_path):
    (tmp_path / "x.qvl.partial").write_bytes(b"something else")
    convert(BIN, tmp_path / "x.qvl", force=True)
    Blob(tmp_path / "x.qvl").check()


@pytest.mark.parametrize("force", [False, True])
def test_a_link_in_place_of_an_unfinished_file_harms_nothing(tmp_path, force):
    letter = tmp_path / "letter"
    if force:
        letter.write_text("x")
    (tmp_path / "x.qvl.partial").symlink_to(letter)
    convert(BIN, tmp_path / "x.qvl", force=force)
    Blob(tmp_path / "x.qvl").check()
    assert not (tmp_path / "x.qvl").is_symlink()
    assert letter.read_text() == "x" if force else not letter.exists()


@pytest.mark.parametrize("other", ["settings", "model", "length"])
def test_resume_refuses_what_was_begun_otherwise(tmp_path, other):
    out = tmp_path / "x.qvl"
    with pytest.raises(KeyboardInterrupt):
        convert(BIN, out, progress=Interrupt(5))
    source, options = BIN, {}
    if other == "settings":
        options = {"head_bits": 4}
    elif other == "model":
        source = changed_copy(BIN, tmp_path / "y", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    else:
        os.truncate(tmp_path / "x.qvl.partial", 300_000)
    with pytest.raises(QvlError, match=r"x\.qvl\.partial.*begin anew"):
        convert(source, out, resume=True, **options)
    assert (tmp_path / "x.qvl.partial").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_conversion_leaves_no_file_and_can_be_resumed(tmp_path):
    out = tmp_path / "x.qvl"
    program = (
        "import sys, time; from qvl_convert.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], progress=lambda n, d, t: (print(n, flush=True), time.sleep(0.2)))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, BIN, out], stdout=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert (tmp_path / "x.qvl.partial").exists()
    convert(BIN, out, resume=True)
    Blob(out).check()
    convert(BIN, tmp_path / "whole.qvl")
    assert sha256(out) == sha256(tmp_path / "whole.qvl")


def test_existing_output_is_refused_without_force(tmp_path):
    out = tmp_path / "x.qvl"
    out.write_bytes(b"precious")
    conversion_refused(BIN, out, "x.qvl", "exists already", "--force")
    assert out.read_bytes() == b"precious"
    convert(BIN, out, force=True)
    Blob(out).check()


def test_force_does_not_replace_what_is_read(tmp_path):
    source, data = Path(shutil.copytree(BIN, tmp_path / "source")), tmp_path / "data.json"
    data.write_text(json.dumps([{"text": "Words."}]))
    linked = tmp_path / "linked.bin"
    os.link(source / "pytorch_model-00001-of-00002.bin", linked)
    before = {path: sha256(path) for path in (data, *source.iterdir())}
    for out in (source / "config.json", source / "qwen.tiktoken", linked, data):
        used = {"method": "gptq", "calibration_data": data, "device": "reference"}
        conversion_refused(source, out, f"{out}: is read here and would be overwritten", force=True, **used)
    assert {path: sha256(path) for path in before} == before
    convert(source, source / "x.qvl")
    convert(source, source / "x.qvl", force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
@pytest.mark.parametrize("option", ["force", "resume"])
def test_two_conversions_do_not_write_one_file(tmp_path, option):
    """The first to end would else name what the other has begun."""
    out = tmp_path / "x.qvl"

    def another(name, done, total):
        if done < total:
            refused(lambda: convert(BIN, out, **{option: True}), "x.qvl.partial: another conversion is writing it")

    convert(BIN, out, progress=another)
    Blob(out).check()


@pytest.mark.parametrize("begins", ["before", "after"])
def test_of_two_conversions_begun_at_once_one_has_the_file(tmp_path, monkeypatch, begins):
    """The other one begins while the first makes its file: before that is there, or before it is locked."""
    out, layout, others = tmp_path / "x.qvl", {"a": ((4,), np.dtype(np.float32))}, []

    def begin(force: bool) -> writer_module.BlobWriter:
        return writer_module.BlobWriter(out, layout, {}, resume=False, force=force)

    def opened(path, mode):
        if mode != "x+b" or others:
            return open(path, mode)
        others.append(None)
        if begins == "before":
            others[0] = begin(False)
        file = open(path, mode)  # noqa: SIM115
        if begins == "after":
            others[0] = begin(True)
        return file

    monkeypatch.setattr(writer_module, "open", opened, raising=False)
    refused(lambda: begin(False), "x.qvl.partial: another conversion is writing it")
    others[0].write("a", np.arange(4, dtype=np.float32))
    others[0].finish()
    assert [path.name for path in tmp_path.iterdir()] == ["x.qvl"]


def test_output_made_by_another_meanwhile_is_kept(tmp_path):
    out = tmp_path / "x.qvl"

    def appear(name, done, total):
        out.write_bytes(b"precious")

    with pytest.raises(QvlError, match=r"exists already.*the conversion is complete in .*x\.qvl\.partial$"):
        convert(BIN, out, progress=appear)
    assert out.read_bytes() == b"precious"
    Blob(tmp_path / "x.qvl.partial").check()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_a_finished_file_leaves_the_page_cache(tmp_path, monkeypatch):
    """Written pages are small; pages that are read again are large."""
    calls, size = [], []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))

    def advise(file, offset, length, advice):
        calls.append((offset, length, advice))
        size.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    convert(GOLDEN / "ckpt" / "tiny-vl", tmp_path / "out.qvl")
    assert calls == ["fsync", (0, 0, os.POSIX_FADV_DONTNEED)]
    assert size == [(tmp_path / "out.qvl").stat().st_size]


def test_a_file_that_is_given_up_is_not_resumed_meanwhile(tmp_path, monkeypatch):
    """The other conversion would lose its file."""
    out, layout, unlink, tried = tmp_path / "x.qvl", {"a": ((4,), np.dtype(np.float32))}, Path.unlink, []

    def unlinked(path, **options):
        tried.append(path.name)
        resume = functools.partial(writer_module.BlobWriter, out, layout, {}, resume=True, force=False)
        refused(resume, "x.qvl.partial: another conversion is writing it")
        unlink(path, **options)

    writer = writer_module.BlobWriter(out, layout, {}, resume=False, force=False)
    monkeypatch.setattr(Path, "unlink", unlinked)
    with pytest.raises(QvlError, match="invalid"), writer:
        raise QvlError("invalid")
    assert tried == ["x.qvl.partial"] and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_what_is_no_file_is_not_replaced(tmp_path):
    """As root, a conversion to /dev/null would leave a file there."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for force in (False, True):
        conversion_refused(BIN, pipe, "pipe.png: is no regular file and is not replaced", force=force)
    refused(lambda: check_path(pipe), "pipe.png: cannot be written")
    assert pipe.is_fifo()


def test_impossible_outputs(tmp_path):
    (tmp_path / "folder").mkdir()
    conversion_refused(BIN, tmp_path / "folder", "is a folder")
    for path in ("", ".", "/"):
        refused(lambda path=path: convert(BIN, path, force=True), "is a folder; name a file, such as")
    conversion_refused(BIN, tmp_path / "a\0b", "a path has no NUL character")
    refused(lambda: convert(BIN, 5), "expected a path, not int")
    (tmp_path / "file").touch()
    conversion_refused(BIN, tmp_path / "no" / "x.qvl", "folder does not exist")
    refused(lambda: convert(BIN, tmp_path / "file" / "x.qvl"), "x.qvl: its folder does not exist")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"bits": 5}, "--bits 5"),
        ({"vision_bits": 2}, "--vision-bits 2"),
        ({"head_bits": 2}, "--head-bits 2"),
        ({"group_size": 48}, "--group-size 48"),
        ({"method": "magic"}, "--method 'magic'"),
    ],
)
def test_unknown_settings(tmp_path, options, part):
    conversion_refused(BIN, tmp_path / "x.qvl", part, "choose", **options)


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("transformer.h.1.mlp.w1.weight", np.nan, {}),
        ("transformer.visual.conv1.weight", np.inf, {"bits": 16}),
        ("transformer.ln_f.weight", np.nan, {}),
        ("transformer.h.0.attn.c_attn.bias", -np.inf, {}),
        ("lm_head.weight", 70000.0, {"bits": 16}),
    ],
)
def test_values_that_cannot_be_kept_are_refused_by_name(tmp_path, name, value, options):
    def spoil(tensors):
        tensors[name] = tensors[name].astype(np.float32)
        tensors[name].flat[-1] = value

    source = changed_copy(BIN, tmp_path / "source", spoil)
    (tmp_path / "out").mkdir()
    conversion_refused(source, tmp_path / "out" / "x.qvl", "model.safetensors", name, **options)


def test_large_weights_can_still_be_quantized(tmp_path):
    def enlarge(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
        tensors["lm_head.weight"].flat[-1] = 70000.0

    convert(changed_copy(BIN, tmp_path / "source", enlarge), tmp_path / "x.qvl")
    assert Blob(tmp_path / "x.qvl").matrix("lm_head").dequantize().max() == pytest.approx(70000, rel=1e-3)


def test_too_little_room_is_said_before_work_begins(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    conversion_refused(BIN, tmp_path / "x.qvl", "x.qvl", "needs", "free")


def test_a_file_system_without_room_for_such_a_file(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        conversion_refused(BIN, tmp_path / "x.qvl", "x.qvl: cannot be written with", "bytes (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_refuses_the_rest_of_the_buffer_again(tmp_path):
    """Closing the file must not hide what to do."""
    vector = np.zeros(3, np.float32)
    layout = {"small": (vector.shape, vector.dtype)}
    writer = writer_module.BlobWriter(tmp_path / "x.qvl", layout, {}, resume=False, force=False)
    with open("/dev/full", "r+b", buffering=0) as full:
        os.dup2(full.fileno(), writer._file.fileno())
    with pytest.raises(QvlError, match=r"x\.qvl: the disk is full.*--resume"), writer:
        writer.write("small", vector)


def test_a_disk_that_fills_up_is_one_line_and_can_be_resumed(tmp_path, monkeypatch):
    write = writer_module.BlobWriter.write

    def full(self, name, array):
        if name.startswith("transformer.h.1.mlp.w2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, array)

    monkeypatch.setattr(writer_module.BlobWriter, "write", full)
    with pytest.raises(QvlError, match=r"x\.qvl: the disk is full.*--resume"):
        convert(BIN, tmp_path / "x.qvl")
    monkeypatch.undo()
    convert(BIN, tmp_path / "x.qvl", resume=True)
    Blob(tmp_path / "x.qvl").check()


def test_source_is_left_alone(tmp_path):
    source = Path(shutil.copytree(VL, tmp_path / "source"))
    before = {path.name: (sha256(path), path.stat().st_mtime_ns) for path in source.iterdir()}
    convert(source, source / "x.qvl")
    (source / "x.qvl").unlink()
    assert {path.name: (sha256(path), path.stat().st_mtime_ns) for path in source.iterdir()} == before


def test_config_travels_inside(blob):
    made = Blob(blob("tiny-vl"))
    raw = json.loads((VL / "config.json").read_text())
    assert made.config.visual.n_queries == 256
    assert made.config.to_dict().items() >= {k: raw[k] for k in ("hidden_size", "seq_length", "vocab_size")}.items()
    assert made.generation_config.top_p == 0.3
