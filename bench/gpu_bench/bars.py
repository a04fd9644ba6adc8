"""Required results of the GPU backend compared with measured ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_bench.common import table


def bars(found: dict[str, dict]) -> list[dict]:
    """One entry for each requirement: `what`, `found` (the worst of its figures), `bar`, and whether it is `met`."""
    rows: list[dict] = []

    def bar(what: str, limit: float, figures: Callable[[], list[float | None]], below: bool = False) -> None:
        try:
            values = [value for value in figures() if value is not None]
        except (KeyError, TypeError):
            values = []
        worst: Any = (max if below else min)(values) if values else None
        met = None if worst is None else (worst <= limit if below else worst >= limit)
        rows.append({"what": what, "found": worst, "bar": ("<= " if below else ">= ") + f"{limit:g}", "met": met})

    def section(name: str) -> dict:
        return found[name]

    def fours(key: str) -> list[float | None]:
        return [row[key] for name, row in section("matvec")["rows"].items() if "int4" in name or "gate" in name]

    def newer() -> list[float | None]:
        return [row["share"] for row in section("newer").values() if isinstance(row, dict)]

    def rows_of(m: int) -> list[float | None]:
        return [row["faster"] for name, row in section("matmul")["rows"].items() if name.startswith(f"m={m} ")]

    for name in ("kernels", "operations", "true_sizes", "golden", "families", "true_model"):
        bar(f"{name}: failures", 0, lambda name=name: [len(section(name)["failures"])], below=True)
    bar("int4 matrix-vector: share of the copy bandwidth", 0.8, lambda: fours("of_copy"))
    bar("int4 matrix-vector: times torch int4", 1.3, lambda: fours("faster"))
    for m, limit in ((16, 2.5), (256, 0.9), (1024, 0.8)):
        bar(f"int4 product, {m} rows: times torch fp16", limit, lambda m=m: rows_of(m))
    for name in ("prefill 2048 x 32 x 128", "ViT 1024 x 16 x 104"):
        bar(f"{name}: times torch SDPA", 0.8, lambda name=name: [section("attention")["rows"][name]["faster"]])
    for length in (512, 8000):
        bar(
            f"decode, {length} tokens of context: share of the limit",
            0.6,
            lambda length=length: [section("decode")[f"{kind} {length}"]["share"] for kind in ("fp16", "int8")],
        )
    bar("decode of newer models: share of the limit", 0.6, newer)
    bar("picture (int8): of torch fp16's time", 1.2, lambda: [section("picture")["int8"]["times"]], below=True)
    for name, limit in (("picture + 2048 tokens", 7.5e9), ("8192 tokens, int8 cache", 8e9)):
        settings = "smallest"
        bar(
            f"memory, {settings}: {name}",
            limit,
            lambda name=name, settings=settings: [section("memory")[f"{settings}: {name}"]["in_use"]],
            below=True,
        )
    return rows


def show(rows: list[dict]) -> None:
    """Print the table."""
    verdicts = {True: "met", False: "MISSED", None: "not measured"}
    table("Bars", ("", "found", "bar", ""), [[r["what"], r["found"], r["bar"], verdicts[r["met"]]] for r in rows])
