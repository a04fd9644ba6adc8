"""Videos as frames: positions and features against the golden data, prompts, sizes, and what is refused."""

from __future__ import annotations

import functools
import io
import json
import math
import shutil

import numpy as np
import pytest
from families import GOLDEN, config, read
from PIL import Image
from rich.console import Console
from serving import data_uri, png, serving

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.screen import Screen
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.positions import position_ids
from qvl_runtime.families.qwen2_vl.preprocessing import VideoLimits
from qvl_runtime.inputs.pictures import LOCAL
from qvl_runtime.inputs.video import FramePair, read_video
from qvl_runtime.server import Limits

VIDEOS = [case for case in read("positions.json") if case["kind"] == "video"]
FRAMES = [case for case in read("vis/index.json") if "resized" in case]
CHATS = [row for row in read("tok/chat_tiny.json") if "video" in str(row["messages"])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """``model(name)``: a golden checkpoint, converted without loss."""
    folder = tmp_path_factory.mktemp("videos")

    @functools.cache
    def make(name: str):
        convert(GOLDEN / "ckpt" / name, folder / f"{name}.qvl", bits=16)
        return qvl.load(folder / f"{name}.qvl", device="cpu")

    return make


@pytest.fixture(autouse=True)
def in_golden(monkeypatch):
    monkeypatch.chdir(GOLDEN)


def frames(count: int, size=(64, 48)) -> list[Image.Image]:
    random = np.random.default_rng(count)
    return [Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)) for _ in range(count)]


def asked(video: list, **about) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "video", "video": video, **about}, {"type": "text", "text": "when?"}]}
    ]


