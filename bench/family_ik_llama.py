"""Compare a newer model's decoder with ik_llama.cpp on this processor: prompts and answers, in turns in one process.

    pip install ik-llama-cpp-python gguf           # compiled for AVX2; its source compiles for the processor
    python bench/family_llama.py write qwen3-vl-4b FOLDER
    python bench/family_ik_llama.py MODEL.qvl FOLDER [--mapped] [--rounds 3] [--realtime]

It times what `family_llama.py run --only text` times, with the same files, 2 threads and fp16 caches. ik_llama.cpp
rearranges the weights when it loads them, unless `--mapped` is given. Its package has no encoder of pictures. A table,
then one JSON document as the last line.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path

import harness
import numpy as np
from cpu_llama import PROMPT, compare

THREADS = 2


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
        model = self.api.llama_model_load_from_file(path.encode(), how)
        if not model:
            raise OSError(f"{path}: ik_llama.cpp does not load it")
        self._vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, PROMPT, PROMPT
        self._context = self.api.llama_init_from_model(model, settings)
        self._length = 0

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
    what = {"model": os.path.basename(arguments.model), "weights": "mapped" if arguments.mapped else "repacked"}
    version = importlib.metadata.version("ik-llama-cpp-python")
    harness.print_document(**{"ik-llama-cpp-python": version}, **what, results=[row])


if __name__ == "__main__":
    main()
