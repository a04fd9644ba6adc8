"""Plans the format of each matrix, and converts single matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from qvl_convert import published, rtn
from qvl_convert.checkpoint import FLOATS, Checkpoint
from qvl_convert.imports import Imported
from qvl_convert.layouts import find_layout
from qvl_convert.writer import Layout
from qvl_kernels.packing import BLOCK, GROUP_SIZES, Matrix, group_sizes, packed_shapes
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import MatrixSpec

METHODS = ("rtn", "gptq")
BITS = (3, 4, 8, 16)
NO_HALF = "holds a weight that is not finite or beyond fp16's range; use --bits 8, 4 or 3"
ROW_CHUNK = 16 << 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Quantization settings of a model.

    Attributes
    ----------
    bits, vision_bits, head_bits : int
        3, 4, 8 or 16: for the decoder's linear layers; for ViT and adapter; for embedding and output head.
    group_size : int
        Columns per scale: 32 (not with 3 bits), 64 or 128.
    method : str
        "rtn" or "gptq": for the decoder's linear layers, and other matrices of 3 or 4 bits except the
        embedding.
    """

    bits: int = 4
    group_size: int = 128
    vision_bits: int = 8
    head_bits: int = 8
    method: str = "rtn"

    def __post_init__(self) -> None:
        for name in ("bits", "vision_bits", "head_bits"):
            if getattr(self, name) not in BITS:
                raise QvlError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: choose 3, 4, 8 or 16")
        if self.group_size not in GROUP_SIZES:
            raise QvlError(f"--group-size {self.group_size!r}: choose 32, 64 or 128")
        if 3 in (self.bits, self.vision_bits, self.head_bits) and self.group_size not in group_sizes(3):
            raise QvlError(f"--group-size {self.group_size!r}: with 3 bits choose 64 or 128")
        if self.method not in METHODS:
            raise QvlError(f"--method {self.method!r}: choose rtn or gptq")

    def bits_of(self, part: str) -> int:
        """Return the bits of a part (a key of `qvl_runtime.families.specs.PARTS`)."""
        return {"decoder": self.bits, "vision": self.vision_bits, "adapter": self.vision_bits}.get(part, self.head_bits)


@dataclasses.dataclass(frozen=True)
class MatrixPlan:
    """The format of a matrix in the file.

    Attributes
    ----------
    method : str
        "fp16", "rtn", "gptq", or the layout of the import: "autogptq" or "awq".
    zeros, perm, bias : bool
        Whether the matrix has these arrays.
    """

    spec: MatrixSpec
    bits: int
    group_size: int
    method: str
    bias: bool
    zeros: bool = False
    perm: bool = False

    def layout(self) -> Layout:
        """Return shapes and dtypes of the arrays by name in the file."""
        spec = self.spec
        arrays = packed_shapes(spec.n, spec.k, self.bits, self.group_size, zeros=self.zeros)
        if self.perm:
            arrays["perm"] = ((spec.k,), np.dtype(np.int32))
        if self.bias:
            arrays["bias"] = ((spec.n,), np.dtype(np.float32))
        return {f"{spec.name}.{suffix}": value for suffix, value in arrays.items()}

    def matrix(self, arrays: dict[str, np.ndarray]) -> Matrix:
        """Create the matrix from its arrays, by the last part of their names."""
        spec, weight = self.spec, arrays["weight" if self.bits == 16 else "qweight"]
        rest = {suffix: arrays.get(suffix) for suffix in ("scales", "zeros", "perm", "bias")}
        return Matrix(spec.n, spec.k, self.bits, self.group_size, weight, **rest)


Finished = Callable[[MatrixPlan], Matrix]
"""Reads a finished matrix from the file."""


