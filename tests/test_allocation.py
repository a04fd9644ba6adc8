"""Bits by layer: sizes are kept, and bits go where they are worth most."""

import numpy as np
import pytest
from conftest import GOLDEN

import qvl_runtime as qvl
from qvl_convert import allocation
from qvl_convert.allocation import choose, parse_size
from qvl_convert.calibration import Sample
from qvl_convert.convert import convert
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError

VL, FAMILIES = GOLDEN / "ckpt" / "tiny-vl", GOLDEN / "families" / "ckpt"
OPTIONS = {"group_size": 32, "device": "reference", "calibration_samples": 3}


@pytest.mark.parametrize(
    ("text", "want"), [("5.5GB", 5_500_000_000), ("900 MB", 900_000_000), ("1gib", 1 << 30), ("64kb", 64_000)]
)
def test_sizes_are_read(text, want):
    assert parse_size(text) == want


@pytest.mark.parametrize("text", ["", "5", "GB", "5TB", "-1GB", "1e3MB", "9" * 400 + "GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(QvlError, match=r"^.{,80}: give a size such as 5\.5GB"):
        parse_size(text)


def test_bits_go_where_they_save_most_for_a_byte():
    losses = [{4: 1.0, 8: 0.1, 16: 0.0}, {4: 8.0, 8: 0.5, 16: 0.0}, {4: 1.0, 8: 0.1, 16: 0.0}]
    sizes = [{4: 10, 8: 20, 16: 40}, {4: 10, 8: 20, 16: 40}, {4: 5, 8: 10, 16: 20}]
    assert choose(losses, sizes, 0) == [4, 4, 4]
    assert choose(losses, sizes, 10) == [4, 8, 4]
    assert choose(losses, sizes, 15) == [4, 8, 8]
    assert choose(losses, sizes, 25) == [8, 8, 8]
    assert choose(losses, sizes, 1000) == [16, 16, 16]


def test_the_file_has_the_size_asked_for_and_beats_one_of_equal_size(tmp_path, blob, model, monkeypatch):
    measured, measure = [], allocation.measure  # the same for every size
    monkeypatch.setattr(allocation, "measure", lambda *args: measured or measured.extend(measure(*args)) or measured)
    smallest = blob("tiny-vl", vision_bits=4, head_bits=4, group_size=32).stat().st_size
    largest = blob("tiny-vl", bits=16).stat().st_size
    prompt, original = "What is this? 这是什么？ 1 + 1 = 2.", model("tiny-vl", bits=16)
    want, errors = original.logits(prompt), []
    for share in (0.15, 0.4, 0.8):
        target = int(smallest + share * (largest - smallest)) // 1000
        out = tmp_path / f"{share}.qvl"
        convert(VL, out, target_size=f"{target}KB", **OPTIONS)
        assert smallest < out.stat().st_size <= target * 1000
        errors.append(float(np.abs(qvl.load(out, device="reference").logits(prompt) - want).mean()))
    assert errors[0] > errors[1] > errors[2] > 0
    mixed = Blob(tmp_path / "0.4.qvl").metadata["quantization"]
    assert any("/" in str(part["bits"]) for part in mixed.values()) or len({p["bits"] for p in mixed.values()}) > 1


def test_measured_losses_fall_with_the_bits(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(allocation, "choose", lambda losses, *_: seen.extend(losses) or [4] * len(losses))
    convert(VL, tmp_path / "x.qvl", target_size="1GB", **OPTIONS)
    assert len(seen) > 6 and all(0 == loss[16] < loss[8] < loss[4] < 1 for loss in seen)


def test_a_tied_head_counts_with_the_embedding(monkeypatch, tmp_path):
    """One matrix for both: its bits are worth what they save in the logits, too."""
    seen = []

    def measure(source, samples, units, plans, device):
        seen.append(units)
        return [{bits: (i + 1) / bits for bits in plans} for i in range(len(units))]

    monkeypatch.setattr(allocation, "measure", measure)
    monkeypatch.setattr(allocation, "choose", lambda losses, *_: seen.append(losses) or [4] * len(losses))
    convert(FAMILIES / "q3-tied", tmp_path / "x.qvl", target_size="1GB", **OPTIONS)
    units, losses = seen
    place = {unit.kind: i for i, unit in enumerate(units)}
    assert units[place["norm"]].matrices == ()
    assert losses[place["embedding"]][4] == (place["embedding"] + 1 + place["norm"] + 1) / 4


def test_one_of_the_few_samples_has_a_picture():
    def sample(*slots):
        return Sample([1], list(slots))

    texts, picture = [sample() for _ in range(9)], sample("slot")
    assert allocation._few([*texts, picture]) == [*texts[:3], picture]
    assert allocation._few([picture, *texts]) == [picture, *texts[:3]]
    assert allocation._few(texts) == texts[:4] and allocation._few([picture]) == [picture]


def test_impossible_wishes_are_errors_and_leave_nothing(tmp_path):
    with pytest.raises(QvlError, match=r"too small: with 4 bits everywhere .* has \d+\.\d+ MB"):
        convert(VL, tmp_path / "x.qvl", target_size="10KB", **OPTIONS)
    with pytest.raises(QvlError, match="quantized already"):
        convert(GOLDEN / "ckpt" / "tiny-vl-gptq", tmp_path / "x.qvl", target_size="1GB", **OPTIONS)
    for given in ("bits", "vision_bits", "head_bits"):
        with pytest.raises(QvlError, match="a target size chooses the bits: leave out"):
            convert(VL, tmp_path / "x.qvl", target_size="1GB", **{given: 4}, **OPTIONS)
    assert list(tmp_path.iterdir()) == []
