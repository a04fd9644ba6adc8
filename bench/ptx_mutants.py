"""Mutation tests of the GPU kernels: apply single mistakes to their PTX and see whether the interpreter notices them.

    python bench/ptx_mutants.py [--architecture 80] [--most 6] [--only barrier] [--kernel decode_attention]

Every kernel of the list runs a case of its tests once as shipped and once for each mistake: a barrier, wait, commit or
fence removed, a wait for one group less, two parameters exchanged, an address shifted by one access, a guard dropped.
`--most` limits the places of each kind and kernel to a random sample with a fixed seed. A mistake is noticed if the
interpreter reports it or the result is wrong; places that no thread of the case reaches do not count. Survivors are
listed with their line. Needs Triton, and no GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import gpu_kernels
import ptx.launch
import test_gpu_attention as attention
import test_gpu_kernels as rows
import test_gpu_products as products
from fakes import ptx_gpu
from fakes.compiled import CompiledImages

STEPS = 200_000
"""Instructions of a group of blocks after which a mutant counts as an endless loop."""

CASES: dict[str, Callable[[np.random.Generator], object]] = {
    "linear.int4.rows8": lambda rng: [
        *(products.test_linear("int4", case, rng) for case in ("split", "one row, one group", "one row, fp16")),
        *(products.test_programs_prepare_a_lone_row("int4", case, rng) for case in products.LONE_CASES),
    ],
    "linear.int4.rows16": lambda rng: products.test_linear("int4", "gelu, residual", rng),
    "linear.int8.rows8": lambda rng: products.test_linear("int8", "split", rng),
    "linear.fp16.rows128": lambda rng: products.test_linear("fp16", "tile of 128, split", rng),
    "gate_up.int4.rows8": lambda rng: [
        products.test_gate_up(5, 65, 640, 8, 3, np.float32, False, True, rng),
        products.test_gate_up(1, 65, 1100, 8, 2, np.float16, True, True, rng),
        *(products.test_gate_up(1, 32, 128, 8, 1, dtype, False, False, rng) for dtype in (np.float16, np.float32)),
    ],
    "rope_append.int8": lambda rng: attention.test_rope_append(True, "norms", rng),
    "rotate.any": lambda rng: attention.test_rotation_of_patches(3, 2, 80, rng),
    "decode_attention.fp16.128": lambda rng: [
        attention.test_decode_attention(False, 1, 10, 2, 128, 2100, rng),
        attention.test_attention_of_a_token_rotates_and_appends_as_the_kernel_for_it(False, 8, 1, 128, 64, True, rng),
    ],
    "decode_attention.int8.any": lambda rng: attention.test_decode_attention(True, 5, 12, 2, 32, 600, rng),
    "cached_attention.fp16.128": lambda rng: attention.test_cached_attention(False, 140, 1, 1, 128, 5, rng),
    "attention.104": lambda rng: attention.test_vision_attention("104", 104, 75, rng),
    "attention.any.segments": lambda rng: attention.test_vision_attention_within_segments(
        "any", 12, [0, 1, 1, 70, 75], rng
    ),
    "norm.4096": lambda rng: rows.test_norm(2, 4200, True, np.float16, rng),
    "gather.any": lambda rng: rows.test_gather_of_rows(rng),
    "argmax.any": lambda rng: rows.test_argmax(65, rng),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes
    ----------
    kind : str
    line : int
        Of the PTX, from 1 on.
    before, after : str
    """

    kind: str
    line: int
    before: str
    after: str


_REMOVED = {
    "barrier": r"bar(\.warp)?\.sync\b",
    "wait": r"(cp\.async|wgmma)\.wait_group\b",
    "commit": r"(cp\.async|wgmma)\.commit_group\b",
    "fence": r"(fence|membar|wgmma\.fence)\b",
}
_BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "u8": 1, "s8": 1, "u16": 2, "u32": 4}


def mutants(ptx_text: str) -> Iterator[Mutant]:
    """All mistakes of these kinds."""
    lines = ptx_text.split("\n")
    loads = [i for i, line in enumerate(lines) if "ld.param" in line]
    for i, line in enumerate(lines):
        code = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line)
        for kind, pattern in _REMOVED.items():
            if re.match(pattern, code):
                yield Mutant(kind, i + 1, line, "")
        if found := re.match(r"(?:cp\.async|wgmma)\.wait_group\S*\s+(\d+)", code):
            more = line[::-1].replace(found[1][::-1], str(int(found[1]) + 1)[::-1], 1)[::-1]
            yield Mutant("weaker wait", i + 1, line, more)
        if ".acq_rel" in code:
            yield Mutant("fence", i + 1, line, line.replace(".acq_rel", ".relaxed"))
        if re.match(r"\s*@!?%p\d+\s+(?!bra)", line):
            yield Mutant("guard", i + 1, line, re.sub(r"@!?%p\d+\s+", "", line))
        if shifted := _shifted(line, code):
            yield Mutant("address", i + 1, line, shifted)
    for first, second in itertools.pairwise(loads):
        if _width(lines[first]) == _width(lines[second]) and _name(lines[first]) != _name(lines[second]):
            swapped = lines[first].replace(_name(lines[first]), _name(lines[second]))
            yield Mutant("parameter", first + 1, lines[first], swapped)