@pytest.mark.parametrize("case", VIDEOS, ids=[case["family"] for case in VIDEOS])
def test_positions(case):
    """The runs of video tokens, cut into pairs of frames as a prompt has them."""
    pairs, rows, columns = case["video_grid_thw"]
    size, types, slots, pair = rows * columns // 4, case["types"], [], 0
    settings = config(f"{case['family']}-tied")
    for index in range(len(types)):
        if types[index] == 2 and (types[index - 1] != 2 or (slots and index == slots[-1][0] + size)):
            seconds = case["second_per_grid"] or 1.0
            time = None if case["family"] == "q3" else settings.frame_position(pair, seconds)
            slots.append((index, rows // 2, columns // 2, time))
            pair += 1
    assert pair == pairs
    # The golden q25 case has 2 tokens a second, which its checkpoint has too.
    assert case["tokens_per_second"] in (None, getattr(settings.visual, "tokens_per_second", None))
    positions, delta = position_ids(len(types), slots)
    assert positions.tolist() == case["position_ids"]
    assert delta == case["delta"]


def test_frames_that_share_a_position():
    """Four pairs a second at two positions a second: the second pair is still at the first one's time."""
    settings = config("q25-untied")
    times = [settings.frame_position(pair, 0.25) for pair in range(4)]
    assert times == [0, 0, 1, 1]
    positions, delta = position_ids(7, [(i + 1, 1, 1, time) for i, time in enumerate(times)])
    assert positions.tolist() == [[0, 1, 1, 2, 2, 3, 4], [0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 1, 1, 3, 4]]
    assert delta == -2


def test_positions_of_times_that_are_no_binary_fractions():
    """The seconds between pairs, computed from 64 times a fifth of a second apart, are just below 0.4."""
    settings, video = config("q25-untied"), read_video({"video": ["a"] * 64, "fps": 5})
    assert video.pair_seconds < 0.4
    assert [settings.frame_position(pair, video.pair_seconds) for pair in (4, 5, 10, 30)] == [3, 4, 8, 24]


@pytest.mark.parametrize("case", FRAMES, ids=[case["ckpt"] for case in FRAMES])
def test_features_of_frames(case, model):
    model, expected, made = model(case["ckpt"]), np.load(GOLDEN / case["file"]), []
    first, second, third = case["images"]
    for pair in ((first, second), (third, third)):
        picture = model.pictures.reader.read(FramePair(*pair, 3, tuple(case["resized"])))
        pixels = picture.prepared.values
        features = model.pictures.vision.encode(pixels, picture.grid)
        made.append(model.ops.download(features).reshape(-1, picture.tokens, features.shape[1]))
        # From the files' bytes again, as a conversation does.
        again = model.pictures.reader.decode(picture.content)
        np.testing.assert_array_equal(again.values, pixels)
    levels = ["final", *(name for name in expected.files if name.startswith("deepstack"))]
    assert len(levels) == len(made[0])
    for level, name in enumerate(levels):
        assert case["stages"][name]["full"]
        assert np.abs(np.concatenate([rows[level] for rows in made]) - expected[name]).max() < 3e-5, name


@pytest.mark.parametrize("case", CHATS, ids=[case["template"] for case in CHATS])
def test_chat_texts(case, model):
    """The template's text around a video; its tokens and times come when the frames are read."""
    newest = case["template"] == "Qwen3-VL"
    made = model("q3-tied" if newest else "q25-untied")
    [message] = asked(frames(4), fps=1.0)
    message["content"].insert(0, {"type": "text", "text": "Video 1: "})
    prompt = made.prompts.build([message], None, LOCAL)
    pads = [f"<|vision_start|>{'<|video_pad|>' * slot.picture.tokens}<|vision_end|>" for slot in prompt.slots]
    if newest:
        video = f"<0.5 seconds>{pads[0]}<2.5 seconds>{pads[1]}"
    else:
        video = "".join(pads).replace("<|vision_end|><|vision_start|>", "")
    text = case["text"].replace("<|vision_start|><|video_pad|><|vision_end|>", video)
    assert prompt.ids == made.tokenizer.encode(text)
    assert [slot.time for slot in prompt.slots] == ([None, None] if newest else [0, 4])
    for slot in prompt.slots:
        assert set(prompt.ids[slot.start : slot.end]) == {made.config.video_token_id}


@pytest.mark.parametrize("name", ["q2-tied", "q25-untied", "q3-tied"])
def test_answers(name, model):
    """The cache, a second turn and speculation change nothing; another rate does where positions depend on it."""
    model, video = model(name), frames(5)
    whole = model.generate(asked(video, fps=4.0), max_new_tokens=6, speculate=False)
    assert model.generate(asked(video, fps=4.0), max_new_tokens=6).token_ids == whole.token_ids
    model.forget()
    assert model.generate(asked(video, fps=4.0), max_new_tokens=6).token_ids == whole.token_ids
    slow = model.generate(asked(video, fps=0.25), max_new_tokens=1)
    assert (slow.timings.cached_tokens < slow.prompt_tokens - 5) == (name != "q2-tied")
    first = model.chat(asked(video, fps=4.0)[0]["content"], max_new_tokens=4, temperature=0)
    assert first.history[0][0][0] == {"type": "video", "video": video, "times": [0, 0.25, 0.5, 0.75, 1.0]}
    second = model.chat("And?", first.history, max_new_tokens=4, temperature=0)
    assert second.timings.cached_images == 3 and second.timings.cached_tokens >= first.prompt_tokens
    model.forget()
    again = model.chat("And?", first.history, max_new_tokens=4, temperature=0)
    assert again.token_ids == second.token_ids


def test_an_odd_frame_is_doubled_and_times_are_the_middle():
    video = read_video({"video": ["a", "b", "c"], "times": [1, 2, 4.5]})
    assert [(p.first, p.second, p.count) for p in video.pairs] == [("a", "b", 3), ("c", "c", 3)]
    assert video.pair_times == [1.5, 4.5]
    assert video.pair_seconds == 3.5
    assert read_video({"video": ["a"]}).pair_seconds == 1.0
    assert read_video({"type": "video", "video": ["a", "b", "c", "d"], "fps": 4}).pair_seconds == 0.5
    again = read_video(video.to_part())
    assert (again.frames, again.times) == (video.frames, video.times)


def test_sizes():
    """Limits of a frame, and of all together: the published rule for frames * height * width."""
    picture = Image.new("RGB", (640, 360))
    assert VideoLimits(128 * 28 * 28, 768 * 28 * 28).size(picture, 99, 28, 10**9) == (644, 364)
    assert VideoLimits(128 * 28 * 28, 768 * 28 * 28).size(picture, 99, 28, 10**5) == (420, 224)
    whole = VideoLimits(4096, 25165824, whole=True)
    assert whole.size(picture, 4, 32, 10**9) == (640, 352)
    for count, size in ((150, (544, 288)), (151, (544, 288)), (153, (512, 288))):
        shrink = math.sqrt(count * 360 * 640 / 25165824)
        assert tuple(math.floor(side / shrink / 32) * 32 for side in (640, 360)) == size
        assert whole.size(picture, count, 32, 10**9) == size
    assert whole.size(Image.new("RGB", (8, 8)), 2, 32, 10**9) == (64, 64)


def test_sizes_of_an_odd_number_of_frames_and_of_small_ones():
    """What the published code computes: 5 frames count as 4 when it looks whether they fit; a side is 32 at least."""
    limits, picture = VideoLimits(4096, 23040, whole=True), Image.new("RGB", (64, 80))
    assert limits.size(picture, 5, 16, 10**9) == (64, 80)
    assert limits.size(picture, 6, 16, 10**9) == (48, 64)
    assert limits.size(picture, 5, 16, 64 * 80 - 1) == (48, 64)
    published = VideoLimits(4096, 25165824, whole=True)
    assert published.size(Image.new("RGB", (23, 67)), 5, 32, 10**9) == (32, 96)
    assert published.size(Image.new("RGB", (15, 297)), 8, 28, 10**9) == (28, 560)


def test_the_limits_of_a_checkpoint_are_read(tmp_path):
    folder = tmp_path / "q3"
    shutil.copytree(GOLDEN / "ckpt/q3-tied", folder)
    limits = {"size": {"shortest_edge": 4096, "longest_edge": 8192}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(limits))
    convert(folder, tmp_path / "q3.qvl", bits=16)
    model = qvl.load(tmp_path / "q3.qvl", device="reference")
    prompt = model.prompts.build(asked(frames(4, (320, 320))), None, LOCAL)
    # 8192 / 4 pixels a frame are one token of 32 x 32.
    assert [slot.picture.tokens for slot in prompt.slots] == [1, 1]
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 4}}))
    with pytest.raises(QvlError, match=r"video_preprocessor_config.json: 'max_pixels' is missing"):
        convert(folder, tmp_path / "no.qvl", bits=16)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"video": "film.mp4"}, "video files are not opened"),
        ({"type": "video"}, "list of its frames"),
        ({"type": "video_url", "video_url": {"url": "file:///film.mp4"}}, "list of its frames"),
        ({"video": []}, "list of its frames"),
        ({"video": np.zeros((56, 84, 3), np.uint8)}, r"shape \[frames, height, width, 3\], not \[56, 84, 3\]"),
        ({"video": np.zeros((2, 3, 56, 84), np.uint8)}, r"shape .* not \[3, 56, 84\]"),
        ({"video": ["a"], "fps": 0}, "'fps' of a video is 0"),
        ({"video": ["a"], "fps": "2"}, "'fps' of a video is '2'"),
        ({"video": ["a"], "fps": math.nan}, "'fps' of a video is nan"),
        ({"video": ["a"], "fps": 10**400}, "'fps' of a video is 1000"),
        ({"video": ["a", "b"], "times": [1]}, "must be 2 numbers"),
        ({"video": ["a", "b"], "times": [1, "x"]}, "must be 2 numbers"),
        ({"video": ["a", "b"], "times": [2, 1]}, "ascending"),
        ({"video": ["a", "b"], "times": [-1, 1]}, "ascending and not below 0"),
        ({"video": ["a"], "times": [1], "fps": 2}, "give one of them"),
        ({"video": ["nowhere.png", "nowhere.png"]}, "nowhere.png"),
        ({"video": [frames(1)[0], "text.txt"]}, "text.txt"),
        ({"video": frames(1, (2001, 10))}, "more than 200 times"),
    ],
)
def test_refused(part, message, model):
    with pytest.raises(QvlError, match=message) as caught:
        model("q3-tied").generate([{"role": "user", "content": [part]}], max_new_tokens=1)
    assert "\n" not in str(caught.value)


