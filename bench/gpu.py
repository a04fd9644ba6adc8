"""Check the GPU backend in one command: correctness, speed and memory.

    python bench/gpu.py                         all sections, within ten minutes
    python bench/gpu.py --only golden decode    these
    python bench/gpu.py --out gpu.json          also write the JSON here (default: bench/gpu.json)

Sections run one after another, each in its own process with a time limit, so that a crash, a fault on the device or a
hang does not affect the others. Every section prints its tables; the summary at the end compares results with required
values, and the last line is one JSON document. Speeds are compared with torch if it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
# so that a checkout works without installation
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent, HERE.parent / "kernels", HERE.parent / "convert")]

SECTIONS = {
    "setup": ("setup.setup", 240),
    "kernels": ("parity.kernels", 120),
    "operations": ("parity.operations", 90),
    "golden": ("parity.golden", 120),
    "families": ("parity.families", 120),
    "bandwidth": ("speed.bandwidth", 30),
    "matvec": ("speed.matvec", 60),
    "matmul": ("speed.matmul", 90),
    "attention": ("speed.attention", 60),
    "decode": ("model.decode", 90),
    "newer": ("model.newer", 60),
    "picture": ("model.picture", 90),
    "memory": ("model.memory", 90),
    "true_sizes": ("parity.true_sizes", 90),
    "true_model": ("parity.true_model", 90),
    "kernels_ptx": ("parity.kernels_from_ptx", 120),
    "kernels_turing": ("parity.kernels_of_turing", 120),
}
"""Name -> function in gpu_bench, and the seconds it may take."""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=" ".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json", help="where the JSON goes (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of all sections (%(default)s)")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        return _section(options.section, options.out)

    end, found = time.monotonic() + 60 * options.minutes, {}
    for name in options.only or SECTIONS:
        found[name] = _run(name, min(SECTIONS[name][1], end - time.monotonic()))
        print(f"[{name}: {found[name]['status']}, {found[name]['wall']:.0f} s]", flush=True)
        options.out.write_text(json.dumps({"date": str(date.today()), "sections": found}, indent=1))
    report = {"date": str(date.today()), "gpu": found.get("setup", {}).get("gpu"), "sections": found}
    report["bars"] = _bars(found)
    options.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return 0 if all(s["status"] == "ok" for s in found.values()) else 1


def _run(name: str, limit: float) -> dict:
    """A section in a process of its own: what it returned, with `status` ok, failed, timeout or skipped."""
    if limit < 5:
        return {"status": "skipped", "wall": 0.0}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, str(HERE / "gpu.py"), "--section", name, "--out", str(out)]
        try:
            code = subprocess.run(command, timeout=limit, check=False).returncode
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        result = json.loads(out.read_text()) if out.exists() else {}
    if result.get("failures") or result.get("error"):
        status = "failed"
    return {"status": status, "wall": time.monotonic() - begin, **result}


def _section(name: str, out: Path) -> int:
    module, function = SECTIONS[name][0].split(".")
    try:
        result = getattr(importlib.import_module(f"gpu_bench.{module}"), function)()
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(result))
    sys.stdout.flush()
    # memory that is returned piece by piece at exit can take long, and after a fault on the device it fails
    os._exit(1 if "error" in result else 0)


def _bars(found: dict) -> list[dict]:
    """The promises, each with what was found; `met` is None where it was not measured."""
    from gpu_bench.bars import bars, show

    rows = bars(found)
    show(rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
