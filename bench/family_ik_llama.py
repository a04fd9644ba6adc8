"""Compare a newer model's decoder with ik_llama.cpp on this processor: prompts and answers, in turns in one process.

    pip install ik-llama-cpp-python gguf           # compiled for AVX2; its source compiles for the processor
    python bench/family_llama.py write qwen3-vl-4b FOLDER
    python bench/family_ik_llama.py MODEL.qvl FOLDER [--mapped] [--rounds 3] [--realtime]

It times what `family_llama.py run --only text` times, with the same files, 2 threads and fp16 caches; then steps of 1,
8 and 16 answers side by side, each after a prompt of 32 tokens; there its flash attention is off, since it aborts on
several sequences. ik_llama.cpp rearranges the weights when it loads them, unless `--mapped` is given. Its package has
no encoder of pictures. A row a measurement, then one JSON document as the last line.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import time
from pathlib import Path

import harness
import numpy as np
from cpu_llama import PROMPT, SETTLE, Ours, compare
from harness import seconds

from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.engine.session import Session, step
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.slices import at_once

THREADS = 2
SIDE_BY_SIDE = (1, 8, 16)
"""Numbers of answers in a step."""
SHORT, STEPS = 32, 8
"""Tokens of their prompts, and steps of a measurement."""


class IkLlama:
    """A context of ik_llama.cpp."""

    def __init__(self, path: str, mapped: bool):
        from ik_llama_cpp import _ctypes_api

        self.api = _ctypes_api
        library = self.api._lib
        library.llama_batch_get_one.restype = self.api.llama_batch
        library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        library.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]
        library.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, *3 * [ctypes.c_int32]]
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *message: None)
        library.llama_log_set(self._log, None)
        self.api.llama_backend_init()
        how = self.api.llama_model_default_params()
        how.use_mmap, how.repack_tensors = mapped, not mapped
        self._model = self.api.llama_model_load_from_file(path.encode(), how)
        if not self._model:
            raise OSError(f"{path}: ik_llama.cpp does not load it")
        self._vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self._model))
        self._context, self._length = None, 0
        self.open(1)

    def open(self, sequences: int) -> None:
        """Begin a context of so many sequences."""
        if self._context is not None:
            self.api.llama_free(self._context)
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 2048, PROMPT, PROMPT
        settings.n_threads = settings.n_threads_batch = THREADS
        # Its flash attention aborts on several sequences (0.1.5).
        settings.n_seq_max, settings.flash_attn = sequences, sequences == 1
        self._context = self.api.llama_init_from_model(self._model, settings)

    def threads(self, count: int) -> None:
        self.api._lib.llama_set_n_threads(self._context, count, count)

    def _decode(self, tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self.api._lib.llama_batch_get_one(array, len(tokens), self._length, 0)
        if self.api.llama_decode(self._context, batch):
            raise RuntimeError("ik_llama.cpp failed to decode")
        self._length += len(tokens)
        logits = self.api._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def prompt(self, tokens: list[int]) -> None:
        self.api.llama_kv_cache_clear(self._context)
        self._length = 0
        self._decode(tokens)

    def forget_answer(self) -> None:
        self.api._lib.llama_kv_cache_seq_rm(self._context, 0, PROMPT, -1)
        self._length = PROMPT

    def answer(self, count: int) -> None:
        token = 1
        for _ in range(count):
            token = self._decode([token])

    def begin(self, count: int) -> None:
        """Start `count` sequences with a short prompt each."""
        self.api.llama_kv_cache_clear(self._context)
        self._length = 0
        for _ in range(SHORT):
            self.steps(count, 1)

    def steps(self, count: int, number: int) -> None:
        """Add `number` tokens to each of `count` sequences, a token of all at a time."""
        # Models with pictures have four positions a token, for which llama_batch_init makes no room.
        positions, pointer = (ctypes.c_int32 * (4 * count))(), ctypes.POINTER(ctypes.c_int32)
        ids = [(ctypes.c_int32 * 1)(i) for i in range(count)]
        batch = self.api.llama_batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*range(1, 1 + count)),
            pos=ctypes.cast(positions, pointer),
            n_seq_id=(ctypes.c_int32 * count)(*count * [1]),
            seq_id=(pointer * count)(*(ctypes.cast(i, pointer) for i in ids)),
            logits=(ctypes.c_int8 * count)(*count * [1]),
        )
        for _ in range(number):
            positions[:] = 3 * count * [self._length] + count * [0]
            if self.api.llama_decode(self._context, batch):
                raise RuntimeError("ik_llama.cpp failed to decode")
            self._length += 1


class OurSequences:
    """Sequences of our decoder that are computed side by side."""

    def __init__(self, ours: Ours):
        self._decoder, self._step = ours.model.decoder, DecodeStep(ours.model.decoder)
        self._sessions: list[Session] = []

    def begin(self, count: int) -> None:
        self._sessions = [Session(self._decoder, "fp16", 1024) for _ in range(count)]
        for i, session in enumerate(self._sessions):
            prompt = Prompt([1 + i] * SHORT, [])
            session.keep(prompt)
            at_once(session.prefill(prompt, [], 1024))
            session.best(0)

    def steps(self, count: int, number: int) -> None:
        for _ in range(number):
            for i, session in enumerate(self._sessions):
                session.feed(1 + i)
            step(self._step, self._sessions)
            for session in self._sessions:
                session.best(0)


def side_by_side(ours: OurSequences, theirs: IkLlama, rounds: int) -> list[dict]:
    """Tokens a second of both sides, in turns."""
    rows = []
    theirs.open(max(SIDE_BY_SIDE))
    for count in SIDE_BY_SIDE:
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for side in (ours, theirs):
            side.begin(count)
            side.steps(count, 2)
        for _ in range(rounds):
            for name, side in (("ours", ours), ("theirs", theirs)):
                taken[name].append(seconds(lambda side=side, count=count: side.steps(count, STEPS)) / STEPS)
                time.sleep(SETTLE)
        row: dict = {"answers": count}
        row |= {f"{name} tok/s": count / float(np.median(times)) for name, times in taken.items()}
        row["ratio"] = float(np.median(np.array(taken["theirs"]) / taken["ours"]))
        rows.append(row)
        harness.print_row(row)
    return rows


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mapped", action="store_true", help="ik_llama.cpp does not rearrange its weights")
    harness.add_timing(parser, rounds=3)
    arguments = parser.parse_args()
    theirs = IkLlama(str(arguments.folder / "decoder.gguf"), arguments.mapped)
    row = compare(arguments.model, theirs, THREADS, arguments.rounds, arguments.realtime)
    harness.print_row(row)
    rows = [row, *side_by_side(OurSequences(Ours(arguments.model, THREADS)), theirs, arguments.rounds)]
    what = {"model": os.path.basename(arguments.model), "weights": "mapped" if arguments.mapped else "repacked"}
    version = importlib.metadata.version("ik-llama-cpp-python")
    harness.print_document(**{"ik-llama-cpp-python": version}, **what, results=rows)


if __name__ == "__main__":
    main()
