"""`qvl eval` from files to table, on the demo model's pictures and on a golden model."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evaluation_files import choice, make, mme, put, qa
from families import GOLDEN
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.blob import Blob
from qvl_runtime.cli import main
from qvl_runtime.cli.eval import table
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.evaluation import runner
from qvl_runtime.evaluation.answers import AnswerFile
from qvl_runtime.evaluation.comparison import Row
from qvl_runtime.evaluation.data import Sample
from qvl_runtime.evaluation.evaluate import Evaluation, evaluate
from qvl_runtime.evaluation.metrics import tokens
from qvl_runtime.evaluation.prompts import wording
from qvl_runtime.evaluation.tasks import TASKS
from qvl_runtime.families.generation_config import GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import demo_eval
import demo_fidelity
import demo_tasks
import skills

COUNT = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The demo model's pictures as published tasks, without text that needs other fonts."""
    path = tmp_path_factory.mktemp("world") / "data"
    demo_tasks.write(path, COUNT, 5, "calm digits")
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.qvl"
    convert(checkpoint_folder(), path, bits=8)
    return path


@pytest.fixture
def base(blob) -> Path:
    return blob("tiny-vl", "base", bits=16)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "data")


def qvl_eval(*arguments: object):
    return CliRunner().invoke(main._app("eval"), ["eval", *map(str, arguments)])


def test_the_limit_of_pictures_arrives(world, demo, tmp_path):
    arguments = ("--data", world, "--out", tmp_path / "a", "--device", "cpu", "--max-pixels", 100_000)
    ran = qvl_eval(demo, "docvqa", *arguments)
    assert "are for models that take pictures of any size" in ran.output


def test_the_demo_model_on_all_four_families(world, demo, base, tmp_path):
    """Most answers of the demo model are right, and none of an untrained model."""
    prompts, highest = world / "prompts.json", {"nocaps": 1000, "vqav2": 100, "docvqa": 100, "refcoco_val": 100}
    for task in demo_tasks.TASKS:
        plot, models = tmp_path / f"{task}.png", [demo, base] if task == "vqav2" else [demo]
        arguments = ("--data", world, "--prompts", prompts, "--out", tmp_path / task, "--plot", plot, "--device", "cpu")
        ran = qvl_eval(*models, task, *arguments)
        assert ran.exit_code == 0, ran.output
        document = json.loads(ran.output.splitlines()[-1])
        first, *others = document["models"]
        assert document["questions"] == COUNT and document["task"] == task
        assert first["score"] >= 0.6 * highest[task], (task, document)
        for second in others:
            assert second["score"] < 20
            assert second["difference"] == pytest.approx(second["score"] - first["score"])
        assert first["seconds"] > 0 and first["size"] == demo.stat().st_size
        assert f"{first['score']:.2f}" in ran.output and "demo" in ran.output
        assert len((tmp_path / task / "demo.jsonl").read_text().splitlines()) == 1 + COUNT
        assert np.asarray(Image.open(plot)).std() > 1


def test_the_bench_makes_one_table(monkeypatch, world, demo, tmp_path):
    monkeypatch.setattr(demo_eval, "columns", lambda *arguments: [("demo", demo)])
    monkeypatch.setattr(demo_tasks, "TASKS", ("nocaps", "vqav2", "docvqa", "refcoco_val"))
    documents = demo_eval.run(tmp_path, 1, 5, "calm digits", ["int8"], "cpu")
    lines = demo_eval.table(documents).splitlines()
    assert len(lines) == 9 and lines[0].endswith("| demo |") and "| vqav2 | VQA accuracy | 100.0 |" in lines
    last = [line.split("|")[1].strip() for line in lines[-3:]]
    assert last == ["time", "memory", "file"] and f" {demo.stat().st_size / 1e6:.1f} MB " in lines[-1]


