"""`qvl convert` and `qvl info` on the command line: output, exit status, and one line for each error."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN
from helpers import linked

from qvl_runtime.blob import Blob
from qvl_runtime.cli.main import VERBS, main
from qvl_runtime.cli.text import duration, size
from qvl_runtime.file.tensorfile import TensorFile

BIN = GOLDEN / "ckpt/tiny-vl-bin"


@pytest.fixture
def qvl(capfd):
    """``qvl(*arguments)`` -> (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        return (caught.value.code or 0, *capfd.readouterr())

    return run


def fails(result: tuple[int, str, str], *parts: object) -> None:
    """Status 1, nothing on standard output, exactly one line on standard error, with all the parts."""
    status, out, err = result
    assert (status, out) == (1, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err


def test_convert_then_info(qvl, tmp_path):
    out = tmp_path / "x.qvl"
    status, text, err = qvl("convert", BIN, out, "--bits", "8", "--vision-bits", "4", "--head-bits", "16")
    assert (status, err) == (0, "")
    assert text.startswith(str(out))
    status, text, err = qvl("info", out, "--check")
    assert (status, err) == (0, "")
    assert "Qwen-VL-Chat" in text.splitlines()[0]
    lines = {line[2:14].strip(): line for line in text.splitlines()[4:]}
    assert "int4, groups of 128, rtn" in lines["ViT"]
    assert "int4, groups of 128, rtn" in lines["adapter"]
    assert "int8, groups of 128, rtn" in lines["decoder"]
    assert lines["output head"].endswith("fp16")
    assert "every hash is right" in text
    sizes = Blob(out).part_sizes()
    assert size(sizes["decoder"]) in lines["decoder"]


def test_info_json(qvl, blob):
    path = blob("tiny-vl-bin")
    status, text, _ = qvl("info", path, "--json")
    facts = json.loads(text)
    assert status == 0
    assert text.count("\n") == 1
    assert facts["bytes"] == path.stat().st_size
    assert facts["parts"]["vision"] == {
        "label": "ViT",
        "bytes": Blob(path).part_sizes()["vision"],
        "bits": 8,
        "group_size": 128,
        "method": "rtn",
    }
    assert facts["config"]["visual"]["width"] == 104
    assert "check" not in facts
    assert json.loads(qvl("info", path, "--json", "--check")[1])["check"] == "passed"


def test_names_write_no_lines_and_no_commands_of_a_terminal(qvl, tmp_path):
    """A file's `source` is what its maker wrote."""
    out, folder = tmp_path / "x\x1b]0;x\x07\ny.qvl", tmp_path / "a\x1b[2J\n  every hash is right"
    shutil.copytree(BIN, folder)
    status, text, _ = qvl("convert", folder, out)
    assert status == 0 and text.count("\n") == 1 and "\x1b" not in text
    status, text, _ = qvl("info", out)
    assert status == 0 and "\x1b" not in text and "  every hash is right" not in text.splitlines()
    status, text, err = qvl("verify", out, "--reference", out, "--samples", 1, "--max-new-tokens", 0)
    assert status == 0 and "\x1b" not in text + err and err.startswith("qvl: warning: ") and err.count("\n") == 1


def test_info_names_a_text_model(qvl, blob):
    assert "Qwen-7B" in qvl("info", blob("tiny-q7-gptq-asym"))[1]


def test_group_size_resume_and_force(qvl, tmp_path):
    out = tmp_path / "x.qvl"
    assert qvl("convert", BIN, out, "--group-size", "32", "--resume")[0] == 0
    assert Blob(out).matrix("lm_head").group_size == 32
    fails(qvl("convert", BIN, out), out, "--force")
    assert qvl("convert", BIN, out, "--force")[0] == 0
    assert Blob(out).matrix("lm_head").group_size == 128


def test_errors_are_one_line(qvl, tmp_path, blob):
    fails(qvl("convert", tmp_path / "nowhere", tmp_path / "x.qvl"), "nowhere", "no such folder", "none is downloaded")
    fails(qvl("convert", BIN / "config.json", tmp_path / "x.qvl"), "config.json", "is no folder")
    fails(qvl("convert", "no\nsuch\nfolder", tmp_path / "x.qvl"), "folder", "no such folder")
    fails(qvl("convert", BIN, tmp_path / "no" / "x.qvl"), "folder does not exist")
    fails(qvl("convert", BIN, tmp_path / "x.qvl", "--bits", "5"), "--bits 5", "choose 3, 4, 8 or 16")
    fails(qvl("convert", GOLDEN / "ckpt/tiny-vl-gptq", tmp_path / "x.qvl", "--bits", "8"), "cannot become 8")
    fails(qvl("info", tmp_path / "missing.qvl"), "missing.qvl", "no such file")
    fails(qvl("info", BIN / "config.json"), "config.json", "not a safetensors file")
    fails(qvl("info", GOLDEN / "ckpt/tiny-vl/model-00001-of-00003.safetensors"), "is no .qvl file", "qvl convert")
    fails(qvl("info", GOLDEN / "ckpt/tiny-vl"), "is a folder", "qvl convert")
    damaged = tmp_path / "damaged.qvl"
    content = bytearray(blob("tiny-vl-bin").read_bytes())
    content[TensorFile(blob("tiny-vl-bin")).entries["lm_head.qweight"].start] ^= 1
    damaged.write_bytes(content)
    fails(qvl("info", damaged, "--check"), "damaged.qvl", "lm_head.qweight", "copy the file again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged.qvl"]


def test_options_of_gptq_are_refused_without_it(qvl, tmp_path):
    fails(qvl("convert", BIN, tmp_path / "x.qvl", "--calibration", "mine.json"), "mine.json", "gptq")
    fails(qvl("convert", BIN, tmp_path / "x.qvl", "--spill"), "spill", "gptq")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo"), "device 'foo' is unknown"),
        (("--calibration-samples", 0), "the number of conversations is 0; expected 1 or more"),
        (("--device", "cuda", "--verify", 1), "no GPU here"),
    ],
)
def test_invalid_options_are_found_before_anything_is_written(qvl, tmp_path, monkeypatch, method, options, message):
    """Whatever the method; and an unfinished file that --resume would continue stays."""
    monkeypatch.setattr("qvl_kernels.gpu.available", lambda: (False, "no GPU here"))
    partial = tmp_path / "x.qvl.partial"
    partial.write_bytes(b"begun")
    fails(qvl("convert", BIN, tmp_path / "x.qvl", "--resume", "--method", method, *options), message)
    assert partial.read_bytes() == b"begun"
    assert list(tmp_path.iterdir()) == [partial]


