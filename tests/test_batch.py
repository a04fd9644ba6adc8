"""Batch jobs: every row exactly once, and the same bytes after any interruption."""

import base64
import errno
import json
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qvl_runtime import __version__
from qvl_runtime.batch import drawn, processes
from qvl_runtime.batch.answers import Answerer
from qvl_runtime.batch.job import Computed, Job, Worker
from qvl_runtime.batch.on_ray import on_ray
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.processes import in_processes, memory_nodes
from qvl_runtime.batch.records import is_failed, is_record
from qvl_runtime.batch.rows import Row
from qvl_runtime.batch.sources import open_source
from qvl_runtime.cli.main import main
from qvl_runtime.demo.scenes import draw, random_scene
from qvl_runtime.engine.constraints import JsonSchema
from qvl_runtime.errors import QvlError

ROWS, BLOCK, NEW = 11, 3, 32
MINE = memory_nodes()[0][:1]
QUESTIONS = ("What color is the circle?", "Describe the picture with boxes.", "How many circles are there?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and rows that ask about them; two of the rows are bad."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(3)
    for name in "ab":
        draw(random_scene(rng), 448).save(folder / f"{name}.png")
    rows = [{"id": f"r{i}", "prompt": QUESTIONS[i % 3], "image": f"{'ab'[i % 2]}.png"} for i in range(ROWS)]
    rows[4]["image"] = "missing.png"
    rows[7]["image"] = "../../../../etc/passwd"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def spec(demo_model):
    return ModelSpec(demo_model.blob.path, {"device": "cpu"})


def options(**changes) -> Options:
    usual = {"prompt": None, "generate": {"max_new_tokens": NEW}, "seed": 0, "max_batch": 4, "allow_urls": False}
    return Options(**usual | changes)


@pytest.fixture(scope="module")
def job(folder, spec):
    def make(out, source="rows.jsonl", asked=None, **arguments):
        arguments = {"block": BLOCK, "max_failures": 0.5} | arguments
        return Job(spec, open_source(folder / source), out, asked or options(), **arguments)

    return make


@pytest.fixture(scope="module")
def worker(folder, spec):
    return Worker(spec, open_source(folder / "rows.jsonl"), options())


@pytest.fixture(scope="module")
def known(worker):
    """`worker`, which computes a task once and keeps the result."""
    seen = {}

    def run(tasks, on_computed):
        for task in tasks:
            if task not in seen:
                worker([task], lambda computed: seen.update({computed.task: computed}))
            on_computed(seen[task])

    return run


@pytest.fixture(scope="module")
def undisturbed(job, worker, tmp_path_factory):
    """The bytes of an uninterrupted job."""
    out = tmp_path_factory.mktemp("whole") / "out"
    progress = job(out).run(worker)
    assert (progress.rows, progress.failed, progress.total) == (ROWS, 2, ROWS)
    return parts(out)


def parts(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def records(found):
    return [json.loads(line) for name in sorted(found) if name.startswith("part") for line in found[name].splitlines()]


def test_every_row_has_the_answer_it_has_alone(undisturbed, demo_model, folder):
    found = records(undisturbed)
    assert [record["id"] for record in found] == [f"r{i}" for i in range(ROWS)]
    assert [record["row"] for record in found] == list(range(ROWS))
    assert len(undisturbed) == 1 + -(-ROWS // BLOCK)
    for i, record in enumerate(found):
        if is_failed(record):
            continue
        picture = Image.open(folder / f"{'ab'[i % 2]}.png")
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTIONS[i % 3]}]
        alone = demo_model.generate(parts, max_new_tokens=NEW)
        assert (record["text"], record["finish_reason"]) == (alone.text, alone.finish_reason)
        assert record["usage"] == {"prompt_tokens": alone.prompt_tokens, "completion_tokens": alone.timings.new_tokens}
        assert [box["pixels"] for box in record["boxes"]] == [list(box.to_pixels(448, 448)) for box in alone.boxes]
    assert any(record["boxes"] for record in found)


def test_a_bad_row_costs_nothing_else(undisturbed):
    found = records(undisturbed)
    assert [i for i, record in enumerate(found) if is_failed(record)] == [4, 7]
    assert "missing.png" in found[4]["error"] and "is not below" in found[7]["error"]
    assert found[4]["text"] is None and found[4]["id"] == "r4"


@pytest.mark.parametrize("stopped", [0, 1, 3])
def test_a_stopped_job_goes_on_to_the_same_bytes(job, worker, known, undisturbed, tmp_path, stopped):
    runner = worker if stopped == 1 else known
    calls = []  # one before the first block, and one after each, in whatever order they end

    def stop(progress):
        calls.append(progress)
        if len(calls) > stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(tmp_path / "out").run(runner, on_progress=stop)
    (tmp_path / "out" / ".part-000002.jsonl.0123.partial").write_bytes(b"half")
    asked = []

    def counted(tasks, on_computed):
        asked.extend(task.block for task in tasks)
        runner(tasks, on_computed)

    assert job(tmp_path / "out").run(counted).rows == ROWS
    assert len(asked) == -(-ROWS // BLOCK) - stopped
    assert parts(tmp_path / "out") == undisturbed


def test_blocks_may_come_in_any_order(job, worker, undisturbed, tmp_path):
    job(tmp_path / "out").run(lambda tasks, on_computed: worker(tasks[::-1], on_computed))
    assert parts(tmp_path / "out") == undisturbed


def test_only_failed_rows_are_asked_again(job, known, undisturbed, tmp_path, folder):
    out = tmp_path / "out"
    job(out).run(known)
    asked = []

    def counted(tasks, on_computed):
        asked.extend(tasks)
        known(tasks, on_computed)

    (folder / "missing.png").write_bytes((folder / "a.png").read_bytes())
    try:
        progress = job(out).run(counted, retry_failed=True)
    finally:
        (folder / "missing.png").unlink()
    assert [task.rows for task in asked] == [(4,), (7,)]
    assert (progress.rows, progress.failed, progress.new_rows) == (ROWS, 1, 2)
    before, after = records(undisturbed), records(parts(out))
    assert [i for i in range(ROWS) if before[i] != after[i]] == [4] and after[4]["text"]


def test_too_many_failures_stop_a_job(job, known, tmp_path):
    with pytest.raises(QvlError, match=r"2 of 11 rows failed, more than a share of 0.1.*is not below"):
        job(tmp_path / "out", max_failures=0.1).run(known)
    assert len(parts(tmp_path / "out")) > 1  # what was done stays


def test_a_folder_belongs_to_one_job(job, known, tmp_path):
    out = tmp_path / "out"
    job(out).run(known)
    for changes, differing in (
        ({"block": 4}, "block"),
        ({"asked": options(seed=1)}, "seed"),
        ({"source": "."}, "input, rows"),
    ):
        with pytest.raises(QvlError, match=rf"output of another job \(it differs in {differing}\)"):
            job(out, **changes)
    job(out, asked=options(max_batch=1))  # changes no answer
    (tmp_path / "file").write_text("x")
    with pytest.raises(QvlError, match="file: is a file; name a folder"):
        job(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(QvlError, match="not empty"):
        job(tmp_path / "full")


def test_two_jobs_do_not_write_to_one_folder(job, tmp_path):
    out = tmp_path / "out"

    def another(tasks, on_computed):
        with pytest.raises(QvlError, match="another job is writing"):
            job(out).run(lambda tasks, on_computed: None)

    job(out).run(another)


def test_rows_of_any_kind_end_no_job(spec, folder, tmp_path):
    pa = pytest.importorskip("pyarrow")

    images = [
        "a\0.png",
        "\ud800.png",
        "loop",
        "rows.jsonl",
        ".",
        "http://127.0.0.1:1/a.png",
        "data:,x",
        None,
        "x" * 5000,
    ]
    rows = [{"prompt": QUESTIONS[0], "image": image} for image in images]
    rows += [{"prompt": "\ud800", "image": "a.png"}, {"prompt": "x" * 60_000}, {"prompt": 3}, {"images": ["a.png"]}]
    lines = [json.dumps({"id": f"\ud800{i}", **row}) for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(["{", *lines]) + "\n")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
    source, asked = open_source(tmp_path / "rows.jsonl"), options(generate={"max_new_tokens": 2})
    found = {}
    for form in ("jsonl", "parquet"):
        out = tmp_path / form
        assert (
            Job(spec, source, out, asked, block=64, form=form, max_failures=1).run(Worker(spec, source, asked)).failed
            == 12
        )
        found[form] = parts(out)[f"part-000000.{form}"]
    records = [json.loads(line) for line in found["jsonl"].splitlines()]
    assert pa.parquet.read_table(pa.BufferReader(found["parquet"])).to_pylist() == records
    assert [record["row"] for record in records if not is_failed(record)] == [8, 10] and records[8]["id"] == "?7"


def test_answers_to_openais_lines_are_no_table(job, tmp_path):
    pytest.importorskip("pyarrow")
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(QvlError, match="no place for the answers to OpenAI's lines"):
        job(tmp_path / "out", source=tmp_path / "in.jsonl", form="parquet")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_whole_blocks(job, known, undisturbed, tmp_path, monkeypatch):
    left, sync = [4], os.fsync

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    work = job(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QvlError, match=r"out/part-\d+\.jsonl: cannot be written \(No space left on device\); make"):
        work.run(known)
    monkeypatch.undo()
    there = parts(tmp_path / "out")
    assert 1 < len(there) < len(undisturbed) and there.items() < undisturbed.items()
    job(tmp_path / "out").run(known)
    assert parts(tmp_path / "out") == undisturbed


def test_a_folder_of_another_kind_is_refused(job, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((QvlError, OSError)):
        job(tmp_path / "file")
    another = json.dumps({"qvl": __version__, "options": 5}).encode()
    for content in (b"", b"[]", b"{}", b"\xff", b'{"qvl": 1}', another):
        out = tmp_path / f"out{content.hex()}"
        out.mkdir()
        (out / "job.json").write_bytes(content)
        with pytest.raises(QvlError, match="take another folder"):
            job(out)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b'{"response": 5}',
        b'{"response": {}}',
        b'{"response": {"status_code": 200}}',
        b'{"response": {"status_code": 200, "body": {"choices": [5]}}}',
        b'{"error": null}',
        b'{"error": null, "boxes": [5]}',
        b'{"error": null, "boxes": [{"ref": null, "pixels": ["a", 1, 2, 3]}]}',
        b"[]",
        b"\xff",
    ],
)
def test_a_block_of_something_else_is_refused(job, undisturbed, tmp_path, line):
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "part-000001.jsonl").write_bytes((line + b"\n") * BLOCK)
    with pytest.raises(QvlError, match=r"part-000001.*; delete the file"):
        job(tmp_path).run(lambda tasks, on_computed: None)


def test_a_lock_that_is_a_link_or_a_pipe_harms_nothing(job, tmp_path):
    (tmp_path / "letter").write_text("x")
    for name in ("link", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / ".lock").symlink_to(tmp_path / "letter")
    with pytest.raises(OSError, match=r"\.lock"):
        job(tmp_path / "link").run(lambda tasks, on_computed: None)
    assert (tmp_path / "letter").read_text() == "x"
    os.mkfifo(tmp_path / "pipe" / ".lock")
    job(tmp_path / "pipe").run(lambda tasks, on_computed: None)


def test_processes_give_the_same_bytes(job, undisturbed, tmp_path, spec, folder):
    source = open_source(folder / "rows.jsonl")
    job(tmp_path / "out").run(lambda *work: in_processes([MINE, MINE], spec, source, options(), *work))
    assert parts(tmp_path / "out") == undisturbed
    assert not multiprocessing.active_children()


def test_a_process_that_is_lost_ends_a_job(job, worker, undisturbed, tmp_path, spec, folder):
    def lose(progress):
        for child in multiprocessing.active_children():
            child.kill()

    source = open_source(folder / "rows.jsonl")
    with pytest.raises(QvlError, match="ended early"):
        job(tmp_path / "out").run(lambda *work: in_processes([MINE], spec, source, options(), *work), on_progress=lose)
    assert 0 < len(parts(tmp_path / "out")) < len(undisturbed)
    job(tmp_path / "out").run(worker)
    assert parts(tmp_path / "out") == undisturbed


def test_an_error_in_a_process_ends_a_job(job, tmp_path, folder):
    source, none = open_source(folder / "rows.jsonl"), ModelSpec(tmp_path / "none.qvl", {})
    with pytest.raises(QvlError, match=r"none\.qvl"):
        job(tmp_path / "out").run(lambda *work: in_processes([MINE], none, source, options(), *work))


def test_ctrl_c_is_left_to_the_first_process(job, tmp_path, folder, monkeypatch):
    def interrupt(connections):
        for child in multiprocessing.active_children():  # they still import their modules
            os.kill(child.pid, signal.SIGINT)
        return wait(connections)

    monkeypatch.setattr(processes, "wait", interrupt)
    source, none = open_source(folder / "rows.jsonl"), ModelSpec(tmp_path / "none.qvl", {})
    with pytest.raises(QvlError, match=r"none\.qvl"):
        job(tmp_path / "out").run(lambda *work: in_processes([MINE], none, source, options(), *work))


def test_ctrl_c_before_a_process_has_begun(tmp_path, folder, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_without_interrupts", interrupted)
    source, none = open_source(folder / "rows.jsonl"), ModelSpec(tmp_path / "none.qvl", {})
    with pytest.raises(KeyboardInterrupt):
        in_processes([MINE], none, source, options(), [], lambda computed: None)


def test_lines_of_openai(demo_model, folder):
    content = base64.b64encode((folder / "a.png").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": QUESTIONS[1]}]}]
    chat, path = "/v1/chat/completions", {"type": "image_url", "image_url": {"url": str(folder / "a.png")}}
    bodies = [
        {"messages": messages, "max_tokens": NEW, "temperature": 0},
        {"messages": messages, "max_tokens": 3, "temperature": 1, "n": 2},
        {"messages": [{"role": "user", "content": [path]}]},
        {"messages": messages, "temperature": "hot"},
    ]
    rows = [Row(i, f"c{i}", url=chat, body=body) for i, body in enumerate(bodies)]
    found = []
    for _ in range(2):
        Answerer(demo_model, folder, options())([rows], lambda _, records: found.append(records))
    assert found[0] == found[1]
    good, two, *bad = (record["response"] for record in found[0])
    parts = [{"type": "image", "image": Image.open(folder / "a.png")}, {"type": "text", "text": QUESTIONS[1]}]
    alone = demo_model.generate(parts, max_new_tokens=NEW)
    assert good["status_code"] == 200 and found[0][0]["custom_id"] == "c0"
    assert good["body"]["model"] == demo_model.blob.path.stem  # as the server names it
    message = good["body"]["choices"][0]["message"]
    assert message["content"] == alone.text
    assert [box["pixels"] for box in message["boxes"]] == [list(box.to_pixels(448, 448)) for box in alone.boxes]
    assert len(two["body"]["choices"]) == 2
    assert [response["status_code"] for response in bad] == [400, 400]
    assert str(folder) not in json.dumps(bad) and all(map(is_failed, found[0][2:]))


def test_lines_of_openai_fail_in_openais_form(demo_model, tmp_path):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    bad = [line | {"method": "GET"}, line | {"url": "/v1/models"}, line | {"body": "x"}, line | {"custom_id": 1}]
    bad[1] |= {"custom_id": "b"}
    del bad[2]["body"], bad[3]["url"]
    bad[2]["custom_id"] = "c"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    source, found = open_source(tmp_path / "rows.jsonl"), []
    assert source.openai and all(row.error and not row.picture_count for row in source.rows(0, 4))
    Answerer(demo_model, tmp_path, options())([source.rows(0, 4)], lambda _, records: found.extend(records))
    assert [record["custom_id"] for record in found] == ["a", "b", "c", None] and all(map(is_failed, found))
    assert [record["response"]["status_code"] for record in found] == [400] * 4
    told = [record["response"]["body"]["error"]["message"] for record in found]
    assert ["only POST" in told[0], "only POST" in told[1], "body" in told[2], "custom_id" in told[3]] == [True] * 4


def test_answers_follow_a_schema(demo_model, folder):
    schema = JsonSchema('{"enum": ["one", "two"]}')
    asked, found = options(schema=schema), []
    rows = [Row(0, "a", QUESTIONS[1], ("a.png",))]
    Answerer(demo_model, folder, asked)([rows], lambda _, records: found.append(records))
    assert json.loads(found[0][0]["text"]) in ("one", "two")
    assert asked.fingerprint()["schema"] == schema.schema and "schema" not in options().fingerprint()


def test_a_seed_belongs_to_a_row():
    seeds = {options(seed=seed).seed_of(row) for seed in (0, 1) for row in ("a", "b")}
    assert len(seeds) == 4 and options().seed_of("a") == 8281872861307171038


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(folder, spec, tmp_path, caplog):
    names = ["a.png", "图" * 80, "𠀀" * 60 + "\ud800"]
    lines = [json.dumps({"id": name, "prompt": "x", "image": f"{i}.png"}) for i, name in enumerate(names)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes((folder / "a.png").read_bytes())
    source = open_source(tmp_path / "rows.jsonl")
    box = {"ref": "x", "numbers": [1, 1, 9, 9], "pixels": [1, 1, 9, 9]}
    ids = [name.replace("\ud800", "?") for name in names]
    found = [{"id": row_id, "boxes": [box], "usage": None, "error": None} for row_id in ids]

    def answered(tasks, on_computed):
        on_computed(Computed(tasks[0], found, 3))

    work = Job(spec, source, tmp_path / "out", options(), block=64, drawings=tmp_path / "drawn")
    assert work.run(answered).rows == 3
    assert records(parts(tmp_path / "out")) == found
    drawn = sorted(path.name for path in (tmp_path / "drawn").glob("*.png"))
    assert drawn == [f"000001-{'图' * 66}.png", f"000002-{'𠀀' * 49}_.png"]
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("row 0 is not drawn: ")
    assert f"{tmp_path}/0.png: no such file" in caplog.messages[0]


def test_boxes_are_drawn_on_the_last_picture_of_openais_messages(tmp_path):
    """Also after a call without content, on the last frame of a video, and for a response."""

    def shown(side: int) -> str:
        Image.new("RGB", (side, side)).save(tmp_path / "shown.png")
        return f"data:image/png;base64,{base64.b64encode((tmp_path / 'shown.png').read_bytes()).decode()}"

    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    picture = {"type": "image_url", "image_url": {"url": shown(20)}}
    video = {"type": "video", "video": [shown(30), shown(40)]}
    asked = [[picture], [video], [picture, video], [video, picture]]
    rows = [
        Row(i, f"r{i}", url="/v1/chat/completions", body={"messages": [call, {"role": "user", "content": parts}]})
        for i, parts in enumerate(asked)
    ]
    box = {"ref": "x", "numbers": [1, 1, 9, 9], "pixels": [1, 1, 9, 9], "image": 0}
    chats = [{"choices": [{"message": {"boxes": [box]}}]}] * 4
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": shown(50)}]}]
    rows.append(Row(4, "r4", url="/v1/responses", body={"input": items}))
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    response = {"output": [{"type": "message", "content": [{"type": "output_text", "boxes": [box]}]}, call]}
    found = [{"custom_id": "r", "response": {"status_code": 200, "body": body}} for body in (*chats, response)]
    (tmp_path / "drawn").mkdir()
    source = SimpleNamespace(root=tmp_path, rows=lambda first, end: rows[first:end])
    drawn.draw(source, range(5), found, tmp_path / "drawn", options(), exif=False)
    sides = [Image.open(path).width for path in sorted((tmp_path / "drawn").iterdir())]
    assert sides == [20, 40, 40, 20, 50]


def test_what_no_job_wrote_is_no_record_and_is_not_drawn(tmp_path, caplog):
    box = {"ref": "x", "pixels": [1, 1, 9, 9]}
    corners = ([1, 2, 3], ["a"] * 4, [10**400] * 4, [1e308] * 4, [float("inf")] * 4, 5)
    boxes = [5, {"a": 1}, [5], [{"ref": 1}], [{"pixels": [1, 1, 9, 9]}], [{**box, "ref": [1]}]]
    boxes += [[{**box, "pixels": wrong}] for wrong in corners]
    bodies = [5, None, {"choices": 5}, {"choices": [5]}, {"output": 5}, {"output": [{"content": [5]}]}]
    found = [{}, *({"error": None, "boxes": wrong} for wrong in boxes)]
    found += [{"response": {"status_code": 200, "body": body}} for body in bodies]
    assert not any(map(is_record, found)) and is_record({"error": None, "boxes": [box]})
    rows = [Row(0, "a", "x"), Row(1, "b", url="/v1/responses", body={}), Row(2, "c", body={"messages": []})]
    source = SimpleNamespace(root=tmp_path, rows=lambda first, end: rows[first:end])
    drawn.draw(source, [0, 1, 2], [{"id": "a", "error": None, "boxes": [box]}] * 3, tmp_path, options(), exif=False)
    assert [message.startswith("row ") for message in caplog.messages] == [True] * 3 and not list(tmp_path.iterdir())


def test_a_box_is_drawn_in_the_pixels_of_its_record(tmp_path):
    """15 / 22 * 22 is less than 15."""
    Image.new("RGB", (22, 22)).save(tmp_path / "a.png")
    source = SimpleNamespace(root=tmp_path, rows=lambda first, end: [Row(0, "a", "x", ("a.png",))])
    found = [{"id": "a", "error": None, "boxes": [{"ref": None, "numbers": [], "pixels": [2, 2, 15, 15]}]}]
    (tmp_path / "drawn").mkdir()
    drawn.draw(source, [0], found, tmp_path / "drawn", options(), exif=False)
    pixels = np.asarray(Image.open(tmp_path / "drawn" / "000000-a.png")).any(2)
    assert np.flatnonzero(pixels.any(0)).tolist() == np.flatnonzero(pixels.any(1)).tolist() == list(range(2, 16))


def test_the_command(demo_model, folder, tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")

    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes((folder / name).read_bytes())
    command = ["batch", str(demo_model.blob.path), str(tmp_path / "pictures"), str(tmp_path / "out")]
    command += ["--prompt", QUESTIONS[1], "--format", "parquet", "--draw", str(tmp_path / "drawn"), "--status"]
    with pytest.raises(SystemExit) as left:
        main(command)
    assert not left.value.code
    *statuses, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [status["rows"] for status in statuses] == [0, 2] and (last["rows"], last["failed"]) == (2, 0)
    found = pa.parquet.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    assert [row["id"] for row in found] == ["a.png", "b.png"]
    drawn = {path.name for path in (tmp_path / "drawn").glob("*.png")}
    assert drawn == {f"{row['row']:06d}-{row['id']}.png" for row in found if row["boxes"]} and drawn


def test_the_command_says_what_is_wrong(demo_model, folder, tmp_path, capsys, monkeypatch):
    command = ["batch", str(demo_model.blob.path), str(folder / "rows.jsonl"), str(tmp_path / "out")]
    for more, code, told in (
        (["--max-failures", "2"], 1, "a share"),
        (["--format", "csv"], 1, "csv"),
        (["--ship-model"], 1, "--ray"),
        (["--max-batch", "17"], 2, "--max-batch"),
    ):
        with pytest.raises(SystemExit) as left:
            main(command + more)
        assert left.value.code == code and told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    for more, told in ((["--ray", "local"], "--ray needs the package ray"), (["--device", "moon"], "moon")):
        with pytest.raises(SystemExit) as left:
            main(command + more)
        assert left.value.code == 1 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    inside = [*command[:2], str(folder), command[3], "--prompt", "x", "--draw", str(folder / "drawn")]
    with pytest.raises(SystemExit) as left:
        main(inside)
    assert left.value.code == 1 and "is in the input" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([*command[:2], str(folder), command[3]])
    assert left.value.code == 1 and "--prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (folder / "drawn").exists()

    def interrupted(self, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "_question", interrupted)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 130 and not parts(tmp_path / "out")


def test_ray_gives_the_same_bytes(job, undisturbed, tmp_path, spec, folder, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster
    source = open_source(folder / "rows.jsonl")
    try:
        job(tmp_path / "out").run(lambda *work: on_ray("local", True, spec, source, options(), *work))
    finally:
        ray.shutdown()
    assert parts(tmp_path / "out") == undisturbed
