"""One table of operations, shapes and error limits; every backend against the reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from qvl_kernels.ops import Norm
from qvl_kernels.packing import Matrix, pack
from qvl_kernels.reference import ReferenceOps

# ------------------------------------------------------------------------------------------------ backends


def cpu(**options):
    from qvl_kernels.cpu import CpuOps

    return CpuOps(**options)


BACKENDS: dict[str, Callable] = {
    "cpu": functools.partial(cpu, activations="int16", threads=2),
    "cpu-1-thread": functools.partial(cpu, activations="int16", threads=1),
    "cpu-3-threads": functools.partial(cpu, activations="int16", threads=3),
}
CACHE_BACKENDS = BACKENDS | {
    # With these a few queries attend by a kernel of their own.
    "cpu-int8": functools.partial(cpu, activations="int8", threads=2),
    "cpu-int8-3-threads": functools.partial(cpu, activations="int8", threads=3),
}
EXACT, PRODUCT, OUTLIER, SOFTMAX = "exact", "product", "outlier", "softmax"
# Relative error (of the whole output's norm) a backend may have. The int16 activations of the CPU cost 1e-4 at most;
# an outlier of a thousand costs its 127 neighbours in the same scale up to 1e-3.
LIMITS = {
    "cpu": {EXACT: 2e-6, PRODUCT: 2e-4, OUTLIER: 1e-3, SOFTMAX: 2e-4},
    "cuda": {EXACT: 1e-3, PRODUCT: 2e-3, OUTLIER: 2e-3, SOFTMAX: 2e-3},
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]()


@pytest.fixture(scope="module", params=CACHE_BACKENDS)
def cache_backend(request):
    return CACHE_BACKENDS[request.param]()


# ------------------------------------------------------------------------------------------------ inputs
@dataclasses.dataclass
class Case:
    """One call. `inputs` are float32 arrays (uploaded, and named ``act_…`` as the backend's activation dtype, in which
    they are exact), `call` gets the backend, the uploaded inputs and the poisoned output."""

    label: str
    limit: str
    inputs: dict[str, np.ndarray]
    shape: tuple[int, ...]
    call: Callable
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in self.inputs.items():
            if name.startswith("act_"):
                self.inputs[name] = value.astype(np.float16).astype(np.float32)


def random(label: str) -> np.random.Generator:
    return np.random.default_rng(abs(hash_of(label)))


def hash_of(label: str) -> int:
    return int.from_bytes(label.encode(), "little") % (1 << 61)


def matrix(rng, n, k, bits, group=128, zeros=False, perm=False, bias=True) -> Matrix:
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    if bits == 16:
        return Matrix(n, k, 16, group, (0.05 * rng.standard_normal((n, k))).astype(np.float16), bias=offset)
    groups = -(-k // group)
    return pack(
        rng.integers(0, 1 << bits, (n, k)).astype(np.uint8),
        (0.005 + 0.01 * rng.random((n, groups))).astype(np.float16),
        bits,
        group,
        zeros=rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8) if zeros else None,
        perm=rng.permutation(k) if perm else None,
        bias=offset,
    )


def values(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def make_norm(arrays: dict, eps: float = 1e-6) -> Norm:
    return Norm(arrays["norm_weight"], arrays.get("norm_bias"), eps)


KINDS = [
    *((bits, group, zeros, False) for bits in (4, 8) for group in (128, 64, 32) for zeros in (False, True)),
    (3, 128, False, False),
    (3, 64, True, True),
    (4, 128, True, True),
    (8, 64, False, True),
    (16, 128, False, False),
]
# One block of everything; sizes off every tile; more rows than the small kernels take.
SHAPES = [
    (1, 32, 128),
    (6, 1, 128),
    (1, 40, 200),
    (2, 64, 256),
    (5, 33, 20),
    (16, 100, 384),
    (17, 96, 130),
    (37, 70, 260),
]


def products() -> Iterator[Case]:
    for bits, group, zeros, perm in KINDS:
        for m, n, k in SHAPES:
            label = f"linear-w{bits}g{group}{'z' * zeros}{'p' * perm}-{m}x{n}x{k}"
            rng = random(label)
            plain, full = (
                matrix(rng, n, k, bits, group, zeros, perm, bias=False),
                matrix(rng, n, k, bits, group, zeros, perm),
            )

            def linear(ops, a, out, w=plain):
                ops.linear(a["act_x"], ops.weight(w), out=out)

            def everything(ops, a, out, w=full):
                ops.linear(a["x"], ops.weight(w), out=out, norm=make_norm(a), activation="gelu", residual=a["residual"])

            def in_place(ops, a, out, w=full):
                ops.copy(a["residual"], out)
                ops.linear(a["act_x"], ops.weight(w), out=out, residual=out)

            second = matrix(rng, n, k, bits, group, zeros, perm, bias=zeros)

            def gate_up(ops, a, out, gate=full, up=second):
                ops.gate_up(a["x"], ops.weight(gate), ops.weight(up), out=out, norm=make_norm(a))

            x, residual, weight = values(rng, m, k), values(rng, m, n), values(rng, k)
            layer = {"norm_weight": weight, "norm_bias": values(rng, k)}
            yield Case(label, PRODUCT, {"act_x": x}, (m, n), linear, "activation")
            yield Case(f"{label}-all", PRODUCT, {"x": x, "residual": residual, **layer}, (m, n), everything)
            yield Case(f"{label}-in-place", PRODUCT, {"act_x": x, "residual": residual}, (m, n), in_place)
            swiglu = {"x": x, "norm_weight": weight}
            yield Case(f"{label}-gate-up", PRODUCT, swiglu, (m, n), gate_up, "activation")
            if k > 128:
                outlier = x.copy()
                outlier[:, k // 2] *= 1000
                yield Case(f"{label}-outlier", OUTLIER, {"act_x": outlier}, (m, n), linear, "activation")


def awkward_widths() -> Iterator[Case]:
    """Inner widths of vision towers that are no multiple of a group, with biases, and every activation."""
    for bits, group in ((4, 128), (8, 128), (8, 64), (16, 128)):
        for m, width in ((3, 3420), (20, 3420), (20, 4304)):
            rng = random(f"{bits}{m}{width}")
            down, ups = matrix(rng, 40, width, bits, group), [matrix(rng, width, 96, bits, group) for _ in range(2)]

            def linear(ops, a, out, w=down):
                ops.linear(a["act_x"], ops.weight(w), out=out, residual=a["residual"])

            def gate_up(ops, a, out, ups=ups):
                ops.gate_up(a["x"], *map(ops.weight, ups), out=out, norm=make_norm(a))

            label, narrow = f"w{bits}g{group}-{m}x{width}", values(rng, m, 96)
            inputs = {"act_x": values(rng, m, width), "residual": values(rng, m, 40)}
            yield Case(f"down-{label}", PRODUCT, inputs, (m, 40), linear)
            inputs = {"x": narrow, "norm_weight": values(rng, 96)}
            yield Case(f"gate-up-{label}", PRODUCT, inputs, (m, width), gate_up, "activation")
            for activation in ("gelu_tanh", "quick_gelu"):

                def activated(ops, a, out, w=ups[0], activation=activation):
                    ops.linear(a["act_x"], ops.weight(w), out=out, activation=activation)

                yield Case(f"{activation}-{label}", PRODUCT, {"act_x": narrow}, (m, width), activated, "activation")


def tied_heads() -> Iterator[Case]:
    """One weight that is a table for `embed` and a matrix for `linear`."""
    for bits in (3, 4, 8, 16):
        rng = random(f"{bits}tied")
        table, ids = matrix(rng, 70, 200, bits, bias=False), rng.integers(0, 70, 5).astype(np.int32)

        def tied(ops, a, out, w=table, ids=ids):
            weight, rows = ops.weight(w), ops.empty((len(ids), 200))
            ops.embed(ops.upload(ids), weight, out=rows)
            ops.linear(rows, weight, out=out, norm=make_norm(a))

        yield Case(f"tied-w{bits}", PRODUCT, {"norm_weight": values(rng, 200)}, (5, 70), tied)


def tables() -> Iterator[Case]:
    for bits, group, zeros, perm in KINDS:
        label = f"embed-w{bits}g{group}{'z' * zeros}{'p' * perm}"
        rng = random(label)
        table, chosen = matrix(rng, 70, 200, bits, group, zeros, perm), rng.integers(0, 70, 9).astype(np.int32)

        def embed(ops, a, out, w=table, ids=chosen):
            ops.embed(ops.upload(ids), ops.weight(w), out=out)

        yield Case(label, EXACT, {}, (9, 200), embed)


def elementwise() -> Iterator[Case]:
    for m, n in ((1, 16), (3, 100), (5, 1664)):
        rng = random(f"elementwise-{m}x{n}")
        x, weight, bias = 3 + values(rng, m, n), values(rng, n), values(rng, n)

        def normalize(ops, a, out):
            ops.normalize(a["x"], make_norm(a), out=out)

        def add(ops, a, out):
            ops.add(a["x"], a["y"], out=out)

        def copy(ops, a, out):
            half = ops.empty(a["x"].shape, np.float16)
            ops.copy(a["x"], half)
            ops.copy(half, out)

        yield Case(f"rmsnorm-{m}x{n}", EXACT, {"x": x, "norm_weight": weight}, (m, n), normalize)
        yield Case(f"layernorm-{m}x{n}", EXACT, {"x": x, "norm_weight": weight, "norm_bias": bias}, (m, n), normalize)
        yield Case(f"add-{m}x{n}", EXACT, {"x": x, "y": values(rng, m, n)}, (m, n), add)
        yield Case(f"copy-{m}x{n}", EXACT, {"x": x}, (m, n), copy)


def choosing() -> Iterator[Case]:
    def argmax(ops, a, out):
        ops.argmax(a["x"], out=out)

    for m, n in ((1, 1), (3, 15), (2, 5000)):
        x = values(random(f"argmax-{n}"), m, n)
        x[:, n // 3] = x[:, n - 1] = 9  # tied: the first counts
        yield Case(f"argmax-{m}x{n}", EXACT, {"x": x}, (m,), argmax, "int32")
    for value, n in itertools.product((np.nan, np.inf, -np.inf), (1, 40, 47)):
        x = values(random(f"argmax-{n}"), 3, n)
        x[1, n // 3] = x[2, n - 1] = value
        yield Case(f"argmax-{value}-{n}", EXACT, {"x": x}, (3,), argmax, "int32")


def full_attention() -> Iterator[Case]:
    for heads, d, keys in ((2, 8, 5), (3, 20, 33), (2, 104, 40), (1, 128, 300)):
        rng = random(f"attention-{heads}-{d}-{keys}")

        def vision(ops, a, out, heads=heads):
            ops.vision_attention(a["act_qkv"], heads, out=out)

        def cross(ops, a, out, heads=heads):
            ops.cross_attention(a["act_q"], a["act_k"], a["act_v"], heads, out=out)

        qkv, q = values(rng, keys, heads * 3 * d), values(rng, 7, heads * d)
        k, v = values(rng, keys, heads * d), values(rng, keys, heads * d)
        label = f"{heads}x{d}-{keys}"
        yield Case(f"vision-{label}", SOFTMAX, {"act_qkv": qkv}, (keys, heads * d), vision, "activation")
        inputs = {"act_q": q, "act_k": k, "act_v": v}
        yield Case(f"cross-{label}", SOFTMAX, inputs, (7, heads * d), cross, "activation")
        # Scores in the hundreds: softmax must not overflow.
        large = {"act_q": 100 * q, "act_k": k, "act_v": v}
        yield Case(f"cross-large-{label}", OUTLIER, large, (7, heads * d), cross, "activation")


def segmented_attention() -> Iterator[Case]:
    """Rotated patches of one picture, in ragged windows, or of several pictures."""
    for heads, d, segments in (
        (2, 24, [0, 20]),
        (3, 32, [0, 4, 12, 12, 60]),
        (2, 64, [0, 256, 300, 364]),
        (1, 72, [0, 300]),
        (2, 80, [0, 64, 128, 144, 160, 196]),
    ):
        rng, rows = random(f"{heads}{d}segments"), segments[-1]
        angles = rng.uniform(0, 2 * np.pi, (rows, d // 2))
        inputs = {
            "act_qkv": values(rng, rows, heads * 3 * d),
            "rope": np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        }

        def attend(ops, a, out, heads=heads, segments=segments):
            ops.vision_attention(a["act_qkv"], heads, out=out, rope=a["rope"], segments=segments)

        def unrotated(ops, a, out, heads=heads, segments=segments):
            ops.vision_attention(a["act_qkv"], heads, out=out, segments=np.array(segments, np.int32))

        shape, label = (rows, heads * d), f"{heads}x{d}-{len(segments) - 1}"
        yield Case(f"vision-rope-segments-{label}", SOFTMAX, inputs, shape, attend, "activation")
        yield Case(f"vision-segments-{label}", SOFTMAX, inputs, shape, unrotated, "activation")


def gathering() -> Iterator[Case]:
    for rows, n, k in ((5, 9, 100), (1, 1, 16), (40, 40, 33)):
        rng = random(f"{rows}gather")
        index = rng.integers(0, rows, n).astype(np.int32)

        def gather(ops, a, out, index=index):
            ops.gather(a["x"], ops.upload(index), out=out)

        yield Case(f"gather-{rows}-{n}x{k}", EXACT, {"x": values(rng, rows, k)}, (n, k), gather)


CASES = [
    *products(),
    *awkward_widths(),
    *tables(),
    *tied_heads(),
    *elementwise(),
    *gathering(),
    *choosing(),
    *full_attention(),
    *segmented_attention(),
]


# ------------------------------------------------------------------------------------------------ running
def run(ops, case: Case) -> np.ndarray:
    kinds = {"activation": ops.activation_dtype, "float32": np.float32, "int32": np.int32}
    arrays = {}
    for name, array in case.inputs.items():
        dtype = ops.activation_dtype if name.startswith("act_") else np.float32
        arrays[name] = ops.upload(array.astype(dtype))
    dtype = np.dtype(kinds[case.dtype])
    out = ops.empty(case.shape, dtype)
    ops.write(out, np.full(case.shape, np.nan if dtype.kind == "f" else -7, dtype))
    case.call(ops, arrays, out)
    return ops.download(out).astype(np.float64)


@functools.cache
def truth(index: int) -> np.ndarray:
    return run(ReferenceOps(), CASES[index])


def error(ops, index: int) -> tuple[float, float]:
    """Relative error of a case, and its limit."""
    got, want = run(ops, CASES[index]), truth(index)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30), LIMITS[ops.name][CASES[index].limit]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.label for case in CASES])
def test_operation(backend, index):
    found, allowed = error(backend, index)
    assert found <= allowed


HEADS = [
    *((heads, heads, d) for heads, d in ((2, 8), (3, 20), (2, 64), (4, 128), (1, 128), (5, 10))),
    *((4, 2, 24), (8, 2, 32), (6, 1, 80), (7, 1, 64), (16, 2, 96), (14, 2, 128), (3, 1, 10)),
]
"""Heads of queries, heads of keys, and their size."""
CACHES = [(kind, *heads) for kind in ("fp32", "fp16", "int8") for heads in HEADS]


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "d"), CACHES)
def test_cache(cache_backend, kind, heads, kv_heads, d):
    """Prompt, decode, prompt again, grow, shrink: rotated queries and attention after each step."""
    backend = cache_backend
    if kind == "fp32" and backend.score_cache_dtype != "fp32":
        pytest.skip("no float32 cache")
    rng, capacity, layer = random(f"cache-{kind}-{heads}-{d}"), 300, 1
    rope, logn = values(rng, 2 * capacity, d), 1 + rng.random(2 * capacity).astype(np.float32)
    steps = (7, 1, 1, 150, 40, 1, 17)
    # numbers that fp16 holds: of others, every backend would quantize slightly different ones
    qkvs = [values(rng, tokens, (heads + 2 * kv_heads) * d).astype(np.float16).astype(np.float32) for tokens in steps]
    weights = 1 + values(rng, 2, d) / 4
    results = []
    for ops in (ReferenceOps(), backend):
        cache, position, seen = ops.kv_cache(2, kv_heads, d, capacity, kind), 0, []
        options = {"logn": ops.upload(logn)}
        if heads != kv_heads:  # as the families are
            norms = [Norm(ops.upload(weight), None, 1e-6) for weight in weights]
            options = {"logn": None, "q_norm": norms[0], "k_norm": norms[1]}
        for qkv in qkvs:
            tokens = len(qkv)
            start, array = ops.upload(np.array([position], np.int32)), ops.upload(qkv.astype(ops.activation_dtype))
            out = ops.upload(np.full((tokens, heads * d), np.nan, ops.activation_dtype))
            ops.rope_append(array, rope=ops.upload(rope), cache=cache, layer=layer, start=start, **options)
            ops.cached_attention(array, cache, layer, start, out=out)
            seen.append((ops.download(array)[:, : heads * d], ops.download(out)))
            position += tokens
            if tokens in (150, 40):
                cache = cache.resized(2 * capacity if tokens == 150 else position + 18, position)
        results.append(seen)
    limits = LIMITS[backend.name]
    for (want_q, want), (got_q, got) in zip(*results):
        assert np.linalg.norm(got_q - want_q) <= limits[EXACT] * np.linalg.norm(want_q)
        assert np.linalg.norm(got - want) <= limits[SOFTMAX] * np.linalg.norm(want)


@pytest.mark.parametrize(("kind", "heads", "kv_heads", "d"), CACHES)
def test_a_saved_cache_comes_back(backend, kind, heads, kv_heads, d):
    """Into a cache of another capacity, at a length within a block; a longer past is refused."""
    if kind == "fp32" and backend.score_cache_dtype != "fp32":
        pytest.skip("no float32 cache")
    rng, length, ops = random(f"saved-{kind}-{heads}-{d}"), 37, backend
    cache, other = (ops.kv_cache(2, kv_heads, d, capacity, kind) for capacity in (80, 300))
    rope, width = ops.upload(values(rng, 300, d)), (heads + 2 * kv_heads) * d
    past, now = (ops.upload(values(rng, n, width).astype(ops.activation_dtype)) for n in (length + 4, 3))
    outs = [ops.upload(np.full((3, heads * d), np.nan, ops.activation_dtype)) for _ in range(2)]
    for layer in range(2):
        ops.rope_append(past, rope=rope, logn=None, cache=cache, layer=layer, start=ops.upload(np.zeros(1, np.int32)))
    for layer in range(2):
        saved = [array.copy() for array in cache.saved(layer, length)]
        other.restore(layer, length, saved)
        again = other.saved(layer, length)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(saved, again, strict=True))
    start = ops.upload(np.array([length], np.int32))
    for store, out in zip((cache, other), outs):
        fresh = ops.upload(ops.download(now))
        ops.rope_append(fresh, rope=rope, logn=None, cache=store, layer=1, start=start)
        ops.cached_attention(fresh, store, 1, start, out=out)
    assert np.array_equal(*map(ops.download, outs))
    for wrong in (saved[:-1], [*saved, saved[0]], [a[:1] for a in saved], [a.astype(np.float64) for a in saved]):
        if kv_heads > 1 or [a.shape for a in wrong] != [a.shape for a in saved] or wrong[0].dtype == np.float64:
            with pytest.raises(ValueError, match="not of this cache"):
                other.restore(0, length, wrong)
    with pytest.raises(ValueError, match="not of this cache"):
        cache.restore(0, 90, other.saved(0, 90))


def test_capture_repeats_a_step_on_new_values(backend):
    rng = random("capture")
    w, k = matrix(rng, 96, 256, 4), 256
    norm_weight = values(rng, k)
    ops, reference = backend, ReferenceOps()
    x, out = ops.empty((1, k)), ops.empty((1, 96), ops.activation_dtype)
    prepared, norm = ops.weight(w), Norm(ops.upload(norm_weight), None, 1e-6)
    ops.write(x, values(rng, 1, k))
    replay = ops.capture(lambda: ops.linear(x, prepared, out=out, norm=norm))
    for _ in range(3):
        fresh, want = values(rng, 1, k), np.empty((1, 96), np.float32)
        ops.write(x, fresh)
        replay()
        reference.linear(fresh, w, out=want, norm=Norm(norm_weight, None, 1e-6))
        assert np.linalg.norm(ops.download(out) - want) <= LIMITS[ops.name][PRODUCT] * np.linalg.norm(want)