@pytest.mark.parametrize("script", [demo_tasks, demo_eval])
def test_the_bench_names_the_package_of_a_missing_font(monkeypatch, capsys, tmp_path, script):
    monkeypatch.setattr("training.lexicon.HANZI_FONTS", [str(tmp_path / "no.ttc")])
    monkeypatch.setattr(sys, "argv", ["x.py", *([str(tmp_path / "out")] if script is demo_tasks else [])])
    with pytest.raises(SystemExit) as left:
        script.main()
    told = capsys.readouterr().err
    assert left.value.code == 1 and told.count("\n") == 1
    assert "fonts-wqy-microhei" in told and "--level latin" in told


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        (skills, [], "the skill 'read hanzi'"),
        (skills, ["--skills", "find", "--kinds", "int8", "int4 all GPTQ"], "the calibration of 'int4 all GPTQ'"),
        (demo_fidelity, [], "the skill 'read hanzi'"),
        (demo_eval, [], "the calibration of 'int4 all GPTQ'"),
    ],
)
def test_the_bench_names_what_prints_chinese_at_every_level(monkeypatch, capsys, tmp_path, script, arguments, named):
    monkeypatch.setattr("training.lexicon.HANZI_FONTS", [str(tmp_path / "no.ttc")])
    monkeypatch.setattr(sys, "argv", ["x.py", "--level", "latin", *arguments])
    with pytest.raises(SystemExit) as left:
        script.main()
    told = capsys.readouterr().err
    assert left.value.code == 1 and told.count("\n") == 1
    assert f"{named} prints Chinese" in told and "fonts-wqy-microhei" in told


def test_the_bench_does_without_the_font_where_nothing_prints_chinese(monkeypatch, tmp_path):
    monkeypatch.setattr("training.lexicon.HANZI_FONTS", [str(tmp_path / "no.ttc")])
    assert skills.prints_hanzi(["find", "read latin"], ["fp16", "int4 all RTN"]) == ""
    assert len(list(skills.cases(3, 1, ["find", "read latin"], "latin"))) == 4


class Stopped(Exception):
    pass


