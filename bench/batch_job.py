"""Test `qvl batch` on rows about the demo model's pictures, and measure its speed.

    python bench/batch_job.py speed --rows 2000      rows a second, several at a time and one at a time, in turns
    python bench/batch_job.py kills --count 20       killed at random moments, then resumed
    python bench/batch_job.py ray --count 20         a Ray cluster of three machines: workers, machines and the command
                                                     are killed at random moments, and the head at the end

`kills` and `ray` compare every byte with an undisturbed run. Exit status 1 if one differs. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

from qvl_convert.convert import convert
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.demo.conversations import ask
from qvl_runtime.demo.scenes import draw, random_scene

ROWS, GOOD = "rows.jsonl", "good.jsonl"
ROWS_A_PICTURE = 4
BAD = 0.01
SMALL = {"object_store_memory": 80 << 20}
"""Options of each machine of the cluster; all of them are processes on this machine."""
SETTINGS = {
    # A busy machine may not respond for a while; it is not lost.
    "RAY_health_check_timeout_ms": "120000",
    "RAY_health_check_period_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_raylet_start_wait_time_s": "300",
}
TRIES = 8
VICTIMS = ("worker", "machine", "command")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("what", choices=("speed", "kills", "ray"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--count", type=int, default=20, help="number of kills")
    parser.add_argument("--rounds", type=int, default=3, help="of `speed`; medians are shown")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(checkpoint_folder(), folder / "demo.qvl")
        write_rows(folder, arguments.rows, arguments.seed)
        found = {"speed": speed, "kills": kills, "ray": lost}[arguments.what](folder, arguments)
    harness.print_document(what=arguments.what, rows=arguments.rows, **found)
    sys.exit(not found.get("equal", True))


def write_rows(folder: Path, count: int, seed: int) -> None:
    """Write questions about new pictures; in one row of a hundred the picture is missing."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        picture = f"{len(rows):06d}.png"
        scene = random_scene(rng)
        draw(scene, 448).save(folder / "pictures" / picture)
        for _ in range(ROWS_A_PICTURE):
            exchange = ask(rng, [scene])
            bad = rng.random() < BAD
            question = exchange.turns[0][0] if exchange else "Describe the picture."
            rows.append({"id": f"r{len(rows)}", "image": "none.png" if bad else picture, "prompt": question})
    write_lines(folder / ROWS, rows[:count])
    # The same rows, none of them bad.
    write_lines(
        folder / GOOD, [row | {"image": f"{i - i % ROWS_A_PICTURE:06d}.png"} for i, row in enumerate(rows)][:count]
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, out: Path, *more: str, rows: str = ROWS) -> list[str]:
    where = [str(folder / rows), str(out), "--images", str(folder / "pictures")]
    options = ["--block", "8", "--max-new-tokens", "40", "--max-failures", "0.2", *more]
    return [sys.executable, "-m", "qvl_runtime", "batch", str(folder / "demo.qvl"), *where, *options]


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != ".lock"}


def status(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def speed(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    ways = {"one at a time": ("1", ROWS), "16 at a time": ("16", ROWS), "16 at a time, none bad": ("16", GOOD)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, dict[str, Any]] = {}
    for turn in range(arguments.rounds):
        for name, (batch, rows) in list(ways.items())[:: -1 if turn % 2 else 1]:
            out = folder / "out"
            asked = command(folder, out, "--max-batch", batch, rows=rows)
            done = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True)
            rates[name].append(status(done)["rows_per_second"])
            lines = (json.loads(line) for path in out.glob("part-*") for line in path.read_text().splitlines())
            answers[name] = {line["id"]: line for line in lines}
            shutil.rmtree(out)
    alone, many, good = answers.values()
    bad = [name for name, line in alone.items() if line["error"]]
    equal = alone == many and all(many[name] == line for name, line in good.items() if name not in bad)
    medians = {name: float(np.median(seen)) for name, seen in rates.items()}
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    one = medians["one at a time"]
    for name, rate in medians.items():
        print(f"{name:24} {rate:7.2f} rows/s {rate / one:6.2f} times")
    print(f"{len(bad)} bad rows; answers {'equal' if equal else 'DIFFER'}; the largest process had {largest:.0f} MB")
    told = {"rows_per_second": medians, "every": rates, "bad": len(bad), "largest_process_mb": largest}
    return {**told, "ratio": medians["16 at a time"] / one, "equal": equal}


def undisturbed(folder: Path) -> tuple[dict[str, bytes], float]:
    began = time.monotonic()
    subprocess.run(command(folder, folder / "whole"), check=True, stdout=subprocess.PIPE)
    return parts(folder / "whole"), time.monotonic() - began


def kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    whole, seconds = undisturbed(folder)
    rng, differing, resumed = random.Random(arguments.seed), 0, 0
    out = folder / "out"
    for number in range(arguments.count):
        with subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(0.2, 0.9) * seconds)
            process.send_signal(signal.SIGKILL)
        done = len(parts(out)) if out.exists() else 0
        resumed += 0 < done < len(whole)
        subprocess.run(command(folder, out), check=True, stdout=subprocess.PIPE)
        differing += parts(out) != whole
        print(f"kill {number + 1}: {done} of {len(whole)} files were there; {differing} differ so far", flush=True)
        shutil.rmtree(out)
    return {"kills": arguments.count, "in_the_middle": resumed, "differing": differing, "equal": not differing}


