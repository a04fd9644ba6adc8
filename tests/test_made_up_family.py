"""A new family is one module and one line in the registry: nothing else of the program has to change."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import GOLDEN
from made_up_family import FAMILY
from safetensors.numpy import save_file

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.families import FAMILIES
from qvl_runtime.families.specs import VectorSpec

CONFIG = {"model_type": "made_up", "width": 64, "floors": 2, "eyes": 2, "eye_width": 32, "inner": 96, "words": 640}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng, weights = tmp_path_factory.mktemp("made-up"), np.random.default_rng(0), {}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "words.txt").write_bytes((GOLDEN / "ckpt" / "tiny-vl" / "qwen.tiktoken").read_bytes())
    for spec in FAMILY.tensors(FAMILY.read_config(CONFIG, "config.json")):
        if isinstance(spec, VectorSpec):
            weights[spec.name] = np.ones(spec.shape, np.float32)
        else:
            weights[f"{spec.name}.weight"] = (rng.standard_normal((spec.n, spec.k)) / 8).astype(np.float32)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def registered():
    FAMILIES["made_up"] = "made_up_family"
    yield
    del FAMILIES["made_up"]


@pytest.mark.parametrize("recipe", [{"bits": 16}, {"bits": 4, "method": "gptq", "calibration_samples": 2}], ids=str)
def test_it_converts_loads_generates_and_chats(folder, tmp_path, recipe):
    convert(folder, tmp_path / "m.qvl", device="reference", **recipe)
    answers = {}
    for device in ("reference", "cpu"):
        model = qvl.load(tmp_path / "m.qvl", device)
        assert "Made-up" in repr(model)
        raw = model.generate("one two", max_new_tokens=8)
        first = model.chat("what?")
        second = model.chat("and?", first.history)
        assert second.history[0] == ("what?", first.text) and len(second.history) == 2
        assert second.timings.cached_tokens > 0, "the second turn begins with the first"
        answers[device] = raw.token_ids, first.token_ids
    assert answers["reference"] == answers["cpu"]
