"""Measure the speed of a model on this machine, and its share of the machine's limits."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from typing import Any

import numpy as np

from qvl_runtime.budget import cache_bytes
from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.engine.session import Session, step
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.model import Model
from qvl_runtime.slices import at_once

PICTURE_SIDE = 448
"""Width and height of the timed picture, in pixels."""

READ_EVERY = 8
"""Decoded tokens between two measurements of the memory bandwidth."""


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Medians over the rounds of `measure`. Shares are relative to the machine's limits, measured alternately.

    Attributes
    ----------
    image : float or None
        Seconds from pixels to features, for one picture.
    prefill, decode : float
        Tokens a second.
    bytes_per_token : int
        Bytes of weights and cache read for one decoded token, at the middle of the answer.
    bandwidth : float or None
        Memory read bandwidth in bytes a second; None if the backend cannot measure it.
    int8_peak : float or None
        Multiplications and additions a second of int8 by weights of the decoder's bits.
    decode_share, prefill_share : float or None
        ``decode * bytes_per_token / bandwidth`` and the prefill's products over `int8_peak`.
    peak_memory : int or None
        Peak resident bytes of the process, including mapped weights.
    level2 : int or None
        Bytes of the L2 cache that a thread is taken to have; None if not on the CPU.
    ahead : int or None
        Bytes between what is read and what is prefetched in products of a few rows; None if not on the CPU.
    ahead_times : dict of int to float
        The relative time of each distance that was measured; empty if none was.
    """

    image: float | None
    prefill: float
    decode: float
    bytes_per_token: int
    bandwidth: float | None
    int8_peak: float | None
    decode_share: float | None
    prefill_share: float | None
    peak_memory: int | None
    level2: int | None = None
    ahead: int | None = None
    ahead_times: dict[int, float] = dataclasses.field(default_factory=dict)


def measure(model: Model, *, kv_cache: str, prompt_tokens: int, new_tokens: int, rounds: int) -> Speeds:
    """Time a prompt, an answer and a picture `rounds` times, alternating with the machine's limits.

    The prompt is random text. Stop tokens do not end the answer.
    """
    random = np.random.default_rng(0)
    choices = _choices(model)
    session = Session(model.decoder, kv_cache, prompt_tokens + new_tokens)
    run = DecodeStep(model.decoder)
    decode_bytes = bytes_per_token(model, kv_cache, prompt_tokens + new_tokens // 2)
    products = 2 * prompt_tokens * _decoder_weights(model)

    def once(limits: _Limits | None) -> dict[str, float]:
        tokens = random.integers(0, model.tokenizer.eod_id, prompt_tokens).tolist()
        taken = _prompt(session, tokens, new_tokens, limits) | _answer(run, session, new_tokens, limits)
        if model.pictures is not None:
            picture = random.integers(0, 256, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
            begin = time.perf_counter()
            model.encode_image(picture)
            taken["image"] = time.perf_counter() - begin
        return taken

    once(None)  # Warms the caches and faults in the pages of the file.
    peak = peak_memory()
    limits = _Limits(model, decode_bytes) if model.ops.name == "cpu" else None
    found = [once(limits) for _ in range(rounds)]
    seen = {name: np.array([taken[name] for taken in found]) for name in found[0]}
    median = {name: float(np.median(values)) for name, values in seen.items()}
    decode_share = prefill_share = None
    if limits:
        decode_share = float(np.median(seen["decode"] * decode_bytes / seen["bandwidth"]))
        prefill_share = float(np.median(seen["prefill"] / prompt_tokens * products / seen["int8_peak"]))
    return Speeds(
        image=median.get("image"),
        prefill=median["prefill"],
        decode=median["decode"],
        bytes_per_token=decode_bytes,
        bandwidth=median.get("bandwidth"),
        int8_peak=median.get("int8_peak"),
        decode_share=decode_share,
        prefill_share=prefill_share,
        peak_memory=peak,
        **choices,
    )


def _choices(model: Model) -> dict[str, Any]:
    """What the CPU's kernels take from this machine, measured if it is not yet."""
    if model.ops.name != "cpu":
        return {}
    from qvl_kernels.cpu import CpuOps, cache_sizes, tuning

    ops = model.ops
    assert isinstance(ops, CpuOps)
    tuning.tune_once(ops)
    return {"level2": cache_sizes.level2(), "ahead": ops.choices.ahead, "ahead_times": ops.choices.times}


class _Limits:
    """Measures the machine's limits with the backend's threads."""

    def __init__(self, model: Model, nbytes: int):
        from qvl_kernels.cpu import CpuOps, measure
        from qvl_kernels.cpu.runner import aligned

        ops, names = model.ops, model.blob.family.decoder_names(model.config)
        assert isinstance(ops, CpuOps)
        self._bits = model.blob.bits(f"{names.layer}.0.{names.gate}")[0]
        self._ops, self._measure, self._memory = ops, measure, aligned(min(nbytes, 1 << 30))
        self._memory[:] = 1

    def int8_peak(self) -> float:
        return self._measure.products_per_second(self._ops, self._bits)

    def bandwidth(self) -> float:
        return self._measure.bandwidth(self._ops, self._memory)


def _prompt(session: Session, tokens: list[int], new: int, limits: _Limits | None) -> dict[str, float]:
    found = {"int8_peak": limits.int8_peak()} if limits else {}
    prompt = Prompt(tokens, [])
    session.truncate(0)
    session.keep(prompt)
    begin = time.perf_counter()
    at_once(session.prefill(prompt, [], len(tokens) + new))
    session.best(0)
    return found | {"prefill": len(tokens) / (time.perf_counter() - begin)}


def _answer(run: DecodeStep, session: Session, new: int, limits: _Limits | None) -> dict[str, float]:
    """Time an answer. The bandwidth is measured between tokens: on a shared machine it changes within seconds."""
    seconds, reads = 0.0, []
    for i in range(new):
        if limits and i % READ_EVERY == 0:
            reads.append(1 / limits.bandwidth())
        begin = time.perf_counter()
        session.feed(session.best(0))
        step(run, [session])
        seconds += time.perf_counter() - begin
    return ({"bandwidth": 1 / float(np.mean(reads))} if limits else {}) | {"decode": new / seconds}


def bytes_per_token(model: Model, kv_cache: str, context: int) -> int:
    sizes = model.blob.part_sizes()
    # A tied output head is the embedding, which is then read as a whole.
    head = sizes["head"] if "head" in sizes else sizes["embedding"]
    return sizes["decoder"] + head + cache_bytes(model.config, context, kv_cache)


def _decoder_weights(model: Model) -> int:
    """Count the weights that every prompt token is multiplied with. The output head is used for the last token only."""
    c = model.config
    width = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    layer = width * c.hidden_size + 3 * c.hidden_size * c.ffn_width
    return c.num_hidden_layers * layer


def peak_memory() -> int | None:
    """Return the peak resident bytes of this process since its start, or None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> str:
    """Describe the processor and the system."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {platform.system()} {platform.machine()}"


def to_json(speeds: Speeds, **conditions: Any) -> dict[str, Any]:
    """Return the speeds and the measurement conditions as JSON types."""
    return {**conditions, "machine": machine(), **dataclasses.asdict(speeds)}
