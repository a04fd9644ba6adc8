"""Where compiled kernels are kept, whose files are run, and what the process that compiles them imports."""

from __future__ import annotations

import errno
import importlib
import logging
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np
import pytest

from qvl_kernels import cache_folder
from qvl_kernels.cpu import CpuOps, build, bundle, cache, choices, features

POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes as on POSIX")


@pytest.fixture(scope="module")
def code() -> bytes:
    """The kernels' machine code."""
    CpuOps(threads=1)
    folder = cache_folder.find().path
    return (folder and cache._read(folder / f"cpu-kernels-{cache.key()}-common.bin")) or bundle.compile_kernels(
        part="common"
    )


@pytest.fixture
def compiled(code, tmp_path, monkeypatch):
    """``compiled()`` reloads the kernels and returns whether they were compiled (which takes no time here)."""
    count = []
    monkeypatch.setattr(bundle, "compile_kernels", lambda level="", part="": count.append(1) or code)
    monkeypatch.setattr(bundle, "BUNDLE", tmp_path / "kernels.zip")

    def load() -> int:
        before = len(count)
        cache_folder._find.cache_clear()
        cache._shipped.cache_clear()
        with monkeypatch.context() as patch:
            # As in a program that has not set up logging; pytest has.
            patch.setattr(logging.getLogger(), "handlers", [])
            assert cache._engine.__wrapped__("common").get_function_address("qvl_execute")
        return len(count) - before

    yield load
    cache._shipped.cache_clear()


@pytest.fixture
def folder(code, tmp_path, monkeypatch):
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "a" / "qvl"))
    yield tmp_path / "a" / "qvl"
    cache_folder._find.cache_clear()


def another_user(monkeypatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)


# ------------------------------------------------------------------------------------------------ the folder
@POSIX
def test_folder_and_files_are_private(folder, compiled, capfd):
    before = os.umask(0)
    try:
        assert compiled() == 1
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600
    assert compiled() == 0
    said = f"qvl: compiling the common kernels for this processor, once; they are kept in {folder}\n"
    assert capfd.readouterr().err == said


@POSIX
def test_folder_that_others_can_write_to_is_not_used(folder, compiled, capfd):
    assert compiled() == 1
    for mode in (0o770, 0o707, 0o777):
        folder.chmod(mode)
        assert compiled() == 1
        assert f"at every start, because others may write to {folder}; set QVL_CACHE_DIR" in capfd.readouterr().err
    folder.chmod(0o755)
    assert compiled() == 0


@POSIX
def test_folder_of_another_user_is_not_used(folder, compiled, capfd, monkeypatch):
    assert compiled() == 1
    with monkeypatch.context() as patch:
        another_user(patch)
        assert compiled() == 1
    assert f"because {folder} belongs to another user" in capfd.readouterr().err


