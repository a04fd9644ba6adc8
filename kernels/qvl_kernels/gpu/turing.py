"""Tensor cores on sm_75, which Triton's compiler does not use from version 3.3 on.

The optimizer runs for sm_80 and emits mma.m16n8k16 to the PTX; the code generator runs for sm_75. Each of these
instructions is then replaced by two m16n8k8, which Turing supports. The halves of k of the operands are in separate
registers (PTX ISA, "Matrix fragments for mma.m16n8k16"), so that only registers are regrouped. There is no asynchronous
copy on sm_75: `num_stages` must be 1.
"""

from __future__ import annotations

import re
from typing import Any

_MMA = re.compile(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32\s+"
    r"(\{[^}]*\}),\s*\{([^}]*)\},\s*\{([^}]*)\},\s*(\{[^}]*\});"
)
_HALF_MMA = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"


def split_mma(ptx: str) -> str:
    """Replace every m16n8k16 product of PTX by two of m16n8k8."""

    def halves(match: re.Match) -> str:
        out, a, b, acc = match[1], *(re.split(r"\s*,\s*", match[i].strip()) for i in (2, 3)), match[4]
        return (
            f"{_HALF_MMA} {out}, {{ {a[0]}, {a[1]} }}, {{ {b[0]} }}, {acc};\n\t"
            f"{_HALF_MMA} {out}, {{ {a[2]}, {a[3]} }}, {{ {b[1]} }}, {out};"
        )

    return _MMA.sub(halves, ptx)


def stages(
    backend: Any, stages: dict | None = None, options: Any = None, language: Any = None, capability: int | None = None
) -> tuple[str, str] | None:
    """Triton's hook for the stages of a compilation; without `stages` it returns the key and hash for the cache."""
    if stages is None:
        return "turing-mma", "turing-mma-1"
    stages["ttgir"] = lambda source, metadata: backend.make_ttgir(source, metadata, options, 80)
    stages["ptx"] = lambda source, metadata: split_mma(backend.make_ptx(source, metadata, options, 75))
    return None
