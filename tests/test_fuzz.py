"""A sample of what bench/fuzz.py runs by the hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
        import fuzz

        yield fuzz


def test_damaged_files_load_or_are_refused_in_one_line(fuzz, tmp_path):
    ends, failures = fuzz.run(fuzz.make_targets([], tmp_path), 220, seed=0)
    assert not failures
    assert sum(ends.values()) == 220 and ends["refused"] > 100


def test_the_good_files_load(fuzz, tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    for name, target in fuzz.make_targets([], scratch).items():
        for original in target.originals:
            if name not in ("adapter", "data"):  # its weights are missing; a picture of it is
                assert fuzz.outcome(target, original, tmp_path) == "loaded", name


def test_what_escapes_is_told(fuzz, tmp_path):
    def several_lines(path):
        raise fuzz.QvlError("a\nb")

    def traceback(path):
        raise KeyError("x")

    def memory(path):
        return bytearray(8 << 30)

    for read, what in ((several_lines, "not one line"), (traceback, "KeyError"), (memory, "MemoryError")):
        ends, failures = fuzz.run({"x": fuzz.Target([b"abc"], "x", read)}, 1, seed=0)
        assert what in failures[0] and not any(ends.values())
