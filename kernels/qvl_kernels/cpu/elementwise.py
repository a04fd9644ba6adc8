"""Elementwise kernels, embedding lookup and argmax."""

from __future__ import annotations

from numba import float32

from qvl_kernels.cpu.quantize import take
from qvl_kernels.cpu.registry import kernel, routine, share, unpack
from qvl_kernels.cpu.simd import (
    fma,
    get_f16,
    get_f32,
    get_i32,
    get_u8,
    get_u16,
    halves,
    loads,
    max_all,
    maximum,
    put_f16,
    put_f32,
    put_i32,
    splats,
    store,
    store_half,
    store_part,
    sum_all,
)

load, half, lowest = loads("f32", 16), halves(16), splats("f32", 16)


@kernel
def add(args, thread, threads):
    """``out = x + y`` of n float32."""
    x, y, out, n = unpack(args, 4)
    first, last = share((n + 15) // 16, thread, threads)
    for i in range(first, last):
        o, count = 64 * i, n - 16 * i
        v = take(x + o, count) + take(y + o, count)
        if count >= 16:
            store(out + o, v)
        else:
            store_part(out + o, v, count)


@kernel
def gather_rows(args, thread, threads):
    """``out[i] = x[index[i]]``, float32 ``[count, k]``; an index past the rows of x is clamped."""
    x, rows, k, index, count, out = unpack(args, 6)
    first, last = share(count, thread, threads)
    for i in range(first, last):
        source = x + 4 * k * min(max(int(get_i32(index + 4 * i)), 0), rows - 1)
        for c in range(0, k, 16):
            target = out + 4 * (i * k + c)
            if k - c >= 16:
                store(target, load(source + 4 * c))
            else:
                store_part(target, take(source + 4 * c, k - c), k - c)


@kernel
def copy(args, thread, threads):
    """``out = x``: n values of 2 (fp16) or 4 (float32) bytes."""
    x, x_size, out, out_size, n = unpack(args, 5)
    first, last = share((n + 15) // 16, thread, threads)
    for i in range(first, last):
        source, target = x + 16 * x_size * i, out + 16 * out_size * i
        if n - 16 * i >= 16:
            v = half(source) if x_size == 2 else load(source)
            if out_size == 2:
                store_half(target, v)
            else:
                store(target, v)
        else:
            for j in range(n - 16 * i):
                s = get_f16(source + 2 * j) if x_size == 2 else get_f32(source + 4 * j)
                if out_size == 2:
                    put_f16(target + 2 * j, s)
                else:
                    put_f32(target + 4 * j, s)


@kernel
def embed(args, thread, threads):
    """``out [count, k] = table[ids]``; ids int32. Ids are clamped to the table."""
    ids, count, w, scales, zeros, perm, bits, group, n, k, out = unpack(args, 11)
    blocks = (k + 127) // 128
    groups = 128 // group
    first, last = share(count * blocks, thread, threads)
    for item in range(first, last):
        token = item // blocks
        block = item - token * blocks
        row = min(max(int(get_i32(ids + 4 * token)), 0), n - 1)
        begin, target = 128 * block, out + 4 * token * k
        if bits == 16:
            for column in range(begin, min(begin + 128, k)):
                put_f32(target + 4 * column, get_f16(w + 2 * (row * k + column)))
            continue
        line, lane = row // 32, row % 32
        base = w + ((line * blocks + block) * (4 * bits) * 32 + lane) * 4
        for column in range(begin, min(begin + 128, k)):
            i = column - begin
            which = ((line * blocks + block) * groups + i // group) * 32 + lane
            if bits == 8:
                code = get_u8(base + i // 4 * 128 + i % 4)
            elif bits == 4:
                code = get_u8(base + i % 64 // 4 * 128 + i % 4)
                code = code >> 4 if i >= 64 else code & 15
            else:
                step, pair = i % 64 // 4, base + i % 64 // 16 * 384 + i % 4 // 2 * 2
                code, third = get_u16(pair + step % 4 // 2 * 128), get_u16(pair + 256)
                if step % 2:
                    code = code >> 1
                else:
                    code = code ^ (third >> 1 if step % 4 else third << 1)
                code = code >> (i % 2 * 8 + (4 if i >= 64 else 0)) & 7
            zero = get_u8(zeros + which) if zeros != 0 else 1 << (bits - 1)
            place = int(get_i32(perm + 4 * column)) if perm != 0 else column
            put_f32(target + 4 * place, float32(code - zero) * get_f16(scales + 2 * which))


@routine
def first_largest(x, n):
    """Return the index of the largest of n float32, the first of ties; -1 if one is not finite."""
    whole = n // 16 * 16
    top = get_f32(x)
    # Zero times NaN or infinity is NaN, and remains NaN in a sum.
    best, zero, broken = lowest(top), lowest(float32(0)), lowest(float32(0))
    for i in range(0, whole, 16):
        v = load(x + 4 * i)
        best, broken = maximum(best, v), fma(v, zero, broken)
    top, nothing = max_all(best), sum_all(broken)
    for i in range(whole, n):
        v = get_f32(x + 4 * i)
        top, nothing = max(top, v), nothing + v * float32(0)
    if nothing != float32(0):
        return -1
    for i in range(0, whole, 16):
        if max_all(load(x + 4 * i)) >= top:
            for j in range(i, i + 16):
                if get_f32(x + 4 * j) >= top:
                    return j
    for i in range(whole, n):
        if get_f32(x + 4 * i) >= top:
            return i
    return 0


@kernel
def argmax(args, thread, threads):
    """``out [rows] int32`` of float32 ``[rows, n]``; see `first_largest`."""
    x, rows, n, out = unpack(args, 4)
    first, last = share(rows, thread, threads)
    for row in range(first, last):
        put_i32(out + 4 * row, first_largest(x + 4 * row * n, n))
