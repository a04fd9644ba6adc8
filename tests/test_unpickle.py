"""Pickle shards: what torch.save writes is read, anything else is refused by name, and nothing is ever run."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import numbers, state_dict, tensor_call, text, write_pickle_shard

from qvl_convert.unpickle import PickleFile
from qvl_runtime.errors import QvlError

SHARD = GOLDEN / "ckpt/tiny-vl-bin/pytorch_model-00002-of-00002.bin"
VALUES = np.arange(24, dtype=np.float32)


def shard(path: Path, call: bytes, **options) -> PickleFile:
    return PickleFile(write_pickle_shard(path / "x.bin", state_dict({"w": call}), {"0": VALUES.tobytes()}, **options))


def test_published_shard_is_read_bit_for_bit():
    file = PickleFile(SHARD)
    with zipfile.ZipFile(SHARD) as archive:
        # torch.save numbers the storages in the order of the dictionary.
        for key, (name, entry) in enumerate(file.entries.items()):
            data = archive.read(f"{SHARD.stem}/data/{key}")
            assert file.array(name).tobytes() == data
            assert file.array(name).shape == entry.shape
    assert file.entries["transformer.visual.conv1.weight"].shape == (104, 3, 14, 14)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("BFloat16", ml_dtypes.bfloat16), ("Half", np.float16), ("Float", np.float32), ("Long", np.int64)],
)
def test_dtypes(tmp_path, kind, dtype):
    values = np.arange(-6, 6).astype(dtype)
    call = tensor_call("0", 12, (3, 4), (4, 1), kind=kind)
    path = write_pickle_shard(tmp_path / "x.bin", state_dict({"w": call}), {"0": values.tobytes()})
    array = PickleFile(path).array("w")
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, values.reshape(3, 4))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4, 6), (6, 1), 0),
        ((6, 4), (1, 6), 0),
        ((3, 2), (8, 2), 1),
        ((5,), (1,), 19),
        ((), (), 23),
        ((0, 3), (3, 1), 0),
    ],
)
def test_views_of_a_storage(tmp_path, shape, strides, offset):
    array = shard(tmp_path, tensor_call("0", 24, shape, strides, offset=offset)).array("w")
    expected = np.lib.stride_tricks.as_strided(VALUES[offset:], shape, [s * 4 for s in strides])
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, expected)


DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(9))


def test_state_of_a_dictionary_and_parameters_are_accepted(tmp_path):
    tensor = tensor_call("0", 24, (24,), (1,))
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x89ccollections\nOrderedDict\n)RtR"
    program = b"\x80\x02ccollections\nOrderedDict\n)R(" + text("w") + parameter + b"u"
    program += b"}" + text("_metadata") + b"}sb."
    path = write_pickle_shard(tmp_path / "x.bin", program, {"0": VALUES.tobytes()}, version="3\n", byteorder="little")
    np.testing.assert_array_equal(PickleFile(path).array("w"), VALUES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (tensor_call("0", 24, (25,), (1,)), "past its storage"),
        (tensor_call("0", 24, (4, 6), (7, 1)), "past its storage"),
        (tensor_call("0", 24, (4,), (1,), offset=21), "past its storage"),
        (tensor_call("0", 25, (4,), (1,)), "claims 25 values"),
        (tensor_call("0", -1, (4,), (1,)), "claims -1 values"),
        (tensor_call("0", 24, (-4,), (1,)), "negative"),
        (tensor_call("0", 24, (4,), (1,), offset=-1), "negative"),
        (tensor_call("0", 24, (2**30, 24), (0, 1)), "repeats"),
        (tensor_call("0", 24, (12, 12), (1, 1)), "repeats"),
        (tensor_call("0", 24, (4, 6), (1,)), "strides"),
        (tensor_call("1", 24, (4,), (1,)), "'1'"),
        (tensor_call("0", 24, (4,), (1,), kind="Quantized"), "torch.QuantizedStorage"),
        # nested a hundred thousand times, this would crash the interpreter when it is looked up
        (tensor_call("0", 24, (4,), (1,)).replace(text("0"), b")" + b"\x85" * 9), "a storage without a name"),
        # a tuple of two times the tuple before: sixty times, its text would take all memory
        (tensor_call("0", 24, (4,), (1,)).replace(b"J\x18\0\0\0", DOUBLED), "claims no number of values"),
        (b"K\x07", "'w' in it is no tensor"),
        (text("os"), "'w' in it is no tensor"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, call, message):
    with pytest.raises(QvlError, match=message):
        shard(tmp_path, call)


class Attack:
    """An object whose pickle calls something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"w": a}, lambda a: [1, ({"w": [a]}, None)]])
