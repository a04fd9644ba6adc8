"""The loops of `gptq` and `hessian`, compiled: what is done to each row by itself."""

from __future__ import annotations

import math

import numba
import numpy as np

from qvl_convert.jit import jit

PASSES = 3
"""Rounds of `descend` over a group's integers, with one scale."""

HOPELESS = 2
"""How much worse than the best scale one is behind which `search` looks no further."""


@numba.njit(inline="always")
def _half(x):
    """Round `x` to a nonzero float16 value."""
    exponent = max(math.frexp(x)[1], -13)
    steps = np.rint(math.ldexp(x, 11 - exponent))
    return np.float32(math.ldexp(steps if steps != 0 else 1.0, exponent - 11))


@numba.njit(inline="always")
def _nearest(x, low, high):
    return min(max(np.rint(x), low), high)


@numba.njit(fastmath=True)
def _loss(w, price, scale, low, high):
    inverse, loss = np.float32(1) / scale, np.float32(0)
    for i in range(len(w)):
        d = w[i] - scale * _nearest(w[i] * inverse, low, high)
        loss += price[i] * d * d
    return loss


@numba.njit(fastmath=True)
def _losses(w, price, scale, low, high):
    """`_loss` with this scale and with its negative, whose integers are the negative ones."""
    inverse, loss, negative = np.float32(1) / scale, np.float32(0), np.float32(0)
    for i in range(len(w)):
        nearest = np.rint(w[i] * inverse)
        d = w[i] - scale * min(max(nearest, low), high)
        e = w[i] - scale * min(max(nearest, -high), -low)
        loss += price[i] * d * d
        negative += price[i] * e * e
    return loss, negative


@jit()
def search(w, price, top, group_size, middle, scales, zeros):
    """`gptq.search_scales`; `middle`: the zero point of symmetric codes, or -1."""
    n, k = w.shape
    top = np.float32(top)
    for row in numba.prange(n):
        for group in range(scales.shape[1]):
            begin, end = group * group_size, min((group + 1) * group_size, k)
            part, cost = w[row, begin:end], price[begin:end]
            low, high = np.float32(0), np.float32(0)
            for x in part:
                low, high = min(low, x), max(high, x)
            span = 2 * max(high, -low) if middle >= 0 else high - low
            best, best_scale, best_zero = np.float32(np.inf), _half(0.0), np.float32(max(middle, 1))
            for attempt in range(60 if span > 0 else 0):
                size, least = span * np.float32(1.05 - 0.0125 * attempt), np.float32(np.inf)
                if middle >= 0:
                    zero, scale = np.float32(middle), _half(size / (top + 1))
                    for sign, loss in zip((1, -1), _losses(part, cost, scale, -zero, top - zero)):
                        least = min(least, loss)
                        if loss < best:
                            best, best_scale, best_zero = loss, sign * scale, zero
                else:
                    scale = _half(size / top)
                    for option in range(-1, 2):
                        zero = min(max(np.rint(-low * (size / span) / scale) + option, np.float32(1)), top)
                        loss = _loss(part, cost, scale, -zero, top - zero)
                        least = min(least, loss)
                        if loss < best:
                            best, best_scale, best_zero = loss, scale, zero
                # by then large values are clipped, and a still smaller scale clips more of them
                if least > HOPELESS * best:
                    break
            scales[row, group], zeros[row, group] = best_scale, np.int32(best_zero)


@numba.njit(fastmath={"contract"})
def _add(y, factor, x):
    for i in range(len(y)):
        y[i] += factor * x[i]


@numba.njit(fastmath={"contract"})
def add_row(y, factor, matrix, row):
    for i in range(len(y)):
        y[i] += factor * matrix[np.uint64(row), np.uint64(i)]


@jit()
def visit(w, order, out):
    """The columns of `w` in visiting order."""
    for row in numba.prange(len(w)):
        x, y = w[row], out[row]
        for i in range(len(order)):
            y[i] = x[order[i]]


@jit()
def leave(codes, order, out):
    """The inverse of `visit`, of codes."""
    for row in numba.prange(len(codes)):
        x, y = codes[row], out[row]
        for i in range(len(order)):
            y[order[i]] = x[i]


@jit()
def divide(a, divisor, out):
    """Compute ``a / divisor`` of a matrix."""
    for i in numba.prange(len(a)):
        row, to = a[i], out[i]
        for j in range(len(row)):
            to[j] = row[j] / divisor


@jit()
def reorder(a, order, out):
    """Take rows and columns of a square matrix in this order."""
    for i in numba.prange(len(order)):
        row, to = a[order[i]], out[i]
        for j in range(len(order)):
            to[j] = row[order[j]]


@jit()
def normalize(lower, diagonal, out):
    """Write what is above the diagonal of U: the Cholesky factor from its end backwards, each column over its pivot."""
    k = len(diagonal)
    for i in numba.prange(k):
        row, to = lower[k - 1 - i], out[i]
        for j in range(i + 1, k):
            to[j] = np.float32(row[k - 1 - j]) / diagonal[j]


@jit(fastmath={"contract"})
def errors(w, codes, scales, zeros, group_size, error):
    """``w`` less what the codes stand for."""
    n, k = w.shape
    for row in numba.prange(n):
        for group in range(scales.shape[1]):
            begin, end = group * group_size, min((group + 1) * group_size, k)
            scale, zero = scales[row, group], np.float32(zeros[row, group])
            part, code, out = w[row, begin:end], codes[row, begin:end], error[row, begin:end]
            for i in range(len(part)):
                out[i] = part[i] - scale * (np.float32(code[i]) - zero)


