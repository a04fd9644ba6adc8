"""The terminal conversation, line by line, and once in a pipe and in a real terminal."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image
from rich.console import Console

import qvl_runtime as qvl
from qvl_runtime.cli.conversation import Conversation, dropped_file
from qvl_runtime.cli.screen import Screen, shown


class Spoken(Screen):
    """A screen that remembers."""

    def __init__(self):
        super().__init__(Console(file=io.StringIO(), force_terminal=False))
        self.said, self.complaints = [], []

    def say(self, text):
        self.said.append(text)

    def complain(self, text):
        self.complaints.append(text)


@pytest.fixture
def talk(model, in_golden, tmp_path):
    conversation = Conversation(model("tiny-vl", device="cpu", bits=16), Spoken())
    conversation.take("/set temperature 0")
    conversation.take("/set max_new_tokens 6")
    return conversation


def test_questions_and_answers_make_the_history(talk):
    talk.take("Hello")
    talk.take("And again")
    assert [query for query, _ in talk.history] == ["Hello", "And again"]
    wanted = talk.model.chat("Hello", temperature=0, max_new_tokens=6)
    assert talk.history[0][1] == wanted.text
    assert talk.screen.console.file.getvalue().startswith(wanted.text[:3])


def test_a_picture_goes_with_the_next_question_only(talk):
    talk.take("/image images/rgb_odd.png")
    talk.take("What is it?")
    talk.take("Sure?")
    assert talk.history[0][0].count("<img>") == 1
    assert talk.history[1][0] == "Sure?"


def test_a_pasted_path_attaches(talk, tmp_path):
    path = tmp_path / "my cat.png"
    Image.new("RGB", (20, 10)).save(path)
    for line in (str(path), f"'{path}'", str(path).replace(" ", "\\ "), path.as_uri(), f" {path} "):
        assert dropped_file(line.strip()) == path
        talk.take(line)
    assert len(talk._waiting) == 5
    assert dropped_file("what is in my cat.png?") is None
    assert dropped_file("x" * 500 + ".png") is None


def test_undo_and_retry(talk):
    talk.take("one")
    talk.take("two")
    first = talk.history[:]
    talk.take("/retry")
    assert talk.history == first
    talk.take("/undo")
    assert talk.history == first[:1]
    talk.take("two")
    assert talk.history == first
    talk.take("/undo")
    talk.take("/undo")
    talk.take("/undo")
    talk.take("/retry")
    assert talk.screen.complaints == ["there is nothing to undo", "there is nothing to retry"]


def test_save_and_load(talk, tmp_path):
    talk.take("/image images/rgb_odd.png")
    talk.take("What is it?")
    talk.take(f"/save {tmp_path}/talk one.json")
    saved = talk.history
    other = Conversation(talk.model, Spoken())
    other.take(f"/load '{tmp_path}/talk one.json'")
    assert other.history == saved
    assert other.settings == talk.settings
    talk.take("more")
    other.take("more")
    assert other.history == talk.history
    assert (tmp_path / "talk one.json").stat().st_mode & 0o077 == 0
    (tmp_path / "bad.json").write_text("[1, 2]")
    other.take(f"/load {tmp_path}/bad.json")
    other.take("/load nowhere.json")
    assert len(other.screen.complaints) == 2
    assert other.history == talk.history


def test_a_loaded_conversation_goes_on_without_computing(talk, blob, tmp_path, monkeypatch):
    talk.take("/image images/rgb_odd.png")
    talk.take("What is it?")
    talk.take("And where?")
    talk.take(f"/save {tmp_path}/talk.json")
    assert "need not be computed again" in talk.screen.said[-1]
    other = Conversation(qvl.load(blob("tiny-vl", bits=16), device="cpu"), Spoken())
    other.take(f"/load {tmp_path}/talk.json")
    assert "need not be computed again" in other.screen.said[-1] and not other.screen.complaints
    kept = []
    for conversation in (talk, other):

        def chat(*args, ask=conversation.model.chat, **options):
            answer = ask(*args, **options)
            kept.append((answer.timings.cached_tokens, answer.timings.cached_images))
            return answer

        monkeypatch.setattr(conversation.model, "chat", chat)
        conversation.take("more")
    assert other.history == talk.history
    assert kept[0] == kept[1] and kept[0][0] > 300 and kept[0][1] == 1

    past = tmp_path / "talk.json.past"
    past.write_bytes(past.read_bytes()[:-1])
    other.take(f"/load {tmp_path}/talk.json")
    (complaint,) = other.screen.complaints
    assert "talk.json.past" in complaint and complaint.endswith("computed anew")
    assert len(other.history) == 2


def test_a_box_is_asked_about_in_thousandths(talk):
    width, height = Image.open("images/rgb_odd.png").size
    talk.take("/image images/rgb_odd.png")
    talk.take(f"/box 0 0 {width} {height / 2} What?")
    assert "<box>(0,0),(999,500)</box>What?" in talk.history[0][0]


def test_show_draws_the_last_boxes(talk, tmp_path):
    from qvl_runtime.boxes import Box

    talk.take("/show")
    talk.take("/image images/rgb_odd.png")
    talk.take("Where?")
    talk._boxes = [Box("击掌", 100, 100, 500, 500)]
    talk.take(f"/show {tmp_path}/out.png")
    assert Image.open(tmp_path / "out.png").size == Image.open("images/rgb_odd.png").size
    assert talk.screen.complaints == ["the last answer has no boxes to show"]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    def interrupted(query, history, *, on_piece, **options):
        from qvl_runtime.engine.generation import Piece

        on_piece(Piece("half an ans"))
        raise KeyboardInterrupt

    monkeypatch.setattr(talk.model, "chat", interrupted)
    talk.take("Hello")
    assert talk.history == [("Hello", "half an ans")]
    assert talk.open


@pytest.mark.parametrize(
    "line",
    [
        "/nonsense",
        "/set heat 3",
        "/set top_p hot",
        "/set top_p 7",
        "/image",
        "/image nowhere.png",
        "/box 1 2 3",
        "/save",
    ],
)
def test_what_the_user_can_mend_is_one_line(talk, line):
    talk.take(line)
    if line == "/set top_p 7":
        talk.take("/set temperature 1")
        talk.take("Hello")
    assert len(talk.screen.complaints) == 1
    assert "\n" not in talk.screen.complaints[0]
    talk.take("/set top_p")
    talk.take("Hello")
    assert len(talk.history) == 1


def test_help_names_every_command(talk):
    talk.take("/help")
    text = "\n".join(talk.screen.said)
    assert all(f"/{name}" in text for name in talk._commands)


def test_markdown_keeps_the_tags():
    console = Console(file=io.StringIO(), width=200)
    from rich.markdown import Markdown

    console.print(Markdown(shown("A <ref>dog</ref><box>(1,2),(3,4)</box> **bold**")))
    text = console.file.getvalue()
    assert "<ref>dog</ref><box>(1,2),(3,4)</box>" in text
    assert "**" not in text


def test_a_pipe_gets_answers_alone(blob, in_golden):
    command = [sys.executable, "-m", "qvl_runtime.cli.main", "chat", str(blob("tiny-vl", bits=16)), "--device", "cpu"]
    done = subprocess.run(command, input="/set temperature 0\nHello\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stdout.endswith("\n")
    assert "help" not in done.stdout


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_in_a_real_terminal(blob, in_golden, tmp_path):
    """Chinese input, history with the arrow keys, a command, and leaving with Ctrl-D."""
    name = f"qvl-{time.time_ns()}"
    program = f"{sys.executable} -m qvl_runtime.cli.main chat {blob('tiny-vl', bits=16)} --device cpu"

    def tmux(*arguments: str) -> str:
        return subprocess.run(["tmux", "-L", name, *arguments], capture_output=True, text=True, timeout=60).stdout

    def wait(text: str) -> str:
        for _ in range(600):
            if text in (screen := tmux("capture-pane", "-p")):
                return screen
            time.sleep(0.2)
        raise AssertionError(f"{text!r} never came:\n{tmux('capture-pane', '-p')}")

    try:
        tmux("new-session", "-d", "-x", "100", "-y", "40", "-c", str(tmp_path), f"LANG=C.UTF-8 {program}")
        wait("/help for commands")
        tmux("send-keys", "/set max_new_tokens 4", "Enter")
        tmux("send-keys", "-l", "你好,世界")
        tmux("send-keys", "Enter")
        wait("> 你好,世界")
        tmux("send-keys", "/set", "Enter")
        wait("max_new_tokens 4")
        tmux("send-keys", "Up", "Up")
        assert wait("> 你好,世界").count("> 你好,世界") >= 1
        tmux("send-keys", "C-c", "")
        tmux("send-keys", "/nonsense", "Enter")
        wait("/nonsense is no command")
        tmux("send-keys", "C-d", "")
        for _ in range(100):
            if not tmux("list-sessions"):
                break
            time.sleep(0.2)
        assert not tmux("list-sessions")
    finally:
        tmux("kill-server")
