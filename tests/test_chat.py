"""The terminal conversation, line by line, and once in a pipe and in a real terminal."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import qvl_runtime as qvl
from qvl_kernels.ops import DeviceError
from qvl_runtime.cli.chat import _talk
from qvl_runtime.cli.conversation import Conversation, dropped_files
from qvl_runtime.cli.main import main
from qvl_runtime.cli.screen import Screen
from qvl_runtime.cli.turns import pictures, portable, words
from qvl_runtime.inputs.images import load_image


class Spoken(Screen):
    """A screen that records its output."""

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
        assert dropped_files(line.strip()) == [path]
        talk.take(line)
    assert len(talk._waiting) == 5
    assert dropped_files("what is in my cat.png?") == []
    for line in ("x" * 500 + ".png", "file://[::1", "file://[::1/a.png", "~nosuchuser/a.png", "a\0b.png"):
        assert dropped_files(line) == []


def test_several_files_that_are_dropped_at_once(talk, tmp_path):
    paths = [tmp_path / "my cat.png", tmp_path / "dog.png"]
    for path in paths:
        Image.new("RGB", (20, 10)).save(path)
    for line in (f"'{paths[0]}' {paths[1]}", f"{paths[0].as_uri()} {paths[1].as_uri()}"):
        talk.take(line)
    assert talk._waiting == [str(path) for path in paths * 2] and not talk.history
    for line in (f"{paths[1]} What is it?", f"{paths[1]} {tmp_path / 'gone.png'}", f"{paths[1]} 'x"):
        assert dropped_files(line) == []


def test_a_file_uri_attaches(talk, tmp_path):
    path = tmp_path / "my cat.png"
    Image.new("RGB", (20, 10)).save(path)
    talk.attach(path.as_uri())
    talk.take(f"/image {path.as_uri()}")
    assert talk._waiting == [str(path)] * 2 and not talk.screen.complaints
    talk.take("/image file://elsewhere/a.png")
    assert "is no file URI (it names another machine)" in talk.screen.complaints[0]


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
    assert talk.screen.said[-2:] == ["took back 'two'; turns left: 1", "took back 'one'; turns left: 0"]


def test_clear_begins_a_new_conversation(talk):
    talk.take("one")
    alone = talk.history[:]
    talk.take("two")
    talk.take("/image images/rgb_odd.png")
    talk.take("/clear")
    assert talk.history == []
    talk.take("one")
    assert talk.history == alone
    assert talk.settings["max_new_tokens"] == 6


def test_retry_of_a_question_with_a_picture_replaces_the_turn(talk, monkeypatch):
    talk.take("/image images/rgb_odd.png")
    talk.take("What is it?")
    before = talk.history
    talk.take("/retry")
    assert talk.history == before and len(before) == 1

    def refuses(*arguments, **options):
        raise qvl.QvlError("no")

    monkeypatch.setattr(talk.model, "chat", refuses)
    talk.take("/retry")
    assert talk.history == before


def test_a_picture_waits_until_a_question_was_answered(talk):
    talk.take("/image images/rgb_odd.png")
    talk.take("<img>nowhere.png</img> What is it?")
    assert not talk.history and len(talk._waiting) == 1
    talk.take("What is it?")
    assert len(talk.history) == 1 and not talk._waiting


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
    assert other.screen.said[0].endswith("talk one.json: turns 1, pictures 1")
    assert "What is it?" in other.screen.said[1]
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
    assert "talk.json.past" in complaint and complaint.endswith("computed again")
    assert len(other.history) == 2


def test_a_saved_conversation_is_read_in_another_folder(talk, tmp_path, monkeypatch):
    talk.take("/image images/rgb_odd.png")
    talk.take("What is it?")
    talk.take("<img>images/rgba.png</img>And this?")
    picture = Image.open("images/rgb_odd.png").convert("RGB")
    talk.history.append(([{"image": picture}, {"text": "And that?"}], "a \udc80 cat"))
    talk.take(f"/save {tmp_path}/talk.json")
    assert not talk.screen.complaints
    monkeypatch.chdir(tmp_path)
    other = Conversation(talk.model, Spoken())
    other.take("/load talk.json")
    assert not other.screen.complaints and not any("gone" in line for line in other.screen.said)
    first, second, third = (pictures(query)[0] for query, _ in other.history)
    assert Path(first).is_file() and Path(second).is_file()
    assert load_image(third).tobytes() == picture.tobytes()
    assert other.history[2][1] == talk.history[2][1]
    other.take("/set max_new_tokens 2")
    other.take("And now?")
    assert len(other.history) == 4 and not other.screen.complaints


def test_load_names_a_picture_that_is_gone(talk, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "cat.png")
    talk.take(f"/image {tmp_path}/cat.png")
    talk.take("What is it?")
    talk.take(f"/save {tmp_path}/talk.json")
    (tmp_path / "cat.png").unlink()
    talk.take(f"/load {tmp_path}/talk.json")
    assert any("cat.png" in line and "gone" in line for line in talk.screen.said)


def test_a_path_before_a_question_is_told_from_a_command(talk):
    talk.take("/tmp/cat.png what is it?")
    talk.take("/what is it?")
    assert talk.screen.complaints == [
        "/tmp/cat.png is no command; give a picture alone on a line, then the question",
        "/what is no command; /help lists them",
    ]


def test_what_a_turn_holds_in_either_form():
    picture = Image.new("RGB", (20, 10))
    pieces = [{"image": "a.png"}, {"image_url": {"url": "http://x/b.png"}}, {"image": picture}, {"text": "What?"}]
    assert pictures(pieces) == ["a.png", "http://x/b.png", picture]
    assert pictures([{"type": "video", "video": ["a.png", "b.png"]}, {"image": "c.png"}]) == ["a.png", "b.png", "c.png"]
    assert words(pieces) == words("<img>a.png</img>What?") == "What?"
    saved = portable(pieces)
    assert saved[0] == {"image": "a.png"} and saved[1] == pieces[1] and saved[2]["image"].startswith("data:image/png")
    assert portable("<img>http://x/b.png</img><img></img>") == "<img>http://x/b.png</img><img></img>"


def test_urls_are_fetched_only_where_allowed(talk, monkeypatch):
    picture = Image.new("RGB", (20, 10))
    talk.take("/image http://example.com/a.png")
    assert talk.screen.complaints and "--allow-urls" in talk.screen.complaints[0]
    monkeypatch.setattr("qvl_runtime.cli.conversation.load_image", lambda source, **options: picture)
    allowed = Conversation(talk.model, Spoken(), allow_urls=True)
    allowed.take("/image http://example.com/a.png")
    assert allowed.screen.said == ["http://example.com/a.png: 20 x 10, goes with your next question"]
    assert allowed._waiting == [picture]


@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ((0, 0, 1, 0.5), "(0,0),(999,500)"),
        ((0.1, 0.2, 0.3, 0.9), "(100,200),(300,900)"),
        ((0.75, 0, 1, 1), "(750,0),(999,999)"),
    ],
)
def test_a_box_is_asked_about_in_thousandths(talk, tmp_path, corners, box):
    Image.new("RGB", (400, 200)).save(tmp_path / "wide.png")
    talk.take(f"/image {tmp_path}/wide.png")
    x1, y1, x2, y2 = corners
    talk.take(f"/box {400 * x1} {200 * y1} {400 * x2} {200 * y2} What?")
    assert f"<box>{box}</box>What?" in talk.history[0][0]


@pytest.mark.parametrize(
    "corners",
    [
        "0 0 1e308 1e308",
        "-1 0 5 5",
        "0 -1 5 5",
        "0 0 401 200",
        "0 0 400 200.5",
        "5 0 5 5",
        "0 5 5 5",
        "0 0 inf 5",
        "0 0 9 nan",
    ],
)
def test_a_box_outside_the_picture_is_refused(talk, tmp_path, corners):
    Image.new("RGB", (400, 200)).save(tmp_path / "wide.png")
    talk.take(f"/image {tmp_path}/wide.png")
    talk.take(f"/box {corners} What?")
    (complaint,) = talk.screen.complaints
    assert complaint.startswith(f"/box {corners} is no box on a picture of 400 x 200 pixels; expected 0 <= x1")
    assert not talk.history and len(talk._waiting) == 1


def test_show_draws_the_last_boxes(talk, tmp_path):
    from qvl_runtime.boxes import Box

    talk.take("/show")
    talk.take("/image images/rgb_odd.png")
    talk.take("Where?")
    talk._boxes = [Box("击掌", 100, 100, 500, 500)]
    talk.take("/image images/rgba.png")
    talk.take(f"/show {tmp_path}/out.png")
    assert Image.open(tmp_path / "out.png").size == Image.open("images/rgb_odd.png").size
    assert talk.screen.complaints == ["the last answer has no boxes to show"]


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_show_does_not_overwrite_what_is_read(talk, tmp_path, form):
    from qvl_runtime.boxes import Box

    own, link = tmp_path / "own.png", tmp_path / "link.png"
    shutil.copy("images/rgb_odd.png", own)
    link.symlink_to(own)
    before = own.read_bytes()
    talk.history = [([{"image": form.format(own)}, {"text": "Where?"}], "There")]
    talk._boxes = [Box(None, 100, 100, 500, 500)]
    for out in (own, link, talk.model.blob.path):
        talk.take(f"/show {out}")
        assert talk.screen.complaints.pop() == f"{out}: is read here and would be overwritten; name another file"
    assert own.read_bytes() == before
    talk.take(f"/show {tmp_path}/other.png")
    assert not talk.screen.complaints and (tmp_path / "other.png").exists()


def test_save_overwrites_saved_conversations_alone(talk, tmp_path):
    picture, file = tmp_path / "own.png", tmp_path / "x.json"
    shutil.copy("images/rgb_odd.png", picture)
    before = picture.read_bytes()
    for path in (picture, talk.model.blob.path, tmp_path):
        talk.take(f"/save {path}")
        assert talk.screen.complaints.pop() == (
            f"{path}: exists and is no conversation saved with /save; name another file"
        )
    assert picture.read_bytes() == before
    talk.take(f"/save {file}")
    talk.take("Hello")
    talk.take(f"/save {file}")
    assert not talk.screen.complaints and "Hello" in file.read_text()


def test_save_overwrites_keys_and_values_of_its_own_alone(talk, tmp_path):
    file, past = tmp_path / "x.json", tmp_path / "x.json.past"
    talk.take("Hello")
    talk.take(f"/save {file}")
    saved = past.read_bytes()
    talk.take("And again")
    talk.take(f"/save {file}")
    assert not talk.screen.complaints and past.read_bytes() != saved
    file.unlink()
    for foreign in (b"precious", talk.model.blob.path.read_bytes()):
        past.write_bytes(foreign)
        talk.take(f"/save {file}")
        assert talk.screen.complaints.pop() == (
            f"{past}: exists and holds no keys and values saved with /save; name another file"
        )
        assert past.read_bytes() == foreign and not file.exists()


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    def interrupted(query, history, *, on_piece, **options):
        from qvl_runtime.engine.generation import Piece

        on_piece(Piece("half an ans"))
        raise KeyboardInterrupt

    monkeypatch.setattr(talk.model, "chat", interrupted)
    talk.take("/image images/rgb_odd.png")
    with pytest.raises(KeyboardInterrupt):
        talk.take("Hello")
    (query, answer), *others = talk.history
    assert words(query) == "Hello" and len(pictures(query)) == 1
    assert (answer, others, talk._waiting) == ("half an ans", [], [])
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
        "/image ~nosuchuser/a.png",
        "/image a\0b.png",
        "/image http://[::1",
        "/box 1 2 3",
        "/box 1 2 nan 4",
        "/box 1 2 inf 4",
        "/box 5 2 5 4",
        "/save",
        "/save ~nosuchuser/a.json",
        "/save a\0b",
        "/save .",
        "/save /",
        "/load",
        "/load ~nosuchuser/a.json",
        "/load a\0b",
        "/set max_new_tokens 0",
        "/set temperature nan",
    ],
)
def test_what_the_user_can_mend_is_one_line(talk, line):
    talk.take(line)
    assert len(talk.screen.complaints) == 1
    assert "\n" not in talk.screen.complaints[0]
    talk.take("/set top_p")
    talk.take("Hello")
    assert len(talk.history) == 1


def test_a_conversation_survives_the_system(talk, tmp_path, monkeypatch):
    talk.take("/image images/rgb_odd.png")
    for error in (DeviceError("the GPU has no memory left"), MemoryError(), OSError(5, "Input/output error")):

        def failing(*arguments, error=error, **options):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(talk.model, "chat", failing)
            talk.take("Hello")
        assert len(talk._waiting) == 1 and not talk.history
    said = ["the GPU has no memory left", "there is not enough memory; close other programs or take a smaller model"]
    assert talk.screen.complaints == [*said, "Input/output error"]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    talk.take("/image a.png")
    assert talk.screen.complaints[3:] == ["No such file or directory"] and talk.failed
    talk.take("Hello")
    assert len(talk.history) == 1


@pytest.mark.parametrize("command", ["/help", "/undo", "/retry", "/clear", "/quit"])
def test_a_command_without_arguments_refuses_one(talk, command):
    talk.take("Hello")
    before = talk.history[:]
    talk.take(f"{command}  2 ")
    assert talk.screen.complaints == [f"{command} takes no argument; leave out '2'"]
    assert talk.history == before and talk.open


def test_help_names_every_command(talk, monkeypatch):
    methods = {name: value for name, value in vars(Conversation).items() if name.startswith("_do_")}
    for method in methods.values():
        monkeypatch.setattr(method, "__doc__", None)  # as under python -OO
    talk.take("/help")
    usages = [entry.partition("\n")[0] for entry in talk.screen.said if entry.startswith("/")]
    assert [usage.split()[0] for usage in usages] == sorted(name.replace("_do_", "/") for name in methods)
    assert "/image FILE" in usages


@pytest.mark.parametrize("width", [0, 1, 4, 5])
def test_help_in_a_narrow_terminal(talk, width):
    talk.screen.console.width = width
    talk.take("/help")
    assert "    take back your" in "\n".join(talk.screen.said)


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on_terminal(*pieces: str) -> str:
    console = Console(file=FakeTerminal(), force_terminal=True, width=40, height=10, _environ={"TERM": "xterm"})
    with Screen(console).answering("thinking") as place:
        for piece in pieces:
            place.show(piece)
    return console.file.getvalue().rpartition("\x1b[2K")[2]


def test_a_terminal_shows_an_answer_as_it_is_and_once():
    lines = [f"{i}: 2*3*4 `x` __init__  two  spaces\n" for i in range(40)]
    pieces = [" ", "\n# of items\n", *lines, "<ref>dog</ref><box>(1,2),(3,4)</box>"]
    assert shown_on_terminal(*pieces) == "".join(pieces).lstrip() + "\n"


def test_a_terminal_does_not_obey_an_answer():
    assert shown_on_terminal("a\x1b[2Jb\x07c\x9b1md\te\r\nf") == "a\ufffd[2Jb\ufffdc\ufffd1md\te\nf\n"


def test_a_pipe_gets_every_character():
    console = Console(file=io.StringIO(), force_terminal=False)
    with Screen(console).answering("thinking") as place:
        place.show(" \x1b[2J\r\n")
    assert console.file.getvalue() == " \x1b[2J\r\n\n"


def test_a_pipe_gets_answers_alone(blob, in_golden):
    command = [sys.executable, "-m", "qvl_runtime", "chat", str(blob("tiny-vl", bits=16)), "--device", "cpu"]
    lines = "/set temperature 0\n/set max_new_tokens 4\nHello\n/image nowhere.png\n/quit\n/nonsense\n"
    environment = {**os.environ, "FORCE_COLOR": "1"}  # as notebooks set it, for their pipes too
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "nowhere.png" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.endswith("\n")
    assert "help" not in done.stdout


def test_a_pipe_is_told_of_what_the_context_cuts(blob, in_golden):
    """On standard error: nothing is left out in silence."""
    talk = Conversation(qvl.load(blob("tiny-vl", bits=16), device="cpu", context=48), Spoken())
    talk.take("/set temperature 0")
    talk.take("/set max_new_tokens 4")
    talk.take("Hello")
    assert talk.screen.complaints == [], "as in `qvl generate`, the limit was the user's"
    talk.take("/set max_new_tokens 500")
    talk.take("And again")
    assert talk.screen.complaints == [
        "the context is full; oldest turns left out: 1",
        "the answer was cut after 5 tokens; start with a larger --context",
    ]


@pytest.mark.parametrize(("lines", "status"), [("/set\n/quit\n/nonsense\n", 0), ("/nonsense\n/set\n", 1)])
def test_the_status_of_a_pipe_tells_of_a_failed_line(blob, monkeypatch, capsys, lines, status):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as caught:
        main(["chat", str(blob("tiny-vl", bits=16)), "--device", "reference"])
    assert (caught.value.code or 0) == status == capsys.readouterr().err.count("\n")


def test_ctrl_z_stops_the_program(talk, monkeypatch):
    from prompt_toolkit.application import Application, create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    stopped = []
    monkeypatch.setattr(Application, "suspend_to_background", lambda self: stopped.append(talk.open))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("/qu\x1ait\r\x04")
        _talk(talk)
    assert stopped == [True] and not talk.open


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_in_a_real_terminal(blob, in_golden, tmp_path):
    """Chinese input, history with the arrow keys, a command, and leaving with Ctrl-D."""
    name = f"qvl-{time.time_ns()}"
    program = f"{sys.executable} -m qvl_runtime chat {blob('tiny-vl', bits=16)} --device cpu"

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
