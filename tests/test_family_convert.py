"""The converter's verbs on the newer families: export and back, adapters, bits by size, calibration, verify."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from families import GOLDEN
from safetensors.numpy import save_file
from shards import all_tensors

import qvl_runtime as qvl
from qvl_convert import answers, calibration
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.convert import convert
from qvl_convert.export import export
from qvl_convert.verify import open_reference, verify
from qvl_kernels.packing import Matrix
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.tensors import canonical
from qvl_runtime.families.specs import MatrixSpec

NAMES = ("q2-untied", "q25-tied", "q3-tied")
KEPT = {"vision_bits": 16, "head_bits": 16}
PROMPT = "<img>images/land.png</img>The answer is 42.\n答案"


@pytest.fixture(autouse=True)
def in_golden(monkeypatch):
    monkeypatch.chdir(GOLDEN)


def logits(path) -> np.ndarray:
    return qvl.load(path, device="cpu").logits(PROMPT)


def matrices(path, *parts: str) -> dict[str, Matrix]:
    """The matrices of a file, or of some parts of it."""
    blob = Blob(path)
    specs = [spec for spec in blob.family.tensors(blob.config) if isinstance(spec, MatrixSpec)]
    return {spec.name: blob.matrix(spec.name) for spec in specs if not parts or spec.part in parts}


@pytest.mark.parametrize("name", NAMES)
def test_export_and_back(name, tmp_path):
    first, again = tmp_path / "first.qvl", tmp_path / "again.qvl"
    convert(GOLDEN / "ckpt" / name, first, group_size=32, **KEPT)
    export(Blob(first), tmp_path / "out")
    convert(tmp_path / "out", again, group_size=32, **KEPT)
    before, after = matrices(first, "decoder"), matrices(again, "decoder")
    for matrix, values in before.items():
        np.testing.assert_array_equal(values.codes(), after[matrix].codes(), err_msg=matrix)
        np.testing.assert_array_equal(values.scales, after[matrix].scales, err_msg=matrix)
    np.testing.assert_allclose(logits(first), logits(again), rtol=0, atol=2e-2)  # biases and norms are rounded to fp16
    blobs = [Blob(path) for path in (first, again)]
    assert blobs[0].config == blobs[1].config and blobs[0].ranks == blobs[1].ranks
    assert blobs[0].metadata["preprocessing"] == blobs[1].metadata["preprocessing"]
    assert blobs[0].generation_config == blobs[1].generation_config
    out = all_tensors(tmp_path / "out")
    linears = {name.removesuffix(".qweight") for name in out if name.endswith(".qweight")}
    assert {linear.rpartition(".")[2] for linear in linears} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert ("lm_head.weight" in out) == ("untied" in name)
    exported, published = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", GOLDEN / "ckpt" / name)
    )
    assert exported["architectures"] == published["architectures"]
    kinds = {key: type(value) for key, value in published["vision_config"].items()}
    for key, value in exported["vision_config"].items():
        assert type(value) is kinds.get(key, type(value)), key  # transformers 5 takes no 4.0 for a 4
    assert "chat_template" not in (tmp_path / "out/tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_at_16_bits_becomes_a_plain_one(name, tmp_path):
    convert(GOLDEN / "ckpt" / name, tmp_path / "x.qvl", bits=16)
    export(Blob(tmp_path / "x.qvl"), tmp_path / "out")
    want = {canonical(tensor): array for tensor, array in all_tensors(GOLDEN / "ckpt" / name).items()}
    got = all_tensors(tmp_path / "out")
    assert set(got) == set(want)
    for tensor, array in want.items():
        np.testing.assert_array_equal(got[tensor], array.astype(np.float16), err_msg=tensor)


@pytest.mark.parametrize(
    ("name", "prefix"), [("q2-untied", "model.layers."), ("q3-tied", "model.language_model.layers.")]
)
def test_an_adapter_is_merged_by_either_naming(name, prefix, tmp_path, rng):
    """As if its product had been added to the checkpoint; also to one of the rows that are stacked."""
    source, folder = GOLDEN / "ckpt" / name, tmp_path / "base"
    tensors = {canonical(tensor): array for tensor, array in all_tensors(source).items()}
    adapter, merged = {}, dict(tensors)
    for layer in ("0.self_attn.k_proj", "1.mlp.down_proj"):
        weight = tensors[f"model.language_model.layers.{layer}.weight"].astype(np.float32)
        a, b = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in ((2, weight.shape[1]), (len(weight), 2)))
        adapter |= {f"base_model.model.{prefix}{layer}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
        merged[f"model.language_model.layers.{layer}.weight"] = weight + 2 * b @ a
    (tmp_path / "lora").mkdir()
    save_file(adapter, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2}))
    folder.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    save_file(merged, folder / "model.safetensors")
    convert(source, tmp_path / "lora.qvl", lora=tmp_path / "lora", bits=16)
    convert(folder, tmp_path / "merged.qvl", bits=16)
    a, b = matrices(tmp_path / "lora.qvl"), matrices(tmp_path / "merged.qvl")
    for matrix in a:
        np.testing.assert_array_equal(a[matrix].weight, b[matrix].weight, err_msg=matrix)


def test_bits_by_size(tmp_path):
    plain, sized, source = tmp_path / "plain.qvl", tmp_path / "sized.qvl", GOLDEN / "ckpt/q25-tied"
    convert(source, plain, group_size=32)
    kilobytes = plain.stat().st_size * 21 // 20_000
    convert(source, sized, target_size=f"{kilobytes}KB", calibration_samples=1)
    assert sized.stat().st_size <= 1000 * kilobytes
    assert len({matrix.bits for matrix in matrices(sized).values()}) > 1


def test_calibration_helps_as_verify_sees_it(tmp_path):
    source, errors = GOLDEN / "ckpt/q3-tied", []
    for method in ("rtn", "gptq"):
        path = tmp_path / f"{method}.qvl"
        convert(source, path, method=method, calibration_samples=4, group_size=32, **KEPT)
        model = qvl.load(path, device="cpu")
        samples = calibration.load("builtin", model, count=2, max_tokens=300, seed=1)
        errors.append(verify(model, open_reference(source), samples, max_new_tokens=2).model.kl_mean)
    assert 0 < errors[1] < errors[0]


@pytest.mark.parametrize("name", ["q2-tied", "q25-tied", "q3-tied"])
def test_the_builtin_samples_have_the_boxes_of_the_family(name):
    """The model's own notation, for the same places in the picture."""
    speaker = Checkpoint(GOLDEN / "ckpt" / name)
    samples = calibration.load("builtin", speaker, count=3)
    texts = [speaker.tokenizer.decode(sample.ids) for sample in samples]
    assert not any("<ref>" in text or "<box>" in text for text in texts)
    picture = samples[0].slots[0].picture

    said = "<ref>a cat</ref><box>(10,20),(370,990)</box><ref>it</ref><box>(0,0),(520,510)</box>"
    cat, it = speaker.grounding.parse(calibration._with_boxes(said, speaker.grounding, picture), [picture])
    assert (cat.ref, it.ref) == ("a cat", "it")
    step = 1000 / min(cat.scale) + 1  # the numbers are whole, and to_pixels truncates
    assert cat.to_pixels(1000, 1000) == pytest.approx((10, 20, 370, 990), abs=step)
    assert it.to_pixels(1000, 1000) == pytest.approx((0, 0, 520, 510), abs=step)
    asked = calibration._with_boxes("What is <box>(10,20),(370,990)</box>?", speaker.grounding, picture)
    assert asked.startswith("What is ") and asked.endswith("?") and "<box>" not in asked
    assert len(speaker.grounding.parse(asked, [picture])) == 1


def test_an_answer_with_a_placeholder_ends_the_comparison_of_it():
    """An untrained model's answer may be invalid as a prompt; that is no error."""

    def refuse(*_, **__):
        raise QvlError("the token ids have 2 image slots")

    model = SimpleNamespace(generate=refuse)
    assert answers._propose(model, calibration.Sample([1], []), [2], 8) == []
