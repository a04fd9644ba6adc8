"""Configs of the newer families: three dialects, defaults, and what is refused by name."""

import copy
import json

import pytest
from families import CHECKPOINTS, GOLDEN, config, config_class

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_5_vl.tensors import tensors as qwen25_tensors
from qvl_runtime.families.qwen2_vl.config import ModelConfig
from qvl_runtime.families.qwen2_vl.family import FAMILY
from qvl_runtime.families.qwen2_vl.tensors import canonical
from qvl_runtime.families.qwen2_vl.tensors import tensors as qwen2_tensors
from qvl_runtime.families.qwen3_vl.config import Qwen3Config
from qvl_runtime.families.qwen3_vl.tensors import tensors as qwen3_tensors
from qvl_runtime.families.specs import MatrixSpec

TENSORS = {"q2": qwen2_tensors, "q25": qwen25_tensors, "q3": qwen3_tensors}

# heads, kv heads, hidden, layers, ffn, vocabulary, tied; ViT: depth, width, heads, mlp
SIZES = {
    "q2-2b": ((12, 2, 1536, 28, 8960, 151936, True), {"embed_dim": 1280, "hidden_size": 1536}, 729, 2_208_985_600),
    "q2-7b": ((28, 4, 3584, 28, 18944, 152064, False), {}, 730, 8_291_375_616),
    "q25-3b": (
        (16, 2, 2048, 36, 11008, 151936, True),
        {"hidden_size": 1280, "out_hidden_size": 2048},
        824,
        3_754_622_976,
    ),
    "q25-7b": ((28, 4, 3584, 28, 18944, 152064, False), {"hidden_size": 1280}, 729, 8_292_166_656),
    "q3-2b": (
        (16, 8, 2048, 28, 6144, 151936, True),
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        625,
        2_127_532_032,
    ),
    "q3-4b": (
        (32, 8, 2560, 36, 9728, 151936, True),
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        713,
        4_437_815_808,
    ),
    "q3-8b": ((32, 8, 4096, 36, 12288, 151936, False), {"out_hidden_size": 4096}, 750, 8_767_123_696),
}


def published(name: str) -> dict:
    """The config of a published size without the keys that have a default."""
    (heads, kv_heads, hidden, layers, ffn, vocabulary, tied), vision, *_ = SIZES[name]
    family = name.partition("-")[0]
    text = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6 if family == "q3" else 1e6,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20] if family == "q3" else [16, 24, 24]},
    }
    kind = config_class(family).MODEL_TYPE
    data = {"model_type": kind, "tie_word_embeddings": tied, "vision_config": vision}
    return data | ({"text_config": text | {"head_dim": 128}} if family == "q3" else text)


@pytest.mark.parametrize("name", SIZES)
def test_tensors_of_published_sizes(name):
    *_, count, parameters = SIZES[name]
    family = name.partition("-")[0]
    read_config = config_class(family).from_dict(published(name))
    sources: dict[str, int] = {}
    for spec in TENSORS[family](read_config):
        if not isinstance(spec, MatrixSpec):
            size = 1
            for side in spec.shape:
                size *= side
            sources[spec.name] = size
            continue
        sources |= {source: rows * spec.k for source, rows in spec.sources.items()}
        sources |= dict(zip(spec.biases, spec.sources.values()))
        assert sum(spec.sources.values()) == spec.n
    assert len(sources) == count
    assert sum(sources.values()) == parameters


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tensors_of_golden_checkpoints(name):
    """Every tensor of a file is read, with either naming."""
    wanted = set()
    for spec in TENSORS[name.partition("-")[0]](config(name)):
        wanted |= {*spec.sources, *spec.biases} if isinstance(spec, MatrixSpec) else {spec.name}
    found = set()
    for file in (GOLDEN / "ckpt" / name).glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {canonical(key) for key in header if key != "__metadata__"}
    assert wanted == found


@pytest.mark.parametrize("name", [*CHECKPOINTS, *SIZES])
def test_round_trip(name):
    kind = config_class(name)
    read_config = config(name) if name in CHECKPOINTS else kind.from_dict(published(name))
    assert kind.from_dict(json.loads(json.dumps(read_config.to_dict()))) == read_config


def test_dialects_agree():
    flat = published("q2-7b")
    text = {key: flat[key] for key in flat if key not in ("model_type", "vision_config", "tie_word_embeddings")}
    rest = {key: flat[key] for key in ("model_type", "vision_config", "tie_word_embeddings")}
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6, "type": "mrope"}
    newest = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_theta")}
    again = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    expected = ModelConfig.from_dict(flat)
    for other in (
        {**rest, "text_config": text},
        {**rest, "text_config": {**newest, "rope_parameters": rope, "layer_types": ["full_attention"] * 28}},
        {**flat, "rope_scaling": again},
    ):
        assert ModelConfig.from_dict(other) == expected


def test_tied_heads():
    flat = published("q2-7b")
    nested = published("q3-8b")
    assert ModelConfig.from_dict({**flat, "tie_word_embeddings": True}).tie_word_embeddings
    del flat["tie_word_embeddings"]
    assert not ModelConfig.from_dict(flat).tie_word_embeddings
    nested["text_config"]["tie_word_embeddings"] = True
    assert not Qwen3Config.from_dict(nested).tie_word_embeddings


