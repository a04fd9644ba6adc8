"""Measure what few bits cost the demo model: `qvl verify` on conversations about its pictures.

    python bench/demo_fidelity.py [--bits 4 3] [--level all] [--count 4] [--folder CHECKPOINT]

Every part at int4, or at these bits, in groups of 128, by GPTQ and by rounding to nearest. GPTQ calibrates on
conversations of the same kind with another seed. Both print Chinese at every level, for the skill "read hanzi": install
Debian's fonts-wqy-microhei. A table, then one JSON document as the last line.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import harness
from demo_tasks import check_level
from skills import SKILLS, calibrated, prints_hanzi, write_conversations

import qvl_runtime as qvl
from qvl_convert import calibration
from qvl_convert.convert import convert
from qvl_convert.verify import open_reference, verify
from qvl_runtime.cli.verify import text
from qvl_runtime.demo import checkpoint_folder
from training.lexicon import LEVELS

TEST_SEED = 50_000


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder())
    parser.add_argument("--level", choices=LEVELS, default="all", help="how hard the pictures are")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--count", type=int, default=4, help="conversations for each skill and language")
    args = parser.parse_args()
    check_level(parser, args.level, prints_hanzi(SKILLS, []))
    reports = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        fresh = write_conversations(scratch / "fresh", TEST_SEED, args.count, args.level)
        recipes = {"GPTQ": calibrated(scratch / "known", args.level), "nearest": {}}
        for bits, (method, recipe) in itertools.product(args.bits, recipes.items()):
            name, every = f"{method}, {bits} bits", {"bits": bits, "vision_bits": bits, "head_bits": bits}
            convert(args.folder, blob := scratch / f"{name}.qvl", **every, **recipe)
            model = qvl.load(blob, "cpu", activations="int16")
            samples = calibration.load(fresh, model, count=2 * len(SKILLS) * args.count)
            reports[name] = verify(model, open_reference(args.folder), samples)
    for name, report in reports.items():
        print(f"{name}: {text(report)}")
    documents = {name: report.to_dict() for name, report in reports.items()}
    for document in documents.values():
        del document["layers"], document["kl_by_position"]
    harness.print_document(bench="demo_fidelity", level=args.level, count=args.count, reports=documents)


if __name__ == "__main__":
    main()
