"""What the tests of the GPU kernels share: launches in the PTX interpreter, and weights in the kernels' layout."""

from __future__ import annotations

import numpy as np
from fakes.compiled import ARCHITECTURE, CompiledImages
from fakes.ptx_gpu import PtxDriver

from qvl_kernels.gpu import signatures as s
from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.graph import Queue
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.memory import Memory
from qvl_kernels.packing import Matrix, pack, round_up
from qvl_kernels.reference import ReferenceOps

reference = ReferenceOps()
HALF = np.float16
images = CompiledImages(ARCHITECTURE)


def constants(name):
    """What a kernel was compiled with."""
    return images[name].constants


class Poisoned(np.ndarray):
    """A poisoned array, which the device may not read before it has written it."""

    written: np.ndarray


def poisoned(shape, dtype=np.float32):
    dtype = np.dtype(dtype)
    array = np.full(shape, np.nan if dtype.kind == "f" else 77, dtype).view(Poisoned)
    array.written = np.zeros(array.nbytes, np.uint8)
    return array


def launch(name, grid, *args, reached=(), observer=None):
    """Run a kernel with the launch arguments of its signature on the arrays where they are; `reached` are those that it
    finds by an address in another."""
    driver = PtxDriver(seed=len(name) + sum(grid))
    driver.observer = observer
    launcher = Launcher(driver, Queue(driver, Memory(driver)), images)
    arrays = [value for value in (*args, *reached) if isinstance(value, np.ndarray)]
    for array, written in {owner(array)[0].ctypes.data: owner(array) for array in arrays}.values():
        driver.adopt(array, written)
    launcher(name, grid, *(on_device(value) if isinstance(value, np.ndarray) else value for value in args))


def owner(array):
    """The base array of a slice, all of which the kernel may use, and a mask of what was written so far."""
    written = getattr(array, "written", None)
    while isinstance(array.base, np.ndarray):
        array = array.base
        written = getattr(array, "written", written)
    return array, written


def on_device(array):
    assert array.flags.c_contiguous
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, array)


def cleared(has_padding, shape, dtype):
    """As in loading: rows that are not written contain zeros."""
    return np.zeros(shape, dtype) if has_padding else poisoned(shape, dtype)


def flags(**given):
    return sum(getattr(s, name) for name, wanted in given.items() if wanted)


def ceil(a, b):
    return -(-a // b)


def close(actual, expected, limit):
    """Errors relative to a value and to its row: the accuracy that products of rounded numbers can reach."""
    actual, expected = actual.astype(np.float32), expected.astype(np.float32)
    size = np.abs(expected) + np.median(np.abs(expected), axis=-1, keepdims=True) + 1e-6
    error = float(np.max(np.abs(actual - expected) / size))
    assert error < limit, f"error {error:.2e}, limit {limit:.0e}"


def matrix(rng, n, k, bits, group=128, *, asymmetric=False, perm=False, bias=False):
    order = rng.permutation(k).astype(np.int32) if perm else None
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    if bits == 16:
        return Matrix(n, k, 16, 128, (rng.standard_normal((n, k)) * 0.05).astype(HALF), bias=offset)
    groups = ceil(k, group)
    codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * (0.02 if bits == 4 else 0.001)).astype(HALF)
    zeros = rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8) if asymmetric else None
    return pack(codes, scales, bits, group, zeros=zeros, perm=order, bias=offset)


