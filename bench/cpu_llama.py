"""Compare the decoder with llama.cpp on this processor: prompts and answers of both, in turns in one process.

    pip install llama-cpp-python gguf              # llama.cpp is compiled for this processor
    python bench/cpu_llama.py write Q4_K_M FILE.gguf
    python bench/cpu_llama.py run MODEL.qvl FILE.gguf [--mapped] [--threads 1 2] [--rounds 3] [--realtime]

`write` makes a GGUF of Qwen-7B's true shape with random values. The types of its matrices are those that
`llama-quantize` chooses for this architecture; the output head is Q6_K. `run` times a prompt of 512 tokens and 32
tokens after it, with fp16 caches on both sides. llama.cpp rearranges weights for this processor when it loads them,
unless `--mapped` is given, which was faster for prompts. With 1 thread prompts are not timed. The memory bandwidth is
measured in turns with both. Shares and ratios are medians over the rounds; a table, then one JSON document as the last
line.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Iterator

import harness
import numpy as np
from harness import seconds

from qvl_kernels.cpu.measure import bandwidth
from qvl_kernels.cpu.runner import aligned
from qvl_runtime import load
from qvl_runtime.benchmark import bytes_per_token
from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.engine.session import Session, step
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.slices import at_once

HIDDEN, FFN, LAYERS, HEADS, VOCABULARY = 4096, 11008, 32, 32, 151936
PROMPT, ANSWER, TURN = 512, 32, 4
"""Tokens of a prompt, of an answer, and of an answer between two measurements of the bandwidth."""
SETTLE = 0.3
"""Seconds after which llama.cpp's threads have stopped their busy waiting."""
SCALES = {"Q4_0": ((0, 1), 18, 2e-3), "Q4_K": ((0, 2), 144, 5e-5), "Q6_K": ((104, 105), 210, 1e-5)}
"""Of a type's block: the range of fp16 values that are scales, its bytes, and a scale that keeps weights small."""


