"""Inputs of a batch job: how each row is read, and which inputs are refused."""

import io
import json
import os
import pickle
import sys
import tarfile
from types import SimpleNamespace

import pytest

from qvl_runtime.batch import jsonl, on_ray, processes, shards
from qvl_runtime.batch.answers import located
from qvl_runtime.batch.job import Task
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.sources import open_source
from qvl_runtime.errors import QvlError


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def only(source):
    (row,) = source.rows(0, 1)
    return row


def test_the_pictures_of_a_request_are_counted(tmp_path):
    picture = {"type": "image_url", "image_url": {"url": "data:,x"}}
    video = {"type": "video", "video": ["data:,x"] * 3}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "?"}, picture, video, {**video, "video": 1}]},
        {"content": "a"},
        7,
    ]
    lines = [{"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": m}}
             for i, m in enumerate((messages, None, [{"content": {"type": "image_url"}}]))]  # fmt: skip
    assert [row.picture_count for row in open_source(write(tmp_path / "rows.jsonl", *lines)).rows(0, 3)] == [5, 0, 0]


def test_rows_of_lines(tmp_path):
    path = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "What?", "image": "x.png"},
        "",
        {"id": 7, "images": ["y.png", "data:,z"]},
        "{broken",
        {"prompt": "no id"},
        {"id": "b", "image": 3},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"custom_id": "d", "method": "GET", "url": "/v1/models", "body": {}},
        {"id": "e", "prompt": "What?", "image_path": "x.png"},
        {"id": "f", "prompt": "What?", "image_path": "x.png", "image": "x.png"},
        {"id": "g", "prompt": "What?", "video": ["x.png"]},
    )
    source = open_source(path)
    rows = source.rows(0, len(source))
    assert [row.number for row in rows] == list(range(10))
    assert (rows[0].id, rows[0].prompt, rows[0].pictures, rows[0].error) == ("a", "What?", ("x.png",), None)
    assert (rows[1].id, rows[1].prompt, rows[1].pictures) == ("7", None, ("y.png", "data:,z"))
    assert rows[2].id is None and "line 4" in rows[2].error and "JSON" in rows[2].error
    assert rows[3].id is None and "no id" in rows[3].error
    assert rows[4].id == "b" and "no picture" in rows[4].error
    assert rows[5].url == "/v1/completions" and rows[5].body == {"prompt": "x"} and rows[5].error is None
    assert rows[6].id == "d" and rows[6].error.startswith("method 'GET' and url '/v1/models': only POST to /v1/chat")
    assert "has image_path, but no image" in rows[7].error and rows[8].pictures == ("x.png",)
    assert rows[9].error == "the row has video, which is not read; give its frames in a line of OpenAI's format"
    assert source.root == tmp_path


def test_any_cut_of_the_lines_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "INDEX_EVERY", 3)
    source = open_source(write(tmp_path / "in.jsonl", *({"id": i, "prompt": "p" * i} for i in range(11)), ""))
    whole = source.rows(0, 11)
    assert len(source) == 11 and [row.id for row in whole] == [str(i) for i in range(11)]
    copy = pickle.loads(pickle.dumps(source))
    for start in range(12):
        for stop in range(start, 12):
            assert copy.rows(start, stop) == whole[start:stop]


def test_a_long_line_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    source = open_source(write(tmp_path / "in.jsonl", {"id": "a"}, {"id": "b" * 300}, {"id": "c"}))
    rows = source.rows(0, 3)
    assert [row.id for row in rows] == ["a", None, "c"] and "line 2" in rows[1].error


def test_an_input_that_shrinks_is_noticed(tmp_path):
    path = write(tmp_path / "in.jsonl", {"id": "a"}, {"id": "b"})
    source = open_source(path)
    write(path, {"id": "a"})
    with pytest.raises(QvlError, match="fewer lines"):
        source.rows(0, 2)


def test_two_rows_with_one_id_are_refused(tmp_path):
    with pytest.raises(QvlError, match=r"line 3 has the id 'a' of .*line 1"):
        open_source(write(tmp_path / "in.jsonl", {"id": "a"}, {"id": "b"}, {"id": "a"}))