def answers(path: Path) -> list[dict]:
    """The answers of a file without the time they took."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return sorted(({**line, "seconds": None} for line in lines), key=lambda line: line["id"])


def write_gqa(folder: Path) -> Path:
    lines = [qa("ab"[i % 2] + ".png", answer="x", question=f"Q{i}?") for i in range(6)]
    put(folder, "gqa/testdev_balanced.jsonl", *lines)
    return folder


@pytest.fixture
def gqa(folder) -> Path:
    return write_gqa(folder)


def test_a_folder_that_cannot_be_made_is_named(gqa, base, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(qvl.QvlError, match=rf"{out}: cannot be made \(.*\); name another folder with --out"):
            evaluate([base], "gqa", gqa, out=out, device="cpu")
    with pytest.raises(qvl.QvlError, match="a path has no NUL character"):
        evaluate([base], "gqa", gqa, out=tmp_path / "a\0b", device="cpu")


def test_a_run_that_was_stopped_goes_on(gqa, base, tmp_path, monkeypatch):
    evaluate([base], "gqa", gqa, out=tmp_path / "whole", device="cpu")
    asked = []

    def stop(name: str, done: int, total: int) -> None:
        asked.append(done)
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        evaluate([base], "gqa", gqa, out=tmp_path / "parts", device="cpu", progress=stop)
    kept = tmp_path / "parts" / f"{base.stem}.jsonl"
    assert len(answers(kept)) == 3
    with kept.open("ab") as file:
        file.write('{"id": "3", "text": "é'.encode()[:-1])  # as a kill in the middle of a write leaves it
    found = evaluate(
        [base], "gqa", gqa, out=tmp_path / "parts", device="cpu", progress=lambda name, done, total: asked.append(done)
    )
    assert asked == [0, 1, 2, 3, 3, 4, 5, 6], "nothing is asked twice"
    assert answers(kept) == answers(tmp_path / "whole" / f"{base.stem}.jsonl") and len(answers(kept)) == 6
    monkeypatch.setattr(qvl.Model, "stream", None)  # nothing is asked
    again = evaluate([base], "gqa", gqa, out=tmp_path / "parts", device="cpu")
    assert again.rows[0].score == found.rows[0].score and again.rows[0].seconds == pytest.approx(found.rows[0].seconds)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_that_was_killed_goes_on(gqa, base, tmp_path):
    def kill(name: str, done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        evaluate([base], "gqa", gqa, out=tmp_path / "parts", device="cpu", progress=kill)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    kept = tmp_path / "parts" / f"{base.stem}.jsonl"
    assert child.exitcode == -signal.SIGKILL and len(answers(kept)) == 3
    found = evaluate([base], "gqa", gqa, out=tmp_path / "parts", device="cpu")
    whole = evaluate([base], "gqa", gqa, out=tmp_path / "whole", device="cpu")
    assert answers(kept) == answers(tmp_path / "whole" / kept.name) and found.rows[0].score == whole.rows[0].score


@pytest.fixture(scope="module")
def one_answer(blob, tmp_path_factory) -> Path:
    """The folder of a run that asked one question of `gqa`."""
    path = tmp_path_factory.mktemp("one")
    evaluate([blob("tiny-vl", "base", bits=16)], "gqa", write_gqa(make(path / "data")), out=path, device="cpu", limit=1)
    return path


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("data", r"data: files: gqa/testdev_balanced\.jsonl"),
        ("limit", "data: samples"),
        ("prompts", "prompt"),
        ("kv_cache", "options: kv_cache"),
        ("model", "model"),
        ("pictures", "data: samples"),
        ("version", r"version of qvl"),
    ],
)
def test_answers_of_another_run_are_not_taken_up(changed, named, one_answer, base, blob, tmp_path, monkeypatch):
    shutil.copytree(one_answer, tmp_path, dirs_exist_ok=True)
    gqa, model, options = tmp_path / "data", base, {"limit": 1}
    if changed == "data":
        put(gqa, "gqa/testdev_balanced.jsonl", *(qa(answer="y", question=f"Q{i}?") for i in range(6)))
    elif changed == "pictures":
        for name in ("a.png", "b.png"):
            Image.new("RGB", (30, 31)).save(gqa / "pictures" / name)
    elif changed == "limit":
        options["limit"] = 2
    elif changed == "prompts":
        options["prompts"] = {"question": "<img></img>{question}"}
    elif changed == "kv_cache":
        options["kv_cache"] = "int8"
    elif changed == "version":
        monkeypatch.setattr(runner, "__version__", "9.9")
    else:
        model = tmp_path / base.name
        model.write_bytes(blob("tiny-vl", "base", bits=8).read_bytes())
    with pytest.raises(
        qvl.QvlError, match=f"its answers were made with different {named}; remove the file, or name another"
    ):
        evaluate([model], "gqa", gqa, out=tmp_path, device="cpu", **options)


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "2"}',
        b'{"id": "2", "seconds": 1}',
        b'{"id": "2", "seconds": 1, "text": 5}',
        b'{"id": "2", "seconds": 1' + b"0" * 400 + b', "text": "x"}',
        b'{"id": "2", "seconds": NaN, "text": "x"}',
        b'{"id": "2", "seconds": 1, "likelihoods": ["x"]}',
        b'{"id": "2", "seconds": 1, "likelihoods": [NaN]}',
        b'{"id": "2", "seconds": 1, "text": "x", "boxes": [[1, 2]]}',
        b'{"id": "2", "seconds": 1, "text": "x", "boxes": 1}',
    ],
)
def test_a_broken_line_of_answers_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {"task": "t"}) as file:
        file.add("1", {"text": "é"})
    with AnswerFile(path, {"task": "t"}) as file:
        assert file.answers["1"]["text"] == "é"
    path.write_bytes(path.read_bytes() + line + b'\n{"id"\n')
    with pytest.raises(qvl.QvlError, match=r"a.jsonl line 3: is no answer"):
        AnswerFile(path, {"task": "t"})


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("gqa", {"likelihoods": [-1]}),
        ("scienceqa", {"text": "A"}),
        ("scienceqa", {"likelihoods": []}),
        ("scienceqa", {"likelihoods": [-1] * 9}),
    ],
)
def test_a_stored_answer_of_another_kind_is_refused(task, answer, gqa, base, tmp_path):
    put(gqa, "scienceqa/scienceqa_test_img.jsonl", choice())
    evaluate([base], task, gqa, out=tmp_path, device="cpu", limit=1)
    path = tmp_path / f"{base.stem}.jsonl"
    head, right = path.read_text().splitlines()
    path.write_text(head + "\n" + json.dumps({"id": json.loads(right)["id"], "seconds": 1, **answer}) + "\n")
    with pytest.raises(qvl.QvlError, match=r"\.jsonl: the answer '\d' is none of this task; remove the file"):
        evaluate([base], task, gqa, out=tmp_path, device="cpu", limit=1)


@pytest.mark.parametrize(
    "content", [b"a letter without a last line end", b'{"task": "other"}\n{"id": "1"', b"[]\n[", b"\xff"]
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(qvl.QvlError, match=r"a.jsonl.*; remove the file, or name another folder"):
        AnswerFile(path, {"task": "t"})
    assert path.read_bytes() == content


def test_two_runs_do_not_write_to_one_file(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {"task": "t"}) as file:
        with pytest.raises(qvl.QvlError, match=r"a.jsonl: another evaluation is writing to it; .* --out"):
            AnswerFile(path, {"task": "t"})
        file.add("1", {"text": "a"})
    with AnswerFile(path, {"task": "t"}) as file:
        assert list(file.answers) == ["1"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no file that is always full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {"task": "t"}) as file, open("/dev/full", "wb", buffering=0) as full:
        with monkeypatch.context() as patch:
            patch.setattr(file, "_file", full)
            with pytest.raises(qvl.QvlError, match=r"a.jsonl: cannot be written \(No space left.*\); make room"):
                file.add("1", {"text": "a"})
        assert not file.answers


@pytest.mark.parametrize("kept", [0, 5])
def test_a_killed_beginning_is_begun_again(tmp_path, kept):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {"task": "t"}):
        whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with AnswerFile(path, {"task": "t"}):
        assert path.read_bytes() == whole


def test_options_are_chosen_by_their_likelihood(folder, base, tmp_path):
    put(folder, "scienceqa/scienceqa_test_img.jsonl", choice(), choice(choices=["u", "v", "w"]))
    found = evaluate([base], "scienceqa", folder, out=tmp_path, device="cpu")
    model = qvl.load(base, "cpu")
    picture = folder / "pictures/a.png"
    prompt = "<img></img>Context: N/A\nQuestion: Which?\nOptions: A. x\nB. y\nAnswer:"
    wanted = [sum(s) / len(s) for s in model.score(prompt, [" A", " B"], [picture])]
    first, second = answers(tmp_path / f"{base.stem}.jsonl")
    assert first["likelihoods"] == wanted and len(second["likelihoods"]) == 3
    right = [int(np.argmax(line["likelihoods"])) == 1 for line in (first, second)]
    assert found.rows[0].score == 50 * sum(right)


def test_prompts_and_lengths_are_those_published(gqa, base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "_record", lambda model, result, boxes: seen.append(result) or {"text": ""})
    evaluate([base], "gqa", gqa, out=tmp_path, device="cpu", limit=1)
    model = qvl.load(base, "cpu")
    question = json.loads((gqa / "gqa/testdev_balanced.jsonl").read_text().splitlines()[5])
    drawn = [f"<img></img>Q{i}? Answer:" for i in range(6)]
    pictures = [gqa / "pictures" / ("ab"[i % 2] + ".png") for i in range(6)]
    wanted = [model.generate(p, [i], max_new_tokens=10, min_new_tokens=1).token_ids for p, i in zip(drawn, pictures)]
    assert question["question"] == "Q5?" and seen[0].token_ids in wanted and 1 <= len(seen[0].token_ids) <= 10
    for kind, longest, shortest in (("nocaps", 30, 8), ("docvqa", 100, 1), ("refcoco_val", 28, 10), ("vqav2", 10, 1)):
        task = TASKS[kind]
        assert wording(model.blob, task.prompt).lengths(task.prompt, task.longest, task.shortest) == {
            "max_new_tokens": longest,
            "min_new_tokens": shortest,
        }


def test_mme_and_touchstone_are_asked_in_turns(folder, demo, base, model, tmp_path):
    mme(folder)
    found = evaluate([demo], "mme_cognition", folder, out=tmp_path, device="cpu", limit=1)
    assert set(found.document["models"][0]) >= {"score", "parts"} and found.questions == 2
    text = answers(tmp_path / "demo.jsonl")[0]["text"]
    subtask = answers(tmp_path / "demo.jsonl")[0]["id"].partition("/")[0]
    message = [{"role": "user", "content": "<img></img>\nIs it Yes? Please answer yes or no."}]
    picture = folder / "mme/images" / subtask / "a.png"
    assert qvl.load(demo, "cpu").generate(message, [picture]).text.strip() == text
    put(
        folder,
        "touchstone/touchstone_20230831.tsv",
        "index\tquestion\thuman_annotation\tgpt4_ha_answer\tcategory\ttask_name\timage",
    )
    with pytest.raises(qvl.QvlError, match="hold no question"):
        evaluate([demo], "touchstone", folder, out=tmp_path / "t", device="cpu")


def test_touchstone_exports_what_its_judge_takes(folder, demo, tmp_path):
    picture = base64.b64encode((folder / "pictures/a.png").read_bytes()).decode()
    head = "index\tquestion\thuman_annotation\tgpt4_ha_answer\tcategory\ttask_name\timage"
    put(folder, "touchstone/touchstone_20230831.tsv", head, f'0\tWhat is in the picture?\t"a\tb"\tcat\tc\tt\t{picture}')
    ran = qvl_eval(demo, "touchstone", "--data", folder, "--out", tmp_path, "--device", "cpu")
    assert ran.exit_code == 0, ran.output
    rows = list(csv.DictReader(io.StringIO((tmp_path / "demo.tsv").read_text()), delimiter="\t"))
    assert list(rows[0]) == [*head.split("\t")[:-1], "response"] and rows[0]["human_annotation"] == "a\tb"
    assert rows[0]["response"] == answers(tmp_path / "demo.jsonl")[0]["text"] != ""
    assert json.loads(ran.output.splitlines()[-1])["exported"] == [str(tmp_path / "demo.tsv")]
    modes = {(tmp_path / name).stat().st_mode for name in ("demo.tsv", "demo.jsonl")}
    assert len(modes) == 1, "whoever may read the answers may read what the judge takes"
    (tmp_path / "demo.tsv").unlink()
    (tmp_path / "demo.tsv").mkdir()
    ran = qvl_eval(demo, "touchstone", "--data", folder, "--out", tmp_path, "--device", "cpu")
    assert ran.exit_code == 1 and "demo.tsv: cannot be written (Is a directory); make room" in ran.output


def test_wrong_usage(gqa, base, tmp_path, monkeypatch):
    assert qvl_eval(base, "--data", gqa).exit_code == 2
    assert qvl_eval("gqa", "--data", gqa).exit_code == 2
    other = tmp_path / "x"
    other.mkdir()
    for arguments, said in (
        ((base, other / base.name, "gqa"), f"two models are called {base.stem}"),
        ((base, "gqa", "--plot", tmp_path / "x.txt"), "no image format has this ending"),
        ((base, "touchstone", "--plot", tmp_path / "x.png"), "touchstone has no score that a plot could show"),
        ((base, "mme_cognition"), "has no *.txt file"),
    ):
        ran = qvl_eval(*arguments, "--data", gqa)
        assert ran.exit_code == 1 and said in ran.output, ran.output
    assert not (Path.cwd() / "qvl-eval").exists()


@pytest.mark.parametrize("missing", ["package", "java"])
def test_what_a_metric_needs_is_checked_before_the_data(missing, base, tmp_path, monkeypatch):
    def failing(command, **options):
        raise OSError(8, "Exec format error")

    if missing == "package":
        monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    monkeypatch.setattr(tokens.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(tokens, "_jar", lambda: tmp_path / "words.jar")
    monkeypatch.setattr(tokens.subprocess, "run", failing)
    said = "CIDEr needs pycocoevalcap" if missing == "package" else "the PTB tokenizer failed .*Exec format error"
    with pytest.raises(qvl.QvlError, match=said):
        evaluate([base], "flickr30k", tmp_path / "no data", device="cpu")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"question": "{answer}"}, r"'question' has no field \{answer\}; it has \{question\}"),
        ({"query": "x"}, "'query' is no prompt"),
        ({"question": 3}, "'question' is no prompt"),
        ({"question": "{"}, "is no template"),
        ({"turns": "yes"}, "'turns' is 'yes'"),
        ({"question": "{question.__class__}"}, "has no field"),
        ({"choice": "{question:{hint}}"}, r"'choice' writes \{question\} with a format"),
        ({"question": "{question:d}"}, "with a format"),
        ({"question": "{question!x}"}, "with a format"),
    ],
)
def test_prompts_of_your_own_are_checked(own, said, model):
    with pytest.raises(qvl.QvlError, match=said):
        wording(model("tiny-vl").blob, "question", own)


def test_the_table_names_the_data_of_published_scores():
    assert {name: task.split for name, task in TASKS.items() if task.split} == {
        "vqav2": "test-dev", "vizwiz": "test-dev", "docvqa": "test"
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    row = Row("m", 60.0, (50.0, 70.0), None, None, {}, 1.0, None, 1)
    console.print(table(Evaluation(TASKS["docvqa"], [row], [], 1, "", {})))
    assert "published: Qwen-VL 65.10 (test)" in console.file.getvalue()


def test_memory_is_that_of_the_run():
    if not os.access(runner.CLEAR, os.W_OK):
        pytest.skip("this system does not let the peak be reset")
    block = np.ones(30_000_000)
    del block
    runner.reset_peak()
    before = runner.peak_since_reset()
    block = np.ones(30_000_000)
    assert runner.peak_since_reset() - before > 200e6
    del block
    runner.reset_peak()
    assert runner.peak_since_reset() - before < 100e6


def test_newer_families_are_asked_in_turns_with_their_pictures_before():
    family = SimpleNamespace(model_type="qwen2_vl")
    blob = SimpleNamespace(family=family, path="m.qvl", generation_config=GenerationConfig("chatml"))
    texts = {
        "hint": "N/A",
        "question": "Which?",
        "options": "A. x\nB. y",
        "phrase": "the cat",
        "prompt": "<img></img>\nQ",
    }
    asked = Sample("1", "line 1", (Path("a.png"), Path("b.png")), texts, "A", ("A", "B"))
    found = wording(blob, "choice")
    wanted = {
        "choice": "Question: Which?\nOptions:\nA. x\nB. y\nPlease select the correct answer from the options above.",
        "question": "Which?\nPlease try to answer the question with short words or phrases if possible.",
        "ready": "Q",
    }
    for kind, text in wanted.items():
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
        assert found.prompt(kind, asked) == [{"role": "user", "content": content}]
    hinted = dataclasses.replace(asked, texts=texts | {"hint": "Look."})
    assert found.prompt("choice", hinted)[0]["content"][-1]["text"].startswith("Hint: Look.\nQuestion: Which?")
    assert found.letters("choice", asked) == ["A", "B"]
    assert found.lengths("phrase", 28, 10) == {"max_new_tokens": 128, "min_new_tokens": 0}
    blob.generation_config = GenerationConfig("raw")
    with pytest.raises(qvl.QvlError, match="is a base model, and this task is asked in chat turns"):
        wording(blob, "question")


def test_a_model_that_reasons_first_is_refused_before_any_is_asked(gqa, base, tmp_path):
    shutil.copytree(GOLDEN / "ckpt/q3-tied", tmp_path / "ckpt")
    path = tmp_path / "ckpt/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thinking": True}))
    convert(tmp_path / "ckpt", tmp_path / "thinking.qvl", group_size=32)
    with pytest.raises(qvl.QvlError, match=r"thinking.qvl: reasons before it answers"):
        evaluate([base, tmp_path / "thinking.qvl"], "gqa", gqa, out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    raw = {"question": "<img></img>{question}", "turns": False}
    assert wording(Blob(tmp_path / "thinking.qvl"), "question", raw).turns.isdisjoint(raw)


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_every_figure(width):
    rows = [
        Row("fp16", 63.84, (61.12, 66.23), None, None, {"OCR": 120.25, "count": 98.75}, 61.5, 881_000_000, 20_100_000),
        Row("int4", 62.95, (60.31, 65.47), -0.89, (-1.76, 0.13), {"OCR": 118.5, "count": 97.5}, 42.5, None, 5_420_000),
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(Evaluation(TASKS["vqav2"], rows, [], 500, "", {})))
    text = "".join(console.file.getvalue().split()).replace("│", "")
    assert "…" not in text
    for figure in ("63.84", "62.95", "-0.89", "120.25", "97.50", "61.5s", "881MB", "5.42MB", "78.80"):
        assert figure in text, (figure, console.file.getvalue())


def test_the_names_of_files_are_shown_as_they_are():
    """A terminal takes the characters of some for commands, and Rich those in brackets for styles."""
    row = Row("m[q4]\x1b]0;x\x07\n", 63.84, (61.12, 66.23), None, None, {}, 61.5, None, 20_100_000)
    console = Console(file=io.StringIO(), width=80)
    console.print(table(Evaluation(TASKS["vqav2"], [row], [], 500, "", {})))
    text = console.file.getvalue()
    assert "m[q4]\ufffd]0;x" in text and "\x1b" not in text and "\x07" not in text
