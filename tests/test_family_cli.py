"""The command line on files of the newer families."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from families import GOLDEN
from PIL import Image
from rich.console import Console

import qvl_runtime
from qvl_convert.convert import convert
from qvl_runtime.blob import Blob
from qvl_runtime.boxes import Box
from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.main import main
from qvl_runtime.cli.screen import Screen
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.errors import QvlError

NAMES = ("q2-tied", "q25-untied", "q3-tied")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A golden checkpoint of each family, converted."""
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES:
        convert(GOLDEN / "ckpt" / name, folder / f"{name}.qvl", group_size=32)
    return {name: folder / f"{name}.qvl" for name in NAMES}


@pytest.fixture
def qvl(capfd, monkeypatch):
    """``qvl(*arguments)`` -> (status, standard output, standard error)."""
    monkeypatch.chdir(GOLDEN)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        return (caught.value.code or 0, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    ("name", "title"), [("q2-tied", "Qwen2-VL"), ("q25-untied", "Qwen2.5-VL"), ("q3-tied", "Qwen3-VL")]
)
def test_info(name, title, files, qvl):
    status, text, err = qvl("info", files[name], "--context", 1024)
    assert (status, err) == (0, "")
    lines: dict[str, str] = {}
    for line in text.splitlines():
        lines.setdefault(line[2:14].strip(), line)
    assert f": {title}, " in text.splitlines()[0]
    most = int(re.search(r"pictures of any size, a token for .* pixels and (\d+) at most", lines["vision"])[1])
    model = qvl_runtime.load(files[name], device="reference")
    assert len(model.encode_image(Image.new("RGB", (900, 900)))) <= most < 64  # the checkpoints' own limit
    assert lines["decoder"].endswith("window 4096")
    assert ("output head" in lines) == ("untied" in name)
    assert "with 1024 tokens" in text


@pytest.mark.parametrize(("pixels", "tokens"), [(12_845_056, 1280), (50_176, 64)])
def test_a_description_names_the_limit_of_pictures(pixels, tokens, files):
    blob = Blob(files["q2-tied"])
    said = blob.family.describe_vision(blob.config, blob.metadata["preprocessing"] | {"max_pixels": pixels})
    assert f"pixels and {tokens} at most (--max-pixels: more)" in said


@pytest.mark.parametrize("name", NAMES)
def test_bench_reads_a_tied_head_too(name, files, qvl):
    sizes = ("--prompt-tokens", 8, "--new-tokens", 8, "--rounds", 1)
    status, text, _ = qvl("bench", files[name], *sizes, "--device", "reference")
    parts = json.loads(qvl("info", files[name], "--json")[1])["parts"]
    head = parts["head" if "head" in parts else "embedding"]["bytes"]
    found = json.loads(text.splitlines()[-1])
    assert status == 0 and found["image"] > 0
    assert parts["decoder"]["bytes"] + head < found["bytes_per_token"] < parts["decoder"]["bytes"] + head + 20_000


def test_bench_refuses_what_it_cannot_measure(files, qvl):
    status, text, err = qvl("bench", files["q3-tied"], "--prompt-tokens", 5000, "--device", "reference")
    message = (
        "a prompt of 5000 tokens and an answer of 32 exceed its window of 4096; lower --prompt-tokens or --new-tokens"
    )
    assert (status, text, err) == (1, "", f"qvl: {files['q3-tied']}: {message}\n")
    status, _, err = qvl("bench", files["q3-tied"], "--rounds", 0)
    assert status == 2 and "'--rounds'" in err


def test_max_pixels(files, qvl):
    def tokens(*options: object) -> int:
        arguments = ("-i", "images/big.png", "--max-new-tokens", 1, "--json", "--device", "cpu")
        return json.loads(qvl("generate", files["q2-tied"], "x", *arguments, *options)[1])["prompt_tokens"]

    assert tokens("--max-pixels", 28 * 28 * 4) < 10 < tokens()
    assert "one token takes 784 pixels" in qvl("serve", files["q2-tied"], "--port", 0, "--max-pixels", 10)[2]