def test_an_array_of_frames(model):
    made = model("q3-tied")
    listed = [np.asarray(frame) for frame in frames(4)]
    query = [made.prompts.build(asked(video), None, LOCAL) for video in (listed, np.stack(listed))]
    assert query[0].ids == query[1].ids and query[0].keys == query[1].keys


def test_frames_obey_the_access_of_pictures(model):
    with pytest.raises(QvlError, match="no file is opened here"):
        model("q3-tied").generate(asked(["images/land.png"]), max_new_tokens=1, allow_paths=False)


@pytest.mark.parametrize("about", [{"fps": 4.0}, {"times": np.array([0.0, 0.5, 2.0])}])
def test_a_saved_conversation_holds_a_video(about, model, tmp_path):
    talk, other = (Conversation(model("q3-tied"), Screen(Console(file=io.StringIO()))) for _ in range(2))
    talk.settings = other.settings = {"temperature": 0, "max_new_tokens": 3}
    query = [{"type": "video", "video": frames(3), **about}, {"type": "text", "text": "when?"}]
    talk.history = talk.model.chat(query, temperature=0, max_new_tokens=3).history
    talk.take(f"/save {tmp_path}/talk.json")
    other.take(f"/load {tmp_path}/talk.json")
    assert len(other.history) == 1 and not talk.failed and not other.failed
    for one in (talk, other):
        one.take("And then?")
    assert other.history[-1] == talk.history[-1] and not other.failed