@pytest.mark.parametrize("change", ["other text", "other order", "one more"])
def test_other_lines_have_another_fingerprint(tmp_path, change):
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}]
    before = open_source(write(tmp_path / "a.jsonl", *rows)).fingerprint()
    assert open_source(write(tmp_path / "b.jsonl", *rows)).fingerprint() == before
    other = {"other text": [rows[0], rows[1] | {"prompt": "z"}], "other order": rows[::-1]}
    after = other.get(change, [*rows, {"id": "c"}])
    assert open_source(write(tmp_path / "b.jsonl", *after)).fingerprint() != before


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert [row.id for row in source.rows(0, len(source))] == ["a.JPG", "b.png", "sub/c.webp"]
    assert source.rows(1, 2)[0].pictures == ("b.png",)
    before = source.fingerprint()
    (tmp_path / "b.png").write_bytes(b"xy")
    assert open_source(tmp_path).fingerprint() == before, "a broken picture may be replaced, and its row asked again"
    (tmp_path / "b.png").rename(tmp_path / "d.png")
    assert open_source(tmp_path).fingerprint() != before


def test_pictures_that_cannot_be_read_are_not_left_out(tmp_path):
    """As rows they have an error: of a phone's photos half would be missing, or answered without the picture."""
    for name in ("a.HEIC", "b.avif", "c.jfif", "c.txt", "d.JPG", "e.pdf"):
        (tmp_path / name).write_bytes(b"x")
    assert [row.id for row in open_source(tmp_path).rows(0, 9)] == ["a.HEIC", "b.avif", "c.jfif", "d.JPG"]
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        add(tar, "1.heic", b"photo")
        add(tar, "1.txt", b"What is this?")
    (row,) = open_source(tmp_path / "in.tar").rows(0, 1)
    assert (row.prompt, row.pictures) == ("What is this?", (b"photo",))


