"""Compare a newer model with MNN on this processor: prompts, answers and a picture, in turns in one process.

    pip install MNN                                                         # for `run`, beside qvl
    pip install MNN llmexport torch torchvision "transformers==4.57.6"      # for `write`
    python bench/family_mnn.py write qwen3-vl-4b FOLDER [--symmetric]
    python bench/family_mnn.py run MODEL.qvl FOLDER [--only text] [--set NAME=VALUE ...] [--rounds 3] [--realtime]

`write` exports a size's true shapes with random values, which are made in memory: a decoder of int4 in groups of 128
(asymmetric by default), its embedding and head in int8, the vision part in int8, both in groups of 128. llmexport's own
defaults are groups of 64 and a head of int4.

`run` asks both programs what `family_openvino.py run` asks, with 2 threads, greedily, and reads the times as it does.
MNN runs with llmexport's settings except for what `--set` names. On AVX2 it rounds activations to int8 for products;
attention, keys and values are float32 (attention_mode=10: int8). Its decoder runs once more after the last token, which
is not counted. Ours runs with its defaults (fp16 keys and values) without speculation, which noise would favour. A
table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import published_vl
from family_openvino import CLASSES, GROUP, THREADS, Ours, add_run, complete, conclude


# ------------------------------------------------------------------------------------------------ MNN's files
def write(name: str, folder: Path, symmetric: bool) -> None:
    """Export a model of random values."""
    import torch
    import transformers

    modules: Any = sys.modules
    modules["MNN.tools.utils.log"] = None  # It installs packages and reports to its makers; MNN does without it.
    # llmexport's modules import each other as if its folder were on the path.
    sys.path[:0] = importlib.util.find_spec("llmexport").submodule_search_locations
    import llmexport

    raw, folder = published_vl.config(name), folder.resolve()
    raw.get("text_config", raw)["tie_word_embeddings"] = raw["tie_word_embeddings"]
    model = getattr(transformers, CLASSES[raw["model_type"]][0])

    def random_values(path: str, **_: object) -> Any:
        return model._from_config(transformers.AutoConfig.from_pretrained(path), dtype=torch.bfloat16)

    model.from_pretrained = random_values
    settings = {"quant_block": GROUP, "lm_quant_bit": 8, "visual_quant_bit": 8, "visual_quant_block": GROUP}
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as completed:
        (Path(plain) / "config.json").write_text(json.dumps(raw))
        (Path(plain) / "preprocessor_config.json").write_text(json.dumps(published_vl.preprocessing(name)))
        published_vl.write_tokenizer(Path(plain), name)
        complete(Path(plain), Path(completed))
        with contextlib.chdir(completed):
            llmexport.export(
                completed, dst_path=str(folder), export="mnn", sym=symmetric, visual_sym=symmetric, **settings
            )


# ------------------------------------------------------------------------------------------------ a run
class Theirs:
    """MNN's engine with `THREADS` threads."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        import MNN.expr
        import MNN.llm

        self._expr, self.version = MNN.expr, importlib.metadata.version("MNN")
        # Threads of the vision part are read from the file only.
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump({**json.loads((folder / "config.json").read_text()), **settings}, file)
            file.flush()
            self._model = MNN.llm.create(file.name)
        self._model.load()

    def _times(self) -> dict[str, float]:
        """Seconds since the model was loaded."""
        # The context cannot be read while it holds an answer that is not UTF-8, as noise often is.
        self._model._c_obj.set_context({"generate_str": ""})
        context = self._model.context
        return {"prefill": context.prefill_us / 1e6, "decode": (context.decode_us + context.sample_us) / 1e6}

    def ask(self, text: str, picture: np.ndarray | None, tokens: int) -> dict[str, float]:
        """The same as `Ours.ask`."""
        self._model.reset()
        before, begin = self._times(), time.perf_counter()
        prompt: Any = text
        if picture is not None:
            height, width = picture.shape[:2]
            data = self._expr.const(picture, list(picture.shape), self._expr.NHWC, self._expr.uint8)
            prompt = {"text": f"<img>image_0</img>{text}", "images": [{"data": data, "height": height, "width": width}]}
        found = self._model._c_obj.generate(self._model.tokenizer_encode(prompt), tokens)
        whole, after = time.perf_counter() - begin, self._times()
        prefill, decode = (after[what] - before[what] for what in ("prefill", "decode"))
        return {
            "first": whole - decode,
            "answer": decode * (tokens - 1) / tokens,
            "encode": whole - decode - prefill,
            "prompt tokens": self._model.context.prompt_len,
            "new tokens": len(found),
        }


def run(arguments: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"sampler_type": "greedy", "tokenizer_file": "tokenizer.txt", "thread_num": THREADS}
    for name, value in (setting.split("=", 1) for setting in arguments.set):
        settings[name] = int(value) if value.isdecimal() else value
    vision = {"backend_type": "cpu", "precision": "normal", "memory": "low", "thread_num": THREADS}
    where = {"base_dir": f"{arguments.folder.resolve()}/", "mllm": vision}
    theirs, ours = Theirs(arguments.folder, {**settings, **where}), Ours(arguments.model)
    conclude(arguments, ours, theirs, "MNN", settings)


def main() -> None:
    parser = harness.parser(__doc__)
    verbs = parser.add_subparsers(required=True)
    writer = verbs.add_parser("write")
    writer.add_argument("name", choices=list(published_vl.SIZES))
    writer.add_argument("folder", type=Path)
    writer.add_argument("--symmetric", action="store_true", help="weights without zero points")
    writer.set_defaults(run=lambda a: write(a.name, a.folder, a.symmetric))
    add_run(verbs, run, "settings of MNN's decoder")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
