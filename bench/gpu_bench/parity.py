"""Correctness: every operation against the reference, golden checkpoints, and the true sizes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpu_bench import common
from gpu_bench.common import table
from qvl_kernels.gpu import CudaOps, signatures
from qvl_kernels.gpu.bundle import Bundle
from qvl_kernels.ops import DeviceError, Norm
from qvl_kernels.reference import ReferenceOps

TESTS = Path(__file__).parents[2] / "tests"
GOLDEN = TESTS / "golden"

TRUE_SHAPES = ((12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008), (8192, 1664), (1664, 8192), (1664, 588))
"""Weights of Qwen-VL: decoder, then ViT."""

GATE_SHAPE, PROMPT = (11008, 4096), 2000

TRUE_LIMIT = 2e-3
"""Relative error of a product in fp16 with float32 sums."""


def kernels() -> dict:
    """tests/test_gpu_kernels.py, every kernel against the reference, with launches on this GPU."""
    return _kernels(common.make_ops())


def kernels_from_ptx() -> dict:
    """The same with the PTX for GPUs without a cubin."""
    return _kernels(_with_ptx(80))


def kernels_of_turing() -> dict:
    """The same with the code for sm_75, whose products are implemented differently."""
    return _kernels(_with_ptx(75))


def _with_ptx(architecture: int) -> CudaOps:
    ops = common.make_ops()
    ops.launch.images = Bundle(ops.launch.images.path, architecture, "ptx")
    if not len(ops.launch.images):
        raise DeviceError(
            f"{ops.launch.images.path} has no code for sm_{architecture}: python -m qvl_kernels.gpu.build"
        )
    return ops


def _kernels(ops: CudaOps) -> dict:
    sys.path.insert(0, str(TESTS))
    import gpu_kernels
    import pytest

    ran, failures, passed = set(), [], []

    def launch(name: str, grid: tuple[int, ...], *args: object, reached: Sequence[np.ndarray] = ()) -> None:
        ran.add(name)
        arrays: dict = {}  # an array that is passed twice must be one array on the device, too

        def upload(value: object) -> object:
            if not isinstance(value, np.ndarray):
                return value
            if value.dtype == np.int64:  # addresses here, of arrays there
                there = [places.get(address, address) for address in value.reshape(-1).tolist()]
                return ops.upload(np.array(there).reshape(value.shape))
            return arrays.setdefault((value.ctypes.data, value.nbytes), (value, ops.upload(value)))[1]

        places = {array.ctypes.data: upload(array).address for array in reached}
        ops.launch(name, grid, *map(upload, args))
        for value, array in arrays.values():
            result = ops.download(array)
            if result.tobytes() != value.tobytes():
                value[...] = result

    class Report:
        def pytest_runtest_logreport(self, report) -> None:
            if report.failed:
                failures.append([report.nodeid.rpartition("::")[2], report.longreprtext.splitlines()[-1][:200]])
            elif report.when == "call":
                passed.append(report.nodeid)

    # the tests take both from here: this GPU's kernels, which have its tiles
    gpu_kernels.launch, gpu_kernels.images = launch, ops.launch.images
    options = ["-q", "--tb=line", "--maxfail=40", "-p", "no:cacheprovider", "-p", "no:warnings"]
    files = [str(TESTS / f"test_gpu_{part}.py") for part in ("products", "kernels", "attention")]
    pytest.main([*options, *files], plugins=[Report()])
    missing = sorted(set(signatures.names(ops.launch.images.architecture)) - ran)
    print(f"{len(passed)} passed, {len(failures)} failed, {len(ran)} kernels ran; not reached: {missing or 'none'}")
    return {"passed": len(passed), "failures": failures, "not_reached": missing}


def operations() -> dict:
    """Every case of the table in tests/test_ops.py, within its limits for this backend."""
    sys.path.insert(0, str(TESTS))
    import test_ops

    ops, failures, worst = common.make_ops(), [], {}
    limits = test_ops.LIMITS["cuda"]
    cases = [i for i, case in enumerate(test_ops.CASES) if "-w3g" not in case.label and case.label != "tied-w3"]
    for index in cases:  # the GPU kernels have no 3-bit weights
        case = test_ops.CASES[index]
        got, want = test_ops.run(ops, case), test_ops.truth(index)
        error = float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
        worst[case.limit] = max(worst.get(case.limit, 0.0), error)
        if not error <= limits[case.limit]:
            failures.append([case.label, error])
    caches = [k for k in test_ops.CACHES if k[0] != "fp32"]  # not supported by the GPU kernels
    checks = [lambda k=k: test_ops.test_cache(ops, *k) for k in caches]
    for check in [*checks, lambda: test_ops.test_capture_repeats_a_step_on_new_values(ops)]:
        try:
            check()
        except AssertionError as e:
            failures.append([getattr(check, "__defaults__", None) or "capture", str(e)[:200]])
    table(
        "Operations: largest relative error",
        ("limit", "allowed", "found"),
        [(k, limits[k], v) for k, v in worst.items()],
    )
    for failure in failures:
        print("  FAILED", *failure)
    return {"cases": len(cases) + len(checks) + 1, "failures": failures, "worst": worst}


def true_sizes() -> dict:
    """Products of the true shapes by few and many rows, and attention over a long past."""
    ops, reference, rng = common.make_ops(), ReferenceOps(), np.random.default_rng(0)
    rows = []
    for n, k in TRUE_SHAPES:
        for bits in (4, 8, 16):
            w = common.matrix(n, k, bits)
            dense, device = w.dequantize(), ops.weight(w)
            for m in (1, 16, 300):
                x = rng.standard_normal((m, k)).astype(np.float16)
                out = ops.empty((m, n))
                ops.write(out, np.full((m, n), np.nan, np.float32))
                ops.linear(ops.upload(x), device, out=out)
                want = x.astype(np.float32) @ dense.T
                rows.append([f"int{bits} {n}x{k} m={m}", _relative(ops.download(out), want)])
    rows += _gate_up(ops, reference, rng)
    rows += _long_attention(ops, reference, rng)
    table("True shapes: relative error", ("product", "error"), rows)
    failures = [row for row in rows if not row[1] <= TRUE_LIMIT]
    return {"failures": failures, "worst": max(row[1] for row in rows)}


def _gate_up(ops, reference, rng) -> list:
    n, k = GATE_SHAPE
    rows, weight, w = [], np.ones(k, np.float32), common.matrix(n, k, 4)
    for m in (1, 300):
        x, want = rng.standard_normal((m, k)).astype(np.float32), np.empty((m, n), np.float32)
        reference.gate_up(x, w, w, out=want, norm=Norm(weight, None, 1e-6))
        out = ops.empty((m, n), np.float16)
        ops.gate_up(ops.upload(x), ops.weight(w), ops.weight(w), out=out, norm=Norm(ops.upload(weight), None, 1e-6))
        rows.append([f"gate_up {n}x{k} m={m}", _relative(ops.download(out).astype(np.float32), want)])
    return rows


def _long_attention(ops, reference, rng) -> list:
    """A prompt of 2000 tokens, then steps, on caches of both kinds; and the ViT's attention."""
    rows, heads, d, length = [], 4, 128, PROMPT
    angles = np.outer(np.arange(4096), 1 / 10000 ** (np.arange(0, d, 2) / d))
    rope, logn = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32), np.ones(4096, np.float32)
    steps = [rng.standard_normal((t, 3 * heads * d)).astype(np.float16) for t in (length, 1, 1)]
    for kind in ("fp16", "int8"):
        results = []
        for backend in (reference, ops):
            cache, position, seen = backend.kv_cache(1, heads, d, 4096, kind), 0, []
            for step in steps:
                qkv = backend.upload(step.astype(backend.activation_dtype))
                start = backend.upload(np.array([position], np.int32))
                out = backend.empty((len(step), heads * d), backend.activation_dtype)
                backend.rope_append(
                    qkv, rope=backend.upload(rope), logn=backend.upload(logn), cache=cache, layer=0, start=start
                )
                backend.cached_attention(qkv, cache, 0, start, out=out)
                seen.append(backend.download(out).astype(np.float32))
                position += len(step)
            results.append(seen)
        names = (f"{kind} cache, {length} tokens", f"{kind} cache, step", f"{kind} cache, next step")
        rows += [[name, _relative(got, want)] for name, want, got in zip(names, *results)]
    qkv = rng.standard_normal((1024, 16 * 3 * 104)).astype(np.float16)
    want, out = np.empty((1024, 1664), np.float32), ops.empty((1024, 1664), np.float16)
    reference.vision_attention(qkv.astype(np.float32), 16, out=want)
    ops.vision_attention(ops.upload(qkv), 16, out=out)
    return [*rows, ["ViT attention 1024 x 16 x 104", _relative(ops.download(out).astype(np.float32), want)]]