def _shifted(line: str, code: str) -> str | None:
    """The same access one element further on."""
    access = re.match(r"(?:ld|st)\.(?:global|shared)\S*?(?:\.v(\d))?\.([bfsu]\d+)\s", code)
    step = int(access[1] or 1) * _BYTES[access[2]] if access else 0
    if copied := re.match(r"cp\.async\.c[ag]\S* .*\], (0x[0-9a-f]+)", code):
        step = int(copied[1], 16)
    place = re.search(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", line)
    if not step or not place:
        return None
    return f"{line[: place.start()]}[{place[1]}+{int(place[2] or 0) + step}]{line[place.end() :]}"


def _width(line: str) -> str:
    return re.search(r"ld\.param\.(\S+)", line)[1]


def _name(line: str) -> str:
    return re.search(r"\[(\w+)", line)[1]


def _with(text: str, line: int, code: str) -> str:
    lines = text.split("\n")
    lines[line - 1] = code
    return "\n".join(lines)


def _fault(line: str) -> str:
    """An invalid access in place of a line: noticed if any thread reaches it."""
    return re.match(r"\s*(?:@!?%p\d+\s+)?", line)[0] + "st.global.b32 [0], 0;"


class Mutated(CompiledImages):
    """The kernels, one of them with a different text."""

    def put(self, name: str, text: str) -> None:
        self[name] = dataclasses.replace(self[name], code=text.encode())


def noticed(images: Mutated, name: str, text: str) -> str | None:
    """The error of a kernel's case with a text in place of its code; None if it passes."""
    images.put(name, text)
    ptx_gpu._kernel.cache_clear()
    try:
        CASES[name](np.random.default_rng(20231001))
    except AssertionError:
        return "wrong result"
    except Exception as error:  # PtxError, and numpy's errors on invalid values
        return f"{type(error).__name__}: {error}"
    return None


def test(name: str, architecture: int, most: int, kinds: set[str]) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """Numbers noticed and planted by kind, and the survivors, of one kernel."""
    images = Mutated(architecture)
    gpu_kernels.images = images
    original = images[name].code.decode()
    if said := noticed(images, name, original):
        raise SystemExit(f"{name}: the kernel as it ships fails: {said}")
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in mutants(original):
        if not kinds or mutant.kind in kinds:
            by_kind.setdefault(mutant.kind, []).append(mutant)
    rng = np.random.default_rng(zlib.crc32(f"{name} {architecture}".encode()))
    counts, survivors = {}, []
    for kind, planted in by_kind.items():
        chosen = rng.permutation(len(planted))[:most] if most else range(len(planted))
        caught = idle = 0
        for i in sorted(chosen):
            mutant = planted[i]
            if noticed(images, name, _with(original, mutant.line, mutant.after)):
                caught += 1
            elif not noticed(images, name, _with(original, mutant.line, _fault(mutant.before))):
                idle += 1
            else:
                found = {"kernel": name, "kind": kind, "line": mutant.line, "was": " ".join(mutant.before.split())}
                survivors.append(found | {"is": " ".join(mutant.after.split())})
                print(f"  survives: {found}", flush=True)
        counts[kind] = [caught, len(chosen) - idle, len(planted)]
    return counts, survivors


def main() -> None:
    """The command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--architecture", type=int, default=80)
    parser.add_argument("--most", type=int, default=0, help="places for each kind and kernel; 0 (default): all")
    parser.add_argument("--only", action="append", default=[], help="this kind of mistake; may be repeated")
    parser.add_argument("--kernel", action="append", default=[], help="kernels that begin like this; may be repeated")
    options = parser.parse_args()
    ptx.launch.MOST_STEPS = STEPS
    found: dict[str, dict[str, list[int]]] = {}
    survivors: list[dict[str, Any]] = []
    for name in CASES:
        if not options.kernel or name.startswith(tuple(options.kernel)):
            found[name], left = test(name, options.architecture, options.most, set(options.only))
            survivors += left
            print(f"{name}: {found[name]}", flush=True)
    print("\n| mistake | noticed | planted | places |\n|---|---|---|---|")
    for kind in dict.fromkeys(kind for counts in found.values() for kind in counts):
        sums = [sum(counts.get(kind, [0, 0, 0])[i] for counts in found.values()) for i in range(3)]
        print(f"| {kind} | {sums[0]} | {sums[1]} | {sums[2]} |")
    harness.print_document(architecture=options.architecture, kernels=found, survivors=survivors)


if __name__ == "__main__":
    main()
