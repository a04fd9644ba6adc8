"""Matrices assembled from published tensors: stacked, transposed, and by heads."""

import ml_dtypes
import numpy as np
import pytest

from qvl_convert.published import bias, matrix, published_shapes
from qvl_runtime.families.specs import MatrixSpec, VectorSpec, linear


class Tensors:
    """Random tensors of the shapes in the specs."""

    def __init__(self, *specs):
        rng = np.random.default_rng(0)
        shapes = published_shapes(specs)
        self.arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def tensor(self, name):
        return self.arrays[name]

    vector = tensor


def test_plain():
    spec = linear("a", "decoder", 4, 3, bias=True)
    tensors = Tensors(spec, VectorSpec("n.weight", "decoder", (3,)))
    assert {name: array.shape for name, array in tensors.arrays.items()} == {
        "a.weight": (4, 3),
        "a.bias": (4,),
        "n.weight": (3,),
    }
    assert np.shares_memory(matrix(tensors, spec), tensors.arrays["a.weight"])
    np.testing.assert_array_equal(bias(tensors, spec), tensors.arrays["a.bias"])
    assert bias(tensors, linear("a", "decoder", 4, 3)) is None


def test_stacked():
    spec = MatrixSpec("qkv", "decoder", 8, 3, {"q.weight": 4, "k.weight": 2, "v.weight": 2}, bias=True)
    tensors = Tensors(spec)
    stacked = [tensors.arrays[f"{name}.weight"] for name in "qkv"]
    np.testing.assert_array_equal(matrix(tensors, spec), np.concatenate(stacked))
    np.testing.assert_array_equal(bias(tensors, spec), np.concatenate([tensors.arrays[f"{n}.bias"] for n in "qkv"]))


def test_stacked_of_different_dtypes():
    """numpy has no common dtype of bfloat16 and float16; each of their values is a float32."""
    tensors = Tensors(spec := MatrixSpec("qkv", "decoder", 8, 3, {"q.weight": 4, "k.weight": 2, "v.weight": 2}))
    for name, dtype in (("q.weight", ml_dtypes.bfloat16), ("k.weight", np.float16)):
        tensors.arrays[name] = tensors.arrays[name].astype(dtype)
    made = matrix(tensors, spec)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, np.concatenate([a.astype(np.float32) for a in tensors.arrays.values()]))


def test_rows_by_head():
    spec = linear("qkv", "vision", 3 * 2 * 4, 8, bias=True, heads=2)
    tensors = Tensors(spec)
    published = tensors.arrays["qkv.weight"]
    q, k, v = published[:8], published[8:16], published[16:]
    expected = np.concatenate([q[:4], k[:4], v[:4], q[4:], k[4:], v[4:]])
    np.testing.assert_array_equal(matrix(tensors, spec), expected)
    heads = tensors.arrays["qkv.bias"].reshape(3, 2, 4)
    np.testing.assert_array_equal(bias(tensors, spec), heads.swapaxes(0, 1).ravel())


@pytest.mark.parametrize("kernel", [(2, 2), (2, 2, 2)])
def test_convolution(kernel):
    values = 3 * int(np.prod(kernel))
    spec = MatrixSpec("patch", "vision", 5, values, {"patch.weight": 5}, columns=(3, *kernel))
    tensors = Tensors(spec)
    assert tensors.arrays["patch.weight"].shape == (5, 3, *kernel)
    np.testing.assert_array_equal(matrix(tensors, spec), tensors.arrays["patch.weight"].reshape(5, -1))


@pytest.mark.parametrize("first_row", [0, 4])
def test_part_of_a_tensor(first_row):
    spec = MatrixSpec("k", "adapter", 4, 4, {"in_proj_weight": 4}, first_row=first_row)
    tensors = Tensors(MatrixSpec("all", "adapter", 12, 4, {"in_proj_weight": 12}))
    np.testing.assert_array_equal(matrix(tensors, spec), tensors.arrays["in_proj_weight"][first_row : first_row + 4])


def test_transposed():
    spec = MatrixSpec("proj", "adapter", 4, 3, {"proj": 4}, transposed=True)
    tensors = Tensors(spec)
    np.testing.assert_array_equal(matrix(tensors, spec), tensors.arrays["proj"].T)
