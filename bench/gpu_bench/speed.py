"""Speed of the kernels, compared with the device's copy bandwidth and with torch, if installed."""

from __future__ import annotations

from functools import partial

import numpy as np

from gpu_bench import common
from gpu_bench.common import OurTimer, TorchTimer, copies, peer, side_by_side, table, torch_or_none
from qvl_kernels.ops import Norm

DECODER_SHAPES = ((12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008))
HEAD_SHAPE, GATE_SHAPE = (151936, 4096), (11008, 4096)
LAYERS = 8
"""Bytes of caches that decode attention reads: several times the largest L2 cache."""


def copy_bandwidth(ops, nbytes: int = 2 << 30) -> float:
    """Bytes read and written a second by a copy within the device."""
    source, target = ops.empty((nbytes,), np.uint8), ops.empty((nbytes,), np.uint8)
    run = OurTimer(ops).prepare([lambda: ops.copy(source, target)])
    return 2 * nbytes / side_by_side({"copy": run})["copy"]


def bandwidth() -> dict:
    """Copying within the device, and from the host as an upload does it."""
    import time

    ops = common.make_ops()
    rate = copy_bandwidth(ops)
    values = np.ones(1 << 30, np.uint8)
    ops.upload(values[: 1 << 26])
    ops.synchronize()
    begin = time.perf_counter()
    ops.upload(values)
    ops.synchronize()
    upload = len(values) / (time.perf_counter() - begin)
    table("Bandwidth", ("", "GB/s"), [("copy, read + write", rate / 1e9), ("upload", upload / 1e9)])
    return {"copy": rate, "upload": upload}


def weight_bytes(w) -> int:
    """Bytes of a weight that a product reads."""
    return w.codes.nbytes + (w.scales.nbytes if w.scales is not None else 0)


def matvec() -> dict:
    """One row of activations: int4 weights beyond the caches, int8 for the output head."""
    ops, torch = common.make_ops(), torch_or_none()
    rate, rows, found = copy_bandwidth(ops), [], {}
    for n, k, bits in [(*shape, 4) for shape in DECODER_SHAPES] + [(*HEAD_SHAPE, 8)]:
        weights = [ops.weight(common.matrix(n, k, bits))]
        weights += [ops.weight(common.matrix(n, k, bits)) for _ in range(copies(weight_bytes(weights[0])) - 1)]
        x, out = ops.upload(np.ones((1, k), np.float16)), ops.empty((1, n), np.float16)
        runs = {"ours": OurTimer(ops).prepare([lambda w=w, o=out, x=x: ops.linear(x, w, out=o) for w in weights])}
        if bits == 4:
            count = len(weights)
            runs |= peer(lambda n=n, k=k, c=count: TorchTimer(torch).prepare(_torch_int4(torch, n, k, c)))
        rows.append(_row(f"int{bits} {n}x{k}", weight_bytes(weights[0]), side_by_side(runs), rate, found))
        del weights, runs
    rows.append(_gate_up(ops, rate, found))
    header = ("weight", "us", "GB/s", "of copy", "torch int4 us", "x faster")
    table(f"Matrix-vector, weights beyond the caches (copy {rate / 1e9:.0f} GB/s)", header, rows)
    return {"copy": rate, "rows": found}


def _gate_up(ops, rate: float, found: dict) -> list:
    n, k = GATE_SHAPE

    def pair():
        return ops.weight(common.matrix(n, k, 4)), ops.weight(common.matrix(n, k, 4))

    weights = [pair()]
    nbytes = sum(map(weight_bytes, weights[0]))
    weights += [pair() for _ in range(copies(nbytes) - 1)]
    norm = Norm(ops.upload(np.ones(k, np.float32)), None, 1e-6)
    x, out = ops.upload(np.ones((1, k), np.float32)), ops.empty((1, n), np.float16)
    calls = [lambda g=g, u=u: ops.gate_up(x, g, u, out=out, norm=norm) for g, u in weights]
    times = side_by_side({"ours": OurTimer(ops).prepare(calls)})
    return _row(f"norm + gate/up 2x{n}x{k}", nbytes, times, rate, found)


def _row(name: str, nbytes: int, times: dict[str, float], rate: float, found: dict) -> list:
    speed, theirs = nbytes / times["ours"], times.get("torch")
    ratio = theirs / times["ours"] if theirs else None
    found[name] = {"seconds": times["ours"], "of_copy": speed / rate, "torch": theirs, "faster": ratio}
    return [name, times["ours"] * 1e6, speed / 1e9, f"{speed / rate:.0%}", theirs and theirs * 1e6, ratio]