def read_only(folder, monkeypatch) -> None:
    """Like a file system that is mounted so, which also root cannot write to."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)


def test_kernels_in_a_folder_that_is_read_only_are_used(folder, compiled, capfd, monkeypatch):
    assert compiled() == 1
    capfd.readouterr()
    read_only(folder, monkeypatch)
    assert compiled() == 0 and not capfd.readouterr().err
    assert cache_folder.subfolder("numba") is None and not choices.can_keep()


def test_nothing_is_stored_in_a_folder_that_is_read_only(folder, compiled, capfd, monkeypatch):
    folder.mkdir(0o700, parents=True)
    read_only(folder, monkeypatch)
    assert compiled() == 1 and not list(folder.iterdir())
    (line,) = capfd.readouterr().err.splitlines()
    assert f"at every start, because {folder} cannot be written to; set QVL_CACHE_DIR" in line


@POSIX
def test_file_that_others_can_have_written_is_not_run(folder, compiled, monkeypatch):
    assert compiled() == 1
    (file,) = folder.iterdir()
    for mode in (0o620, 0o602, 0o666):
        file.chmod(mode)
        assert compiled() == 1, "compiled again"
        assert file.stat().st_mode & 0o777 == 0o600, "and replaced"
    assert cache_folder.open_private(file)
    another_user(monkeypatch)
    assert cache_folder.open_private(file) is None


@POSIX
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert cache_folder.open_private(tmp_path / "fifo") is None
    assert cache_folder.open_private(tmp_path) is None
    assert cache_folder.open_private(tmp_path / "none") is None


@pytest.mark.parametrize("place", ["below a file", "a file", "proc", "no home", "nul"])
def test_unusable_folder_is_said_once(place, tmp_path, compiled, capfd, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    named = {"below a file": str(tmp_path / "file" / "qvl"), "a file": str(tmp_path / "file"), "proc": "/proc/qvl"}
    if place in named:
        monkeypatch.setenv("QVL_CACHE_DIR", named[place])
    elif place == "no home":
        monkeypatch.delenv("QVL_CACHE_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: Path("/proc/nobody"))
    else:
        monkeypatch.setattr(cache_folder, "find", lambda: cache_folder._find.__wrapped__("a\0b"))
    assert compiled() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "at every start, because" in line and line.endswith("; set QVL_CACHE_DIR to a folder of your own")
    assert "once" not in line


# ------------------------------------------------------------------------------------------------ its files
def test_damaged_and_foreign_files_are_compiled_again(folder, compiled):
    """100 of them: cut, changed, of no kernels, of other kernels under this name."""
    assert compiled() == 1
    (file,) = folder.iterdir()
    whole, rng = file.read_bytes(), random.Random(0)

    def signed(code: bytes, name: str = file.name) -> bytes:
        return cache._digest(Path(name), code) + code

    other = signed(whole[32:], "cpu-kernels-0-common.bin")
    machine = llvm.Target.from_default_triple().create_target_machine()
    empty = machine.emit_object(llvm.parse_assembly(""))
    none = b"".join((b"\1\0\0\0", len(empty).to_bytes(4, "little"), empty))
    bad = [b"", bytes(32), signed(b""), signed(bytes(4)), signed(none), signed(none[:-1]), signed(bytes(400)), other]
    while len(bad) < 100:
        data = bytearray(whole)
        at = rng.randrange(len(data))
        if len(bad) % 3:
            data[at] ^= 1 << rng.randrange(8)
        else:
            del data[at:]
        bad.append(bytes(data))
    for data in bad:
        file.write_bytes(data)
        assert compiled() == 1
        assert file.read_bytes() == whole
    assert compiled() == 0


def test_full_disk_leaves_nothing_behind(folder, compiled, capfd, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert compiled() == 1
    assert list(folder.iterdir()) == []
    assert "could not be kept" in capfd.readouterr().err
    old, new, other = folder / ".x.0123abcd.partial", folder / ".y.0123abcd.partial", folder / "model.qvl.partial"
    for partial in (old, new, other):
        partial.write_bytes(b"of a process that was killed, or is still writing")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    assert compiled() == 1
    assert new.exists() and not old.exists()
    assert other.exists(), "an unfinished conversion"


@POSIX
def test_a_process_that_does_not_come_to_an_end_is_not_waited_for(folder, compiled, capfd, monkeypatch):
    """A lock is released after its use, even if a child was forked meanwhile."""
    import fcntl

    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(cache_folder, "LONGEST_WAIT", 0.2)
    with cache_folder.alone(folder):
        assert compiled() == 1
        assert capfd.readouterr().err.startswith("qvl: waiting for another process that is compiling kernels\n")
        if not (child := os.fork()):
            signal.pause()
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ------------------------------------------------------------------------------------------------ the compiler
PLANTED = "import os, sys; open(os.environ['QVL_PLANTED'], 'a').write(__name__ + ' ')\n"


def test_compiling_runs_nothing_from_the_current_folder(tmp_path, monkeypatch):
    """Modules in the current directory or on PYTHONPATH are not imported."""
    log, here = tmp_path / "log", tmp_path / "model"
    here.mkdir()
    for name in ("numba", "llvmlite", "numpy", "qvl_kernels", "multiprocessing", "struct", "gc"):
        (here / f"{name}.py").write_text(PLANTED)
    (here / "sitecustomize.py").write_text(PLANTED)
    (here / ".numba_config.yaml").write_text("cache_dir: planted\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}")
    monkeypatch.setenv("QVL_PLANTED", str(log))
    # Every import the compiler makes, without the compilation.
    only_imports = bundle.BUILD.replace(
        "emit(level, part)", "import os; from qvl_kernels.cpu import build; build.prepare(); os.write(1, b'imported')"
    )
    monkeypatch.setattr(bundle, "BUILD", only_imports)
    assert bundle.compile_kernels() == b"imported"
    assert not log.exists()


@pytest.mark.parametrize("install", ["checkout", "wheel", "target folder"])
def test_compiling_finds_its_own_package(install, tmp_path, monkeypatch):
    """From a folder that only PYTHONPATH adds to the path, with the libraries in it or elsewhere."""
    package = Path(cache.__file__).parents[1]
    root = package.parent
    if install != "checkout":
        root = tmp_path / install
        root.mkdir()
        os.symlink(package, root / "qvl_kernels")
        if install == "target folder":
            (root / "typing.py").write_text("raise SystemExit('a module that replaces one of the standard library')")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from qvl_kernels.cpu import bundle; del sys.path[0];"
        "emit = 'import qvl_kernels, typing; print(qvl_kernels.__file__)';"
        "bundle.BUILD = bundle.BUILD.replace('emit(level, part)', emit);"
        "print(bundle.compile_kernels().decode(), end='')"
    )
    if install == "target folder":
        script = "import typing, " + script.removeprefix("import ")
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"{root / 'qvl_kernels' / '__init__.py'}\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="compiles in one process")
@pytest.mark.parametrize("children", ["work", "are refused", "are killed"])
def test_kernels_are_compiled_in_children_as_far_as_the_system_grants_them(children, monkeypatch):
    def no_lock(*arguments) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))  # without /dev/shm

    def no_process(self) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def compile_kernel(name: str) -> bytes:
        compiled.append(name)
        if os.getpid() != me and children == "are killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return name.encode()

    me, compiled, names = os.getpid(), [], [f"kernel{i}" for i in range(5)]
    monkeypatch.setattr(multiprocessing.synchronize, "SemLock", no_lock)
    if children == "are refused":
        monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", no_process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(build, "prepare", lambda: names)
    monkeypatch.setattr(build, "compile_kernel", compile_kernel)
    assert cache._objects(build.compile_kernels()) == [name.encode() for name in names]
    assert sorted(compiled) == ([] if children == "work" else names) and not multiprocessing.active_children()


def test_failed_compilation_is_one_line(monkeypatch):
    monkeypatch.setattr(bundle, "BUILD", "raise ValueError('two\\nlines')")
    with pytest.raises(bundle.DeviceError, match=r"could not be compiled \(lines\); try QVL_CPU=plain"):
        bundle.compile_kernels()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # as in a program that embeds Python
    with pytest.raises(bundle.DeviceError, match=r"could not be compiled \(/nowhere/python: No such file .*\); try"):
        bundle.compile_kernels()


# ------------------------------------------------------------------------------------------------ code that ships
def test_shipped_code_is_neither_compiled_nor_kept(folder, compiled, capfd):
    assert build.main([str(bundle.BUNDLE)]) == 0
    capfd.readouterr()
    assert compiled() == 0
    assert not folder.exists() and capfd.readouterr() == ("", "")


def test_bundle_has_every_level_of_this_machine_and_those_of_others(compiled, monkeypatch):
    """The same sources give the same bytes; code of other sources is removed."""
    other = f"plan9-mips-plain-{bundle.source_hash()}.bin"
    with zipfile.ZipFile(bundle.BUNDLE, "w") as file:
        file.writestr(other, b"theirs")
        file.writestr("plan9-mips-plain-0123456789abcdef0123.bin", b"older")
    monkeypatch.setattr(bundle, "compile_kernels", lambda level: level.encode())
    assert build.main([str(bundle.BUNDLE)]) == 0
    assert all(bundle.shipped(level) == level.encode() for level in bundle.levels())
    before = bundle.BUNDLE.read_bytes()
    assert build.main([str(bundle.BUNDLE)]) == 0
    assert bundle.BUNDLE.read_bytes() == before
    with zipfile.ZipFile(bundle.BUNDLE) as file:
        assert sorted(file.namelist()) == sorted([*map(bundle.entry, bundle.levels()), other])
        assert file.read(other) == b"theirs"


@pytest.mark.parametrize("how", ["cut", "changed", "encrypted", "no zip", "other sources", "no kernels"])
def test_bundle_that_does_not_serve_is_passed_over(how, folder, compiled, monkeypatch):
    assert build.main([str(bundle.BUNDLE)]) == 0
    whole, name = bundle.BUNDLE.read_bytes(), bundle.entry(features.selected().name)
    if how == "cut":
        bundle.BUNDLE.write_bytes(whole[: len(whole) // 2])
    elif how == "changed":
        middle = whole.index(name.encode()) + 5000
        bundle.BUNDLE.write_bytes(whole[:middle] + bytes(100) + whole[middle + 100 :])
    elif how == "encrypted":  # as a flag says
        flags = whole.rindex(b"PK\x01\x02", 0, whole.rindex(name.encode())) + 8
        bundle.BUNDLE.write_bytes(whole[:flags] + b"\x01" + whole[flags + 1 :])
    elif how == "no zip":
        bundle.BUNDLE.write_bytes(b"kernels")
    elif how == "other sources":
        monkeypatch.setattr(bundle, "source_hash", lambda: "0123456789abcdef0123")
    else:
        with zipfile.ZipFile(bundle.BUNDLE, "w") as file:
            file.writestr(name, b"\x01\0\0\0 of no kernels")
    assert compiled() == 1
    assert how == "no kernels" or bundle.shipped(features.selected().name) is None


# ------------------------------------------------------------------------------------------------ Numba's own
def test_numba_keeps_its_own_cache_in_the_folder(folder, monkeypatch):
    import numba

    from qvl_convert.jit import jit

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    cache_folder._find.cache_clear()

    def double(x):
        return x * 2

    assert jit()(double)(np.arange(3)).tolist() == [0, 2, 4]
    assert list((folder / "numba").rglob("*.nbi")) and numba.config.CACHE_DIR == ""


@POSIX
def test_what_numba_runs_is_in_a_private_folder(folder):
    """Numba makes its files with the process's umask, and reads them whoever wrote them."""
    from qvl_convert.jit import jit

    cache_folder._find.cache_clear()
    folder.mkdir(0o755, parents=True)
    before = os.umask(0)
    try:
        assert jit()(_double)(np.arange(3)).tolist() == [0, 2, 4]
    finally:
        os.umask(before)
    assert (folder / "numba").stat().st_mode & 0o777 == 0o700
    assert list((folder / "numba").rglob("*.nbi"))


