"""The synthetic checkpoint has the published model's tensors, shard for shard, and both kinds of file hold the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from qvl_convert.unpickle import PickleFile
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.file.tensorfile import TensorFile

# Tensors and bytes of the published pytorch_model-00001-of-00010.bin and its nine companions.
PUBLISHED_SHARDS = [
    (16, 1964064768),
    (39, 1933778944),
    (39, 1933778944),
    (38, 1990393856),
    (38, 1923268608),
    (38, 1933770752),
    (39, 1933778944),
    (230, 1975280384),
    (312, 1994809856),
    (64, 1730945280),
]


@pytest.fixture(scope="module")
def synthetic():
    path = Path(__file__).parents[1] / "bench/synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


def test_shards_are_the_published_ones(synthetic):
    config = ModelConfig.from_dict(synthetic.published_config())
    shards = synthetic.shards(synthetic.published_order(config))
    assert [(len(shard), sum(t.nbytes for t in shard)) for shard in shards] == PUBLISHED_SHARDS
    assert shards[0][0].name == "transformer.wte.weight"
    assert shards[9][-1].name == "lm_head.weight"


def test_text_only_is_qwen_7b(synthetic):
    config = ModelConfig.from_dict(synthetic.published_config(text_only=True))
    assert sum(t.nbytes for t in synthetic.published_order(config)) == 15442649088


def test_pickle_and_safetensors_hold_the_same_values(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK_VALUES", 100)
    tensors = [
        synthetic.Tensor("transformer.h.0.ln_1.weight", (64,)),
        synthetic.Tensor("transformer.h.0.mlp.w1.weight", (33, 40)),
        synthetic.Tensor("transformer.visual.conv1.weight", (3, 3, 14, 14)),
    ]
    synthetic.write_pickle(tmp_path / "x.bin", tensors, 5, 2)
    synthetic.write_safetensors(tmp_path / "x.safetensors", tensors, 5, 2)
    pickled, plain = PickleFile(tmp_path / "x.bin"), TensorFile(tmp_path / "x.safetensors")
    assert list(pickled.entries) == list(plain.entries) == [t.name for t in tensors]
    for tensor in tensors:
        array = pickled.array(tensor.name)
        assert (array.shape, array.dtype) == (tensor.shape, synthetic.BF16)
        np.testing.assert_array_equal(array, plain.array(tensor.name))
        # torch.save aligns storages so.
        assert pickled.entries[tensor.name].start % 64 == 0
    assert pickled.array(tensors[0].name).astype(np.float32).mean() == pytest.approx(1, abs=0.1)
    assert pickled.array(tensors[1].name).astype(np.float32).std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("size", "count", "nbytes"),
    [("qwen2-vl-7b", 730, 16_582_751_232), ("qwen2.5-vl-7b", 729, 16_584_333_312), ("qwen3-vl-4b", 713, 8_875_631_616)],
)
def test_newer_sizes_are_the_published_ones(synthetic, size, count, nbytes, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(synthetic, "write_safetensors", lambda path, tensors, *_: written.extend(tensors))
    monkeypatch.setattr(synthetic.published_vl, "write_tokenizer", lambda *_: None)
    synthetic.write_vl_checkpoint(tmp_path, size)
    names = {tensor.name for tensor in written}
    assert (len(written), len(names), sum(t.nbytes for t in written)) == (count, count, nbytes)
    prefixes = {".".join(name.split(".")[:2]) for name in names - {"lm_head.weight"}}
    newest = {"model.visual", "model.language_model"}
    assert prefixes == newest if "qwen3" in size else not prefixes & newest
