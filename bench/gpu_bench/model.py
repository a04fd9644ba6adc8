"""The whole model at its true size, with random weights: decode, prefill, a picture, and memory."""

from __future__ import annotations

import gc
import time

import numpy as np

from gpu_bench import common
from gpu_bench.common import peer, table, torch_or_none
from gpu_bench.speed import copy_bandwidth, weight_bytes
from qvl_kernels.gpu.cache import cache_bytes
from qvl_runtime.engine.decoder import DecodeStep, Features, Outcome, Span
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.families import family_of
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.qwen_vl.adapter import Adapter
from qvl_runtime.families.qwen_vl.vision import VisionTower

GB = 1e9
STEPS = 32
DEVICE = "cuda"
ROWS = 512
"""Tokens of a prompt computed at a time, as the runtime does."""


def decode() -> dict:
    """Token by token with 512 and with 8000 tokens of context, several answers at once, and prefill."""
    ops, config = common.make_ops(), common.true_config()
    rate = copy_bandwidth(ops)
    decoder = common.decoder(common.synthetic(ops, config, common.BITS))
    rows, found = [], {}
    for kind in ("fp16", "int8"):
        for length in (512, 8000):
            found[f"{kind} {length}"] = _decode(ops, decoder, kind, length, rate)
            rows.append([f"{kind}, {length}", *_cells(found[f"{kind} {length}"])])
    table(f"Decode, {_weight_bytes(decoder) / GB:.2f} GB of weights a token", ("cache, context", *FIGURES), rows)
    found["together"] = _together("qwen-vl", decoder, 512)
    found["prefill"] = _prefill(ops, decoder)
    return found


def newer() -> dict:
    """A token of newer models with 1024 tokens of context, compared with the copy bandwidth; and answers at once."""
    rows, found, length = [], {}, 1024
    for name, published in common.newer_configs().items():
        ops, family = common.make_ops(), family_of(published, name)
        config, rate = family.read_config(published, name), copy_bandwidth(ops)
        decoder = common.decoder(common.synthetic(ops, config, common.BITS, family), family)
        found[name] = _decode(ops, decoder, "fp16", length, rate)
        rows.append([name, _weight_bytes(decoder) / GB, *_cells(found[name])])
        found[name]["together"] = _together(name, decoder, length)
        del decoder, ops
        gc.collect()
    table(f"Decode of newer models, {length} tokens of context", ("model", "GB a token", *FIGURES), rows)
    return found


FIGURES = ("ms a token", "graph alone", "bytes / copy rate", "tokens/s", "of the limit")


def _cells(found: dict[str, float]) -> list:
    loop = found["loop"]
    return [loop * 1e3, found["graph"] * 1e3, found["limit"] * 1e3, 1 / loop, f"{found['share']:.0%}"]


def _weight_bytes(decoder: Decoder) -> int:
    """Bytes of weights that a token reads."""
    blocks = decoder.blocks
    products = [w for b in blocks for w in (b.qkv, b.attention_out, b.up, b.gate, b.down)]
    return sum(weight_bytes(w) for w in (*products, decoder.head))


class LoneStep:
    """A step of one sequence."""

    def __init__(self, decoder: Decoder, sequence: SequenceState):
        self.sequence, self._step = sequence, DecodeStep(decoder)

    def __call__(self, *tokens: int) -> Outcome:
        return self._step([(self.sequence, tokens)])

    def replay(self) -> None:
        """The graph alone."""
        self.sequence.captured[self._step].replays[1]()


def _decode(ops, decoder: Decoder, kind: str, length: int, rate: float) -> dict[str, float]:
    """Seconds a step: of its graph alone, and as greedy generation runs it, reading each token back; what copying the
    bytes at `rate` takes, and its share."""
    config = decoder.config
    context = decoder.sequence(kind, min(length + 2 * STEPS, config.max_position_embeddings))
    common.clear(ops, context.store)
    context.truncate(length)
    step = LoneStep(decoder, context)
    for _ in range(3):
        step(7)
    context.truncate(length)
    driver, loops, graphs = ops.driver, [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step(7).best(0)
        loops.append(time.perf_counter() - begin)
    context.truncate(length)
    for _ in range(STEPS):
        mark = driver.mark()
        step.replay()
        graphs.append(driver.seconds(mark, driver.mark()))
    cache = cache_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, length, kind)
    graph, loop, limit = float(np.median(graphs)), float(np.median(loops)), (_weight_bytes(decoder) + cache) / rate
    return {"graph": graph, "loop": loop, "limit": limit, "share": limit / loop}