def test_a_calibration_without_its_gpu_leaves_no_file(qvl, tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_kernels.gpu.available", lambda: (False, "no GPU here"))
    options = ("--method", "gptq", "--device", "cuda", "--verify", 0)
    fails(qvl("convert", BIN, tmp_path / "x.qvl", *options), "no GPU here")
    assert not list(tmp_path.iterdir())


def test_options_of_gptq_that_are_valid_are_accepted_without_it(qvl, tmp_path):
    """Scripts give them for every method."""
    options = ("--device", "cuda", "--calibration-samples", 4)
    assert qvl("convert", BIN, tmp_path / "x.qvl", *options)[::2] == (0, "")


@pytest.mark.parametrize("name", ["model.safetensors", "qwen.tiktoken"])
def test_a_git_lfs_pointer_is_named_as_such(qvl, tmp_path, name):
    folder = linked(GOLDEN / "ckpt/tiny-vl", tmp_path / "clone")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    pointer = folder / (next(iter(index.values())) if name == "model.safetensors" else name)
    pointer.unlink()
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    fails(qvl("convert", folder, tmp_path / "x.qvl"), pointer.name, "Git-LFS pointer", "git lfs pull")
    fails(qvl("info", pointer), pointer.name, "Git-LFS pointer")


def test_a_folder_without_permission_is_one_line(qvl, tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.qvl"))

    monkeypatch.setattr("qvl_convert.convert.BlobWriter", denied)
    fails(qvl("convert", BIN, tmp_path / "x.qvl"), f"{tmp_path / 'x.qvl'}: Permission denied")


def test_interrupt_is_130_and_leaves_the_unfinished_file(qvl, tmp_path, monkeypatch):
    def interrupt(self, name, array):
        raise KeyboardInterrupt

    monkeypatch.setattr("qvl_convert.writer.BlobWriter.write", interrupt)
    status, out, err = qvl("convert", BIN, tmp_path / "x.qvl")
    assert (status, out, err.count("\n")) == (130, "", 1)
    assert "x.qvl.partial" in err and "--resume" in err
    assert [p.name for p in tmp_path.iterdir()] == ["x.qvl.partial"]
    monkeypatch.undo()
    fails(qvl("convert", BIN, tmp_path / "x.qvl"), "x.qvl.partial", "--resume", "--force")
    assert [p.name for p in tmp_path.iterdir()] == ["x.qvl.partial"]
    assert qvl("convert", BIN, tmp_path / "x.qvl", "--force")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.qvl"]


@pytest.mark.parametrize("arguments", [
    ("convert",), ("convert", "a"), ("frobnicate",), ("info", "x", "--nonsense"),
    ("verify", "x", "--reference", "y", "--max-new-tokens", "-1"), ("convert", "a", "b", "--verify", "-1"),
])  # fmt: skip
def test_wrong_usage_is_2(qvl, arguments):
    status, out, err = qvl(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: qvl" in err


def test_help_and_version(qvl):
    import qvl_runtime

    status, text, _ = qvl("--help")
    assert status == 0
    assert "Make a .qvl file out of a Hugging Face model." in text
    assert qvl()[1] == text
    assert qvl("--version") == (0, f"qvl {qvl_runtime.__version__}\n", "")
    status, text, _ = qvl("convert", "--help")
    assert status == 0
    assert "qvl convert Qwen-VL-Chat qwen-vl-chat.qvl" in text


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_are_whole_in_a_narrow_terminal(qvl, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "40")
    status, text, _ = qvl(verb, "--help")
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"    qvl {verb}")]
    source = importlib.import_module(f"qvl_runtime.cli.{verb}")
    written = [line.strip() for line in getattr(source, verb).__doc__.splitlines()]
    assert status == 0 and len(examples) >= 1
    assert all(example in written for example in examples)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (5_352_000, "5.35 MB"),
        (99_960_000, "100 MB"),
        (6_590_000_000, "6.59 GB"),
        (123_400_000_000, "123 GB"),
    ],
)
def test_a_size_has_a_unit_that_fits(nbytes, text):
    assert size(nbytes) == text


