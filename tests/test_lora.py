"""LoRA adapters are merged while a model is read."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import save_file
from typer.testing import CliRunner

from qvl_convert.checkpoint import Checkpoint
from qvl_convert.convert import convert
from qvl_convert.lora import Merged
from qvl_convert.verify import mismatch, open_reference
from qvl_runtime.blob import Blob
from qvl_runtime.cli.main import _app
from qvl_runtime.errors import QvlError

VL = GOLDEN / "ckpt" / "tiny-vl"
C_ATTN, W1 = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.w1"


@pytest.fixture
def adapter(tmp_path, rng):
    """``adapter(config, tensors)``: the folder of an adapter with random factors of rank 4 on two matrices."""

    def make(config=None, **tensors):
        folder, base = tmp_path / "adapter", Checkpoint(VL)
        folder.mkdir(exist_ok=True)
        made = {}
        for name in (C_ATTN, W1):
            n, k = base.entry(f"{name}.weight").shape
            made[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((4, k)).astype(np.float32) * 0.1
            made[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((n, 4)).astype(np.float32) * 0.1
        made = {k: v for k, v in (made | tensors).items() if v is not None}
        save_file(made, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder, made

    return make


@pytest.mark.parametrize(("config", "factor"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_the_product_is_added_and_all_else_stays(adapter, config, factor):
    folder, made = adapter(config)
    base, merged = Checkpoint(VL), Merged(VL, folder)
    for name in (C_ATTN, W1):
        a, b = (made[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        want = base.tensor(f"{name}.weight").astype(np.float64) + factor * b.astype(np.float64) @ a
        np.testing.assert_allclose(merged.tensor(f"{name}.weight"), want, rtol=0, atol=1e-5)
    for name in base.names:
        if name not in (f"{C_ATTN}.weight", f"{W1}.weight"):
            np.testing.assert_array_equal(merged.tensor(name), base.tensor(name))
    assert set(merged.fingerprint()) > set(base.fingerprint())


def test_saved_modules_replace_the_bases(adapter):
    norm = np.full(Checkpoint(VL).entry("transformer.ln_f.weight").shape, 0.5, np.float32)
    head = np.ones(Checkpoint(VL).entry("lm_head.weight").shape, np.float16)
    folder, _ = adapter(
        {"modules_to_save": ["ln_f", "lm_head", "of_another_model"]},
        **{
            "base_model.model.transformer.ln_f.weight": norm,
            "base_model.model.lm_head.modules_to_save.weight": head,
        },
    )
    merged = Merged(VL, folder)
    np.testing.assert_array_equal(merged.vector("transformer.ln_f.weight"), norm)
    np.testing.assert_array_equal(merged.tensor("lm_head.weight"), head)


def test_a_conversion_takes_the_merged_weights(adapter, tmp_path):
    folder, _ = adapter()
    convert(VL, tmp_path / "m.qvl", bits=16, lora=folder)
    convert(VL, tmp_path / "b.qvl", bits=16)
    merged, base = Blob(tmp_path / "m.qvl"), Blob(tmp_path / "b.qvl")
    want = Merged(VL, folder).tensor(f"{C_ATTN}.weight").astype(np.float16)
    np.testing.assert_array_equal(merged.matrix(C_ATTN).weight, want)
    assert (merged.matrix(C_ATTN).weight != base.matrix(C_ATTN).weight).any()
    assert "adapter/adapter_model.safetensors" in merged.metadata["source"]["files"]


SHAPE = Checkpoint(VL).entry(f"{W1}.weight").shape


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "'use_dora' is 'True'"),
        ({"bias": "all"}, {}, "'bias' is 'all'"),
        ({"fan_in_fan_out": 0}, {}, "'fan_in_fan_out' is '0'"),
        ({"alora_invocation_tokens": [1, 2]}, {}, r"'alora_invocation_tokens' is '\[1, 2\]'"),
        ({"layer_replication": [[0, 1], [0, 2]]}, {}, "'layer_replication' is "),
        ({"trainable_token_indices": [7]}, {}, "'trainable_token_indices' is "),
        ({"a_later_variant": True}, {}, "'a_later_variant' is 'True'"),
        ({"\x1b[2J\n": 1}, {}, r"'\\x1b\[2J\\n' is '1'"),
        ({"use_rslora": "false"}, {}, "'use_rslora' is 'false', expected bool"),
        ({"r": "4"}, {}, "'r' is '4', expected int"),
        ({"r": 8}, {}, "rank 4, but 'r' is 8 in adapter_config"),
        ({"init_lora_weights": "pissa_niter_16"}, {}, "'init_lora_weights' is 'pissa_niter_16'.* changed the base"),
        ({"init_lora_weights": "olora"}, {}, "'init_lora_weights' is 'olora'"),
        ({"init_lora_weights": 1}, {}, "'init_lora_weights' is '1'"),
        ({}, {f"base_model.model.{W1}.lora_A.default.weight": np.ones((4, SHAPE[1]), np.float32)}, "in two ways"),
        ({}, {f"base_model.model.{W1}.modules_to_save.weight": np.ones(SHAPE, np.float32)}, "in two ways"),
        ({}, {f"base_model.model.{W1}.weight": np.ones(SHAPE, np.float32)}, "in two ways"),
        ({}, {f"base_model.model.{W1}.lora_B.weight": np.ones((SHAPE[0], 4), np.int8)}, "lora_B.* is int8, expected"),
        ({}, {f"base_model.model.{W1}.lora_A.weight": np.ones((4, SHAPE[1]), bool)}, "lora_A.* is bool, expected"),
        (
            {},
            {f"base_model.model.{name}.lora_{side}.weight": None for name in (C_ATTN, W1) for side in "AB"},
            r"adapter_model\.safetensors: holds no tensor",
        ),
        ({"modules_to_save": ["wte", "lm_head"]}, {}, "holds no 'wte', which 'modules_to_save' in adapter_config"),
        ({"peft_type": "IA3"}, {}, "'peft_type' is 'IA3'"),
        ({"lora_alpha": "x"}, {}, "'lora_alpha' is 'x'"),
        ({"lora_alpha": 10**400}, {}, "'lora_alpha' is '1000"),
        ({"lora_alpha": 1e300}, {}, "'lora_alpha' is '1e.300'"),
        ({}, {f"base_model.model.{W1}.lora_B.weight": None}, "lora_A alone"),
        ({}, {f"base_model.model.{W1}.lora_A.weight": np.ones((3, 5), np.float32)}, "factors of"),
        (
            {},
            {
                f"base_model.model.{W1}.lora_A.weight": np.ones((0, SHAPE[1]), np.float32),
                f"base_model.model.{W1}.lora_B.weight": np.ones((SHAPE[0], 0), np.float32),
            },
            "factors of",
        ),
        ({}, {"base_model.model.other.weight": np.ones(3, np.float32)}, "'other.weight', which"),
        ({}, {f"base_model.model.{W1}.lora_B.weight": np.full((SHAPE[0], 4), np.nan, np.float32)}, "lora_B.* finite"),
        ({}, {"base_model.model.transformer.ln_f.weight": np.full(104, np.inf, np.float16)}, "ln_f.weight.* finite"),
        ({}, {"x" * 50_000: np.ones(3, np.float32)}, "^.{,300}$"),
        ({}, {"base_model.model.transformer.ln_f.weight": np.ones(3, np.float32)}, r"has the shape \[3\]"),
        ({}, {f"base_model.model.{W1}.lora_magnitude_vector": np.ones(3, np.float32)}, "no part of a LoRA"),
    ],
)
def test_what_cannot_be_merged_is_refused(adapter, config, tensors, message):
    folder, _ = adapter(config, **tensors)
    with pytest.raises(QvlError, match=message):
        Merged(VL, folder)


# What PEFT 0.21 writes for `LoraConfig(r=4, target_modules=[...])`.
PEFT = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "QWenLMHeadModel", "parent_library": "transformers_modules"},
    "base_model_name_or_path": "Qwen/Qwen-VL-Chat",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["c_attn", "w1"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "tau": 0.99}},
        {"init_lora_weights": False, "layers_to_transform": [0], "layers_pattern": "h", "modules_to_save": []},
        {"bias": None, "use_rslora": None, "use_dora": None, "r": None, "enable_lora": None, "merge_weights": False},
    ],
)
def test_what_peft_writes_for_a_plain_adapter_is_merged(adapter, config):
    folder, made = adapter(PEFT | config)
    a, b = (made[f"base_model.model.{W1}.lora_{side}.weight"] for side in "AB")
    want = Checkpoint(VL).tensor(f"{W1}.weight").astype(np.float64) + 2 * b.astype(np.float64) @ a
    np.testing.assert_allclose(Merged(VL, folder).tensor(f"{W1}.weight"), want, rtol=0, atol=1e-5)


def test_a_sum_that_cannot_be_stored_is_named_with_the_adapter(adapter, tmp_path):
    large = np.full((SHAPE[0], 4), 1e30, np.float32)
    folder, _ = adapter(**{f"base_model.model.{W1}.lora_B.weight": large})
    message = rf"tiny-vl/.*{W1}\.weight' with the adapter .*adapter_model\.safetensors holds a weight that is not"
    with pytest.raises(QvlError, match=message):
        convert(VL, tmp_path / "x.qvl", lora=folder)
    saved = {"base_model.model.lm_head.weight": np.full(Checkpoint(VL).entry("lm_head.weight").shape, 1e30, np.float32)}
    folder, _ = adapter(**saved)
    with pytest.raises(QvlError, match=r"adapter_model\.safetensors: 'lm_head\.weight' holds a weight that is not"):
        convert(VL, tmp_path / "x.qvl", lora=folder)


def test_a_quantized_base_and_a_missing_file_are_refused(adapter, tmp_path):
    folder, _ = adapter()
    with pytest.raises(QvlError, match="take the unquantized base"):
        Merged(GOLDEN / "ckpt" / "tiny-vl-gptq", folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(QvlError, match=r"holds no adapter_model\.safetensors"):
        Merged(VL, folder)
    with pytest.raises(QvlError, match=r"adapter_config\.json.* the folder of a PEFT adapter"):
        convert(VL, tmp_path / "x.qvl", lora=tmp_path / "gone")
    assert not (tmp_path / "x.qvl").exists()


def test_the_fingerprint_tells_strengths_apart(adapter):
    """Otherwise a conversion of one would be resumed as a conversion of the other."""
    configs = ({}, {"lora_alpha": 16}, {"use_rslora": True}, {"lora_alpha": 16, "use_rslora": True})
    folder, _ = adapter()
    settings, prints = json.loads((folder / "adapter_config.json").read_text()), set()
    for config in configs:
        (folder / "adapter_config.json").write_text(json.dumps(settings | config))
        prints.add(json.dumps(Merged(VL, folder).fingerprint()))
    assert len(prints) == len(configs)


def test_a_merged_file_says_so_and_verify_knows(adapter, tmp_path):
    """`convert --lora --verify` compares with the merged model, not with the base."""
    folder, _ = adapter()
    out = tmp_path / "m.qvl"
    more = ["--bits", "16", "--lora", folder, "--verify", "1", "--device", "reference"]
    shown = CliRunner().invoke(_app("convert"), ["convert", *map(str, [VL, out, *more])])
    assert shown.exit_code == 0 and shown.stderr == ""
    assert float(re.search(r"KL divergence, mean +([0-9.]+)", shown.stdout)[1]) < 1e-5
    blob = Blob(out)
    assert mismatch(blob, open_reference(VL, folder)) is None
    assert mismatch(blob, open_reference(VL, shutil.copytree(folder, tmp_path / "renamed"))) is None
    assert "adapter 'adapter', which the reference is without" in mismatch(blob, open_reference(VL))
    assert "made without the adapter" in mismatch(_base(tmp_path), open_reference(VL, folder))
    assert "another adapter" in mismatch(blob, open_reference(VL, adapter({"lora_alpha": 1})[0]))
    shown = CliRunner().invoke(_app("info"), ["info", str(out)])
    assert "tiny-vl with the adapter adapter by" in shown.stdout


def _base(folder) -> Blob:
    convert(VL, folder / "base.qvl", bits=16)
    return Blob(folder / "base.qvl")