@pytest.mark.parametrize("name", ["q25-tied", "q3-tied"])
def test_over_http(model, name):
    """The answer is that of Python; frames count as pictures where a box names one."""
    listed, made = frames(3), model(name)
    sent = [data_uri(png(frame)) for frame in listed]
    with serving(made, limits=Limits(pixels=64 * 64, all_pixels=16 * 64 * 64)) as server:
        for about in ({}, {"fps": 1}, {"times": [0, 0.5, 3.0]}):
            body = {"messages": asked(sent, **about), "max_tokens": 6, "temperature": 0}
            whole = server.http.post("/v1/chat/completions", json=body).json()
            own = made.generate(asked(listed, **about), max_new_tokens=6)
            assert whole["choices"][0]["message"]["content"] == own.text
            assert whole["usage"]["prompt_tokens"] == own.prompt_tokens
        mixed = asked(sent)
        mixed[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": data_uri(png(listed[0]))}})
        mixed[0]["content"].append({"type": "box", "image": 3, "pixels": [0, 0, 64, 48]})
        assert server.http.post("/v1/chat/completions", json={"messages": mixed, "max_tokens": 1}).status_code == 200
        for about, message in [
            ({"video": []}, "a video is a list of its frames"),
            ({"video": sent[0]}, "messages[0].content[0].video must be an array"),
            ({"video": [1]}, "messages[0].content[0].video[0] must be a string"),
            ({"video": ["/etc/passwd"]}, "messages[0].content[0].video[0]: a picture must be a URI"),
            ({"video": [data_uri(b"x")]}, "picture 0 is no image"),
            ({"video": sent[:1] * 129}, "more than 128 frames"),
            ({"video": sent[:1] * 22}, "more than 65536 pixels"),
            ({"fps": "2"}, "the 'fps' of a video is '2'"),
            ({"fps": 0}, "the 'fps' of a video is 0"),
            ({"times": [0, 1]}, "must be 3 numbers"),
            ({"times": [0, 1, "x"]}, "must be 3 numbers"),
            ({"fps": 1, "times": [0, 1, 2]}, "give one of them"),
        ]:
            messages = [{"role": "user", "content": [{"type": "video", "video": sent, **about}]}]
            refused = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
            assert refused.status_code == 400
            assert message in refused.json()["error"]["message"]
        messages = [{"role": "system", "content": asked(sent)[0]["content"]}, *asked(sent)]
        refused = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
        assert "only messages of a user or tool" in refused.json()["error"]["message"]
