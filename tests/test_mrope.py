"""Rotary positions of a sequence: rows for a prompt, for what follows it, and after the cache has grown."""

import dataclasses

import numpy as np
import pytest
from families import config

from qvl_kernels.reference import ReferenceOps
from qvl_runtime.families.qwen2_vl.positions import position_ids, rotary_rows
from qvl_runtime.families.qwen2_vl.rotary import Mrope
from qvl_runtime.families.rope import TableRotary
from qvl_runtime.inputs.pictures import Picture
from qvl_runtime.inputs.prompt import Slot


def slot(start: int, rows: int, columns: int) -> Slot:
    return Slot(start, Picture(b"", b"", rows * columns, (rows, columns), (1, 1), (1, 1)))


def expected(name: str, length: int, slots: list[Slot], capacity: int) -> np.ndarray:
    positions, delta = position_ids(length, [(s.start, *s.picture.grid, s.time) for s in slots])
    following = np.arange(length, capacity) + delta
    return rotary_rows(np.concatenate([positions, np.stack([following] * 3)], axis=1), config(name))


@pytest.mark.parametrize("name", ["q2-tied", "q3-tied"])
def test_rows(name):
    rotary = Mrope(ReferenceOps(), config(name), 40)
    assert (rotary.alpha, rotary.scaling(10**6), rotary.logn) == (1, 1, None)
    np.testing.assert_array_equal(rotary.rope, expected(name, 0, [], 40))
    for length, slots in [(20, [slot(3, 2, 4)]), (30, [slot(3, 2, 4), slot(13, 3, 3)]), (30, []), (5, [])]:
        rotary.place(length, slots)
        np.testing.assert_array_equal(rotary.rope, expected(name, length, slots, 40))
    rotary.place(20, [slot(3, 2, 4)])
    rotary.reserve(64)
    np.testing.assert_array_equal(rotary.rope, expected(name, 20, [slot(3, 2, 4)], 64))
    rotary.reserve(10)
    assert len(rotary.rope) == 64


def test_only_rows_that_change_are_written():
    """A turn of a long conversation does not compute the whole table again."""
    written = []

    class Ops(ReferenceOps):
        def write(self, target, values):
            written.append(len(target))
            super().write(target, values)

    rotary = Mrope(Ops(), config("q2-tied"), 1000)
    rotary.place(600, [])
    rotary.place(900, [])
    assert written == [1000]
    rotary.place(900, [slot(800, 5, 5)])
    assert written == [1000, 1000 - 801]


def test_an_interrupt_leaves_no_wrong_rows():
    class Ops(ReferenceOps):
        broken = False

        def write(self, target, values):
            if self.broken:
                raise KeyboardInterrupt
            super().write(target, values)

    ops = Ops()
    rotary = Mrope(ops, config("q2-tied"), 30)
    ops.broken = True
    with pytest.raises(KeyboardInterrupt):
        rotary.place(20, [slot(3, 2, 4)])
    ops.broken = False
    rotary.place(20, [])
    np.testing.assert_array_equal(rotary.rope, expected("q2-tied", 20, [], 30))


def test_an_interrupt_while_tables_grow_leaves_both_to_grow():
    class Ops(ReferenceOps):
        broken = False

        def upload(self, array):
            if self.broken:
                raise KeyboardInterrupt
            return super().upload(array)

    ops = Ops()
    rotary = TableRotary(ops, 8, lambda count, alpha: np.zeros((count, 4), np.float32), np.ones)
    ops.broken = True
    with pytest.raises(KeyboardInterrupt):
        rotary.reserve(16)
    ops.broken = False
    rotary.reserve(16)
    assert len(rotary.rope) == len(rotary.logn) == 16


def test_sections_are_of_half_the_head():
    """A wrong order of sections moves height and width."""
    positions = np.array([[5], [7], [11]])
    chunked = rotary_rows(positions, config("q2-tied"))
    interleaved = rotary_rows(positions, dataclasses.replace(config("q3-tied"), head_dim=16, rope_theta=200.0))
    assert not np.allclose(chunked, interleaved)