def test_a_time_has_a_unit_that_fits():
    assert [duration(t) for t in (0.0003, 0.0142, 0.9999, 33.84)] == ["0.30 ms", "14.2 ms", "1.00 s", "33.8 s"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is the C locale's
def test_an_ascii_terminal_shows_code_points(blob, tmp_path, errors):
    (tmp_path / "圆.qvl").symlink_to(blob("tiny-vl-bin"))
    for name, status in (("圆.qvl", 0), ("圆", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "qvl_runtime", "info", str(tmp_path / name)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": f"ascii:{errors}"},
        )
        assert done.returncode == status and "\\u5706" in (done.stderr if status else done.stdout)
        assert (done.stdout if status else done.stderr) == ""


def test_an_interrupt_while_a_command_is_imported_is_130(qvl, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert qvl("info", "x.qvl") == (130, "", "")


@pytest.mark.parametrize("module", ["numpy", "typer"])
def test_an_interrupt_at_the_start_is_quiet(module):
    """An exception would be reported by whatever is being imported."""
    program = f"""
import os, signal, sys

class Interrupting:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting)
from qvl_runtime.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program, "info", "nix"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_output_is_written_nowhere(monkeypatch, blob, name):
    """A descriptor that a shell closed makes the stream None."""
    command = ["generate", str(blob("tiny-vl", bits=16)), "x", "--device", "reference", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as caught:
        main(command)
    written = getattr(sys, name)
    assert caught.value.code == 0 and os.path.samestat(os.fstat(written.fileno()), os.stat(os.devnull))
    written.write("圆\udcff")
    written.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["-u", "--version"], ["--version"], ["-u", "--help"], ["info", "--help"]])
def test_a_full_disk_is_one_line(arguments):
    """Without -u Python writes at the end."""
    with open("/dev/full", "w") as full:
        done = run_into(full, arguments)
    assert (done.returncode, done.stderr) == (1, "qvl: No space left on device\n")


@pytest.mark.parametrize("arguments", [["-u", "--version"], ["--version"], ["info", "--help"]])
def test_a_pipe_that_nobody_reads_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        done = run_into(pipe, arguments)
    assert (done.returncode, done.stderr) == (1, "")


def run_into(file, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run `qvl` with its output into a file; -u is for Python."""
    unbuffered = [word for word in arguments if word == "-u"]
    command = [sys.executable, *unbuffered, "-m", "qvl_runtime", *arguments[len(unbuffered) :]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_message_has_no_control_characters(qvl, tmp_path):
    result = qvl("info", "\x1b[2J.qvl")
    fails(result, "[2J.qvl", "no such file")
    assert "\x1b" not in result[2]
    (tmp_path / "\x1b[2J").write_text("a file")
    result = qvl("demo", "--out", tmp_path / "\x1b[2J")
    fails(result, "\ufffd[2J: is a file")


@pytest.mark.parametrize("words", ["qvl co", "qvl info --con"])
def test_a_shell_completes_verbs_and_options(words):
    environment = {"_QVL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-m", "qvl_runtime"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.stdout.split() == {"qvl co": ["convert"], "qvl info --con": ["--context"]}[words]


def test_only_the_wanted_verb_is_imported(blob):
    program = (
        "import sys; from qvl_runtime.cli.main import main\n"
        "try: main(['info', sys.argv[1]])\n"
        "except SystemExit: print([m for m in ('qvl_convert', 'qvl_runtime.cli.generate') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, blob("tiny-vl-bin")], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_first_start_of_the_demo_does_not_wait_for_numba(tmp_path):
    program = (
        "import sys; from qvl_runtime.cli.main import main\n"
        "try: main(['demo', '--seed', '7', '--device', 'cpu', '--out', sys.argv[1]])\n"
        "except SystemExit: print('numba' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "demo")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def on_terminal(command: list[str]) -> str:
    """A command's output to standard error if that is a terminal."""
    leader, follower = pytest.importorskip("pty").openpty()
    process = subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    seen = b""
    try:
        while piece := os.read(leader, 65536):
            seen += piece
    except OSError:
        # Linux reports the end of a terminal as an error.
        pass
    os.close(leader)
    assert process.wait() == 0
    return seen.decode(errors="replace")


def test_a_bar_on_a_terminal_and_none_in_a_pipe(tmp_path):
    command = [sys.executable, "-m", "qvl_runtime", "convert", str(BIN)]
    shown = on_terminal([*command, str(tmp_path / "a.qvl")])
    assert "962.8" in shown
    environment = {**os.environ, "FORCE_COLOR": "1"}
    command.append(str(tmp_path / "b.qvl"))
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert piped.stderr == ""
    assert piped.stdout == f"{tmp_path / 'b.qvl'}: {size(Path(tmp_path / 'b.qvl').stat().st_size)}\n"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_long_conversion_says_how_far_it_is_in_a_pipe(method, tmp_path, monkeypatch, qvl):
    monkeypatch.setattr(importlib.import_module("qvl_runtime.cli.convert"), "SECONDS", 0)
    options = ["--method", method, "--calibration-samples", 2, "--verify", 0, "--device", "reference"]
    status, _, err = qvl("convert", BIN, tmp_path / "a.qvl", *options)
    assert status == 0
    lines = err.splitlines()
    shares = [int(re.fullmatch(r"qvl: \S.*: (\d+)% done(, \d+ min to go)?", line)[1]) for line in lines]
    assert len(shares) > 10 and shares == sorted(shares) and shares[-1] > 80
    assert lines[-1].endswith(" min to go")


def test_every_command_starts_without_optional_packages():
    absent = ["starlette", "uvicorn", "prometheus_client", "pyarrow", "ray", "pycocoevalcap"]
    program = (
        f"import importlib, sys; sys.modules |= dict.fromkeys({absent})\n"
        "from qvl_runtime.cli.main import VERBS\n"
        "for verb in VERBS: importlib.import_module(f'qvl_runtime.cli.{verb}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
