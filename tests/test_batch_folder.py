"""The output folder of a batch job: which job it belongs to, from when on, and what a killed job leaves in it."""

import errno
import json
import os

import pytest
from PIL import Image

from qvl_runtime.batch import job as job_module
from qvl_runtime.batch.job import Computed, Job
from qvl_runtime.batch.jsonl import JsonLines
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.sources import open_source
from qvl_runtime.cli import batch as command
from qvl_runtime.cli.main import main
from qvl_runtime.engine.constraints import JsonSchema
from qvl_runtime.errors import QvlError

ROWS = 4


def answer(tasks, on_computed):
    """A runner without a model."""
    for task in tasks:
        records = [{"id": f"r{row}", "row": row, "text": "x", "boxes": [], "error": None} for row in task.rows]
        on_computed(Computed(task, records, 0))


@pytest.fixture
def job(demo_model, tmp_path):
    lines = (json.dumps({"id": f"r{i}", "prompt": "x", "image": f"{i}.png"}) for i in range(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    spec = ModelSpec(demo_model.blob.path, {"device": "cpu"})

    def make(out="out", drawings=None, **changes):
        usual = {"prompt": None, "generate": {}, "seed": 0, "max_batch": 4, "allow_urls": False}
        options = Options(**usual | changes)
        source = open_source(tmp_path / "rows.jsonl", options.images)
        return Job(spec, source, tmp_path / out, options, block=2, drawings=drawings)

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_job_that_cannot_begin_binds_no_folder(job, tmp_path):
    def fail(tasks, on_computed):
        raise QvlError("context is 0")

    with pytest.raises(QvlError, match="context is 0"):
        job(seed=1).run(fail)
    assert names(tmp_path / "out") == [".lock"]
    assert job(seed=2).run(answer).rows == ROWS
    with pytest.raises(QvlError, match=r"another job \(it differs in seed\)"):
        job(seed=1)


def test_a_job_of_another_version_is_not_mixed_with_this_one(job, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(job_module, "__version__", "0.1.0")
        job().run(answer)
    (tmp_path / "out" / "part-000001.jsonl").unlink()
    with pytest.raises(QvlError, match=r"out: was begun by qvl '0\.1\.0', and qvl .*; finish it with that version, or"):
        job(seed=1)
    assert "part-000001.jsonl" not in names(tmp_path / "out")


def test_a_job_killed_while_its_manifest_is_written_goes_on(job, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".lock", ".job.json.0123abcd.partial"):
        (tmp_path / "out" / name).touch()
    assert job().run(answer).rows == ROWS
    assert names(tmp_path / "out") == [".lock", "job.json", "part-000000.jsonl", "part-000001.jsonl"]


def test_a_folder_with_other_files_is_left_as_it_is(job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-000000.jsonl").touch()
    with pytest.raises(QvlError, match="is not empty and holds no job"):
        job()
    assert names(tmp_path / "out") == ["part-000000.jsonl"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_takes_a_job(job, monkeypatch, number):
    def refusing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refusing)
    assert job().run(answer).rows == ROWS


def test_of_two_jobs_begun_at_once_one_has_the_folder(job, tmp_path):
    first, second = job(seed=1), job(seed=2)  # both find no folder

    def late(tasks, on_computed):
        with pytest.raises(QvlError, match="another job is writing to it"):
            second.run(answer)
        answer(tasks, on_computed)

    assert first.run(late).rows == ROWS
    with pytest.raises(QvlError, match=r"another job \(it differs in seed\)"):
        second.run(answer)
    assert json.loads((tmp_path / "out" / "job.json").read_text())["options"]["seed"] == 1


def test_a_prompt_of_half_characters_goes_on(job):
    job(prompt="\ud800").run(answer)
    assert job(prompt="\ud800").run(answer).new_rows == 0


def test_pictures_of_another_folder_are_another_job(job, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    job(images=tmp_path / "a").run(answer)
    job(images=tmp_path / "a")
    for images in (tmp_path / "b", None):
        with pytest.raises(QvlError, match=r"another job \(it differs in images\)"):
            job(images=images)
    job("moved").run(answer)
    (tmp_path / "rows.jsonl").rename(tmp_path / "b" / "rows.jsonl")
    (tmp_path / "rows.jsonl").symlink_to("b/rows.jsonl")  # the input and its pictures may be moved together
    job("moved")


def test_the_command_records_the_folder_of_the_pictures(demo_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "on_this_machine", lambda *work: answer(*work[-2:]))
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "x", "image": "a.png"}')
    asked = ["batch", str(demo_model.blob.path), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "--device", "cpu"]
    for images, code in (("a", 0), ("a", 0), ("b", 1)):
        (tmp_path / images).mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as left:
            main([*asked, "--images", str(tmp_path / images)])
        assert (left.value.code or 0) == code
    assert "differs in images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"generate": {"max_new_tokens": -1}}, "max_new_tokens is -1"),
        ({"generate": {"temperature": -1.0}}, "temperature is -1"),
        ({"generate": {"top_p": 7.0}}, "top_p is 7"),
        ({"generate": {"min_p": float("inf")}}, "min_p is inf"),
        ({"schema": JsonSchema('{"type": "strin"}')}, "json_schema cannot be used"),
        ({"schema": JsonSchema('{"$ref": "#"}')}, "json_schema cannot be used: no text"),
    ],
)
def test_options_are_checked_before_anything_is_written(job, tmp_path, changes, told):
    with pytest.raises(QvlError, match=told):
        job(**changes)
    assert not (tmp_path / "out").exists()
    job(schema=JsonSchema('{"type": "string"}'), generate={"max_new_tokens": 4, "top_p": 0.5, "stop": ["."]})


def boxed(tasks, on_computed):
    """As `answer`; each answer has a box."""
    box = {"ref": "x", "numbers": [1, 1, 9, 9], "pixels": [1, 1, 9, 9]}
    for task in tasks:
        records = [{"id": f"r{row}", "row": row, "boxes": [box], "usage": None, "error": None} for row in task.rows]
        on_computed(Computed(task, records, 0))


def test_finished_blocks_are_drawn_from_their_answers(job, tmp_path, monkeypatch):
    for row in range(ROWS):
        Image.new("RGB", (20, 20), (row, 0, 0)).save(tmp_path / f"{row}.png")
    whole, later = tmp_path / "whole", tmp_path / "later"
    job("a", whole).run(boxed)
    job("b").run(boxed)
    assert job("b", later).run(boxed).new_rows == 0
    pictures = [f"{row:06d}-r{row}.png" for row in range(ROWS)]
    assert names(whole) == names(later) == [*pictures, "job.json"]
    assert all((whole / name).read_bytes() == (later / name).read_bytes() for name in pictures)
    (later / pictures[0]).unlink()
    (later / pictures[1]).write_bytes(b"as it is")
    job("b", later).run(boxed)
    assert (later / pictures[0]).exists() and (later / pictures[1]).read_bytes() == b"as it is"
    again = job("b", later)
    monkeypatch.setattr(JsonLines, "rows", None)  # rows of which nothing is missing are not read
    assert again.run(boxed).rows == ROWS


def test_a_folder_of_drawings_belongs_to_one_job(job, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000-r0.png").write_bytes(b"mine")
    with pytest.raises(QvlError, match="mine: is not empty and holds no job"):
        job(drawings=tmp_path / "mine")
    job(drawings=tmp_path / "drawn").run(answer)
    with pytest.raises(QvlError, match=r"drawn: holds the output of another job \(it differs in seed\)"):
        job("other", tmp_path / "drawn", seed=1)
    with pytest.raises(OSError, match=r"rows\.jsonl"):
        job("other", tmp_path / "rows.jsonl" / "drawn")
    assert (tmp_path / "mine" / "000000-r0.png").read_bytes() == b"mine" and not (tmp_path / "other").exists()
