"""Invalid folders and pictures of the newer families: one line for each error, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from families import GOLDEN
from PIL import Image
from safetensors.numpy import save_file
from shards import all_tensors, safetensors_bytes

import qvl_runtime
from qvl_convert.convert import convert
from qvl_runtime.cli.main import main
from qvl_runtime.errors import QvlError
from qvl_runtime.file.tensorfile import TensorFile


@pytest.fixture
def fails(capfd, tmp_path):
    """``fails(folder)`` -> the one line of a conversion that is refused."""

    def run(folder: Path) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(folder), str(tmp_path / "x.qvl")])
        out, err = capfd.readouterr()
        assert (caught.value.code, out, err.count("\n")) == (1, "", 1), err
        assert not list(tmp_path.glob("x.qvl*"))
        return err

    return run


@pytest.fixture
def folder(tmp_path):
    """``folder(name)``: a copy of a golden checkpoint, to be damaged."""

    def make(name: str) -> Path:
        shutil.copytree(GOLDEN / "ckpt" / name, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("q2-tied", None, {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("q25-untied", None, {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("q25-untied", None, {"rope_scaling": {"type": "yarn", "mrope_section": [4, 6, 6]}}, "'type' is 'yarn'"),
        ("q3-tied", "text_config", {"num_experts": 128}, "mixtures of experts"),
        ("q3-tied", None, {"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe'"),
        ("q3-tied", "text_config", {"model_type": "qwen2_5_vl_text"}, "'model_type' is 'qwen2_5_vl_text'"),
        ("q3-tied", "vision_config", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ],
)
def test_configs_that_are_computed_otherwise(name, section, change, message, folder, fails):
    made = folder(name)
    data = json.loads((made / "config.json").read_text())
    (data if section is None else data[section]).update(change)
    (made / "config.json").write_text(json.dumps(data))
    err = fails(made)
    assert message in err and "config.json" in err


@pytest.mark.parametrize("name", ["q2-untied", "q25-tied", "q3-tied"])
def test_missing_and_foreign_tensors(name, folder, fails):
    made = folder(name)
    tensors = all_tensors(made)
    for file in made.glob("*.safetensors*"):
        file.unlink()
    some = next(tensor for tensor in tensors if tensor.endswith("k_proj.weight"))
    for changed, message in [
        ({key: array for key, array in tensors.items() if key != some}, "k_proj"),
        (tensors | {"model.visual.extra.weight": np.zeros(3, np.float32)}, "extra"),
        (tensors | {some: tensors[some][:-1]}, "k_proj"),
    ]:
        save_file(changed, made / "model.safetensors")
        assert message in fails(made)


def test_merges_that_contradict_the_ranks(folder, fails):
    made = folder("q3-tied")
    (made / "tokenizer.json").unlink()
    lines = (made / "merges.txt").read_text(encoding="utf-8").splitlines()
    lines[10], lines[11] = lines[11], lines[10]
    (made / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "merge 10" in fails(made)
    (made / "merges.txt").unlink()
    assert "merges.txt: no such file" in fails(made)
    (made / "merges.txt").symlink_to("/dev/zero")  # its size is 0, and it never ends
    assert "merges.txt: cannot be read" in fails(made)


def test_pictures_that_cannot_be_seen(tmp_path):
    convert(GOLDEN / "ckpt/q25-untied", tmp_path / "x.qvl")
    model = qvl_runtime.load(tmp_path / "x.qvl", device="cpu", context=64, max_pixels=28 * 28 * 400)
    with pytest.raises(QvlError, match="one side more than 200 times the other"):
        model.generate("x", [Image.new("RGB", (2010, 10))])
    assert model.generate("x", [Image.new("RGB", (2000, 10))], max_new_tokens=1).prompt_tokens < 64
    with pytest.raises(
        QvlError, match=r"400 of them pictures\) and the window is 64; shorten .* context of up to 4096"
    ):
        model.generate("x", [Image.new("RGB", (560, 560))])


def test_metadata_that_contradict_the_rest_of_a_file(tmp_path):
    path = tmp_path / "x.qvl"
    convert(GOLDEN / "ckpt/q3-tied", path)
    file = TensorFile(path)
    arrays = {name: np.array(file.array(name)) for name in file.entries}
    for key, change, message in [
        ("config", {"vision_start_token_id": 0}, "config: 'vision_start_token_id' is 0"),
        ("preprocessing", {"video": 5}, "preprocessing: 'video' is 5"),
        ("preprocessing", {"max_pixels": 10**400}, "preprocessing: 'max_pixels' is 1000"),
        ("preprocessing", {"image_std": [1.0, 1.0, 1e300]}, "preprocessing: 'image_std' is"),
    ]:
        changed = json.dumps(json.loads(file.metadata[key]) | change)
        (tmp_path / "y.qvl").write_bytes(safetensors_bytes(arrays, file.metadata | {key: changed}))
        with pytest.raises(QvlError, match=f"y.qvl: {message}"):
            qvl_runtime.load(tmp_path / "y.qvl", device="cpu")
    for wrong in ("x", 1.5, 10**400):
        with pytest.raises(QvlError, match="max_pixels is"):
            qvl_runtime.load(path, device="cpu", max_pixels=wrong)