class OnDevice:
    """A matrix in the layout of the kernels, brought there by the kernels that do it."""

    def __init__(self, m: Matrix):
        self.matrix, self.blocks, self.rows = m, ceil(m.k, 128), round_up(m.n, 128)
        self.padded = 128 * self.blocks
        self.shift = (m.group_size // 32).bit_length() - 1
        self.kind = "fp16" if m.bits == 16 else f"int{m.bits}" + ("" if m.group_size == 128 else "_fine")
        if m.bits == 16:
            self.codes, self.scales = cleared(m.n < self.rows, (self.rows, self.padded), HALF), None
            half = m.n // 2
            for first, part in ((0, m.weight[:half]), (half, m.weight[half:])):
                if len(part):
                    launch("pad_rows.any", (ceil(self.padded, s.ELEMENTS), len(part)), np.ascontiguousarray(part),
                           self.codes, first, m.k, self.padded)  # fmt: skip
            return
        groups = self.padded // m.group_size
        padded = round_up(m.n, 32) < self.rows
        self.codes = cleared(padded, (self.blocks, self.rows, 4 * m.bits), np.int32)
        self.scales = cleared(padded, (groups, self.rows), np.int32)
        for first in range(len(m.weight)):
            piece = slice(first, first + 1)
            launch(f"reorder.int{m.bits}", (self.blocks, 1), m.weight[piece].view(np.int32), self.codes,
                   first, self.rows, self.blocks)  # fmt: skip
        zeros = m.zeros
        launch("pack_scales.any", (groups, len(m.scales)), m.scales, zeros, self.scales, 0, self.rows, groups,
               8 if m.bits == 4 else 128, flags(HAS_ZEROS=zeros is not None))  # fmt: skip

    def prepare(self, x, norm=None):
        """x in the products' input form: normalized, permuted, padded, fp16."""
        m, k = x.shape
        out, perm = poisoned((m, self.padded), HALF), self.matrix.perm
        if norm is None:
            launch("gather.any", (ceil(self.padded, s.ELEMENTS), m), x, None, perm, out, k, self.padded,
                   flags(PERMUTED=perm is not None, X_HALF=x.dtype == HALF, OUT_HALF=True))  # fmt: skip
        else:
            launch(s.norm_kernel(k), (m,), x, norm.weight, norm.bias, perm, out, k, self.padded, norm.eps,
                   flags(PERMUTED=perm is not None, LAYER_NORM=norm.bias is not None, OUT_HALF=True))  # fmt: skip
        return out

    def prepare_few(self, x, norm):
        """The same of few rows, with the bits of a lone row."""
        m, k = x.shape
        out, perm = poisoned((m, self.padded), HALF), self.matrix.perm
        launch("few_norm.any", (m,), x, norm.weight, perm, out, self.blocks, k, k, norm.eps,
               flags(ORDERED=perm is not None))  # fmt: skip
        return out


def given(x, w: OnDevice, programs, split, norm=None, lone=False):
    """A product's arguments for its input, the eps, and the flags; `lone`: its programs prepare the row."""
    if not lone:
        return (w.prepare(x, norm), None, None, None), 0.0, 0
    prepared = poisoned((programs, 128 * ceil(w.blocks, split)), HALF)
    known = flags(NORM=norm is not None, GATHER=norm is None, ORDERED=w.matrix.perm is not None)
    if norm is None:
        return (x.astype(HALF), None, w.matrix.perm, prepared), 0.0, known
    return (x, norm.weight, w.matrix.perm, prepared), norm.eps, known


def tiles(kind: str) -> list[int]:
    """The rows of the tiles of the products with these weights."""
    names = [name.split(".") for name in s.names(images.architecture, "linear")]
    return [int(variant.removeprefix("rows")) for _, found, variant in names if found == kind]


def linear(x, w: OnDevice, out, *, rows=16, split=1, norm=None, activation=None, residual=None, gate=None,
           lone=False):  # fmt: skip
    """A product with tiles of `rows`, or the nearest number that there is for these weights; what it prepared."""
    name = f"linear.{w.kind}.rows{min(tiles(w.kind), key=lambda found: abs(found - rows))}"
    shape = constants(name)
    m, n = x.shape[0], w.matrix.n
    count = ceil(m, shape["BM"]) * (w.rows // shape["BN"])
    partials, counters = poisoned((count, split, shape["BM"] * shape["BN"])), np.zeros(count, np.int32)
    source, eps, known = given(x, w, count * split, split, norm, lone)
    launch(name, (count, split), *source, w.codes, w.scales, w.matrix.bias,
           residual if gate is None else gate, out, partials, counters, m, n, w.rows, w.blocks, w.shift, x.shape[1],
           eps, known | flags(BIAS=w.matrix.bias is not None, RESIDUAL=residual is not None, GATE=gate is not None,
                         OUT_HALF=out.dtype == HALF, GELU=activation == "gelu", GELU_TANH=activation == "gelu_tanh",
                         QUICK_GELU=activation == "quick_gelu"))  # fmt: skip
    assert not counters.any()
    return source[3]


def activations(rng, m, k, *, outlier=False):
    x = rng.standard_normal((m, k)).astype(np.float32)
    if outlier:
        x[:, k // 3] *= 1000
    return x