def true_model() -> dict:
    """Two layers of the decoder and of the ViT at their true width, against the reference."""
    from qvl_runtime.engine.scoring import score
    from qvl_runtime.families.qwen_vl.adapter import Adapter
    from qvl_runtime.families.qwen_vl.vision import VisionTower
    from qvl_runtime.inputs.prompt import Prompt

    config, ids, found = common.true_config(1, 1), list(range(100, 120)), {}
    for name, ops in (("reference", ReferenceOps()), ("cuda", common.make_ops())):
        weights = common.synthetic(ops, config, common.BITS | {"head": 4, "embedding": 4})
        features = Adapter(weights)(VisionTower(weights)(common.pixels(config)))
        logits = score(common.decoder(weights), Prompt(ids, []), [])
        found[name] = (ops.download(features), logits)
    errors = [_relative(got, want) for got, want in zip(found["cuda"], found["reference"])]
    rows = list(zip(("picture features", "logits"), errors))
    table("One layer of the true width: relative error", ("", "error"), rows)
    return {"features": errors[0], "logits": errors[1], "failures": [row for row in rows if not row[1] <= 5e-3]}


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def golden() -> dict:
    """The golden checkpoints through the public API: logits, greedy ids, picture features."""
    sys.path.insert(0, str(TESTS))
    import test_golden_model

    import qvl_runtime as qvl
    from qvl_convert.convert import convert

    rows = []
    os.chdir(GOLDEN)
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def model(name: str, variant: str, bits: int, device: str = "cuda"):
            path = Path(folder) / f"{name}-{variant}-{bits}.qvl"
            if not path.exists():
                convert(_checkpoint(name, variant, Path(folder)), path, bits=bits, vision_bits=16, head_bits=16)
            return qvl.load(path, device=device)

        for index in ("lm/index.json", "lm/index_gptq.json"):
            for case in _cases(index):
                for bits in (16, 4) if "gptq" in index else (16,):
                    m = model(case["ckpt"], case["variant"], bits)
                    rows.append(_language(test_golden_model, m, case, bits))
        for case in _cases("vis/index.json"):
            at = case["ckpt"], case["variant"], 16
            rows.append(_vision(model(*at), model(*at, device="reference"), case))
    return _compared("Golden checkpoints", rows)


