"""Rounding a block of columns, compiled: `ROWS` rows side by side, then each row by itself."""

from __future__ import annotations

import numba
import numpy as np

from qvl_convert.gptq_kernels import add_row
from qvl_convert.jit import jit
from qvl_kernels.cpu.simd import (
    LANES,
    absolute,
    fma,
    get_f32,
    loads,
    max_all,
    maximum,
    minimum,
    rint,
    splats,
    store,
    to_f32,
)

ROWS = 32
"""Rows in the lanes of vectors."""

STEP = 4 * ROWS
"""Bytes of a column of `ROWS` rows."""

CHECKED = 8
"""Integers among which the descent looks for a change at once."""

load, splat = loads("f32", LANES, ROWS // LANES), splats("f32", LANES)
part = loads("f32", CHECKED)


@numba.njit
def _round_column(at, weight, target, scale, low, high):
    """Round a column; what `at` addresses becomes its rounding error. Returns the weights' errors."""
    wanted, step, least = load(target + at), load(scale + at), load(low + at)
    code = to_f32(rint(minimum(maximum(wanted / step, least), load(high + at))))
    rest = load(weight + at) - step * code
    store(target + at, wanted - step * code)
    store(weight + at, code - least)
    return rest


@numba.njit
def _round_columns(width, weight, target, scale, low, high, upper):
    for i in range(0, width, 2):
        at, row = i * STEP, upper + 4 * i * width
        rest = _round_column(at, weight, target, scale, low, high)
        if i + 1 == width:
            break
        beside = target + at + STEP
        store(beside, fma(rest, splat(get_f32(row + 4 * (i + 1))), load(beside)))
        second = _round_column(at + STEP, weight, target, scale, low, high)
        for j in range(i + 2, width):
            to = target + j * STEP
            pushed = fma(rest, splat(get_f32(row + 4 * j)), load(to))
            store(to, fma(second, splat(get_f32(row + 4 * (width + j))), pushed))


@numba.njit
def _spread(w, ahead, weight, target):
    for i in range(len(ahead)):
        weight[i], target[i] = w[i], w[i] + ahead[i]


@numba.njit
def _spread_scales(scales, zeros, groups, top, scale, low, high):
    for i in range(len(groups)):
        group = np.uint64(groups[i])
        zero = np.float32(zeros[group])
        scale[i], low[i], high[i] = scales[group], -zero, top - zero


@numba.njit
def _collect(target, weight, error, codes):
    for i in range(len(target)):
        error[i], codes[i] = target[i], np.uint8(np.int32(weight[i]))


@jit()
def round_columns(w, ahead, upper, groups, scales, zeros, top, error, codes):
    """Round a block's columns one after another, each rounding error pushed onto the columns to come.

    Parameters
    ----------
    w, ahead : ndarray
        float32 ``[N, width]`` in visiting order: the weights, and what the blocks before push onto them.
    upper : ndarray
        float32 ``[width, width]``: U of the block.
    groups : ndarray
        int ``[width]``: the group of each column.
    scales, zeros : ndarray
        As in `gptq.refine`.
    error, codes : ndarray
        float32 and uint8 ``[N, width]`` in visiting order: the results; `error` is that of the roundings alone.
    """
    n, width = ahead.shape
    for tile in numba.prange((n + ROWS - 1) // ROWS):
        first = tile * ROWS
        count = min(ROWS, n - first)
        buffers = np.ones((5, width, ROWS), np.float32)
        weight, target, scale, low, high = buffers[0], buffers[1], buffers[2], buffers[3], buffers[4]
        for r in range(count):
            _spread(w[first + r], ahead[first + r], weight[:, r], target[:, r])
            _spread_scales(scales[first + r], zeros[first + r], groups, top, scale[:, r], low[:, r], high[:, r])
        _round_columns(
            width, weight.ctypes.data, target.ctypes.data, scale.ctypes.data, low.ctypes.data, high.ctypes.data,
            upper.ctypes.data,
        )  # fmt: skip
        for r in range(count):
            _collect(target[:, r], weight[:, r], error[first + r], codes[first + r])


@numba.njit
def _moves(at, stride):
    """Whether one of `CHECKED` integers gains by a change; rows of `stride` bytes hold what `settle` names."""
    now = part(at)
    wanted = now + part(at + stride) / part(at + 2 * stride)
    wanted = to_f32(rint(minimum(maximum(wanted, part(at + 3 * stride)), part(at + 4 * stride))))
    return max_all(absolute(wanted - now)) > 0


@numba.njit
def _open(codes, slopes, diagonal, scale, low, code, slope, bend):
    for i in range(len(codes)):
        code[i], slope[i], bend[i] = np.float32(codes[i]) + low[i], slopes[i], diagonal[i] * scale[i]


@numba.njit
def _close(w, scale, code, low, error, codes):
    for i in range(len(codes)):
        error[i], codes[i] = w[i] - scale[i] * code[i], np.uint8(np.int32(code[i] - low[i]))


@jit(fastmath={"contract"})
def settle(w, slopes, local, groups, scales, zeros, top, turns, error, codes):
    """Settle a block's integers among one another.

    What the errors of a block cost, given that all later columns make up for them as well as they can, is ``e . local .
    e``: coordinate descent lowers it.

    Parameters
    ----------
    w, groups, scales, zeros, codes : ndarray
        As in `round_columns`; `codes` change.
    slopes : ndarray
        float32 ``[N, width]``: the rounding errors times ``D U^T``.
    local : ndarray
        float32 ``[width, width]``: ``U D U^T`` of the block.
    turns : int
        Rounds of the descent, backwards first.
    error : ndarray
        float32 ``[N, width]``: the weights less what the codes stand for.
    """
    n, width = slopes.shape
    pieces = (width + CHECKED - 1) // CHECKED
    diagonal = np.diag(local).copy()
    for row in numba.prange(n):
        buffers = np.zeros((6, pieces * CHECKED), np.float32)
        code, slope, bend, low, high, scale = buffers[0], buffers[1], buffers[2], buffers[3], buffers[4], buffers[5]
        bend[width:] = 1
        _spread_scales(scales[row], zeros[row], groups, top, scale, low, high)
        _open(codes[row], slopes[row], diagonal, scale, low, code, slope, bend)
        for turn in range(turns):
            changed = False
            for number in range(pieces):
                begin = CHECKED * (number if turn % 2 else pieces - 1 - number)
                if not _moves(buffers.ctypes.data + 4 * begin, 4 * buffers.shape[1]):
                    continue
                for step in range(CHECKED):
                    i = begin + (step if turn % 2 else CHECKED - 1 - step)
                    wanted = min(max(np.rint(code[i] + slope[i] / bend[i]), low[i]), high[i])
                    if wanted != code[i]:
                        add_row(slope[:width], scale[i] * (code[i] - wanted), local, i)
                        code[i] = wanted
                        changed = True
            if not changed:
                break
        _close(w[row], scale, code, low, error[row], codes[row])