@POSIX
def test_a_folder_that_others_may_write_to_is_not_numbas(folder, caplog):
    from qvl_convert.jit import jit

    cache_folder._find.cache_clear()
    (folder / "numba").mkdir(parents=True)
    (folder / "numba").chmod(0o770)
    assert jit()(_double)(np.arange(3)).tolist() == [0, 2, 4]
    assert not list((folder / "numba").iterdir())
    assert "others may write to" in caplog.text


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_file_of_numba_is_compiled_again(folder, suffix):
    """A power failure leaves empty files."""
    from qvl_convert.jit import jit

    cache_folder._find.cache_clear()
    for _ in range(2):
        assert jit()(_double)(np.arange(3)).tolist() == [0, 2, 4]
        (file,) = (folder / "numba").rglob(f"*.{suffix}")
        assert file.stat().st_size
        file.write_bytes(b"")


@pytest.mark.parametrize("what", ["source", "processor"])
def test_numba_compiles_again_what_calls_another_function_than_before(folder, tmp_path, monkeypatch, what):
    """As after a `git pull` that changed the file of the called function alone, and after a change of QVL_CPU."""
    from qvl_convert import jit

    cache_folder._find.cache_clear()
    called, calling = tmp_path / "called.py", tmp_path / "calling.py"
    calling.write_text("from called import f\nfrom qvl_convert.jit import jit\n@jit()\ndef g(x):\n    return f(x)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(jit, "SOURCES", (called, calling))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for number in (1, 2):
        called.write_text(f"import numba\n@numba.njit\ndef f(x):\n    return x + {number}\n")
        for name in ("called", "calling"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        jit._key.cache_clear()
        if what == "processor":
            monkeypatch.setattr(jit, "SOURCES", ())
            monkeypatch.setattr(features, "selected", lambda name=str(number): SimpleNamespace(name=name))
        assert importlib.import_module("calling").g(np.arange(2)).tolist() == [number, number + 1]
    jit._key.cache_clear()


def test_every_module_that_numba_compiles_is_in_the_key_of_its_cache():
    from qvl_convert import jit

    compiled = {p for p in jit.SOURCES[0].parent.glob("*.py") if "import numba" in p.read_text(encoding="utf-8")}
    assert compiled - {Path(jit.__file__)} == set(jit.SOURCES)


def test_a_full_disk_keeps_nothing_of_numba_and_ends_nothing(folder, caplog, monkeypatch):
    from numba.core.caching import IndexDataCacheFile

    from qvl_convert.jit import jit

    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache_folder._find.cache_clear()
    monkeypatch.setattr(IndexDataCacheFile, "_save_data", full)
    assert jit()(_double)(np.arange(3)).tolist() == [0, 2, 4]
    assert "could not be kept" in caplog.text and "No space left" in caplog.text


def _double(x):
    return x * 2


def test_numba_without_a_folder(monkeypatch):
    """Read-only packages and no home: compiled for this process only."""
    from qvl_convert.jit import jit

    monkeypatch.setenv("QVL_CACHE_DIR", "/proc/qvl")

    def double(x):
        return x * 2

    assert jit()(double)(np.arange(3)).tolist() == [0, 2, 4]