def families() -> dict:
    """The golden checkpoints of the newer families through the public API: logits, and greedy ids that are sure."""
    sys.path.insert(0, str(TESTS))
    import families as golden

    import qvl_runtime as qvl
    from qvl_convert.convert import convert

    rows, cases = [], golden.read("lm/index.json")
    os.chdir(golden.GOLDEN)
    with tempfile.TemporaryDirectory() as folder:
        for name in golden.CHECKPOINTS:
            path = Path(folder) / f"{name}.qvl"
            convert(golden.GOLDEN / "ckpt" / name, path, bits=16)
            model = qvl.load(path, device="cuda")
            for case in (c for c in cases if c["ckpt"] == name):
                expected, allowed = np.load(case["file"]), 1.5 * case["logits_drift"]["fp16"]
                logits = model.logits(expected["ids"], case["images"])
                error = float(np.abs(logits[expected["pos"]] - expected["logits"]).max())
                same = "-"
                if case["min_gap"] > 2 * error:
                    answers = _answers(model, expected["ids"], case["images"], expected["gen_ids"].tolist())
                    same = "same" if answers else "differ"
                rows.append([f"{name} {case['case']}", error, allowed, same])
    return _compared("Golden checkpoints of the newer families", rows)


def _compared(what: str, rows: list[list]) -> dict:
    """Print name, error, limit and whether greedy ids differ, of each row; return a summary with the failures."""
    failures = [row for row in rows if not row[1] <= row[2] or row[3] == "differ"]
    table(f"{what}: largest error", ("case", "found", "allowed", "greedy ids"), rows)
    return {"cases": len(rows), "failures": failures, "worst": max(row[1] / row[2] for row in rows)}


def _answers(model, ids, images, wanted: list[int]) -> bool:
    """Whether greedy generation gives these ids, up to the first that ends an answer."""
    stops = [i for i, token in enumerate(wanted) if token in model.stop_ids]
    got = model.generate(ids, images, max_new_tokens=len(wanted)).token_ids
    return got == wanted[: stops[0] if stops else None]


def _cases(index: str) -> list[dict]:
    return json.loads((GOLDEN / index).read_text())["cases"]


def _checkpoint(name: str, variant: str, folder: Path) -> Path:
    """A golden checkpoint with the config values of a variant."""
    source, overrides = GOLDEN / "ckpt" / name, json.loads((GOLDEN / "ckpt" / "variants.json").read_text())[variant]
    target = folder / f"{name}-{variant}"
    if not target.exists():
        shutil.copytree(source, target)
        config = json.loads((source / "config.json").read_text())
        for key, value in overrides.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (target / "config.json").write_text(json.dumps(config))
    return target


FP16_LOGITS = 0.025
"""Change of the published code's results when it runs in fp16 (tests/golden/README.md)."""


def _language(tests, model, case: dict, bits: int) -> list:
    error, same, checked = 0.0, True, False
    for ids, expected in tests._rows(case):
        images = tests._images(ids, model.config)
        logits = model.logits(ids, images)
        error = max(error, float(np.abs(logits[expected["logits_at"]] - expected["logits"]).max()))
        if "gen_ids" in expected:
            unsure = np.flatnonzero(expected["gen_gap"] < 2 * error)
            count = int(unsure[0]) if len(unsure) else len(expected["gen_ids"])
            answers = _answers(model, ids, images, expected["gen_ids"][:count].tolist())
            same, checked = same and answers, True
    return [f"{case['file'][:-4]} int{bits}", error, FP16_LOGITS, ("same" if same else "differ") if checked else "-"]


def _vision(model, reference, case: dict) -> list:
    """Beside the reference backend here: a build of Pillow may resize a picture otherwise than the golden data's."""
    error = max(float(np.abs(model.encode_image(i) - reference.encode_image(i)).max()) for i in case["images"])
    return [case["file"][:-4], error, 1.5 * case["noise"]["original_in_fp16_vs_fp32"], "-"]