@numba.njit(fastmath=True)
def _dot(x, y):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@numba.njit(fastmath={"contract"})
def _wish(code, slope, relax, inverse, low, high, wish):
    for i in range(len(code)):
        wish[i] = _nearest(code[i] + slope[i] * relax[i] * inverse, low, high)


@jit(fastmath={"contract"})
def centered(codes, zeros, start, group_size, out):
    """The integers of a block, less their zero points, as float32 ``[N, width]``."""
    n, width = out.shape
    for row in numba.prange(n):
        for begin in range(0, width, group_size):
            end = min(begin + group_size, width)
            zero = np.float32(zeros[row, (start + begin) // group_size])
            code, to = codes[row, start + begin : start + end], out[row, begin:end]
            for i in range(len(to)):
                to[i] = np.float32(code[i]) - zero


@numba.njit(fastmath={"contract"})
def _copy(x, y):
    for i in range(len(x)):
        y[i] = x[i]


@numba.njit(fastmath={"contract"})
def _sum(x, y, out):
    for i in range(len(x)):
        out[i] = x[i] + y[i]


@numba.njit(fastmath={"contract"})
def _settle(w, scale, chosen, low, codes, error, last, moved):
    """Write what a group has become, and by how much its errors changed in this sweep and in the last two."""
    for i in range(len(chosen)):
        codes[i] = np.uint8(chosen[i] - low)
        new = w[i] - scale * chosen[i]
        change = new - error[i]
        error[i] = new
        moved[i] = last[i] + change
        last[i] = change


@jit(fastmath={"contract"})
def descend(w, codes, scales, zeros, error, slopes, last, moved, ahead, inner, spreads, integers, start, top, group):
    """Coordinate descent inside one block of columns, which begins at `start`.

    A change ``d`` of the block's errors costs ``2 d . slope + d . inner . d``.

    Parameters
    ----------
    w, codes, scales, zeros : ndarray
        As in `gptq.refine`.
    error : ndarray
        float32 ``[N, K]``, `w` less what the codes stand for.
    slopes : ndarray
        float32 ``[N, K]``, ``error @ H`` of a block as it was when the block was left.
    last, moved : ndarray
        float32 ``[N, K]``: how much the errors changed in a block's last sweep, and in its last two.
    ahead : ndarray
        float32 ``[N, width]``: what the other blocks added to the slopes since then.
    inner : ndarray
        float32 ``[width, width]``, H of the block.
    spreads : ndarray
        float32 ``[groups, N, width]``: the integers of each group times its rows of `inner`.
    integers : ndarray
        float32 ``[N, width]``, from `centered`.
    """
    n, width = ahead.shape
    top = np.float32(top)
    diagonal = np.diag(inner).copy()
    relax = np.float32(1) / diagonal
    for row in numba.prange(n):
        buffers = np.empty((6, width), np.float32)
        trial, wish, code, best_code, best_slope = buffers[0], buffers[1], buffers[2], buffers[3], buffers[4]
        slope = buffers[5]
        _sum(slopes[row, start : start + width], ahead[row], slope)
        for begin in range(0, width, group):
            end = min(begin + group, width)
            index = (start + begin) // group
            scale, low = scales[row, index], -np.float32(zeros[row, index])
            high = top + low
            now, spread = integers[row, begin:end], spreads[begin // group, row]
            mine, here, want, chosen = code[begin:end], trial[begin:end], wish[begin:end], best_code[begin:end]
            ease, bent = relax[begin:end], diagonal[begin:end]
            # with the integers fixed the objective is a parabola in the scale, its minimum at scale + up / bend
            up, bend = _dot(now, slope[begin:end]), _dot(now, spread[begin:end])
            fitted = _half(scale + up / bend) if bend > 0 else scale
            best, best_scale = np.float32(np.inf), scale
            for attempt in range(1 if fitted == scale else 2):
                candidate = fitted if attempt == 0 else scale
                step, inverse = scale - candidate, np.float32(1) / candidate
                gain = 2 * step * up + step * step * bend
                _copy(slope, trial)
                _add(trial, step, spread)
                _copy(now, mine)
                for _ in range(PASSES):
                    _wish(mine, here, ease, inverse, low, high, want)
                    for i in range(end - begin):
                        if want[i] == mine[i]:
                            continue
                        wanted = _nearest(mine[i] + here[i] * ease[i] * inverse, low, high)
                        d = candidate * (mine[i] - wanted)
                        change = d * (2 * here[i] + d * bent[i])
                        if change < 0:
                            gain += change
                            mine[i] = wanted
                            add_row(trial, d, inner, begin + i)
                if gain < best:
                    best, best_scale = gain, candidate
                    _copy(mine, chosen)
                    _copy(trial, best_slope)
            _copy(best_slope, slope)
            scales[row, index] = best_scale
            here_too = slice(start + begin, start + end)
            _settle(
                w[row, here_too], best_scale, chosen, low, codes[row, here_too], error[row, here_too],
                last[row, here_too], moved[row, here_too],
            )  # fmt: skip
        _copy(slope, slopes[row, start : start + width])