# ------------------------------------------------------------------------------------------------ llama.cpp's file
def tensor_types(kind: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name, shape and type of every matrix, as `llama-quantize` chooses for `kind` (Q4_0 or Q4_K_M)."""
    base = "Q4_K" if kind == "Q4_K_M" else kind
    yield "token_embd.weight", (VOCABULARY, HIDDEN), base
    for i in range(LAYERS):
        eighth = LAYERS // 8
        more = kind == "Q4_K_M" and (i < eighth or i >= 7 * eighth or (i - eighth) % 3 == 2)
        better = "Q6_K" if more else base
        yield f"blk.{i}.attn_qkv.weight", (3 * HIDDEN, HIDDEN), better
        yield f"blk.{i}.attn_output.weight", (HIDDEN, HIDDEN), base
        yield f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN), base
        yield f"blk.{i}.ffn_up.weight", (FFN, HIDDEN), base
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, FFN), better
    yield "output.weight", (VOCABULARY, HIDDEN), "Q6_K"


def write(kind: str, path: str) -> None:
    """Write the GGUF: random codes, constant scales."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * FFN)
    writer.add_head_count(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCABULARY)
    ones, zeros = np.ones(HIDDEN, np.float32), np.zeros(3 * HIDDEN, np.float32)
    vectors = {"output_norm.weight": ones}
    for i in range(LAYERS):
        vectors |= {f"blk.{i}.{name}_norm.weight": ones for name in ("attn", "ffn")}
        vectors[f"blk.{i}.attn_qkv.bias"] = zeros
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for name, (n, k), block in tensor_types(kind):
        per_block = 32 if block == "Q4_0" else 256
        shape = (n, k // per_block * SCALES[block][1])
        quantization = gguf.GGMLQuantizationType[block]
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), shape[0] * shape[1], quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in vectors.values():
        writer.write_tensor_data(values)
    random = np.random.default_rng(0)
    for _, (n, k), block in tensor_types(kind):
        where, size, scale = SCALES[block]
        count = n * k // (32 if block == "Q4_0" else 256)
        codes = random.integers(0, 256, (1 << 14, size), np.uint8)
        codes.view(np.float16)[:, where[0] : where[1]] = scale
        writer.write_tensor_data(np.resize(codes, (count, size)))
    writer.close()


# ------------------------------------------------------------------------------------------------ the two sides
class Ours:
    """A session of our decoder with `threads` threads."""

    def __init__(self, path: str, threads: int):
        os.environ["QVL_THREADS"] = str(threads)
        self.model = load(path, device="cpu")
        self.session = Session(self.model.decoder, "fp16", PROMPT + ANSWER)
        self.step = DecodeStep(self.model.decoder)

    def prompt(self, tokens: list[int]) -> None:
        self.session.truncate(0)
        prompt = Prompt(tokens, [])
        self.session.keep(prompt)
        at_once(self.session.prefill(prompt, [], PROMPT + ANSWER))
        self.session.best(0)

    def forget_answer(self) -> None:
        self.session.truncate(PROMPT)

    def answer(self, count: int) -> None:
        """`count` more tokens."""
        token = 1
        for _ in range(count):
            self.session.feed(token)
            step(self.step, [self.session])
            token = self.session.best(0)


class Theirs:
    """A context of llama.cpp."""

    def __init__(self, path: str, mapped: bool):
        import llama_cpp

        self.api, self.mapped = llama_cpp, mapped
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = not mapped
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), how)
        if not self.model:
            raise OSError(f"{path}: llama.cpp does not load it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, PROMPT, PROMPT
        self._context = llama_cpp.llama_init_from_model(self.model, settings)
        self._memory = llama_cpp.llama_get_memory(self._context)

    def threads(self, count: int) -> None:
        self.api.llama_set_n_threads(self._context, count, count)

    def _decode(self, tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.api.llama_decode(self._context, self.api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp failed to decode")
        logits = self.api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (VOCABULARY,)).argmax())

    def prompt(self, tokens: list[int]) -> None:
        self.api.llama_memory_clear(self._memory, False)
        self._decode(tokens)

    def forget_answer(self) -> None:
        self.api.llama_memory_seq_rm(self._memory, 0, PROMPT, -1)

    def answer(self, count: int) -> None:
        token = 1
        for _ in range(count):
            token = self._decode([token])


# ------------------------------------------------------------------------------------------------ a run
def _turns(ours: Ours, theirs: Theirs, memory: np.ndarray) -> dict[str, list[float]]:
    """Seconds to read a byte of memory and to decode a token on both sides, in turns."""
    found: dict[str, list[float]] = {"bandwidth": [], "decode ours": [], "decode theirs": []}
    for _ in range(ANSWER // TURN):
        found["bandwidth"].append(1 / bandwidth(ours.model.ops, memory))
        for name, side in (("decode ours", ours), ("decode theirs", theirs)):
            found[name].append(seconds(lambda side=side: side.answer(TURN)) / TURN)
        time.sleep(SETTLE)
    return found


def compare(path: str, theirs: Theirs, threads: int, rounds: int, realtime: bool) -> dict:
    """Tokens a second of both sides, in turns."""
    ours, tokens = Ours(path, threads), np.random.default_rng(1).integers(0, 150000, PROMPT).tolist()
    memory = aligned(1 << 30)
    memory[:] = 1
    theirs.threads(2)
    for side in (ours, theirs):
        side.prompt(tokens)
        side.answer(4)
    theirs.threads(threads)
    if realtime:
        harness.take_processors()
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        ours.forget_answer()
        theirs.forget_answer()
        # The bandwidth changes within seconds while other programs use the memory.
        for name, values in _turns(ours, theirs, memory).items():
            taken.setdefault(name, []).append(float(np.mean(values)))
        if threads > 1:
            for name, side in (("prefill ours", ours), ("prefill theirs", theirs)):
                taken.setdefault(name, []).append(seconds(lambda side=side: side.prompt(tokens)) / PROMPT)
            time.sleep(SETTLE)
    rates = {name: 1 / np.array(values) for name, values in taken.items()}
    row: dict = {"threads": threads, "rounds": rounds}
    row |= {f"{name} tok/s": float(np.median(rates[name])) for name in rates if name != "bandwidth"}
    row["read GB/s"] = float(np.median(rates["bandwidth"])) / 1e9
    needed = bytes_per_token(ours.model, "fp16", PROMPT + ANSWER // 2)
    row["decode share"] = float(np.median(rates["decode ours"] * needed / rates["bandwidth"]))
    for what in ("decode", "prefill")[: min(2, threads)]:
        row[f"{what} ratio"] = float(np.median(rates[f"{what} ours"] / rates[f"{what} theirs"]))
    return row


def run(arguments: argparse.Namespace) -> None:
    theirs, rows = Theirs(arguments.gguf, arguments.mapped), []
    for threads in sorted(set(arguments.threads), reverse=True):
        row = compare(arguments.model, theirs, threads, arguments.rounds, arguments.realtime)
        rows.append(row)
        harness.print_row(row)
    conclude(theirs, arguments.mapped, rows, file=os.path.basename(arguments.gguf))


def conclude(theirs: Theirs, mapped: bool, rows: list[dict], **what: str) -> None:
    """Print the JSON document: the conditions, what was measured, and the rows."""
    weights = "mapped" if mapped else "repacked"
    harness.print_document(**{"llama.cpp": theirs.api.__version__}, **what, weights=weights, results=rows)


def add_conditions(runner: argparse.ArgumentParser) -> None:
    """Add the options that both kinds of `run` take."""
    runner.add_argument("--mapped", action="store_true", help="llama.cpp does not rearrange its weights")
    harness.add_timing(runner, rounds=3)


def main() -> None:
    parser = harness.parser(__doc__)
    verbs = parser.add_subparsers(required=True)
    writer = verbs.add_parser("write")
    writer.add_argument("kind", choices=["Q4_0", "Q4_K_M"])
    writer.add_argument("gguf")
    writer.set_defaults(run=lambda a: write(a.kind, a.gguf))
    runner = verbs.add_parser("run")
    runner.add_argument("model")
    runner.add_argument("gguf")
    runner.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    add_conditions(runner)
    runner.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
