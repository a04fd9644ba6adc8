"""Prove `qvl batch` on rows of the demo model's world, and measure it.

    python bench/batch_job.py speed --rows 2000      rows a second, side by side and one at a time, in turns
    python bench/batch_job.py kills --count 20       killed at random moments, and gone on with
    python bench/batch_job.py ray                    three machines of a Ray cluster, one of which is lost, and a worker

`kills` and `ray` compare every byte with an undisturbed run, and end with status 1 where one differs. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qvl_convert.convert import convert
from qvl_runtime.benchmark import machine
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.demo.conversations import ask
from qvl_runtime.demo.scenes import draw, random_scene

ROWS_A_PICTURE = 4
BAD = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "kills", "ray"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--count", type=int, default=20, help="Kills.")
    parser.add_argument("--rounds", type=int, default=3, help="Of the speed; medians are shown.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert(checkpoint_folder(), folder / "demo.qvl")
        write_rows(folder, arguments.rows, arguments.seed)
        found = {"speed": speed, "kills": kills, "ray": lost}[arguments.what](folder, arguments)
    print(json.dumps({"what": arguments.what, "rows": arguments.rows, "machine": machine(), **found}))
    sys.exit(not found.get("equal", True))


def write_rows(folder: Path, count: int, seed: int) -> None:
    """Questions about fresh pictures; of one row in a hundred the picture is missing."""
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
    lines = (json.dumps(row) + "\n" for row in rows[:count])
    (folder / "rows.jsonl").write_text("".join(lines))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    rows = [str(folder / "rows.jsonl"), str(out), "--images", str(folder / "pictures")]
    options = ["--block", "8", "--max-new-tokens", "40", "--max-failures", "0.2", *more]
    return [sys.executable, "-m", "qvl_runtime", "batch", str(folder / "demo.qvl"), *rows, *options]


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != ".lock"}


def status(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def speed(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"1": [], "16": []}
    for _ in range(arguments.rounds):
        for batch, seen in rates.items():
            out = folder / "out"
            done = subprocess.run(
                command(folder, out, "--max-batch", batch), check=True, stdout=subprocess.PIPE, text=True
            )
            seen.append(status(done)["rows_per_second"])
            shutil.rmtree(out)
    one, many = (float(np.median(seen)) for seen in rates.values())
    print(f"one at a time {one:7.2f} rows/s\n16 at a time  {many:7.2f} rows/s   {many / one:.2f} times")
    return {"rows_per_second": {"1": one, "16": many}, "ratio": many / one}


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


def lost(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from ray.cluster_utils import Cluster

    whole, _ = undisturbed(folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out = folder / "out"
    job = subprocess.Popen(command(folder, out, "--ray", cluster.address, "--ship-model"), stdout=subprocess.DEVNULL)
    killed = []

    def disturb() -> None:
        for victim in ("worker", "machine"):
            before = len(parts(out)) if out.exists() else 0
            while job.poll() is None and (not out.exists() or len(parts(out)) < before + 3):
                time.sleep(0.1)
            if job.poll() is None:
                if victim == "worker":
                    os.kill(next(workers()), signal.SIGKILL)
                else:
                    cluster.remove_node(nodes[0], allow_graceful=False)
                killed.append(victim)
                print(f"a {victim} was lost at {len(parts(out))} of {len(whole)} files", flush=True)

    thread = threading.Thread(target=disturb)
    thread.start()
    code = job.wait()
    thread.join()
    cluster.shutdown()
    equal = code == 0 and parts(out) == whole and killed == ["worker", "machine"]
    return {"lost": killed, "status": code, "equal": equal}


def workers() -> Iterator[int]:
    """Processes of Ray that compute rows."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::" in path.read_bytes() and b"Worker" in path.read_bytes():
                yield int(path.parent.name)
        except OSError:
            continue


if __name__ == "__main__":
    main()
