"""GPTQ on whole models: its results, that they are better than rounding, and interruptions."""

import errno
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN
from fakes.recorded import Recorded
from helpers import conversion_refused, dequantize, output_error, sha256
from shards import changed_copy

import qvl_runtime as qvl
from qvl_convert import calibration, gram, quantize_model
from qvl_convert import convert as convert_module
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.convert import convert
from qvl_convert.gptq import gptq
from qvl_convert.hessian import factorize
from qvl_convert.plan import Published, Recipe, Source
from qvl_convert.quantize_model import Calibrated, Watch, WatchedWeights
from qvl_convert.rtn import quantize
from qvl_convert.walk import Walk, stages
from qvl_runtime.backends import make_ops
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.families.weights import Weights

VL = GOLDEN / "ckpt" / "tiny-vl"
ALL_INT4 = {"vision_bits": 4, "head_bits": 4, "group_size": 32, "method": "gptq", "device": "reference"}


@pytest.fixture(scope="module")
def source():
    return Source(Checkpoint(VL))


@pytest.fixture(scope="module")
def samples(source):
    return calibration.load("builtin", source.checkpoint, count=3, max_tokens=600)


def _walk(source, ops, samples, folder=None):
    checkpoint = source.checkpoint
    return Walk(ops, checkpoint.family, checkpoint.config, samples, checkpoint.reader, folder)