class Source:
    """A checkpoint whose tensors match its config.

    Attributes
    ----------
    checkpoint : Checkpoint
    imported : set of str
        Names of the already quantized matrices.
    specs : list of TensorSpec
        All tensors of the model.

    Raises
    ------
    QvlError
        If a tensor is missing or has another shape, or the layout is unknown.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.specs = list(checkpoint.family.tensors(checkpoint.config))
        matrices = [spec for spec in self.specs if isinstance(spec, MatrixSpec)]
        layout = find_layout(checkpoint)
        if layout is None:
            packed = next((name for name in checkpoint.names if name.endswith(".qweight")), None)
            if packed is not None:
                raise QvlError(
                    f"{checkpoint.path(packed)}: {packed!r} is quantized, but there is no quantize_config.json "
                    "that says how; finish the download"
                )
        self._imported = None if layout is None else Imported(checkpoint, layout, matrices)
        self.imported = set() if self._imported is None else set(self._imported.specs)
        unquantized = [spec for spec in self.specs if spec.name not in self.imported]
        shapes = published.published_shapes(unquantized)
        wanted = {name: (shape, FLOATS) for name, shape in shapes.items()}
        checkpoint.check(wanted | ({} if self._imported is None else self._imported.wanted()))

    def plan(self, recipe: Recipe, bits: Mapping[str, int] | None = None) -> list[MatrixPlan]:
        """Plan every matrix, in the model's order of use.

        Parameters
        ----------
        recipe : Recipe
        bits : mapping, optional
            Bits of single matrices by name, which override the recipe.

        Raises
        ------
        QvlError
            If a quantized source would need other bits.
        """
        specs = [spec for spec in self.specs if isinstance(spec, MatrixSpec)]
        return [self._plan(spec, recipe, (bits or {}).get(spec.name, recipe.bits_of(spec.part))) for spec in specs]

    def _plan(self, spec: MatrixSpec, recipe: Recipe, bits: int) -> MatrixPlan:
        if self._imported is not None and spec.name in self.imported:
            return self._plan_import(self._imported, spec, bits)
        if bits == 16:
            method = "fp16"
        else:
            # at 8 bits the error is too small for hours of calibration of the ViT or the head
            calibrated = spec.part == "decoder" or (bits < 8 and spec.part != "embedding")
            method = recipe.method if calibrated else "rtn"
        return MatrixPlan(spec, bits, BLOCK if bits == 16 else recipe.group_size, method, spec.bias)

    def _plan_import(self, imported: Imported, spec: MatrixSpec, bits: int) -> MatrixPlan:
        layout, bias = imported.layout, imported.has_bias(spec)
        if bits == 16:
            return MatrixPlan(spec, 16, BLOCK, layout.METHOD, bias)
        if bits != layout.bits:
            raise QvlError(
                f"{layout.path}: the model is quantized to {layout.bits} bits and cannot become {bits}; "
                f"use --bits {layout.bits} to keep it as it is, or --bits 16"
            )
        return MatrixPlan(
            spec,
            bits,
            imported.stored_group_size,
            layout.METHOD,
            bias,
            zeros=imported.zeros(spec) is not None,
            perm=imported.perm(spec) is not None,
        )

    def weight(self, spec: MatrixSpec) -> np.ndarray:
        """Return the published weight of an unquantized matrix: ``[n, k]``, in its dtype."""
        return published.matrix(self.checkpoint, spec)

    def bias(self, spec: MatrixSpec) -> np.ndarray | None:
        """Return the published bias of a matrix, float32 ``[n]``."""
        return published.bias(self.checkpoint, spec)

    def origin(self, spec: MatrixSpec) -> str:
        """Return file and name of the published weight of a matrix, for errors."""
        return self.checkpoint.origin(spec.source)

    def matrix(self, plan: MatrixPlan) -> Matrix:
        """Convert a single matrix: import it, round it to nearest, or store 16 bits.

        Raises
        ------
        QvlError
            If a weight is not finite or out of range.
        """
        spec = plan.spec
        if plan.method == "gptq":
            raise RuntimeError(f"{spec.name}: gptq looks at whole layers, not at one matrix")
        if self._imported is not None and spec.name in self.imported:
            matrix = self._imported.matrix(spec)
            return matrix if plan.bits != 16 else _at_16_bits(matrix, self._imported.origin(spec))
        weight, bias, name = self.weight(spec), self.bias(spec), self.origin(spec)
        if plan.bits == 16:
            half = to_half(weight, name)
            return Matrix(n=spec.n, k=spec.k, bits=16, group_size=BLOCK, weight=half, bias=bias)
        return rtn.quantize(weight, plan.bits, plan.group_size, bias=bias, name=name)


class Published:
    """A checkpoint with the interface of a blob: a matrix is converted whenever it is asked for.

    Parameters
    ----------
    source : Source
    plans : iterable of MatrixPlan, optional
        The format of each matrix, none by "gptq"; by default 16 bits.
    """

    def __init__(self, source: Source, plans: Iterable[MatrixPlan] | None = None):
        self.source, self.config = source, source.checkpoint.config
        plans = source.plan(Recipe(bits=16, vision_bits=16, head_bits=16)) if plans is None else plans
        self._plans = {plan.spec.name: plan for plan in plans}

    def matrix(self, name: str) -> Matrix:
        """Return a weight."""
        return self.source.matrix(self._plans[name])

    def vector(self, name: str) -> np.ndarray:
        """Return a float32 tensor."""
        return self.source.checkpoint.vector(name)


def to_half(weight: np.ndarray, name: str, problem: str = NO_HALF) -> np.ndarray:
    """Round a matrix to fp16, in slices of rows.

    Raises
    ------
    QvlError
        If a value is not finite or beyond fp16's range of 65504: `name`, then `problem`.
    """
    half = np.empty(weight.shape, np.float16)
    rows = max(1, ROW_CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        chunk = half[start : start + rows]
        with np.errstate(over="ignore", invalid="ignore"):
            chunk[:] = weight[start : start + rows]
        if not np.isfinite(chunk).all():
            raise QvlError(f"{name} {problem}")
    return half


def _at_16_bits(matrix: Matrix, name: str) -> Matrix:
    """Dequantize a weight to fp16 as the published code does."""
    problem = f"stands for a weight beyond fp16's range; use --bits {matrix.bits}"
    half = to_half(matrix.dequantize(), name, problem)
    return Matrix(n=matrix.n, k=matrix.k, bits=16, group_size=BLOCK, weight=half, bias=matrix.bias)