REFUSED = [
    ("q2-7b", "model_type", "qwen2_5_vl", "'model_type' is 'qwen2_5_vl'"),
    ("q2-7b", "use_sliding_window", True, "'use_sliding_window' is True"),
    ("q2-7b", "hidden_act", "gelu", "'hidden_act' is 'gelu'"),
    ("q2-7b", "rope_scaling", {"type": "yarn", "mrope_section": [16, 24, 24]}, "rope_scaling: 'type' is 'yarn'"),
    ("q2-7b", "rope_scaling.rope_type", "linear", "rope_scaling: 'rope_type' is 'linear'"),
    ("q2-7b", "rope_scaling.mrope_interleaved", True, "'mrope_interleaved' is True"),
    ("q2-7b", "rope_scaling.partial_rotary_factor", 0.5, "rope_scaling: 'partial_rotary_factor' is 0.5"),
    ("q2-7b", "rope_scaling.mrope_section", [16, 24, 23], "'mrope_section' is .* sum 64"),
    ("q2-7b", "rope_scaling.mrope_section", [16, 48], "'mrope_section'"),
    ("q2-7b", "rope_scaling.mrope_section", ["a"], "'mrope_section' is 'a', expected int"),
    ("q2-7b", "rope_scaling", None, "'rope_scaling' is missing"),
    ("q2-7b", "rope_theta", None, "'rope_theta' is missing"),
    ("q2-7b", "rope_theta", 1e-300, "'rope_theta' is 1e-300, expected 1 or more"),
    ("q2-7b", "layer_types", ["full_attention", "sliding_attention"], "'layer_types' holds .*sliding_attention"),
    ("q2-7b", "num_experts", 64, "'num_experts' is 64"),
    ("q2-7b", "head_dim", 64, "'head_dim' is 64; only 128"),
    ("q2-7b", "num_key_value_heads", 5, "no multiple of 'num_key_value_heads' 5"),
    ("q2-7b", "num_attention_heads", 0, "'num_attention_heads' is below 1"),
    ("q2-7b", "num_hidden_layers", 10**9, "'num_hidden_layers' is 1000000000"),
    ("q2-7b", "hidden_size", 28 << 40, "'hidden_size' is"),
    ("q2-7b", "vocab_size", 100, "'image_token_id' is 151655"),
    ("q2-7b", "rms_norm_eps", 0.0, "'rms_norm_eps' is 0.0"),
    ("q2-7b", "vision_config", [], "'vision_config' is"),
    ("q2-7b", "vision_config.hidden_size", 1280, "the ViT's output is 1280 wide"),
    ("q2-7b", "vision_config.spatial_merge_size", 3, "'spatial_merge_size' is 3"),
    ("q2-7b", "vision_config.temporal_patch_size", 1, "'temporal_patch_size' is 1"),
    ("q2-7b", "vision_config.hidden_act", "gelu", "'hidden_act' is 'gelu'"),
    ("q2-7b", "vision_config.num_heads", 3, "no multiple of 'num_heads' 3"),
    ("q2-7b", "vision_config.num_heads", 640, "2 wide, expected a multiple of 4"),
    ("q2-7b", "vision_config.mlp_ratio", 1e3, "the MLP is"),
    ("q2-7b", "vision_config.mlp_ratio", 1e308, "'mlp_ratio' is 1e"),
    ("q2-7b", "vision_config.rope_parameters", {"rope_theta": 5.0}, "'rope_theta' is 5.0"),
    ("q2-7b", "vision_config.rope_parameters", {"rope_type": "yarn"}, "rope_parameters: 'rope_type' is 'yarn'"),
    ("q2-7b", "vision_config.model_type", "qwen3_vl", "'model_type' is 'qwen3_vl'"),
    ("q25-7b", "vision_config.window_size", 27, "'window_size' 27"),
    ("q25-7b", "vision_config.fullatt_block_indexes", "all", "expected list"),
    ("q3-8b", "text_config.model_type", "qwen2_vl_text", "'model_type' is 'qwen2_vl_text'"),
    ("q3-8b", "text_config.model_type", "qwen3_vl_moe_text", "'model_type' is 'qwen3_vl_moe_text'"),
    ("q3-8b", "text_config.attention_bias", True, "'attention_bias' is True"),
    ("q3-8b", "text_config.head_dim", None, "'head_dim' is missing"),
    ("q3-8b", "text_config.moe_intermediate_size", 768, "'moe_intermediate_size' is 768"),
    ("q3-8b", "text_config.rope_scaling.mrope_interleaved", False, "'mrope_interleaved' is False"),
    ("q3-8b", "vision_config.num_position_embeddings", 2305, "'num_position_embeddings' 2305 is no square"),
    ("q3-8b", "vision_config.deepstack_visual_indexes", [8, 16, 27], "'deepstack_visual_indexes'"),
    ("q3-8b", "vision_config.deepstack_visual_indexes", [8, 8], "'deepstack_visual_indexes'"),
]


def test_top_k_of_a_generation_config_without_it(tmp_path):
    """transformers takes 50 then, and leaves out this value where it saves; 0, and null in version 4, are off."""
    for given, top_k in (({}, 50), ({"top_k": 0}, 0), ({"top_k": None}, 0), ({"top_k": 20}, 20)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **given}))
        assert FAMILY.read_generation(tmp_path).top_k == top_k


@pytest.mark.parametrize(("name", "key", "value", "message"), REFUSED, ids=[f"{n}.{k}={v}" for n, k, v, _ in REFUSED])
def test_refused(name, key, value, message):
    data = copy.deepcopy(published(name))
    *path, last = key.split(".")
    part = data
    for step in path:
        part = part[step]
    part[last] = value
    with pytest.raises(QvlError, match=message):
        config_class(name).from_dict(data)
