"""A model whose results are not finite ends its answer with an error, however the token is chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from shards import safetensors_bytes

import qvl_runtime as qvl
from qvl_runtime.errors import QvlError
from qvl_runtime.file.tensorfile import TensorFile


@pytest.fixture(scope="module")
def broken(blob, tmp_path_factory):
    """``broken(name, row, value)``: the path of a 16-bit model with one value in a large matrix replaced."""
    path = tmp_path_factory.mktemp("broken") / "x.qvl"

    def make(name: str, row: int, value: float):
        file = TensorFile(blob("tiny-vl", bits=16))
        arrays = {n: np.array(file.array(n)) for n in file.entries}
        arrays[name][row, 5] = value
        path.write_bytes(safetensors_bytes(arrays, dict(file.metadata)))
        return path

    return make


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}])
def test_a_broken_head_is_noticed_at_the_first_token(broken, device, value, options):
    model = qvl.load(broken("lm_head.weight", 300, value), device=device)
    with pytest.raises(QvlError, match="the model's logits hold") as caught:
        model.generate("What is this?", max_new_tokens=3, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_broken_token_is_noticed_while_an_answer_goes_on(blob, broken, device):
    """Its row of the embedding is read when the answer has it, not in the prompt."""
    right = qvl.load(blob("tiny-vl", bits=16), device=device)
    ids = right.generate("What is this?", max_new_tokens=40).token_ids
    token = next(t for t in ids[:20] if t not in right.tokenizer.encode("What is this?"))
    model = qvl.load(broken("transformer.wte.weight", token, np.nan), device=device)
    seen = []
    with pytest.raises(QvlError, match="the model's logits hold"):
        for piece in model.stream("What is this?", max_new_tokens=40, speculate=False):
            seen += piece.token_ids
    # Those whose text was not complete are not in a piece; what follows the broken token never is.
    assert seen == ids[: len(seen)] and len(seen) <= ids.index(token) + 1


def test_checking_finds_it_before(broken):
    path = broken("lm_head.weight", 300, np.nan)
    with pytest.raises(QvlError, match=r"lm_head.weight' is damaged"):
        qvl.load(path, device="reference", check=True)
    assert json.loads(TensorFile(path).metadata["hashes"])
