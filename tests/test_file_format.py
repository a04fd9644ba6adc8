"""A reader made from docs/file-format.md alone finds the weights that the program computes with."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors import safe_open

from qvl_runtime.blob import Blob
from qvl_runtime.families.specs import MatrixSpec


def weight(tensors: dict[str, np.ndarray], name: str, n: int, k: int) -> np.ndarray:
    """Read a matrix, weight by weight as the document has it."""
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].astype(np.float32)
    packed, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
    lines = packed.shape[2]
    group = 128 * packed.shape[1] // scales.shape[1]
    if lines == 12:
        a, b, c = (np.ascontiguousarray(packed[:, :, t::3]).view("<u2") for t in range(3))
        four = np.empty((*packed.shape[:2], 16, 32, 2), "<u2")
        for t, words in enumerate((a ^ (c << 1), a >> 1, b ^ (c >> 1), b >> 1)):
            four[:, :, t::4] = words & 0x7777
        packed = four.view(np.uint8)
    r, c = np.indices((n, k))
    block, column, i, j = r // 32, c // 128, r % 32, c % 128
    if lines == 32:
        q = packed[block, column, j // 4, i, j % 4]
    else:
        byte = packed[block, column, j % 64 // 4, i, j % 4]
        q = np.where(j < 64, byte & 15, byte >> 4)
    at = block, c // group, i
    zero = tensors[f"{name}.zeros"][at] if f"{name}.zeros" in tensors else {12: 4, 16: 8, 32: 128}[lines]
    w = scales[at].astype(np.float32) * (q.astype(np.float32) - zero)
    if f"{name}.perm" in tensors:
        packed_order, w = w, np.empty_like(w)
        w[:, tensors[f"{name}.perm"]] = packed_order
    return w


@pytest.mark.parametrize(
    ("source", "options", "kinds"),
    [
        ("tiny-vl", {"bits": 3, "vision_bits": 4, "head_bits": 16, "group_size": 64}, {3, 4, 16}),
        ("tiny-vl", {"bits": 4, "group_size": 32}, {4, 8}),
        ("tiny-q7-gptq-asym", {}, {4, 8, "zeros"}),
        ("tiny-q7-gptq-actorder", {}, {4, 8, "perm"}),
    ],
)
def test_the_document_suffices(blob, source, options, kinds):
    path = blob(source, **options)
    made, found = Blob(path), set()
    with safe_open(path, "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for spec in made.family.tensors(made.config):
        if isinstance(spec, MatrixSpec):
            matrix = made.matrix(spec.name)
            found |= {matrix.bits} | {kind for kind in ("zeros", "perm") if getattr(matrix, kind) is not None}
            np.testing.assert_array_equal(weight(tensors, spec.name, spec.n, spec.k), matrix.dequantize())
    assert found == kinds
    hashes = json.loads(metadata.pop("hashes"))
    pairs = json.dumps(sorted([key, text] for key, text in metadata.items()))
    assert hashes.pop("__metadata__") == hashlib.sha256(pairs.encode()).hexdigest()
    assert hashes == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
