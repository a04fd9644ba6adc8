"""Damage files at random and read them: each must load or be refused in one line, within 10 s and 2 GB.

    python bench/fuzz.py --count 100000            # all targets in turn, on one core
    python bench/fuzz.py past picture --count 500 --seed 7

A mutant is determined by seed, target and number, so that a failure can be reproduced: ``--seed S --only N``. The
originals are the golden files of the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import harness

from qvl_convert import calibration
from qvl_convert.checkpoint import Checkpoint, read_json
from qvl_convert.convert import convert
from qvl_convert.lora import Merged
from qvl_convert.unpickle import PickleFile
from qvl_runtime.batch.sources import open_source
from qvl_runtime.blob import Blob
from qvl_runtime.cli.saved_chat import FORMAT, read_saved
from qvl_runtime.engine import kv_file
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.runner import questions
from qvl_runtime.evaluation.tasks import TASKS
from qvl_runtime.families.specs import MatrixSpec
from qvl_runtime.file.tensorfile import TensorFile
from qvl_runtime.inputs.images import load_image

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SECONDS, MEMORY = 10, 2 << 30
IDENTITY = "f" * 64
WORDS = [b"null", b"true", b"-1", b"0", b"1", b"1e999", b"NaN", b"-Infinity", b"1.5", b'""', b"[]", b"{}", b"9" * 30]
WORDS += [b"[[", b'{"a":{"a":', b",", b":", b'"', b"\\", b"\n", b"\0", b" ", b"\xff\xfe", b"\x80", b"1000000000"]
WORDS += [b"F16", b"F32", b"I64", b"dtype", b"shape", b"N", b"(", b"t", b"R", b"cos\nsystem\n", b"PK\5\6"]


class TimedOut(BaseException):
    """The time limit; not an Exception, so that no handler takes it for a damaged file."""


class Target(NamedTuple):
    """A kind of file.

    Attributes
    ----------
    originals : list of bytes
        Good files.
    name : str
        File name of a mutant.
    read : callable
        Opens the file and reads all of it.
    repair : callable
        Corrects what an attacker would correct after a change: lengths, digests.
    """

    originals: list[bytes]
    name: str
    read: Callable[[Path], object]
    repair: Callable[[bytes], bytes] = bytes


def mutant(target: Target, seed: str) -> bytes:
    """One damaged file."""
    choose = random.Random(seed)
    content = bytearray(choose.choice(target.originals))
    # Headers and directories are parsed, so most changes go there.
    reach = len(content) if choose.random() < 0.4 else min(len(content), 4096)
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        at = choose.randrange(max(1, min(reach, len(content))))
        if choose.random() < 0.2:
            at = max(0, len(content) - 1 - at)
        kind = choose.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([choose.randrange(256)])
        elif kind == 1:
            word = choose.choice(WORDS)
            content[at : at + choose.choice((0, len(word)))] = word
        elif kind == 2:
            del content[at : at + choose.choice((1, 2, 8, 64, 1024))]
        elif kind == 3:
            start = choose.randrange(max(1, len(content)))
            content[at:at] = content[start : start + choose.choice((1, 4, 32, 256))]
        elif kind == 4:
            content[at : at + 4] = choose.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**16)).to_bytes(4, "little")
        else:
            content[at:at] = choose.choice(WORDS) * choose.choice((2, 100, 20_000))
    if choose.random() < 0.05:
        del content[choose.randrange(max(1, len(content))) :]
    return target.repair(bytes(content)) if choose.random() < 0.7 else bytes(content)


def with_length(content: bytes) -> bytes:
    """A safetensors file with the length of its header, up to the last brace of its JSON, corrected."""
    old = int.from_bytes(content[:8], "little")
    end = content.rfind(b"}}", 8, max(10, min(len(content), old + 4096))) + 2
    return (end - 8).to_bytes(8, "little") + content[8:] if end > 10 else content


def with_digest(content: bytes) -> bytes:
    """A saved past with its digest corrected."""
    content = with_length(content)
    return content[:-32] + hashlib.sha256(content[:-32]).digest()


def read_tensors(path: Path) -> None:
    file = TensorFile(path)
    for name, entry in file.entries.items():
        assert file.array(name).shape == entry.shape


def read_pickle(path: Path) -> None:
    file = PickleFile(path)
    for name, entry in file.entries.items():
        assert file.array(name).shape == entry.shape


def read_blob(path: Path) -> None:
    blob = Blob(path)
    for spec in blob.family.tensors(blob.config):
        blob.matrix(spec.name) if isinstance(spec, MatrixSpec) else blob.vector(spec.name)
    blob.family.tokenizer(blob.ranks, blob.config)


def read_rows(path: Path) -> None:
    source = open_source(path)
    assert len(source.rows(0, len(source))) == len(source)


def with_checksums(content: bytes) -> bytes:
    """A tar file with the checksums of its headers corrected."""
    made = bytearray(content)
    for at in range(0, len(made) - 511, 512):
        if made[at + 257 : at + 262] == b"ustar":
            made[at + 148 : at + 156] = b" " * 8
            made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def make_tar(form: int) -> bytes:
    """Two rows whose names need every kind of header."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        for name, text in (("x" * 120 + ".txt", b"What?"), ("a.json", b'{"id": "b"}'), ("a.png", b"P6 1 1 255 abc")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            member.pax_headers = {"size": str(len(text)), "comment": name}
            tar.addfile(member, io.BytesIO(text))
    return made.getvalue()