def test_the_default_window_is_capped(tmp_path, qvl):
    folder, file = tmp_path / "wide", tmp_path / "wide.qvl"
    shutil.copytree(GOLDEN / "ckpt/q3-tied", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 262144
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, file, group_size=32)
    assert "window 32768 (--context: up to 262144)" in qvl("info", file)[1]
    model = qvl_runtime.load(file, device="cpu")
    assert model.window == 32768
    model.generate("Hello", max_new_tokens=2)
    session = model._prefix_cache.take([], 1)
    assert session.state.rotary.rope.shape[0] == session.state.store.capacity == 256
    assert qvl_runtime.load(file, device="cpu", context=100_000).window == 100_000
    message = r"takes \d+ tokens \(9 of them pictures\) and the window is 5; shorten .*context of up to 262144"
    with pytest.raises(QvlError, match=message):
        qvl_runtime.load(file, device="cpu", context=5).generate("Hello", ["images/tiny.png"])


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("q2-tied", [416, 555, 750, 833]),
        ("q25-untied", None),
        ("q3-tied", [416, 555, 750, 833]),
    ],
)
def test_a_conversation(name, box, files, tmp_path, monkeypatch):
    """/box in pixels of the upright picture, pictures of two sizes, /save and /load with what was computed."""
    monkeypatch.chdir(GOLDEN)
    screen = Screen(Console(file=io.StringIO(), force_terminal=False))
    talk = Conversation(qvl_runtime.load(files[name], device="cpu"), screen)
    talk.settings = {"temperature": 0, "max_new_tokens": 4}
    talk.take("/image images/land.png")
    width, height = Image.open("images/land.png").size
    talk.take(f"/box {width * 5 / 12} {height * 5 / 9} {width * 3 / 4} {height * 5 / 6} What?")
    if box is None:  # pixels of the resized picture
        across, down = talk.model.pictures.reader.read("images/land.png").resized
        box = [across * 5 / 12, down * 5 / 9, across * 3 / 4, down * 5 / 6]
        assert (across, down) != (width, height)
    said = "".join(part.get("text", "") for part in talk.history[0][0])
    assert list(map(int, re.findall(r"\d\d+", said))) == pytest.approx(box, abs=1)
    talk.take("/image images/exif6.jpg")
    talk.take("And this?")
    talk.take(f"/save {tmp_path}/talk.json")
    assert (tmp_path / "talk.json.past").exists() and not talk.failed
    other = Conversation(qvl_runtime.load(files[name], device="cpu"), screen)
    other.take(f"/load {tmp_path}/talk.json")
    talk.take("Really?")
    other.take("Really?")
    assert other.history[-1] == talk.history[-1] and not other.failed
    result = other.model.chat("Really?", other.history[:-1], temperature=0, max_new_tokens=4)
    assert result.timings.cached_tokens > result.prompt_tokens * 3 // 4
    other._boxes = [Box("x", 0, 0, 500, 500)]
    other.take(f"/show {tmp_path}/boxes.png")
    upright = Image.open("images/exif6.jpg").size[::-1]
    assert Image.open(tmp_path / "boxes.png").size == upright


@pytest.mark.parametrize("name", NAMES)
def test_grounding_is_drawn(name, files, tmp_path, monkeypatch):
    monkeypatch.chdir(GOLDEN)
    model = qvl_runtime.load(files[name], device="cpu")
    result = model.generate(
        [{"image": "images/land.png"}, {"text": "Where?"}], constraint=qvl_runtime.Grounding(), max_new_tokens=300
    )
    assert result.boxes and all(box.ref for box in result.boxes)
    drawn = draw_boxes("images/land.png", result.boxes, tmp_path / "out.png")
    assert drawn.image.size == Image.open("images/land.png").size