def _torch_int4(torch, n: int, k: int, count: int) -> list:
    """Calls of torch's own int4 product, in groups of 128."""
    packed = torch.ops.aten._convert_weight_to_int4pack(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8
    )
    weights = [packed] + [packed.clone() for _ in range(count - 1)]
    scales = torch.full((k // 128, n, 2), 0.01, dtype=torch.bfloat16, device="cuda")
    x = torch.ones((1, k), dtype=torch.bfloat16, device="cuda")
    return [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in weights]


def matmul() -> dict:
    """int4 products of many rows beside torch's fp16 product with the dequantized weight."""
    ops, torch = common.make_ops(), torch_or_none()
    rows, found = [], {}
    for m in (16, 256, 1024, 2048):
        for n, k in DECODER_SHAPES:
            first = ops.weight(common.matrix(n, k, 4))
            count = copies(2 * n * k) if m <= 256 else 2
            weights = [first] + [ops.weight(common.matrix(n, k, 4)) for _ in range(count - 1)]
            x = ops.upload(np.random.default_rng(0).standard_normal((m, k)).astype(np.float16))
            out = ops.empty((m, n), np.float16)
            calls = [lambda w=w, x=x, o=out: ops.linear(x, w, out=o) for w in weights]
            runs = {"ours": OurTimer(ops).prepare(calls)}
            runs |= peer(lambda m=m, n=n, k=k, c=count: TorchTimer(torch).prepare(_torch_fp16(torch, m, n, k, c)))
            times = side_by_side(runs, 9)
            flops, ratio = 2 * m * n * k, times["torch"] / times["ours"] if "torch" in times else None
            found[f"m={m} {n}x{k}"] = {"seconds": times["ours"], "torch": times.get("torch"), "faster": ratio}
            theirs = times["torch"] * 1e6 if "torch" in times else None
            rows.append([f"m={m} {n}x{k}", times["ours"] * 1e6, flops / times["ours"] / 1e12, theirs, ratio])
            del runs, weights, first
    table("int4 products", ("shape", "us", "Tflop/s", "torch fp16 us", "x faster"), rows)
    return {"rows": found}


def _torch_fp16(torch, m: int, n: int, k: int, count: int) -> list:
    """Calls of torch's fp16 product."""
    x = torch.randn((m, k), dtype=torch.float16, device="cuda")
    weights = [torch.randn((n, k), dtype=torch.float16, device="cuda") / k**0.5 for _ in range(count)]
    return [lambda w=w: x @ w.T for w in weights]


def attention() -> dict:
    """Prefill of 2048 tokens, and the ViT's attention, beside torch's scaled_dot_product_attention."""
    ops, torch = common.make_ops(), torch_or_none()
    cases = {"prefill 2048 x 32 x 128": (_prefill(ops), (2048, 32, 128, True))}
    cases["ViT 1024 x 16 x 104"] = (_vision(ops), (1024, 16, 104, False))
    rows, found = [], {}
    for name, (ours, shape) in cases.items():
        theirs = peer(lambda shape=shape: TorchTimer(torch).prepare([_sdpa(torch, *shape)] * 4))
        times = side_by_side({"ours": OurTimer(ops).prepare([ours] * 4), **theirs})
        ratio = times["torch"] / times["ours"] if "torch" in times else None
        found[name] = {"seconds": times["ours"], "torch": times.get("torch"), "faster": ratio}
        rows.append([name, times["ours"] * 1e6, times["torch"] * 1e6 if "torch" in times else None, ratio])
    table("Attention", ("", "us", "torch SDPA us", "x faster"), rows)
    decode = _decode(ops, copy_bandwidth(ops))
    return {"rows": found, "decode": decode}


def _prefill(ops):
    heads, d, t = 32, 128, 2048
    cache = ops.kv_cache(1, heads, d, t, "fp16")
    common.clear(ops, cache)
    qkv = ops.upload(np.random.default_rng(0).standard_normal((t, 3 * heads * d)).astype(np.float16))
    start, out = ops.upload(np.zeros(1, np.int32)), ops.empty((t, heads * d), np.float16)
    return lambda: ops.cached_attention(qkv, cache, 0, start, out=out)


def _vision(ops):
    qkv = ops.upload(np.random.default_rng(0).standard_normal((1024, 16 * 3 * 104)).astype(np.float16))
    out = ops.empty((1024, 16 * 104), np.float16)
    return lambda: ops.vision_attention(qkv, 16, out=out)


def _sdpa(torch, rows: int, heads: int, d: int, causal: bool):
    q, k, v = (torch.randn((1, heads, rows, d), dtype=torch.float16, device="cuda") for _ in range(3))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _decode(ops, rate: float) -> dict:
    """One query over long caches, of many layers so that they lie beyond the caches of the device."""
    rows, found, heads, d = [], {}, 32, 128
    for kind in ("fp16", "int8"):
        cache = ops.kv_cache(LAYERS, heads, d, 8192, kind)
        common.clear(ops, cache)
        qkv, out = ops.upload(np.ones((1, 3 * heads * d), np.float16)), ops.empty((1, heads * d), np.float16)
        for length in (512, 8000):
            start = ops.upload(np.array([length - 1], np.int32))
            calls = [partial(ops.cached_attention, qkv, cache, layer, start, out=out) for layer in range(LAYERS)]
            seconds = side_by_side({"ours": OurTimer(ops).prepare(calls)})["ours"]
            nbytes = 2 * heads * length * (d + 2 if kind == "int8" else 2 * d)
            found[f"{kind} {length}"] = {"seconds": seconds, "of_copy": nbytes / seconds / rate}
            rows.append([f"{kind}, {length} positions", seconds * 1e6, nbytes / seconds / 1e9, nbytes / seconds / rate])
    table("Decode attention, one layer", ("cache", "us", "GB/s", "of copy"), rows)
    return found