def test_a_link_to_nothing_is_a_row(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").symlink_to("nothing")
    source = open_source(tmp_path)
    assert [row.id for row in source.rows(0, 2)] == ["a.png", "b.png"] and source.fingerprint()["pictures"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode")
def test_ids_tell_names_apart_that_are_no_text(tmp_path):
    for name in (b"caf\xe8.png", b"caf\xe9.png"):
        open(os.path.join(os.fsencode(tmp_path), name), "wb").close()
    rows = open_source(tmp_path).rows(0, 2)
    assert [row.id for row in rows] == ["caf\\udce8.png", "caf\\udce9.png"]
    assert [os.fsencode(row.pictures[0]) for row in rows] == [b"caf\xe8.png", b"caf\xe9.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Its pictures would be left out without a word."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").touch()
    scan = os.scandir

    def deny(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(QvlError, match=r"sub: cannot be read \(Permission denied\); make it readable"):
        open_source(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(QvlError, match="has no pictures"):
        open_source(tmp_path)


def test_a_folder_of_pictures_has_no_other_folder_of_pictures(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(QvlError, match="is a folder of pictures itself; leave out --images"):
        open_source(tmp_path, tmp_path)


def add(tar, name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def test_samples_of_tar_files(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "x/001.png", b"picture")
        add(tar, "x/001.txt", "问题".encode())
        add(tar, "x/002.left.jpg", b"left")
        add(tar, "x/002.right.jpg", b"right")
        add(tar, "x/002.json", json.dumps({"id": "two", "prompt": "Which?"}).encode())
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "003.png", b"third")
        add(tar, "004.json", b"[1]")
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    rows = source.rows(0, len(source))
    assert [(row.id, row.prompt, row.pictures) for row in rows[:3]] == [
        ("x/001", "问题", (b"picture",)),
        ("two", "Which?", (b"left", b"right")),
        ("003", None, (b"third",)),
    ]
    assert rows[3].error and len(rows) == 4
    sparse = tarfile.TarInfo("a.txt")
    sparse.type = tarfile.GNUTYPE_SPARSE
    cut = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    cut[482] = 1  # the list of pieces goes on in a block that is missing
    cut[148:156] = b"%06o\0 " % (sum(cut) - sum(cut[148:156]) + 8 * ord(" "))
    for content in (b"no tar" * 200, bytes(cut)):
        (tmp_path / "2.tar").write_bytes(content)
        with pytest.raises(QvlError, match="cannot be read as a tar file"):
            open_source(tmp_path)


def test_prompts_of_other_encodings_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        add(tar, "1.txt", "\ufeffWas ist größer?".encode())  # Windows' editor begins UTF-8 so
        add(tar, "2.txt", "Was ist größer?".encode("latin-1"))
    marked, other = open_source(tmp_path / "in.tar").rows(0, 2)
    assert (marked.prompt, marked.error) == ("Was ist größer?", None)
    assert (other.id, other.error) == ("2", "'2.txt' is not UTF-8; save it as such")


def test_what_is_no_file_in_a_tar_is_a_bad_row(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        add(tar, "x", b"", type=tarfile.DIRTYPE)
        add(tar, "x/._001.png", b"of macOS")
        add(tar, "x/001.png", b"one")
        add(tar, "x/002.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "x/003.png", b"", type=tarfile.LNKTYPE, linkname="x/001.png")
        add(tar, "/etc/004.png", b"four")
        add(tar, "../005.png", b"five")
        add(tar, "006.png", b"six")
        add(tar, "006.png", b"another")
        add(tar, "007.png", b"", type=tarfile.FIFOTYPE)
        add(tar, "008.txt", b"y" * (shards.MAX_TEXT + 1))
    source = open_source(tmp_path / "in.tar")
    rows = source.rows(0, len(source))
    assert [(row.id, row.pictures) for row in rows if row.error is None] == [
        ("x/001", (b"one",)), ("/etc/004", (b"four",)), ("../005", (b"five",)),
    ]  # fmt: skip
    told = {row.id: row.error for row in rows if row.error is not None}
    assert list(told) == ["x/002", "x/003", "006", "007", "008"]
    assert all("put the file itself" in told[key] for key in ("x/002", "x/003", "007"))
    assert "two files '006.png'" in told["006"] and "more than 1 MiB" in told["008"]


@pytest.mark.parametrize("size", [-1, -1536, -(1 << 62), 1 << 62, 1 << 20])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_impossible_sizes_in_a_tar_are_refused(tmp_path, size, kind):
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        add(tar, "001.png", b"p" * 600)
        add(tar, "002.png", b"p" * 600)
    content = bytearray((tmp_path / "in.tar").read_bytes())
    header = content[1536:2048]
    header[124:136], header[156:157] = tarfile.itn(size, 12, tarfile.GNU_FORMAT), kind
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    content[1536:2048] = header
    (tmp_path / "in.tar").write_bytes(content)
    with pytest.raises(QvlError, match="cannot be read as a tar file"):
        open_source(tmp_path / "in.tar")


def test_a_damaged_header_in_a_tar_is_refused(tmp_path):
    """Rows after it would be lost in silence."""
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        add(tar, "001.png", b"p" * 600)
        add(tar, "002.png", b"p" * 600)
    content = bytearray((tmp_path / "in.tar").read_bytes())
    content[1536 + 148] ^= 1
    (tmp_path / "in.tar").write_bytes(content)
    with pytest.raises(QvlError, match="a header in it is damaged"):
        open_source(tmp_path / "in.tar")
    (tmp_path / "in.tar").write_bytes(content[:1536])  # without the blocks that end an archive
    assert len(open_source(tmp_path / "in.tar")) == 1


def test_a_tar_that_is_cut_off_is_refused(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        add(tar, "001.png", b"p" * 600)
    content = (tmp_path / "whole.tar").read_bytes()
    for length in (511, 700, 1200):
        (tmp_path / "in.tar").write_bytes(content[:length])
        with pytest.raises(QvlError, match="cannot be read as a tar file"):
            open_source(tmp_path / "in.tar")


def test_joined_tars_are_refused(tmp_path):
    """As `cat 0.tar 1.tar` makes them: readers stop at the end of the first."""
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        add(tar, "001.png", b"p" * 600)
    one = (tmp_path / "one.tar").read_bytes()
    (tmp_path / "padded.tar").write_bytes(one + bytes(5000))
    assert len(open_source(tmp_path / "padded.tar")) == 1
    (tmp_path / "two.tar").write_bytes(one + one.replace(b"001.png", b"002.png"))
    with pytest.raises(QvlError, match=r"two\.tar: goes on after its end at byte 1536, as joined archives do"):
        open_source(tmp_path / "two.tar")


def test_another_prompt_of_the_same_length_is_another_input(tmp_path):
    found = []
    for prompt in (b"What is red?", b"What is blu?"):
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            add(tar, "001.txt", prompt)
        found.append(open_source(tmp_path / "in.tar").fingerprint())
    assert found[0] != found[1]


def test_rows_of_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    tables = [
        pa.table({"id": ["a", "b", "c"], "prompt": ["1", None, "3"], "image": [b"x", b"y", None]}),
        pa.table({"id": ["d"], "image": [{"bytes": b"z", "path": "z.png"}], "other": [1]}),
    ]
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    rows = source.rows(0, 4)
    assert [(row.id, row.prompt, row.pictures) for row in rows] == [
        ("a", "1", (b"x",)), ("b", None, (b"y",)), ("c", "3", ()), ("d", None, (b"z",)),
    ]  # fmt: skip
    assert source.rows(1, 3) == rows[1:3]
    other = tables[0].set_column(1, "prompt", pa.array(["2", None, "3"]))
    pyarrow.parquet.write_table(other, tmp_path / "0.parquet", row_group_size=2)
    assert source.fingerprint() != open_source(tmp_path).fingerprint()
    pyarrow.parquet.write_table(tables[0], tmp_path / "2.parquet")
    with pytest.raises(QvlError, match=r"2.parquet: row 1 has the id 'a' of"):
        open_source(tmp_path)
    pyarrow.parquet.write_table(pa.table({"id": ["a"], "img": ["a.png"]}), tmp_path / "2.parquet")
    with pytest.raises(QvlError, match="has a column img, but no image"):
        open_source(tmp_path / "2.parquet")
    pyarrow.parquet.write_table(pa.table({"name": ["a"]}), tmp_path / "2.parquet")
    with pytest.raises(QvlError, match=r"2\.parquet: has no column id; it has name; add one"):
        open_source(tmp_path)


def test_a_large_row_group_is_read_in_pieces(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pictures = [number.to_bytes(2, "big") * 10_000 for number in range(1600)]
    table = pa.table({"id": [str(number) for number in range(1600)], "image": pictures})
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=16)
    source, usual = open_source(path), pa.default_memory_pool()
    pa.set_memory_pool(measured := pa.proxy_memory_pool(usual))
    try:
        for start in (0, 1000, 1597):
            assert [row.pictures[0] for row in source.rows(start, start + 3)] == pictures[start : start + 3]
    finally:
        pa.set_memory_pool(usual)
    assert measured.max_memory() < path.stat().st_size // 2
    source._starts[1] += 1
    with pytest.raises(QvlError, match=r"in.parquet: has fewer rows than it names"):
        source.rows(1599, 1601)


def test_parquet_files_that_are_broken_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "in.parquet"
    table = pa.table({"id": [f"{i:04d}" for i in range(50)], "image": [b"%04d" % i for i in range(50)]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="zstd")
    content, read = path.read_bytes(), 0
    for place in range(0, len(content), 23):
        path.write_bytes(
            content[:place] + bytes(255 - byte for byte in content[place : place + 7]) + content[place + 7 :]
        )
        try:
            source = open_source(path)
            source.rows(0, len(source))
            read += 1
        except QvlError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert read < len(content) // 46
    path.write_bytes(content[:-1])
    with pytest.raises(QvlError, match="cannot be read as Parquet"):
        open_source(path)


def test_pictures_stay_below_their_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(b"x")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    assert located("a/b.png", tmp_path / "in") == (tmp_path / "in/a/b.png").resolve()
    assert located((tmp_path / "in/a b.png").as_uri(), tmp_path / "in") == (tmp_path / "in/a b.png").resolve()
    assert located("data:image/png;base64,", tmp_path) == "data:image/png;base64,"
    for name in ("../out.png", str(tmp_path / "out.png"), "link.png", "/etc/passwd", "file:///etc/passwd"):
        with pytest.raises(QvlError, match="is not below"):
            located(name, tmp_path / "in")
    (tmp_path / "in" / "loop").symlink_to("loop")
    for name in ("a\0b.png", "\ud800.png", "loop", "loop/a.png"):
        with pytest.raises(QvlError, match="is not below"):
            located(name, tmp_path / "in")


@pytest.mark.parametrize("name", ["none.jsonl", "none", "in.csv"])
def test_what_is_no_input_is_refused(tmp_path, name):
    (tmp_path / "in.csv").write_text("id\n")
    with pytest.raises(QvlError, match=name):
        open_source(tmp_path / name)


def test_memory_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 9}, raising=False)
    for name, cpus in {"node10": "8-9\n", "node2": "0-1,4\n", "node3": "\n", "node4": "5-7\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cpus)
    assert processes.memory_nodes(tmp_path) == [[0, 1], [9]]
    assert processes.memory_nodes(tmp_path / "none") == [[0, 1, 2, 9]]


def _placed(tmp_path, monkeypatch, size, rows, max_batch, limit):
    """Return the processors of each process for a job; [] if it is computed in this one."""
    monkeypatch.setattr(processes, "memory_nodes", lambda: [[0, 1, 2], [4, 5, 6]])
    monkeypatch.setattr(processes, "processor_limit", lambda: limit)
    monkeypatch.setattr(processes, "Worker", lambda *arguments: lambda *more: None)
    monkeypatch.setattr(processes, "WORTH", 1000)
    seen = []
    monkeypatch.setattr(processes, "in_processes", lambda *arguments: seen.append(arguments[0]))
    path = tmp_path / "model.qvl"
    with open(path, "wb") as file:
        file.truncate(size)
    options = Options(None, {}, 0, max_batch, allow_urls=False)
    tasks = [Task(0, tuple(range(rows)))]
    processes.on_this_machine(ModelSpec(path, {}), None, options, None, tasks, None)
    return seen[0] if seen else []


@pytest.mark.parametrize(
    ("size", "rows", "max_batch", "expected"),
    [
        (processes.SMALL, 2000, 16, [[0, 2], [1], [4, 6], [5]]),  # two processes a node
        (processes.SMALL, 2000, 1, [[0, 1, 2], [4, 5, 6]]),
        (processes.SMALL, 50, 16, [[0, 1, 2], [4, 5, 6]]),
        (processes.SMALL + 1, 2000, 16, [[0, 1, 2], [4, 5, 6]]),
    ],
)
def test_a_small_model_has_more_processes(tmp_path, monkeypatch, size, rows, max_batch, expected):
    assert _placed(tmp_path, monkeypatch, size, rows, max_batch, None) == expected


@pytest.mark.parametrize("size", [processes.SMALL, processes.SMALL + 1])
def test_a_limited_container_has_one_process(tmp_path, monkeypatch, size):
    assert _placed(tmp_path, monkeypatch, size, 2000, 16, 5.5) == []
    assert _placed(tmp_path, monkeypatch, size, 2000, 16, 6.0) != []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners and modes as on POSIX")
def test_a_model_sent_to_a_worker_is_read_from_a_private_file_only(tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray.tempfile, "gettempdir", lambda: str(tmp_path))
    path = on_ray._unpacked(b"model")
    assert path.read_bytes() == b"model" and path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"other")
    path.chmod(0o666)  # anybody may have written it
    assert on_ray._unpacked(b"model") == path and path.read_bytes() == b"model"
    path.parent.chmod(0o777)
    with pytest.raises(QvlError, match="others may write to"):
        on_ray._unpacked(b"model")


def test_a_cluster_without_processors_is_refused(monkeypatch):
    head = {"Alive": True, "Resources": {"memory": 1.0}}
    cluster = SimpleNamespace(init=lambda **options: None, nodes=lambda: [head])
    monkeypatch.setattr(on_ray, "ray_package", lambda: cluster)
    with pytest.raises(QvlError, match="--ray auto: no machine of the cluster has a processor"):
        on_ray.on_ray("auto", False, None, None, None, [], print)
