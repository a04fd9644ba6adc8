"""Score the demo model at several precisions with `qvl eval`, on the tasks that `demo_tasks.py` writes.

    python bench/demo_eval.py --count 100

One task of each kind: captions (CIDEr), questions (VQA accuracy), reading (ANLS), phrases (IoU). A table with the
intervals of the differences from fp16, then one JSON document as the last line.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import demo_tasks
import harness
from skills import columns, prints_hanzi

from qvl_runtime.evaluation.evaluate import evaluate
from training.lexicon import LEVELS

KINDS = ("fp16", "int8", "int4", "int4 all RTN", "int4 all GPTQ")


def run(folder: Path, count: int, seed: int, level: str, kinds: list[str], device: str) -> dict[str, dict]:
    """The document of every task."""
    demo_tasks.write(folder / "data", count, seed, level)
    models = [blob for _, blob in columns([], kinds, level, folder)]
    return {
        task: evaluate(
            models,
            task,
            folder / "data",
            out=folder / "answers" / task,
            prompts=demo_tasks.PROMPTS,
            device=device,
        ).document
        for task in demo_tasks.TASKS
    }


def table(documents: dict[str, dict]) -> str:
    """Rows of tasks, columns of models."""
    names = [model["name"] for model in next(iter(documents.values()))["models"]]
    lines = ["| task | metric | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for task, document in documents.items():
        cells = []
        for model in document["models"]:
            text = f"{model['score']:.1f}"
            if model["difference"] is not None:
                low, high = model["difference_interval"]
                text += f" ({low:+.1f} to {high:+.1f})"
            cells.append(text)
        lines.append(f"| {task} | {document['metric']} | " + " | ".join(cells) + " |")
    by_model = list(zip(*(document["models"] for document in documents.values())))
    for name, cell in (
        ("time", lambda tasks: f"{sum(task['seconds'] for task in tasks):.0f} s"),
        ("memory", lambda tasks: f"{max(task['peak_memory'] or 0 for task in tasks) / 1e6:.0f} MB"),
        ("file", lambda tasks: f"{tasks[0]['size'] / 1e6:.1f} MB"),
    ):
        lines.append(f"| {name} | | " + " | ".join(map(cell, by_model)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--count", type=int, default=100, help="questions of every task")
    parser.add_argument("--seed", type=int, default=60_000)
    parser.add_argument("--level", choices=LEVELS, default="all", help="how hard the pictures are")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="keep files and answers here, and resume from them")
    args = parser.parse_args()
    demo_tasks.check_level(parser, args.level, prints_hanzi([], args.kinds))
    with tempfile.TemporaryDirectory() as folder:
        kept = args.folder or Path(folder)
        documents = run(kept, args.count, args.seed, args.level, args.kinds, args.device)
    print(f"{args.count} questions a task; in brackets the 95% interval of the difference from {args.kinds[0]}")
    print(table(documents))
    harness.print_document(bench="demo_eval", count=args.count, seed=args.seed, tasks=documents)


if __name__ == "__main__":
    main()
