"""Mutation tests: apply single mistakes to a copy of the source and see whether the tests notice them.

    python bench/mutants.py [--only N ...] [--list FILE]

The list (`mutants.txt`) has a block for each mutant: the file and the tests that should fail, then the original lines
(``- ``, without indentation) and their replacement (``+ ``). A mutant is noticed if one of its tests fails or takes
more than ten minutes. Only a temporary folder is changed, and it is removed at the end. Exit status 1 if a mutant was
not noticed, 2 if its original lines are not in the file exactly once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 600
SHARED = (
    "numpy",
    "numba",
    "pytest",
    "hypothesis",
    "PIL.Image",
    "safetensors.numpy",
    "tiktoken",
    "typer",
    "rich.console",
)
"""Imported once, by the process whose children run the tests. None of the mutated packages may be imported there."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes
    ----------
    path : str
        Of the file, relative to the root.
    tests : list of str
        Arguments for pytest.
    old, new : list of str
        Lines without their indentation.
    """

    path: str
    tests: list[str]
    old: list[str]
    new: list[str]

    def applied(self, text: str) -> str:
        """Return the file's text with the mistake applied.

        Raises
        ------
        ValueError
            If the old lines are not in the text exactly once.
        """
        lines = text.split("\n")
        stripped = [line.strip() for line in lines]
        count = len(self.old)
        places = [i for i in range(len(lines)) if stripped[i : i + count] == self.old]
        if len(places) != 1:
            raise ValueError(f"{self.path}: {self.old[0]!r} found {len(places)} times instead of once")
        at = places[0]
        indents = [line[: len(line) - len(line.lstrip())] for line in lines[at : at + count]]
        new = [indents[min(i, count - 1)] + line for i, line in enumerate(self.new)]
        return "\n".join([*lines[:at], *new, *lines[at + count :]])

    @property
    def changes_kernels(self) -> bool:
        return self.path.startswith("kernels/qvl_kernels/cpu/")


def read_list(path: Path) -> list[Mutant]:
    """The mutants of a list file."""
    found = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        lines = [line for line in block.split("\n") if line.strip() and not line.startswith("#")]
        if lines:
            name, _, tests = lines[0].partition(": ")
            old, new = ([line[2:].strip() for line in lines[1:] if line.startswith(f"{sign} ")] for sign in "-+")
            found.append(Mutant(name, shlex.split(tests), old, new))
    return found


def copy_source(folder: Path) -> None:
    """Copy the files of the working tree that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def run_tests(folder: Path, tests: list[str], cache: Path, output: Path) -> int | None:
    """Run pytest on the copy in a child of this process; its exit status, or None if it took too long."""
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            os.chdir(folder)
            with open(output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            places = [str(folder), str(folder / "kernels"), str(folder / "convert")]
            os.environ |= {"QVL_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(places)}
            sys.path[:0] = places
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-rfE"]
            names = [f"tests/{test}" if test.endswith(".py") else test for test in tests]
            status = int(pytest.main([*options, *names]))
            sys.stdout.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def noticed_by(status: int | None, output: str) -> str | None:
    """The test or error that noticed a mistake; None if nothing did.

    Raises
    ------
    RuntimeError
        When no test ran.
    """
    if status == 0:
        return None
    if status in (4, 5):  # wrong usage, no test collected
        raise RuntimeError(output[-500:])
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[0].removeprefix("tests/") if found else "too late" if status is None else f"exit status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, default=Path(__file__).with_name("mutants.txt"))
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants, from 1")
    args = parser.parse_args()
    mutants = read_list(args.list)
    chosen = args.only or range(1, len(mutants) + 1)
    if unknown := [number for number in chosen if not 1 <= number <= len(mutants)]:
        parser.error(f"--only {unknown[0]}: the list has the mutants 1 to {len(mutants)}")
    problems = []
    for mutant in mutants:
        try:
            mutant.applied((ROOT / mutant.path).read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        print("\n".join(problems))
        sys.exit(2)
    for name in SHARED:
        importlib.import_module(name)
    results = []
    with tempfile.TemporaryDirectory(prefix="qvl-mutants-") as name:
        folder, cache, output = Path(name) / "source", Path(name) / "cache", Path(name) / "output"
        copy_source(folder)
        cache.mkdir(mode=0o700)
        known = Path(os.environ.get("QVL_CACHE_DIR", Path.home() / ".cache" / "qvl"))
        for path in known.glob("cpu-kernels-*.bin"):
            shutil.copy2(path, cache)
        for number in chosen:
            mutant = mutants[number - 1]
            path, begin = folder / mutant.path, time.perf_counter()
            original = path.read_text(encoding="utf-8")
            own = Path(tempfile.mkdtemp(dir=name)) if mutant.changes_kernels else cache
            try:
                path.write_text(mutant.applied(original), encoding="utf-8")
                status = run_tests(folder, mutant.tests, own, output)
            finally:
                path.write_text(original, encoding="utf-8")
                with contextlib.suppress(OSError):
                    shutil.rmtree(own) if own != cache else None
            by = noticed_by(status, output.read_text(errors="replace"))
            seconds = time.perf_counter() - begin
            results.append({"number": number, "path": mutant.path, "by": by, "seconds": round(seconds, 1)})
            print(f"{number:4} {seconds:6.1f} s  {mutant.path}: {mutant.new[0] if mutant.new else 'deleted'}")
            print(f"{'':13}{'NOT NOTICED' if by is None else by}", flush=True)
    missed = [result["number"] for result in results if result["by"] is None]
    print(
        json.dumps({"planted": len(results), "noticed": len(results) - len(missed), "missed": missed, "all": results})
    )
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
