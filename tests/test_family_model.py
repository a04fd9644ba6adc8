"""The newer families against the published code's outputs: every stage, on every backend, through the public API."""

from __future__ import annotations

import functools
import io
import re
from collections import defaultdict

import numpy as np
import pytest
from conftest import BACKENDS
from families import CHECKPOINTS, GOLDEN, read
from helpers import linked
from PIL import Image, ImageOps
from rich.console import Console
from safetensors.numpy import save_file
from shards import all_tensors

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.boxes import Box
from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.screen import Screen
from qvl_runtime.cli.turns import words

LOGITS, HIDDEN, STAGE, FINAL = 2e-4, 1e-4, 1e-4, 3e-5
LEVELS = ("final", "deepstack0", "deepstack1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """``model(name, device, **options)``: a golden checkpoint, converted and loaded."""
    folder = tmp_path_factory.mktemp("blobs")

    @functools.cache
    def make(name: str, device: str = "reference", **options):
        path = folder / f"{name}-{'-'.join(f'{k}{v}' for k, v in sorted(options.items()))}.qvl"
        if not path.exists():
            convert(GOLDEN / "ckpt" / name, path, **options)
        return qvl.load(path, device=device)

    return make


@pytest.fixture(autouse=True)
def in_golden(monkeypatch):
    """Run with the golden folder as the current directory, as the image paths of its prompts expect."""
    monkeypatch.chdir(GOLDEN)


def test_a_turned_picture_is_asked_about_as_it_is_shown(model, tmp_path):
    """`/box` takes pixels of the upright picture; the family's own notation has those of the resized one."""
    talk = Conversation(model("q25-tied", "cpu", bits=16), Screen(Console(file=io.StringIO())))
    picture = GOLDEN / "images/exif6.jpg"
    upright = ImageOps.exif_transpose(Image.open(picture))
    assert upright.size != Image.open(picture).size
    for line in ("/set max_new_tokens 2", f"/image {picture}", f"/box 1 2 {upright.width - 1} {upright.height - 1}"):
        talk.take(line)
    (query, _), *_ = talk.history
    assert not talk.failed
    assert upright.size == (80, 120)  # resized to 84 x 112
    assert words(query) == '{"bbox_2d": [1, 1, 82, 111]} What is this?'
    talk._boxes = [Box(None, 1, 2, 3, 4)]
    talk.take(f"/show {tmp_path}/boxes.png")
    assert Image.open(tmp_path / "boxes.png").size == upright.size


def case_id(case: dict) -> str:
    return f"{case['ckpt']}-{case['case']}"


PICTURES = [case for case in read("vis/index.json") if "resized" not in case]


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("case", PICTURES, ids=case_id)
def test_vision_stages(case, device, model):
    model = model(case["ckpt"], device, bits=16)
    expected, seen, features = np.load(GOLDEN / case["file"]), defaultdict(list), []
    for image in case["images"]:
        made = model.encode_image(image, trace=lambda stage, x: seen[stage].append(model.ops.download(x)))
        # Without a trace the blocks are captured and replayed.
        np.testing.assert_array_equal(model.encode_image(image), made)
        features.append(made)
    for stage, about in case["stages"].items():
        rows = slice(None) if about["full"] else expected["rows"]
        error = np.abs(np.concatenate(seen[stage])[rows] - expected[stage]).max()
        assert error < (FINAL if stage in LEVELS else STAGE), stage
    np.testing.assert_array_equal(np.concatenate(features), np.concatenate(seen["final"]))


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("case", read("lm/index.json"), ids=case_id)
def test_logits_hidden_states_and_greedy_ids(case, device, model):
    model, expected = model(case["ckpt"], device, bits=16), np.load(GOLDEN / case["file"])
    forms = [expected["ids"], case["text"]]
    if not case["render_options"]:  # `add_vision_id` is written by hand here
        forms.append(case["messages"])
    stages = {}
    logits = model.logits(forms[0], case["images"], trace=lambda s, x: stages.__setitem__(s, model.ops.download(x)))
    assert np.abs(logits[expected["pos"]] - expected["logits"]).max() < LOGITS
    hidden = [name for name in expected.files if name.startswith("h_") and name != "h_final_norm"]
    for name in hidden:
        assert np.abs(stages[name[2:]][expected["hpos"]] - expected[name]).max() < HIDDEN, name
    wanted = expected["gen_ids"].tolist()
    stops = [i for i, token in enumerate(wanted) if token in model.stop_ids]
    wanted = wanted[: stops[0]] if stops else wanted
    for form in forms:
        assert model.generate(form, case["images"], max_new_tokens=len(expected["gen_ids"])).token_ids == wanted


def test_deepstack_may_have_more_levels_than_the_decoder_layers(tmp_path):
    """Levels after the last layer are not used, as in the published code."""
    source, config = GOLDEN / "ckpt" / "q3-tied", read("ckpt/q3-tied/config.json")
    assert len(config["vision_config"]["deepstack_visual_indexes"]) == 2
    weights = (path.name for path in source.glob("*.safetensors*"))
    folder = linked(source, tmp_path / "short", *weights, text_config=config["text_config"] | {"num_hidden_layers": 1})
    kept = {name: x for name, x in all_tensors(source).items() if not re.search(r"\.layers\.[123]\.", name)}
    save_file(kept, folder / "model.safetensors")
    convert(folder, tmp_path / "short.qvl", bits=16)
    case = next(case for case in read("lm/index.json") if (case["ckpt"], case["case"]) == ("q3-tied", "img1"))
    expected, stages, model = np.load(GOLDEN / case["file"]), {}, qvl.load(tmp_path / "short.qvl", device="cpu")
    model.logits(expected["ids"], case["images"], trace=lambda s, x: stages.__setitem__(s, model.ops.download(x)))
    assert np.abs(stages["block0"][expected["hpos"]] - expected["h_block0"]).max() < HIDDEN


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_quantized_cpu_equals_reference(name, bits, model):
    """The same quantized weights give the same logits, features and greedy ids on both backends."""
    options = {"bits": bits, "vision_bits": bits, "head_bits": 8, "group_size": 32}
    cpu, reference = (model(name, device, **options) for device in ("cpu", "reference"))
    wanted = reference.encode_image("images/land.png")
    assert np.linalg.norm(cpu.encode_image("images/land.png") - wanted) < 1e-3 * np.linalg.norm(wanted)
    for prompt in ("The answer is 42.\n答案", "<img>images/exif6.jpg</img><img>images/gray.png</img>这是什么?"):
        wanted = reference.logits(prompt)
        assert np.linalg.norm(cpu.logits(prompt) - wanted) < 1e-3 * np.linalg.norm(wanted)
        answers = [model.generate(prompt, max_new_tokens=16).token_ids for model in (cpu, reference)]
        assert answers[0] == answers[1]