def test_a_pickle_that_calls_anything_is_refused_by_name_and_not_run(tmp_path, monkeypatch, protocol, wrap):
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps(wrap(Attack(os.system, "touch executed")), protocol)
    path = write_pickle_shard(tmp_path / "x.bin", program)
    with pytest.raises(QvlError, match=r"x\.bin.*(posix|nt)\.system.*not run"):
        PickleFile(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02cbuiltins\neval\n(" + text("1") + b"tR.", "builtins.eval"),
        (b"(ios\nsystem\n" + text("x") + b"o.", "os.system"),
        (b"(icollections\nOrderedDict\n.", "INST"),
        (b"\x80\x02}(K\x01" + b"o.", "OBJ"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n)R.", "torch.storage._load_from_bytes"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93.", "os.system"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "state"),
        (b"\x80\x02\x8f.", "EMPTY_SET"),
        (b"\x80\x02].", "no dictionary"),
        (b"\x80\x02}(K\x01e.", "malformed"),
        (numbers(1) + b".", "no dictionary"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.", "malformed"),
        (b"", "malformed"),
        (b"}", "malformed"),
        (b"\x80\x02h\x07.", "malformed"),
        (b"R.", "malformed"),
        (b"}}.", "malformed"),
        (b"\x80\x02}(K\x01K\x02u.", "malformed"),
        (state_dict({"a": b"}", "b": b"}"}).replace(b"b}", b"a}"), "twice"),
    ],
)
def test_other_programs_are_refused(tmp_path, program, message):
    with pytest.raises(QvlError, match=message):
        PickleFile(write_pickle_shard(tmp_path / "x.bin", program))


def test_other_files_are_refused(tmp_path):
    good = tensor_call("0", 24, (24,), (1,))
    with pytest.raises(QvlError, match="big-endian"):
        shard(tmp_path, good, byteorder="big")
    with pytest.raises(QvlError, match="compressed"):
        shard(tmp_path, good, method=zipfile.ZIP_DEFLATED)
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict({"w": tensor_call("0", 1 << 20, (1 << 20,), (1,))}))
        archive.writestr("archive/data/0", bytes(8))
        # The directory at the end is written on closing.
        archive.filelist[-1].file_size = archive.filelist[-1].compress_size = 4 << 20
    with pytest.raises(QvlError, match="reaches past the end"):
        PickleFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict({"w": tensor_call("0", 2, (2,), (1,))}))
        archive.writestr("archive/data/0", bytes(8))
        # No more than the file has, but more than there is behind its beginning.
        archive.filelist[-1].file_size = archive.filelist[-1].compress_size = archive.fp.tell()
    with pytest.raises(QvlError, match="reaches past the end"):
        PickleFile(path)
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("archive/data.pkl", state_dict({}))
    with pytest.raises(QvlError, match="twice"):
        PickleFile(path)
    with pytest.raises(QvlError, match="no such file"):
        PickleFile(tmp_path / "missing.bin")
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    with pytest.raises(QvlError, match=r"before 1\.6"):
        PickleFile(path)
    path.write_bytes(SHARD.read_bytes()[:-1000])
    with pytest.raises(QvlError, match="cannot be read"):
        PickleFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(QvlError, match=r"no data\.pkl"):
        PickleFile(path)


@contextlib.contextmanager
def more_memory(nbytes: int):
    """Limit the memory that this process may allocate in addition."""
    resource = pytest.importorskip("resource")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda: b"\x80\x02" + b"N" * (64 << 20) + b".", "its data.pkl has 67108867 bytes"),
        (lambda: b"\x80\x02" + b"N" * (2 << 20) + b".", "more than 1048576 instructions"),
    ],
)
def test_a_pickle_of_many_instructions_is_refused_early(tmp_path, program, message):
    """Otherwise it would take a hundred times its size in memory."""
    path = write_pickle_shard(tmp_path / "x.bin", program())
    with more_memory(1 << 29), pytest.raises(QvlError, match=message):
        PickleFile(path)


@pytest.fixture(scope="module")
def mutant(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mutants") / "x.bin"


def survives_or_refuses(path: Path) -> None:
    try:
        file = PickleFile(path)
        for name, entry in file.entries.items():
            array = file.array(name)
            assert (array.shape, array.dtype) == (entry.shape, entry.dtype)
    except QvlError:
        pass


@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_pickles_raise_nothing_but_our_error(mutant, edits):
    with zipfile.ZipFile(SHARD) as archive:
        program = archive.read(f"{SHARD.stem}/data.pkl")
        storages = {str(i): archive.read(f"{SHARD.stem}/data/{i}")[:700] for i in range(8)}
    mutated = program
    for place, insert, cut in edits:
        at = int(place * len(mutated))
        mutated = mutated[:at] + insert + mutated[at + cut :]
    survives_or_refuses(write_pickle_shard(mutant, mutated, storages))


@given(
    edits=st.lists(
        st.tuples(st.one_of(st.integers(0, 4000), st.integers(-9000, -1)), st.binary(max_size=4), st.integers(0, 4)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_mutated_archives_raise_nothing_but_our_error(mutant, edits):
    mutated = SHARD.read_bytes()
    for place, insert, cut in edits:
        at = place % len(mutated)
        mutated = mutated[:at] + insert + mutated[at + cut :]
    mutant.write_bytes(mutated)
    survives_or_refuses(mutant)


@given(program=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_programs_raise_nothing_but_our_error(mutant, program):
    survives_or_refuses(write_pickle_shard(mutant, program))
