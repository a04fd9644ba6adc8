"""Write a training run's weights as a Hugging Face folder in bfloat16, the form `qvl convert` reads.

python training/export.py RUN qvl_runtime/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from pretrain_vision import config
from safetensors.torch import save_file
from vocabulary import RANKS

GENERATION = {
    "chat_format": "chatml",
    "do_sample": False,
    "eos_token_id": RANKS,
    "max_new_tokens": 256,
    "max_window_size": 6144,
    "pad_token_id": RANKS,
    "top_k": 0,
    "top_p": 0.3,
}
TOKENIZER = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    state = torch.load(args.run / "state.pt", map_location="cpu")
    weights = {name: value.bfloat16().contiguous() for name, value in state["model"].items()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    size = sum(v.numel() * 2 for v in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(weights), "model.safetensors")}
    documents = {
        "model.safetensors.index.json": index,
        "config.json": config(),
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER,
    }
    for name, document in documents.items():
        (args.out / name).write_text(json.dumps(document, indent=2) + "\n")
    shutil.copyfile(args.run / "qwen.tiktoken", args.out / "qwen.tiktoken")
    shutil.copyfile(args.run / "training.log", args.out / "training.log")
    print(f"step {state['step']}: {len(weights)} tensors, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