def _together(name: str, decoder: Decoder, length: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of several answers, each with `length` tokens of context; and if every step one of the answers
    ends and another takes its place."""
    rows, found = [], {}
    for count in (1, 2, 4, 8, 16):
        sequences = [decoder.sequence("fp16", length + 2 * STEPS) for _ in range(count + 1)]
        for sequence in sequences:
            common.clear(decoder.ops, sequence.store)
            sequence.truncate(length)
        step, times = DecodeStep(decoder), {"same": [], "others": []}
        for kind, taken in times.items():
            for turn in range(STEPS):
                first = turn % (count + 1) if kind == "others" else 0
                members = (sequences[first:] + sequences[:first])[:count]
                begin = time.perf_counter()
                step([(sequence, (7,)) for sequence in members]).best(0)
                taken.append(time.perf_counter() - begin)
        seconds = {kind: float(np.median(taken)) for kind, taken in times.items()}
        found[str(count)] = seconds
        rows.append([count, *(s * 1e3 for s in seconds.values()), *(count / s for s in seconds.values())])
    header = ("answers", "ms a step", "with another", "tokens/s", "with another")
    table(f"{name}: answers at once, {length} tokens of context each", header, rows)
    return found


def prefill(decoder: Decoder, sequence: SequenceState, ids: list[int], images: list) -> None:
    """A prompt through the decoder, in slices."""
    work = decoder.workspace(min(len(ids), ROWS))
    for first in range(0, len(ids), ROWS):
        part = ids[first : first + ROWS]
        rows = work.rows(len(part))
        decoder.embed(decoder.ops.upload(np.array(part, np.int32)), rows.x)
        pictures = [Features(row - first, features.shape[0], features) for row, features in images]
        decoder.forward(rows, [Span(sequence, len(part))], pictures)
        sequence.advance(len(part))
    decoder.logits(rows.x[len(part) - 1 : len(part)], decoder.ops.empty((1, decoder.vocab_size)))


def _prefill(ops, decoder: Decoder) -> dict:
    rows, found = [], {}
    for length in (512, 2048):
        sequence = decoder.sequence("fp16", length)
        times = []
        for _ in range(4):
            sequence.truncate(0)
            begin = time.perf_counter()
            prefill(decoder, sequence, list(range(length)), [])
            ops.synchronize()
            times.append(time.perf_counter() - begin)
        seconds = float(np.median(times[1:]))
        found[str(length)] = {"seconds": seconds, "tokens_per_second": length / seconds}
        rows.append([length, seconds * 1e3, length / seconds])
    table("Prefill", ("tokens", "ms", "tokens/s"), rows)
    return found


def picture() -> dict:
    """One picture through the ViT and the adapter, compared with fp16 modules of the same shapes in torch."""
    ops, torch, config = common.make_ops(), torch_or_none(), common.true_config()
    found, rows, pixels = {}, [], common.pixels(config)
    theirs = peer(lambda: _tried(_torch_picture(torch, config)))
    for bits in (4, 8, 16):
        weights = common.synthetic(ops, config, dict.fromkeys(common.BITS, bits))
        tower, adapter = VisionTower(weights), Adapter(weights)

        def ours(tower=tower, adapter=adapter):
            adapter(tower(pixels))
            ops.synchronize()

        times = _wall({"ours": ours, **theirs})
        ratio = times["ours"] / times["torch"] if theirs else None
        found[f"int{bits}"] = {"seconds": times["ours"], "torch": times.get("torch"), "times": ratio}
        rows.append([f"int{bits}", times["ours"] * 1e3, times["torch"] * 1e3 if theirs else None, ratio])
        del tower, adapter, weights
    table("One picture, ViT and adapter", ("weights", "ms", "torch fp16 ms", "of torch's time"), rows)
    return found


def _tried(call):
    call()
    return call


def _wall(calls: dict, repeats: int = 10) -> dict[str, float]:
    """Median wall-clock seconds, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(t)) for name, t in times.items()}