class Machines:
    """A Ray cluster whose machines are processes on this one: a head and two others."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._added()  # the head
        self._others = [self._added() for _ in range(2)]
        self.address = self._cluster.address

    def _added(self) -> Any:
        """Add a machine. Ray waits 30 s for it, which can be too short on a busy machine."""
        for _ in range(TRIES):
            with contextlib.suppress(Exception):
                return self._cluster.add_node(num_cpus=1, **SMALL)
        raise SystemExit(f"no machine of the cluster started in {TRIES} tries of 30 s")

    def lose(self, victim: str, rng: random.Random) -> bool:
        """Kill a worker, a machine (and replace it), or the head; whether there was one to kill."""
        if victim == "worker":
            found = list(workers())
            if found:
                os.kill(rng.choice(found), signal.SIGKILL)
            return bool(found)
        lost = self._cluster.head_node
        if victim == "machine":
            lost = self._others.pop(rng.randrange(len(self._others)))
            self._others.append(self._added())
        self._cluster.remove_node(lost, allow_graceful=False)
        return True

    def close(self) -> None:
        self._cluster.shutdown()


def lost(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    os.environ |= SETTINGS
    whole, _ = undisturbed(folder)
    rng, out, machines = random.Random(arguments.seed), folder / "out", Machines()
    victims = [VICTIMS[i % len(VICTIMS)] for i in range(arguments.count)]
    rng.shuffle(victims)
    kills, in_the_middle, differing, finished = Counter[str](), 0, 0, 0

    def started() -> subprocess.Popen[bytes]:
        ray = ["--ray", machines.address, "--ship-model"]
        return subprocess.Popen(command(folder, out, *ray), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ended(job: subprocess.Popen[bytes]) -> None:
        nonlocal differing, finished
        told = job.communicate()[1]
        finished += 1
        if job.returncode or parts(out) != whole:
            differing += 1
            print(f"status {job.returncode}: {told.decode()[-2000:]}", flush=True)
        shutil.rmtree(out)

    job = started()
    for victim in [*victims, "head"]:
        while True:
            after, until = len(written(out)) + rng.randrange(4), time.monotonic() + rng.uniform(0, 4)
            while job.poll() is None and (len(written(out)) < after or time.monotonic() < until):
                time.sleep(0.05)
            if job.poll() is not None:
                ended(job)
                job = started()
            elif victim == "command":
                job.kill()
                break
            elif machines.lose(victim, rng):
                break
        kills[victim] += 1
        there = written(out)
        in_the_middle += 0 < len(there) < len(whole)
        differing += any(whole.get(name) != content for name, content in there.items())
        print(f"a {victim} was lost at {len(there)} of {len(whole)} files; {differing} differ so far", flush=True)
        if victim == "head":
            print(f"the command ended with status {job.wait()}")
            machines.close()
            machines = Machines()
        if victim in ("head", "command"):
            job.communicate()
            job = started()
    ended(job)
    machines.close()
    told = {"in_the_middle": in_the_middle, "jobs": finished, "differing": differing, "equal": not differing}
    return {"lost": dict(kills), **told}


def written(out: Path) -> dict[str, bytes]:
    """The finished files of a job, without those it is writing."""
    found = parts(out) if out.exists() else {}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def workers() -> Iterator[int]:
    """Process ids of the Ray workers that compute rows."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"_RayWorker" in path.read_bytes():
                yield int(path.parent.name)
        except OSError:
            continue


if __name__ == "__main__":
    main()
