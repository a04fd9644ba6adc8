"""The files of a published folder, for export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.qwen2_vl.config import FRAMES, MERGE, ModelConfig
from qvl_runtime.families.qwen2_vl.vocabulary import Vocabulary, letters, merges

ENDED = ("tool_call", "tool_response", "think")
PLAIN = frozenset(
    [
        *(f"<{slash}{name}>" for name in ENDED for slash in ("", "/")),
        *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
    ]
)
"""Special tokens that remain when special tokens are removed from text."""


def files(
    name: str, config: ModelConfig, generation: GenerationConfig, preprocessing: Mapping[str, Any], data: bytes
) -> dict[str, Any]:
    """Return the contents of a published folder's files besides weights: JSON objects, or bytes.

    The chat template is not included: it belongs to the original repository.

    Parameters
    ----------
    name : str
        Name of the class in transformers, such as "Qwen3VL".
    data : bytes
        The vocabulary in the format of the blob.
    """
    ranks, special = Vocabulary.from_bytes(data)
    shown = letters()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    lines = [f"{text[first]} {text[second]}\n" for first, second in merges(ranks)]
    forms = {
        str(token): {"content": form, "special": form not in PLAIN}
        | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for form, token in special.items()
    }
    image = dict(preprocessing)
    video = image.pop("video", None)
    size = {"shortest_edge": image["min_pixels"], "longest_edge": image["max_pixels"]}
    about = {"patch_size": config.visual.patch_size, "merge_size": MERGE, "temporal_patch_size": FRAMES}
    found: dict[str, Any] = {
        "config.json": _config(name, config),
        "generation_config.json": _generation(generation),
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{name}Processor",
            **about,
            **image,
            "size": size,
        },
        "vocab.json": json.dumps({text[token]: rank for token, rank in ranks.items()}, ensure_ascii=False).encode(),
        "merges.txt": ("#version: 0.2\n" + "".join(lines)).encode(),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": forms,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": config.max_position_embeddings,
        },
    }
    if video is not None:
        limits = {"shortest_edge": video["min_pixels"], "longest_edge": video["max_pixels"]}
        found["video_preprocessor_config.json"] = {**about, "size": limits}
    return found


def _config(name: str, config: ModelConfig) -> dict[str, Any]:
    """Return the config in the format that most versions of transformers read."""
    data = config.to_dict()
    kind, text = data["model_type"], data["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"model_type": f"{kind}_text", "rope_theta": rope.pop("rope_theta")}
    if config.INTERLEAVED:
        rope["mrope_interleaved"] = True
    text |= {"rope_scaling": rope, "tie_word_embeddings": data["tie_word_embeddings"], "hidden_act": "silu"}
    data["vision_config"] |= {
        "model_type": kind,
        "hidden_act": config.visual.ACTIVATION,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
    }
    ratio = data["vision_config"].get("mlp_ratio")
    if ratio is not None and ratio.is_integer():  # transformers 5 refuses 4.0
        data["vision_config"]["mlp_ratio"] = int(ratio)
    return {"architectures": [f"{name}ForConditionalGeneration"], **data, "torch_dtype": "float16"}


def _generation(generation: GenerationConfig) -> dict[str, Any]:
    """Return the settings that transformers reads, and `thinking`, which else only the chat template shows."""
    keys = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    data = {"eos_token_id": list(generation.eos_token_id), **{key: getattr(generation, key) for key in keys}}
    return data | ({"thinking": True} if generation.thinking else {})
