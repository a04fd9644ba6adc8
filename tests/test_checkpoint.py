"""Reading a folder in Hugging Face layout: consistent files are read, others are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from shards import all_tensors, changed_copy, safetensors_bytes

from qvl_convert.checkpoint import Checkpoint
from qvl_convert.plan import Recipe, Source
from qvl_convert.published import published_shapes
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.tensors import tensors

CKPT = GOLDEN / "ckpt"
VL, BIN, ASYM = CKPT / "tiny-vl", CKPT / "tiny-vl-bin", CKPT / "tiny-q7-gptq-asym"
WTE = "transformer.wte.weight"
VISUAL = json.loads((VL / "config.json").read_text())["visual"]


@pytest.fixture
def copy(tmp_path):
    """A copy of the golden VL checkpoint, to be damaged."""
    return Path(shutil.copytree(VL, tmp_path / "copy"))


def refused(folder: Path, *parts: str) -> None:
    """Opening a folder fails with one line that holds all the parts."""
    helpers.refused(lambda: Source(Checkpoint(folder)), *parts)


def test_every_tensor_is_what_another_reader_sees():
    checkpoint = Checkpoint(VL)
    seen = set()
    for path in VL.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = checkpoint.tensor(name)
                assert tensor.dtype == ml_dtypes.bfloat16
                np.testing.assert_array_equal(tensor, file.get_tensor(name))
                seen.add(name)
    assert seen == set(checkpoint.names)


@pytest.mark.parametrize("name", ["tiny-vl", "tiny-vl-bin"])
def test_names_and_shapes_are_those_of_the_published_model(name):
    checkpoint = Checkpoint(CKPT / name)
    shapes = published_shapes(checkpoint.family.tensors(checkpoint.config))
    assert {n: checkpoint.entry(n).shape for n in checkpoint.names} == shapes
    assert checkpoint.ranks == (CKPT / name / "qwen.tiktoken").read_bytes()
    assert checkpoint.generation_config.chat_format == "chatml"


def test_a_tensor_is_a_view_of_the_file_and_is_read_only():
    tensor = Checkpoint(BIN).tensor("lm_head.weight")
    assert not tensor.flags.writeable
    assert tensor.base is not None


def test_single_file_without_index(tmp_path):
    folder = changed_copy(VL, tmp_path / "one")
    Source(Checkpoint(folder))
    for name, array in all_tensors(VL).items():
        np.testing.assert_array_equal(Checkpoint(folder).tensor(name), array)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", 1.5),
        ("top_k", -2),
        ("temperature", -1.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", -5),
        ("max_window_size", -1),
    ],
)
def test_sampling_values_out_of_range_are_refused(copy, key, value):
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(copy, str(path), key, str(value), "expected")


def test_a_long_foreign_value_is_cut(copy):
    for name, key in (
        ("generation_config.json", "chat_format"),
        ("config.json", "rotary_pct"),
        ("config.json", "visual"),
    ):
        path = copy / name
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | {key: "x" * 100_000}))
        with pytest.raises(QvlError, match=f"{key}.* is 'xxx") as caught:
            Checkpoint(copy)
        assert len(str(caught.value)) < 1000
        path.write_text(kept)


def test_a_top_k_of_minus_one_is_off(copy):
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": -1}))
    assert Checkpoint(copy).generation_config.top_k == 0


def test_missing_generation_config_gives_defaults(copy):
    (copy / "generation_config.json").unlink()
    assert Checkpoint(copy).generation_config.chat_format == "raw"


def test_ranks_with_crlf(copy):
    path = copy / "qwen.tiktoken"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    changed, original = Checkpoint(copy), Checkpoint(VL)
    assert changed.ranks != original.ranks
    text = "Picture 1: <img></img>\nWhat is this? 这是什么?"
    assert changed.tokenizer.encode(text) == original.tokenizer.encode(text)


def test_known_buffers_are_tolerated(tmp_path):
    added = {
        "transformer.rotary_emb.inv_freq": np.ones(4, np.float32),
        "transformer.visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32),
        "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32),
        "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.bool_),
    }

    def add(tensors):
        tensors |= added

    changed, original = Checkpoint(changed_copy(VL, tmp_path / "x", add)), Checkpoint(VL)
    assert set(changed.names) == set(original.names) | set(added)
    assert Source(changed).plan(Recipe()) == Source(original).plan(Recipe())


def test_missing_files(copy, tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")
    for name, remedy in (("qwen.tiktoken", "download"), ("config.json", "Hugging Face")):
        moved = (copy / name).rename(tmp_path / name)
        refused(copy, name, "no such file", remedy)
        moved.rename(copy / name)
    shard = copy / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    refused(copy, shard.name, "no such file", "finish the download")
    shard.write_bytes(data[:-1])
    refused(copy, shard.name, "truncated")
    shard.write_bytes(data[:4])
    refused(copy, shard.name, "4 bytes")
    shard.write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    refused(copy, shard.name, "not a safetensors file")
    shard.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(copy, shard.name, "not a safetensors file")
    for path in copy.glob("model*"):
        path.unlink()
    refused(copy, "holds no weights")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "not readable"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "names the shard '1'"),
        ('{"weight_map": {"a": "../model-00001-of-00003.safetensors"}}', "names the shard '../model-00001"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names the shard '/etc/passwd'"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "names the shard '/etc/x.safetensors'"),
        ('{"weight_map": {"a": "x.bin"}}', "expected a .safetensors file"),
        ('{"weight_map": {"a": "model-00001-of-00003.safetensors"}}', "has no tensor 'a'"),
        ('{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}', "twice"),
    ],
)
def test_broken_index(copy, content, message):
    (copy / "model.safetensors.index.json").write_text(content)
    refused(copy, message)


def test_index_that_names_the_wrong_shard(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][WTE] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(index))
    refused(copy, "model-00002-of-00003.safetensors", WTE)


def test_tensor_in_two_shards(copy):
    shutil.copy(copy / "model-00001-of-00003.safetensors", copy / "model-00004.safetensors")
    (copy / "model.safetensors.index.json").unlink()
    refused(copy, "model-00004.safetensors", "stands in model-00001-of-00003.safetensors too")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(WTE), [WTE, "finish the download"]),
        (lambda t: t.update({WTE: t[WTE][:-1]}), [WTE, "[639, 256]", "[640, 256]"]),
        (lambda t: t.update({WTE: t[WTE].T.copy()}), [WTE, "[256, 640]"]),
        (lambda t: t.update({WTE: t[WTE].astype(np.int32)}), [WTE, "int32", "float16"]),
        (lambda t: t.update({"transformer.h.3.ln_1.weight": t[WTE]}), ["transformer.h.3.ln_1.weight", "describe"]),
        (lambda t: t.update({"lm_head.qweight": np.zeros((2, 2), np.int32)}), ["lm_head.qweight", "quantize_config"]),
    ],
)
def test_tensors_that_contradict_the_config(tmp_path, change, parts):
    refused(changed_copy(VL, tmp_path / "x", change), *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'"]),
        ({"num_hidden_layers": 2}, ["transformer.h.2.", "describe"]),
        ({"num_hidden_layers": 4}, ["transformer.h.3.", "finish"]),
        ({"hidden_size": 512}, ["512"]),
        ({"vocab_size": 600}, ["vocab_size"]),
        ({"rotary_pct": 0.25}, ["rotary_pct"]),
        ({"seq_length": "2048"}, ["seq_length"]),
        ({"visual": None}, ["transformer.visual.", "describe"]),
        ({"visual": {"image_size": 448}}, ["visual", "missing"]),
        ({"intermediate_size": 4096}, ["mlp.w1.weight"]),
        ({"intermediate_size": 10**30}, ["'intermediate_size'", "at most"]),
        ({"rotary_emb_base": 1e300}, ["'rotary_emb_base' is 1e+300", "at most"]),
        ({"rotary_emb_base": 1e-300}, ["'rotary_emb_base' is 1e-300", "1 or more"]),
        ({"layer_norm_epsilon": 2.0}, ["'layer_norm_epsilon' is 2.0", "at most"]),
        ({"kv_channels": 2}, ["'kv_channels' is 2", "above 2"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most 1024"]),
        ({"vocab_size": 2**63}, ["vocab_size", "at most"]),
        ({"max_position_embeddings": 10**12}, ["max_position_embeddings", "at most"]),
        ({"seq_length": 1}, ["'seq_length' is 1"]),
        ({"visual": VISUAL | {"layers": 10**9}}, ["'layers' is 1000000000"]),
        ({"visual": VISUAL | {"mlp_ratio": 1e308}}, ["'mlp_ratio' is 1e+308"]),
        ({"visual": VISUAL | {"image_size": 14 * 10**9}}, ["'image_size'", "at most"]),
        ({"visual": VISUAL | {"width": 10**400}}, ["'width'", "at most"]),
    ],
)
def test_config_that_contradicts_the_tensors(copy, config, parts):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    refused(copy, *parts)


def test_image_start_id_that_contradicts_the_tokenizer(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["visual"]["image_start_id"] += 1
    path.write_text(json.dumps(config))
    refused(copy, "config.json", "615", "614")


def test_broken_ranks(copy):
    (copy / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    refused(copy, "qwen.tiktoken", "single byte")


def test_fingerprint_tells_sources_apart(copy):
    before = Checkpoint(copy).fingerprint()
    assert before == Checkpoint(VL).fingerprint()
    path = copy / "model-00003-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = Checkpoint(copy).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {path.name}


def test_qwen_7b_is_the_text_half():
    raw = json.loads((VL / "config.json").read_text())
    both = published_shapes(tensors(ModelConfig.from_dict(raw)))
    text = published_shapes(tensors(ModelConfig.from_dict({k: v for k, v in raw.items() if k != "visual"})))
    assert text == {name: shape for name, shape in both.items() if ".visual." not in name}


def test_shard_bytes_helper_is_what_the_library_reads(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": values}, {"k": "v"}))
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONFIG_KEYS = [*json.loads((CKPT / "tiny-vl-gptq/config.json").read_text()), "x"]
VISUAL_KEYS = [*VISUAL, "n_queries"]
GPTQ_KEYS = [*json.loads((ASYM / "quantize_config.json").read_text()), "quant_method", "checkpoint_format"]
GENERATION_KEYS = [*json.loads((VL / "generation_config.json").read_text()), "temperature", "repetition_penalty"]


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """A folder whose weights are links to a golden checkpoint's and whose JSON files can be overwritten."""
    source = CKPT / "tiny-vl-gptq"
    written = ("config.json", "generation_config.json", "quantize_config.json")
    folder = helpers.linked(source, tmp_path_factory.mktemp("linked"), *written)
    for name in written:
        shutil.copy(source / name, folder)
    return folder


@given(
    place=st.sampled_from(
        [("config", None, key) for key in CONFIG_KEYS]
        + [("config", "visual", key) for key in VISUAL_KEYS]
        + [("config", "quantization_config", key) for key in GPTQ_KEYS]
        + [("quantize_config", None, key) for key in GPTQ_KEYS]
        + [("generation_config", None, key) for key in GENERATION_KEYS]
    ),
    value=JSON,
)
@settings(max_examples=400, deadline=None)
def test_any_value_in_the_json_files_is_read_or_refused(linked, place, value):
    stem, section, key = place
    path = linked / f"{stem}.json"
    original = path.read_text()
    content = json.loads(original)
    (content if section is None else content[section])[key] = value
    path.write_text(json.dumps(content))
    try:
        Source(Checkpoint(linked)).plan(Recipe())
    except QvlError as error:
        assert "\n" not in str(error)
    finally:
        path.write_text(original)