def _stages(source):
    return stages(source.checkpoint.family, source.checkpoint.config)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A conversion in one run: its file, and ``{(kind, index): outputs}`` of every stage before its products."""
    path, seen, original = tmp_path_factory.mktemp("gptq") / "whole.qvl", {}, quantize_model.products

    def spy(walk, stage, *rest):
        seen[stage.kind, stage.index] = [x.copy() for x in walk.outputs(stage)]
        return original(walk, stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_model, "products", spy)
        convert(VL, path, **ALL_INT4, calibration_samples=3)
    return path, seen


@pytest.fixture(scope="module")
def whole(watched):
    return watched[0]


def test_a_walk_computes_what_the_model_computes(source, samples, model):
    ops = make_ops("reference")
    walk, weights = _walk(source, ops, samples), Weights(Published(source), ops)
    for stage in _stages(source):
        walk.run(stage, weights)
    head = weights.matrix("lm_head")
    for i, sample in enumerate(samples):
        want = model("tiny-vl", bits=16).logits(sample.ids, sample.images)
        np.testing.assert_allclose(np.concatenate(list(walk.logits(head, i))), want, rtol=0, atol=1e-5)


def test_spilled_activations_are_the_same(source, samples, tmp_path):
    ops = make_ops("reference")
    weights, results = Weights(Published(source), ops), []
    for folder in (None, tmp_path):
        walk = _walk(source, ops, samples, folder)
        for stage in _stages(source)[:-3]:
            walk.run(stage, weights)
        results.append([np.array(x) for x in walk.hidden])
        assert all(isinstance(x, np.memmap) == (folder is not None) for x in walk.hidden)
    assert not list(tmp_path.iterdir()), "a process that is killed leaves nothing"
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_full_disk_for_activations_is_one_line_and_can_be_resumed(tmp_path, monkeypatch):
    def full(*place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(QvlError, match=r"qvl-\w+/\S+: the disk is full; .*--resume"):
        convert(VL, tmp_path / "out.qvl", **ALL_INT4, calibration_samples=1, spill=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.qvl.partial"]


def test_every_matrix_is_watched_with_the_inputs_it_gets(source, samples, monkeypatch):
    """The Hessian of each product is that of what it multiplies."""
    monkeypatch.setattr(gram, "FAST", False)  # sums without rounding, for a close comparison
    ops = Recorded(make_ops("reference"))
    walk, seen = _walk(source, ops, samples), set()
    for stage in _stages(source):
        names = set(stage.matrices) - {"transformer.wte", "lm_head"}
        watch = Watch(ops, names)
        ops.inputs = {}
        walk.run(stage, WatchedWeights(Published(source), watch), keep=False)
        assert set(watch.hessians) == names
        for weight, name in watch._names.items():
            if name in names:
                x = np.concatenate(ops.inputs[weight])
                hessian = watch.hessians[name]
                assert hessian.count == len(x) > 0
                np.testing.assert_allclose(hessian.sum, x.T @ x, rtol=1e-3, atol=1e-4 * np.abs(hessian.sum).max())
        seen |= names
        walk.run(stage, Weights(Published(source), ops))
    assert len(seen) == sum(len(stage.matrices) for stage in _stages(source)) - 2


def test_all_parts_become_int4_but_the_embedding_is_rounded(whole):
    blob = Blob(whole)
    methods = {part: (q["bits"], q["method"]) for part, q in blob.metadata["quantization"].items()}
    assert methods == {
        "vision": (4, "gptq"),
        "adapter": (4, "gptq"),
        "decoder": (4, "gptq"),
        "embedding": (4, "rtn"),
        "head": (4, "gptq"),
    }


def test_a_layer_is_calibrated_behind_the_quantized_ones(source, watched):
    whole, seen = watched
    ops, blob = make_ops("reference"), Blob(whole)
    walk = _walk(source, ops, calibration.load("builtin", source.checkpoint, count=3))
    for stage in _stages(source):
        if stage.index > 0:
            for got, want in zip(seen[stage.kind, stage.index], walk.outputs(stage)):
                np.testing.assert_array_equal(got, want)
        walk.run(stage, Weights(blob, ops))
    assert ("decoder", 2) in seen and ("vision", 2) in seen


def test_it_is_nearer_to_the_original_than_rounding(whole, blob, model, samples):
    rounded = qvl.load(blob("tiny-vl", vision_bits=4, head_bits=4, group_size=32), device="reference")
    reference, ours = model("tiny-vl", bits=16), qvl.load(whole, device="reference")
    sample = samples[0]
    want = reference.logits(sample.ids, sample.images)
    errors = [np.square(m.logits(sample.ids, sample.images) - want).mean() for m in (ours, rounded)]
    assert errors[0] < 0.5 * errors[1]
    features = reference.encode_image(sample.images[0])
    errors = [np.square(m.encode_image(sample.images[0]) - features).mean() for m in (ours, rounded)]
    assert errors[0] < 0.6 * errors[1]


class Killed(BaseException):
    pass


def test_an_interrupted_run_resumes_to_the_same_bytes(whole, tmp_path):
    """Several times, in parts of every kind; finished matrices are not made again."""
    out, seen, kept = tmp_path / "out.qvl", set(), set()

    def run(until, **options):
        made = []

        def progress(name, *_):
            made.append(name)
            seen.add(name)
            if len(seen) == until:
                raise Killed

        try:
            convert(VL, out, **ALL_INT4, calibration_samples=3, progress=progress, **options)
        finally:
            assert made and kept.isdisjoint(made)
            kept.update(made[:-1])

    for until in (1, 7, 14, 17, 24, 30):
        with pytest.raises(Killed):
            run(until, resume=until > 1)
        assert not out.exists()
    run(0, resume=True)
    assert sha256(out) == sha256(whole)


def test_the_command_calibrates_and_ends_with_a_comparison(whole, tmp_path):
    command = [sys.executable, "-m", "qvl_runtime", "convert", VL, tmp_path / "out.qvl", "--method", "gptq"]
    command += ["--vision-bits", "4", "--head-bits", "4", "--group-size", "32", "--device", "reference", "--spill"]
    command += ["--calibration-samples", "3", "--verify", "1"]
    shown = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    assert "MB" in shown.stdout and "KL divergence, mean" in shown.stdout and "answers" not in shown.stdout
    assert sha256(tmp_path / "out.qvl") == sha256(whole)


def test_the_work_that_is_reported_grows_to_the_whole(tmp_path):
    reports = []
    convert(VL, tmp_path / "out.qvl", **ALL_INT4, calibration_samples=1, effort=lambda *work: reports.append(work))
    done, whole = zip(*reports)
    assert len(reports) > 20 and len(set(whole)) == 1
    assert done[0] > 0 and all(a < b for a, b in itertools.pairwise(done)) and done[-1] == pytest.approx(whole[-1])


def test_other_calibration_data_are_not_mixed_into_an_unfinished_file(tmp_path):
    def die(*_):
        raise Killed

    with pytest.raises(Killed):
        convert(VL, tmp_path / "out.qvl", **ALL_INT4, calibration_samples=3, progress=die)
    with pytest.raises(QvlError, match="other settings"):
        convert(VL, tmp_path / "out.qvl", **ALL_INT4, calibration_samples=4, resume=True)


def test_an_unfinished_file_of_another_version_is_not_taken_up(tmp_path, monkeypatch):
    """Its matrices were quantized by another GPTQ."""

    def die(*_):
        raise Killed

    with monkeypatch.context() as earlier, pytest.raises(Killed):
        earlier.setattr(convert_module, "__version__", "0.1.0")
        convert(VL, tmp_path / "out.qvl", progress=die)
    before = (tmp_path / "out.qvl.partial").read_bytes()
    with pytest.raises(
        QvlError, match=r"begun by 'qvl 0\.1\.0', and qvl .* may round otherwise; finish it with that, or"
    ):
        convert(VL, tmp_path / "out.qvl", resume=True)
    assert (tmp_path / "out.qvl.partial").read_bytes() == before


def test_a_finished_walk_is_not_repeated(source, samples, monkeypatch):
    """No layer is run if no matrix needs calibration."""
    monkeypatch.setattr(Walk, "run", lambda *a, **k: pytest.fail("ran a layer"))
    plans = source.plan(Recipe(method="rtn"))
    made = list(Calibrated(samples, device="reference")(source, plans, plans[:4], None))
    assert [plan for plan, _ in made] == plans[:4]


@pytest.mark.parametrize("value", [np.nan, 3e6])
def test_a_weight_that_cannot_be_stored_is_named_and_leaves_nothing(tmp_path, value):
    name = "transformer.h.0.attn.c_attn.weight"

    def spoil(tensors):
        tensors[name] = tensors[name].astype(np.float32)
        tensors[name][3, 3] = value

    options = {"method": "gptq", "device": "reference", "calibration_samples": 1}
    source = changed_copy(VL, tmp_path / "source", spoil)
    (tmp_path / "out").mkdir()
    conversion_refused(source, tmp_path / "out" / "x.qvl", "model.safetensors", name, "fp16 scale", **options)


@pytest.mark.parametrize(
    "options", [{"method": "gptq", "vision_bits": 4}, {"method": "gptq", "vision_bits": 3}, {"target_size": "1GB"}]
)
def test_a_vit_is_not_calibrated_without_pictures(tmp_path, options):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Only words."}\n')
    out = tmp_path / "x.qvl"
    conversion_refused(VL, out, "texts.jsonl", "has a picture", calibration_data=texts, device="reference", **options)


def test_text_alone_calibrates_a_decoder(source, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Only words."}\n')
    assert len(convert_module._samples(source, texts, 2, parts={"decoder", "head"})) == 1


def test_bad_calibration_data_leave_nothing_behind(tmp_path):
    with pytest.raises(QvlError, match=r"gone\.json"):
        convert(VL, tmp_path / "out.qvl", method="gptq", calibration_data=tmp_path / "gone.json")
    assert list(tmp_path.iterdir()) == []


def test_the_error_the_algorithm_sees_is_that_of_the_layer(source, samples):
    """One decoder matrix: GPTQ on the watched Hessian beats rounding on the layer's own inputs."""
    ops = make_ops("reference")
    walk = _walk(source, ops, samples)
    for stage in _stages(source):
        if stage.kind == "decoder":
            break
        walk.run(stage, Weights(Published(source), ops))
    name = stage.matrices[0]
    watch = Watch(ops, {name})
    walk.run(stage, WatchedWeights(Published(source), watch), keep=False)
    spec = next(plan.spec for plan in source.plan(Recipe()) if plan.spec.name == name)
    w = source.weight(spec).astype(np.float32)
    h = watch.hessians[name].mean()
    codes, scales, _ = gptq(w, factorize(h), group_size=32)
    ours = output_error(w, dequantize(codes, scales, 8, 32), h)
    assert ours < 0.75 * output_error(w, quantize(w, 4, 32).dequantize(), h)
