"""The whole model on the GPU backend without a GPU: golden parity, every kernel as it ships in the PTX interpreter."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import families
from fakes.compiled import CompiledImages
from fakes.ptx_gpu import PtxDriver

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_kernels import gpu
from qvl_kernels.gpu.ops import CudaOps

GOLDEN = Path(__file__).parent / "golden"


def _noise(index: str, file: str) -> float:
    """Change of the published code's results when it runs in fp16."""
    case = next(c for c in json.loads((GOLDEN / index).read_text())["cases"] if c["file"] == file)
    return case.get("noise_max_abs_logit", case.get("noise"))["original_in_fp16_vs_fp32"]


@pytest.fixture(scope="module")
def driver() -> PtxDriver:
    """Blocks run as one group, which is fast; the tests of the kernels run them in turns."""
    return PtxDriver(turns=1)


@pytest.fixture
def load(driver, monkeypatch):
    """``load(blob, **options)``: a model on the interpreted GPU."""
    monkeypatch.setattr(gpu, "available", lambda: (True, driver.name))
    monkeypatch.setattr(gpu, "CudaOps", lambda **options: CudaOps(driver, CompiledImages(), **options), raising=False)
    return lambda path, **options: qvl.load(path, device="cuda", **options)


@pytest.fixture(scope="module")
def int4_blob(blob) -> Path:
    return blob("tiny-vl-gptq", bits=4, vision_bits=8, head_bits=16)


@pytest.fixture(scope="module")
def text():
    return np.load(GOLDEN / "lm" / "tiny-vl-gptq_gptq_text.npz")


def test_logits_are_within_the_noise_of_fp16(load, int4_blob, text):
    logits = load(int4_blob).logits(text["input_ids"][0].tolist())[text["pos"]]
    error = np.abs(logits - text["logits"][0]).max()
    assert 0 < error < 1.5 * _noise("lm/index_gptq.json", "tiny-vl-gptq_gptq_text.npz")


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_greedy_tokens_are_those_of_the_published_code(load, int4_blob, text, kv_cache):
    """A whole generation, through captured graphs."""
    expected = text["gen_ids"][0].tolist()
    result = load(int4_blob, kv_cache=kv_cache).generate(text["input_ids"][0].tolist(), max_new_tokens=4)
    assert result.token_ids == expected[:4] and len(expected) >= 4


def test_an_answer_is_the_same_alone_and_among_others(load, int4_blob):
    """Prompts on both sides of 16 tokens, drafts among the rows of steps; tokens and log probabilities to the bit."""
    prompts = [[5, 6, 7], [*range(40, 60)], [*range(60, 66)] * 4]
    asked = [{"prompt": ids, "max_new_tokens": 4, "logprobs": 2, "seed": 1, "temperature": 0.7} for ids in prompts]
    asked[2]["temperature"] = 0
    alone = load(int4_blob, conversations=0)
    expected = [alone.generate(**one) for one in asked]
    for one, other in zip(load(int4_blob, conversations=0).generate_batch(asked), expected, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)


def test_image_features_are_within_the_noise_of_fp16(load, blob):
    vision = np.load(GOLDEN / "vis" / "tiny-vl-bin_base.npz")
    features = load(blob("tiny-vl-bin", bits=16)).encode_image(GOLDEN / "images" / "rgb_odd.png")
    error = np.abs(features[vision["qrows"]] - vision["final"][0]).max()
    assert 0 < error < 1.5 * _noise("vis/index.json", "tiny-vl-bin_base.npz")


# the newer families --------------------------------------------------------------------------------------------------

FAMILIES = ("q2-untied", "q25-tied", "q3-untied")


@pytest.fixture(scope="module")
def family_blob(tmp_path_factory):
    """``family_blob(name, **options)``: a golden checkpoint of a newer family, converted."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(name: str, **options) -> Path:
        path = folder / f"{name}.qvl"
        convert(families.GOLDEN / "ckpt" / name, path, **options)
        return path

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_newer_family_answers_as_the_published_code(load, family_blob, name, monkeypatch):
    """A picture, the prompt, and steps on captured graphs, in fp16 where the golden data is float32."""
    monkeypatch.chdir(families.GOLDEN)
    model = load(family_blob(name, bits=16))
    case = min((c for c in families.read("lm/index.json") if c["ckpt"] == name and c["images"]),
               key=lambda c: len(np.load(families.GOLDEN / c["file"])["ids"]))  # fmt: skip
    expected = np.load(families.GOLDEN / case["file"])
    logits = model.logits(expected["ids"], case["images"])[expected["pos"]]
    error = np.abs(logits - expected["logits"]).max()
    assert 0 < error < 1.5 * case["logits_drift"]["fp16"]
    wanted = expected["gen_ids"][:3].tolist()
    assert model.generate(expected["ids"], case["images"], max_new_tokens=3).token_ids == wanted


def test_the_kernels_of_a_model_took_part(driver):
    families = {launch.name.partition(".")[0] for launch in driver.launches}
    assert families >= {"linear", "gate_up", "embed", "norm", "rope_append", "cached_attention", "decode_attention"}
    assert families >= {"attention", "argmax", "gather", "add", "reorder", "pack_scales", "pad_rows"}
