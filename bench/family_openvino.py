"""Compare a newer model with OpenVINO GenAI on this processor: prompts, answers and a picture, in turns in one process.

    pip install openvino-genai optimum-intel nncf torch torchvision "transformers==4.57.6"
    python bench/synthetic.py CKPT --model qwen3-vl-4b
    qvl convert CKPT MODEL.qvl
    python bench/family_openvino.py write CKPT FOLDER [--symmetric]
    python bench/family_openvino.py run MODEL.qvl FOLDER [--only text] [--set NAME=VALUE ...] [--rounds 3] [--realtime]

`write` exports a checkpoint of `synthetic.py` as `optimum-cli` does: a decoder of int4 in groups of 128 (asymmetric by
default), its embedding and head in int8, the vision part in int8 with a scale for each row. It needs the checkpoint's
size twice on disk, once under TMPDIR.

`run` asks both programs the same raw text with 2 threads, greedily: 512 tokens and 65 of an answer, then a picture of
1024 tokens with a short text and one token. Every prompt and picture is new, so no cache of either side has it. Time to
the first token is that of the whole call without the tokens after the first, whose times each program gives itself; so
it includes tokenization. "encode" is the part of it before the decoder starts: ours the call without decoder times,
theirs the preparation of embeddings. OpenVINO runs with its own defaults (paged attention, int8 keys and values, and
int8 activations where the processor has VNNI: on AVX2 alone 2026.4 computes in float32, whatever
DYNAMIC_QUANTIZATION_GROUP_SIZE says) except for what `--set` names, for example KV_CACHE_PRECISION=f16; ours with its
defaults (fp16 keys and values) without speculation, which noise would favour. Medians of rounds; ratios are theirs /
ours in time, medians over the rounds. A table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from qvl_kernels.cpu.measure import bandwidth
from qvl_kernels.cpu.runner import aligned
from qvl_runtime import load
from qvl_runtime.benchmark import bytes_per_token

PROMPT, ANSWER, GROUP, THREADS = 512, 64, 128, 2
SIDE_TOKENS = 32
"""Along each side of the picture."""
SETTLE = 0.3
"""Seconds after which the other side's threads have stopped their busy waiting."""
MARKS = 8
"""Tokens that all prompts may begin with."""
QUESTION = "What is in this picture?"
CLASSES = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor", "Qwen2VLImageProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", "Qwen2VLImageProcessorFast"),
}
"""Names that transformers needs in the published files, and that a synthetic checkpoint omits."""


