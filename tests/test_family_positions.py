"""M-RoPE positions, rotary rows, windows and learned positions of the newer families, against the golden data."""

import dataclasses

import numpy as np
import pytest
from families import GOLDEN, config, read

from qvl_runtime.families.qwen2_5_vl.windows import windows
from qvl_runtime.families.qwen2_vl.positions import patch_positions, patch_rotary, position_ids, rotary_rows
from qvl_runtime.families.qwen3_vl.learned_positions import interpolate

TABLES = np.load(GOLDEN / "tables.npz")
IMAGE_CASES = [case for case in read("positions.json") if case["kind"] == "image"]


@pytest.mark.parametrize("case", IMAGE_CASES, ids=range(len(IMAGE_CASES)))
def test_positions_of_pictures(case):
    slots, length = [], 0
    for part in case["pattern"]:
        if isinstance(part, int):
            length += part
        else:
            _, rows, columns = part
            slots.append((length, rows // 2, columns // 2, None))
            length += rows * columns // 4
    positions, delta = position_ids(length, slots)
    assert positions.tolist() == case["position_ids"]
    assert delta == case["delta"]


def halves(name: str) -> np.ndarray:
    """A golden table, whose halves are equal, as cos and sin side by side."""
    cos, sin = TABLES[f"{name}.cos"], TABLES[f"{name}.sin"]
    return np.concatenate([cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]], axis=-1)


@pytest.mark.parametrize(("key", "checkpoint"), [("q2", "q2-tied"), ("q3", "q3-tied")])
def test_rotary_rows(key, checkpoint):
    about = read("tables.json")
    positions = np.array(about["position_ids"])
    published = dataclasses.replace(
        config(checkpoint),
        head_dim=128,
        rope_theta=about[key]["rope_theta"],
        mrope_section=tuple(about[key]["mrope_section"]),
    )
    rows, expected = rotary_rows(positions, published), halves(key)
    assert rows.dtype == np.float32
    limit = 2e-7 * (1 + positions.max(axis=0))[:, None]
    assert (np.abs(rows - expected) <= limit).all()


@pytest.mark.parametrize("name", [name for name in TABLES.files if name.endswith(".index")])
def test_learned_positions(name):
    rows, columns = map(int, name.split(".")[1].split("x"))
    table = np.random.default_rng(0).normal(size=(2304, 3)).astype(np.float32)
    taps, weights = TABLES[name].astype(int), TABLES[name.replace("index", "weight")]
    expected = (table[taps] * weights[..., None]).sum(axis=1)
    np.testing.assert_allclose(interpolate(table, rows, columns), expected, atol=1e-6)


@pytest.mark.parametrize("case", read("window_index.json")["cases"])
def test_windows(case):
    order, bounds, before = [], [0], 0
    for frames, rows, columns in case["grid_thw"]:
        for _ in range(frames):
            cells, lengths = windows(rows // 2, columns // 2, 4)
            order += (cells + before).tolist()
            bounds += (bounds[-1] + 4 * np.cumsum(lengths)).tolist()
            before += len(cells)
    assert order == case["window_index"]
    assert bounds == case["cu_window_seqlens"]


@pytest.mark.parametrize("width", [64, 72, 80])
def test_patch_rotary(width):
    places = np.array(read("tables.json")["vision_hw"])
    vision = dataclasses.replace(config("q2-tied").visual, width=width * 4)
    side = places.max() + 1 + (places.max() + 1) % 2
    found = np.stack(patch_positions(side, side), axis=1)
    chosen = [np.flatnonzero((found == place).all(axis=1)).item() for place in places]
    limit = 2e-7 * (1 + places.max(axis=1))[:, None]
    assert (np.abs(patch_rotary(side, side, vision)[chosen] - halves(f"vision{width}")) <= limit).all()


def test_patches_of_a_token_follow_one_another():
    assert patch_positions(4, 4)[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert patch_positions(4, 4)[1].tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3]