def _torch_picture(torch, config):
    """The same shapes in torch, fp16, with its scaled_dot_product_attention."""
    v, functional = config.visual, torch.nn.functional
    half = {"dtype": torch.float16, "device": DEVICE}

    def linear(n, k):
        return torch.randn((n, k), **half) / k**0.5, torch.zeros(n, **half)

    def norm(width):
        return (width,), torch.ones(width, **half), torch.zeros(width, **half)

    def block():
        attention = norm(v.width), linear(3 * v.width, v.width), linear(v.width, v.width)
        return (*attention, norm(v.width), linear(v.mlp_width, v.width), linear(v.width, v.mlp_width))

    layers = [block() for _ in range(v.layers)]
    conv, kv = linear(v.width, v.patch_dim), linear(v.output_dim, v.width)
    projections = [linear(v.output_dim, v.output_dim) for _ in range(4)]
    x0, q0 = torch.randn((v.patches, v.patch_dim), **half), torch.randn((v.n_queries, v.output_dim), **half)
    wide = norm(v.output_dim)

    @torch.no_grad()
    def run():
        x = functional.layer_norm(functional.linear(x0, *conv), *norm(v.width))
        for ln_1, in_proj, out_proj, ln_2, c_fc, c_proj in layers:
            h = functional.linear(functional.layer_norm(x, *ln_1), *in_proj)
            q, k, value = h.view(v.patches, v.heads, 3, v.head_dim).permute(2, 1, 0, 3)
            h = functional.scaled_dot_product_attention(q[None], k[None], value[None])[0]
            x = x + functional.linear(h.transpose(0, 1).reshape(v.patches, v.width), *out_proj)
            h = functional.gelu(functional.linear(functional.layer_norm(x, *ln_2), *c_fc))
            x = x + functional.linear(h, *c_proj)
        x = functional.layer_norm(functional.linear(x, *kv), *wide)
        k, value = (functional.linear(x, *p) for p in projections[:2])
        q, k, value = (a.view(len(a), v.adapter_heads, -1).transpose(0, 1)[None] for a in (q0, k, value))
        h = functional.scaled_dot_product_attention(q, k, value)[0].transpose(0, 1).reshape(v.n_queries, v.output_dim)
        for projection in projections[2:]:
            h = functional.layer_norm(functional.linear(h, *projection), *wide)
        if half["device"] == "cuda":
            torch.cuda.synchronize()

    return run


def memory() -> dict:
    """Peak memory of the GPU: a picture and 2048 tokens; 8192 tokens with an int8 cache.

    "arrays" is the largest sum of live arrays; "in use" all that is taken from the device, driver and graphs included.
    """
    rows, found, config = [], {}, common.true_config()
    for settings, bits in (("default", common.BITS), ("smallest", common.SMALLEST)):
        ops = common.make_ops()
        weights = common.synthetic(ops, config, bits)
        decoder, tower, adapter = common.decoder(weights), VisionTower(weights), Adapter(weights)
        for name, kind, tokens in (("picture + 2048 tokens", "fp16", 2048), ("8192 tokens, int8 cache", "int8", 8192)):
            ops.memory.trim()
            ops.memory.peak = ops.memory.in_use
            tokens = min(tokens, config.max_position_embeddings)
            step = LoneStep(decoder, decoder.sequence(kind, tokens))
            features = adapter(tower(common.pixels(config)))
            prefill(decoder, step.sequence, list(range(100, 100 + tokens - 8)), [(1, features)])
            for _ in range(8):
                step(7)
            ops.synchronize()
            free, total = ops.driver.memory()
            figures = {"arrays": ops.memory.peak, "in_use": max(total - free, ops.memory.peak)}
            found[f"{settings}: {name}"] = figures
            rows.append([f"{settings}: {name}", *(figure / GB for figure in figures.values())])
            del step, features
            gc.collect()
        del decoder, tower, adapter, weights, ops
        gc.collect()
    table("Peak memory, GB", ("", "arrays", "in use"), rows)
    return found