# ------------------------------------------------------------------------------------------------ OpenVINO's files
def complete(checkpoint: Path, folder: Path) -> None:
    """Fill a folder with links to a checkpoint's files, and with the keys that transformers needs in its JSON files."""
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    kind = json.loads((checkpoint / "config.json").read_text())["model_type"]
    model, processor, images = CLASSES[kind]
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    added: dict[str, dict[str, Any]] = {
        "config.json": {"architectures": [model]},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", **tokens},
        "preprocessor_config.json": {
            "processor_class": processor,
            "image_processor_type": images,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    }
    for name, keys in added.items():
        text = json.dumps({**keys, **json.loads((checkpoint / name).read_text())}, indent=2)
        (folder / name).unlink()
        (folder / name).write_text(text)


def write(checkpoint: Path, folder: Path, symmetric: bool) -> None:
    """Export a checkpoint."""
    with tempfile.TemporaryDirectory() as completed:
        complete(checkpoint, Path(completed))
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", completed]
        command += ["--task", "image-text-to-text", "--weight-format", "int4", "--group-size", str(GROUP)]
        command += ["--ratio", "1.0", *(["--sym"] if symmetric else []), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


# ------------------------------------------------------------------------------------------------ the two sides
class Ours:
    """Our model with `THREADS` threads."""

    def __init__(self, path: str):
        os.environ["QVL_THREADS"] = str(THREADS)
        self.model = load(path, device="cpu")

    def ask(self, text: str, picture: np.ndarray | None, tokens: int) -> dict[str, float]:
        """Seconds to the first token, from there to the last, and of the picture, and the numbers of tokens."""
        pictures = None if picture is None else [picture]
        begin = time.perf_counter()
        found = self.model.generate(text, pictures, max_new_tokens=tokens, speculate=False)
        whole, timings = time.perf_counter() - begin, found.timings
        if timings.cached_tokens > MARKS or timings.cached_images:
            raise RuntimeError("a part of the prompt was in our cache")
        return {
            "first": whole - timings.decode,
            "answer": timings.decode,
            "encode": whole - timings.decode - timings.prefill,
            "prompt tokens": timings.prompt_tokens,
            "new tokens": timings.new_tokens,
        }


class Theirs:
    """OpenVINO GenAI's pipeline with `THREADS` threads."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        import openvino
        import openvino_genai

        self.version = openvino_genai.get_version()
        self._tensor, self._config = openvino.Tensor, openvino_genai.GenerationConfig
        self._pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", **settings)

    def ask(self, text: str, picture: np.ndarray | None, tokens: int) -> dict[str, float]:
        """The same as `Ours.ask`."""
        config = self._config()
        config.max_new_tokens, config.do_sample, config.ignore_eos = tokens, False, True
        config.apply_chat_template = False
        pictures = {} if picture is None else {"images": [self._tensor(picture[None])]}
        begin = time.perf_counter()
        found = self._pipeline.generate(text, generation_config=config, **pictures)
        whole, metrics = time.perf_counter() - begin, found.perf_metrics
        times = metrics.raw_metrics.m_new_token_times
        answer = (times[-1] - times[0]) / 1e3
        return {
            "first": whole - answer,
            "answer": answer,
            "encode": metrics.get_prepare_embeddings_duration().mean / 1e3,
            "prompt tokens": metrics.get_num_input_tokens(),
            "new tokens": metrics.get_num_generated_tokens(),
        }


# ------------------------------------------------------------------------------------------------ a run
def texts(ours: Ours, random: np.random.Generator) -> Callable[[], str]:
    """A function that returns another text of `PROMPT` tokens each time: words that are tokens."""
    tokens = (ours.model.tokenizer.token_bytes(i) for i in range(20000))
    words = [t.decode() for t in tokens if t[:1] == b" " and t[1:].isalpha() and t[1:].islower() and len(t) > 4]
    return lambda: "".join(random.choice(words, PROMPT))


def check(seen: dict[str, float], new: int, prompt: int | None = None) -> None:
    """Raise an error for a call that did not compute what it should."""
    if seen["new tokens"] != new or (prompt is not None and seen["prompt tokens"] != prompt):
        raise RuntimeError(f"{seen}, expected {prompt} and {new} tokens")


def text_row(ours: Ours, theirs: Theirs, rounds: int, realtime: bool) -> dict[str, Any]:
    """Seconds of a prompt and tokens a second of the answer, in turns."""
    prompt, memory = texts(ours, np.random.default_rng(1)), aligned(1 << 30)
    memory[:] = 1
    sides = {"ours": ours, "theirs": theirs}
    for side in sides.values():
        side.ask(prompt(), None, 1 + ANSWER // 8)
    if realtime:
        harness.take_processors()
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        text, reads = prompt(), []
        for name, side in sides.items():
            reads.append(1 / bandwidth(ours.model.ops, memory))
            seen = side.ask(text, None, 1 + ANSWER)
            check(seen, 1 + ANSWER, PROMPT)
            taken.setdefault(f"prompt {name}", []).append(seen["first"])
            taken.setdefault(f"answer {name}", []).append(seen["answer"] / ANSWER)
            time.sleep(SETTLE)
        reads.append(1 / bandwidth(ours.model.ops, memory))
        taken.setdefault("read", []).append(float(np.mean(reads)))
    found = {name: np.array(values) for name, values in taken.items()}
    row: dict[str, Any] = {f"prompt {name} s": float(np.median(found[f"prompt {name}"])) for name in sides}
    row |= {f"answer {name} tok/s": float(np.median(1 / found[f"answer {name}"])) for name in sides}
    row["read GB/s"] = float(np.median(1 / found["read"])) / 1e9
    needed = bytes_per_token(ours.model, "fp16", PROMPT + ANSWER // 2)
    row["answer share"] = float(np.median(needed * found["read"] / found["answer ours"]))
    for what in ("prompt", "answer"):
        row[f"{what} ratio"] = float(np.median(found[f"{what} theirs"] / found[f"{what} ours"]))
    return row


def picture_row(ours: Ours, theirs: Theirs, rounds: int, realtime: bool) -> dict[str, Any]:
    """Seconds of a picture and of the first token after it, in turns."""
    side_pixels, random = SIDE_TOKENS * ours.model.config.visual.factor, np.random.default_rng(0)

    def pixels(side: int = side_pixels) -> np.ndarray:
        return random.integers(0, 256, (side, side, 3), np.uint8)

    sides = {"ours": ours, "theirs": theirs}
    for side in sides.values():
        side.ask(QUESTION, pixels(side_pixels // 2), 1)
    if realtime:
        harness.take_processors()
    taken: dict[str, list[float]] = {}
    row: dict[str, Any] = {}
    for _ in range(rounds):
        picture = pixels()
        for name, side in sides.items():
            seen = side.ask(QUESTION, picture, 1)
            check(seen, 1)
            row[f"picture {name} tokens"] = int(seen["prompt tokens"])
            taken.setdefault(f"encode {name}", []).append(seen["encode"])
            taken.setdefault(f"picture {name}", []).append(seen["first"])
            time.sleep(SETTLE)
    found = {name: np.array(values) for name, values in taken.items()}
    row |= {f"{name} s": float(np.median(values)) for name, values in found.items()}
    for what in ("encode", "picture"):
        row[f"{what} ratio"] = float(np.median(found[f"{what} theirs"] / found[f"{what} ours"]))
    return row


def conclude(arguments: argparse.Namespace, ours: Ours, theirs: Any, program: str, settings: dict[str, Any]) -> None:
    """Measure what `add_run`'s options say, and print it. `theirs` has `ask` and a `version`, as `Theirs` has."""
    row: dict[str, Any] = {"threads": THREADS, "rounds": arguments.rounds}
    if "text" in arguments.only:
        row |= text_row(ours, theirs, arguments.rounds, arguments.realtime)
    if "picture" in arguments.only:
        row |= picture_row(ours, theirs, arguments.rounds, arguments.realtime)
    harness.print_row(row)
    what = {"model": os.path.basename(arguments.model), "folder": arguments.folder.name}
    harness.print_document(**{program: theirs.version}, **what, settings=settings, results=[row])


def add_run(verbs: Any, run: Callable[[argparse.Namespace], None], settings: str) -> None:
    """Add the verb `run` and its options."""
    runner = verbs.add_parser("run")
    runner.add_argument("model")
    runner.add_argument("folder", type=Path)
    runner.add_argument("--only", nargs="+", choices=["text", "picture"], default=["text", "picture"])
    runner.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=settings)
    harness.add_timing(runner, rounds=3)
    runner.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    settings = {"INFERENCE_NUM_THREADS": str(THREADS), "PERFORMANCE_HINT": "LATENCY"}
    settings |= dict(setting.split("=", 1) for setting in arguments.set)
    theirs, ours = Theirs(arguments.folder, settings), Ours(arguments.model)
    conclude(arguments, ours, theirs, "OpenVINO GenAI", settings)


def main() -> None:
    parser = harness.parser(__doc__)
    verbs = parser.add_subparsers(required=True)
    writer = verbs.add_parser("write")
    writer.add_argument("checkpoint", type=Path)
    writer.add_argument("folder", type=Path)
    writer.add_argument("--symmetric", action="store_true", help="int4 without zero points")
    writer.set_defaults(run=lambda a: write(a.checkpoint, a.folder, a.symmetric))
    add_run(verbs, run, "settings of OpenVINO")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
