"""Configs and tokenizer files of the published Qwen2-VL, Qwen2.5-VL and Qwen3-VL sizes, for synthetic checkpoints.

Vision sections omit keys with default values, as published files do.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from qvl_runtime.families.qwen2_vl.vocabulary import letters, merges
from qvl_runtime.inputs.tokenizer import read_ranks

# model_type, then: heads, kv heads, hidden, layers, ffn, vocabulary, tied; the vision section
_SMALL_3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
SIZES: dict[str, tuple[str, tuple[int, int, int, int, int, int, bool], dict[str, Any]]] = {
    "qwen2-vl-2b": (
        "qwen2_vl",
        (12, 2, 1536, 28, 8960, 151936, True),
        {"embed_dim": 1280, "hidden_size": 1536},
    ),
    "qwen2-vl-7b": ("qwen2_vl", (28, 4, 3584, 28, 18944, 152064, False), {}),
    "qwen2.5-vl-3b": (
        "qwen2_5_vl",
        (16, 2, 2048, 36, 11008, 151936, True),
        {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2},
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        (28, 4, 3584, 28, 18944, 152064, False),
        {"hidden_size": 1280, "tokens_per_second": 2},
    ),
    "qwen3-vl-2b": ("qwen3_vl", (16, 8, 2048, 28, 6144, 151936, True), {**_SMALL_3, "out_hidden_size": 2048}),
    "qwen3-vl-4b": ("qwen3_vl", (32, 8, 2560, 36, 9728, 151936, True), {**_SMALL_3, "out_hidden_size": 2560}),
    "qwen3-vl-8b": ("qwen3_vl", (32, 8, 4096, 36, 12288, 151936, False), {"out_hidden_size": 4096}),
}

FORMS = [
    *(f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start")),
    *(f"<|{name}|>" for name in ("box_end", "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad")),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
]
"""Special tokens of Qwen3-VL, from id 151643."""

FORM_COUNTS = {"qwen2_vl": 14, "qwen2_5_vl": 22, "qwen3_vl": 26}
POSITIONS = {"qwen2_vl": 32768, "qwen2_5_vl": 128000, "qwen3_vl": 262144}


def config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The `config.json` of a published size, or of one with fewer layers (of the decoder and of the ViT)."""
    kind, (heads, kv_heads, hidden, depth, ffn, vocabulary, tied), vision = SIZES[name]
    newest = kind == "qwen3_vl"
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": depth if layers is None else layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6 if newest else 1e6,
        "vocab_size": vocabulary,
        "max_position_embeddings": POSITIONS[kind],
        "rope_scaling": (
            {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
            if newest
            else {"type": "mrope", "mrope_section": [16, 24, 24]}
        ),
    }
    if layers is not None:
        vision = {**vision, "depth": layers}
        if newest:
            vision["deepstack_visual_indexes"] = list(range(min(3, layers)))
    data = {"model_type": kind, "tie_word_embeddings": tied, "vision_config": vision, "torch_dtype": "bfloat16"}
    return data | ({"text_config": {**text, "head_dim": 128}} if newest else text)


def file_name(tensor: str, name: str) -> str:
    """The name of a tensor in the published files of a size: before Qwen3-VL they have older names."""
    if SIZES[name][0] == "qwen3_vl":
        return tensor
    return tensor.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def preprocessing(name: str) -> dict[str, Any]:
    """The `preprocessor_config.json` of a published size."""
    if SIZES[name][0] == "qwen3_vl":
        size = {"shortest_edge": 65536, "longest_edge": 16777216}
        return {"size": size, "patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def ranks_file() -> Path:
    """The file of the published vocabulary, which the test dependency dashscope ships."""
    return Path(importlib.util.find_spec("dashscope").submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


def write_tokenizer(folder: Path, name: str) -> None:
    """Write `vocab.json`, `merges.txt` and `tokenizer_config.json` with the published vocabulary."""
    ranks, alphabet = read_ranks(ranks_file().read_bytes()), letters()
    shown = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    (folder / "vocab.json").write_text(json.dumps({shown[token]: rank for token, rank in ranks.items()}))
    lines = [f"{shown[first]} {shown[second]}" for first, second in merges(ranks)]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    forms = FORMS[: FORM_COUNTS[SIZES[name][0]]]
    added = {str(len(ranks) + i): {"content": form, "special": form.startswith("<|")} for i, form in enumerate(forms)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