def make_parquet() -> bytes:
    """Three rows in two row groups."""
    import pyarrow
    import pyarrow.parquet

    made = io.BytesIO()
    rows = [{"id": f"r{i}", "prompt": "What?", "image": {"bytes": b"P6 1 1 255 abc", "path": "a"}} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made, row_group_size=2, compression="none")
    return made.getvalue()


def make_past() -> bytes:
    """A saved past as the runtime writes it, without a model."""
    import numpy as np

    class Store:
        layers = 2

        def saved(self, layer: int, length: int) -> list[np.ndarray]:
            return [np.full((2, length, 4), layer, np.float16)]

    class State:
        store = Store()

        class rotary:
            alpha = 3

    with tempfile.TemporaryDirectory() as folder:
        kv_file.write(Path(folder) / "past", State(), [1, 2, 2, b"p" * 32, b"p" * 32, 7], IDENTITY, 0)
        return (Path(folder) / "past").read_bytes()


def make_blob() -> bytes:
    """A small file with every kind of tensor."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "x.qvl"
        convert(GOLDEN / "ckpt/tiny-vl-gptq", out, vision_bits=4, head_bits=4)
        return out.read_bytes()


def make_targets(wanted: list[str], scratch: Path) -> dict[str, Target]:
    """The wanted targets by name; all of them if none is named. Their checkpoints lie in folders of `scratch`."""
    ckpt, linked, family, asked = GOLDEN / "ckpt", *(scratch / name for name in ("linked", "family", "asked"))
    for folder in (linked, family, asked):
        folder.mkdir()
    vl = ckpt / "tiny-vl"
    for path in vl.iterdir():
        if path.name != "config.json":
            (linked / path.name).symlink_to(path)
    chat = {"format": FORMAT, "system": "You are.", "settings": {"temperature": 0.5, "top_k": 3, "seed": 1}}
    chat["history"] = [["Hi", "Hello"], [[{"image": "a.png"}, {"ref": "x", "box": [1, 2, 3, 4]}, {"text": "?"}], None]]
    said = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image", "url": "data:,"}]}
    data = [{"id": "x", "conversations": said}, {"messages": [parts]}, {"text": "Words."}]
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": True, "rank_pattern": {}}
    speaker = Checkpoint(vl)
    for path in (GOLDEN / "families/ckpt/q3-tied").iterdir():
        (family / path.name).symlink_to(path)
    question = {"question_id": 1, "image": "data/a.png", "question": "What?"}
    people = {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]}
    (asked / "textvqa").mkdir()
    (asked / "a.png").write_bytes(b"P6 1 1 255 abc")
    (asked / "textvqa/textvqa_val_annotations.json").write_text(json.dumps(people))
    shards = [(ckpt / "tiny-q7-gptq-asym/model-00001-of-00001.safetensors").read_bytes()]

    def read_config(path: Path) -> None:
        (linked / "config.json").unlink(missing_ok=True)
        (linked / "config.json").write_bytes(path.read_bytes())
        Checkpoint(linked)

    def read_family(name: str) -> Callable[[Path], None]:
        def read(path: Path) -> None:
            good = (family / name).resolve()
            (family / name).unlink()
            (family / name).symlink_to(path)
            try:
                checkpoint = Checkpoint(family)
                _ = checkpoint.tokenizer, checkpoint.reader, checkpoint.prompts
            finally:
                (family / name).unlink()
                (family / name).symlink_to(good)

        return read

    def read_questions(path: Path) -> None:
        (asked / "textvqa/textvqa_val.jsonl").write_bytes(path.read_bytes())
        questions(TASKS["textvqa"], asked)

    def of_family(name: str) -> Target:
        return Target([(family / name).read_bytes()], "x.json", read_family(name))

    makers: dict[str, Callable[[], Target]] = {
        "tensors": lambda: Target(shards, "x.safetensors", read_tensors, with_length),
        "blob": lambda: Target([make_blob()], "x.qvl", read_blob, with_length),
        "pickle": lambda: Target([p.read_bytes() for p in (ckpt / "tiny-vl-bin").glob("*.bin")], "x.bin", read_pickle),
        "past": lambda: Target([make_past()], "x.past", lambda path: kv_file.read(path, IDENTITY, 8192), with_digest),
        "chat": lambda: Target([json.dumps(chat).encode()], "x.json", lambda path: read_saved(path)),
        "picture": lambda: Target(
            [p.read_bytes() for p in (GOLDEN / "images").iterdir()], "x.png", lambda path: load_image(path, exif=True)
        ),
        "config": lambda: Target([(vl / "config.json").read_bytes()], "x.json", read_config),
        "adapter": lambda: Target(
            [json.dumps(adapter).encode()], "adapter_config.json", lambda p: Merged(vl, p.parent)
        ),
        "index": lambda: Target([(vl / "model.safetensors.index.json").read_bytes()], "x.json", read_json),
        "ranks": lambda: Target(
            [speaker.ranks], "x", lambda path: speaker.family.tokenizer(path.read_bytes(), speaker.config)
        ),
        "config3": lambda: of_family("config.json"),
        "tokenizer3": lambda: of_family("tokenizer.json"),
        "pictures3": lambda: of_family("preprocessor_config.json"),
        "answers3": lambda: of_family("generation_config.json"),
        "tar": lambda: Target(
            [make_tar(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)], "x.tar", read_rows, with_checksums
        ),
        "parquet": lambda: Target([make_parquet()], "x.parquet", read_rows),
        "rows": lambda: Target([json.dumps({"id": 1, "images": ["a"]}).encode()], "x.jsonl", read_rows),
        "questions": lambda: Target([json.dumps(question).encode()], "x.jsonl", read_questions),
        "data": lambda: Target([json.dumps(data).encode()], "x.json", lambda path: calibration.load(path, speaker)),
    }
    if importlib.util.find_spec("pyarrow") is None and not wanted:  # an optional package
        del makers["parquet"]
    return {name: makers[name]() for name in wanted or makers}


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limit memory to 2 GB more than the process has, and the time to 10 s."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))

    def late(*_: object) -> None:
        raise TimedOut(f"took longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(target: Target, content: bytes, folder: Path) -> str:
    """Read a mutant: "loaded" or "refused"; any other exception is raised."""
    path = folder / target.name
    path.write_bytes(content)
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
        return "loaded"
    except QvlError as error:
        message = str(error)
        if "\n" in message or len(message) > 5000 or not message.strip():
            raise AssertionError(f"not one line: {message[:300]!r}") from error
        if "MemoryError" in message:
            raise AssertionError(message) from error
        return "refused"


def run(targets: dict[str, Target], count: int, seed: int, first: int = 0) -> tuple[dict[str, int], list[str]]:
    """Read `count` mutants of the targets in turn; counts of outcomes, and a line for each failure."""
    ends, failures = {"loaded": 0, "refused": 0}, []
    with tempfile.TemporaryDirectory(prefix="qvl-fuzz-") as name:
        for number in range(first, first + count):
            kind = list(targets)[number % len(targets)]
            try:
                ends[outcome(targets[kind], mutant(targets[kind], f"{seed}/{kind}/{number}"), Path(name))] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    break
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(
                    f"{kind} {number}: {type(error).__name__}: {error!s:.200} ({where.name}:{where.lineno})"
                )
    return ends, failures


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutant")
    args = parser.parse_args()
    logging.disable()  # calibration names what it skips
    with tempfile.TemporaryDirectory(prefix="qvl-fuzz-") as scratch:
        targets = make_targets(args.targets, Path(scratch))
        started = time.perf_counter()
        first, count = (0, args.count) if args.only is None else (args.only, 1)
        ends, failures = run(targets, count, args.seed, first)
    for line in failures[:50]:
        print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    taken = time.perf_counter() - started
    harness.print_document(**ends, failed=len(failures), seconds=taken, peak_gb=peak)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
