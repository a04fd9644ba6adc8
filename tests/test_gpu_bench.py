"""bench/gpu.py without a GPU: every section runs to its end on the fake one, and the command line holds together."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fakes.gpu import FakeDriver, Images, choose

from qvl_kernels import gpu
from qvl_kernels.gpu import signatures
from qvl_kernels.gpu.ops import CudaOps
from qvl_runtime.families.qwen_vl.config import ModelConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rehearsal(monkeypatch):
    """The sections, on small shapes and a GPU that computes nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu_bench import common, model, parity, setup, speed

    config = ModelConfig.from_dict(json.loads((Path(__file__).parent / "golden/ckpt/tiny-vl/config.json").read_text()))
    vision = dataclasses.replace(config.visual, layers=1)
    small = dataclasses.replace(config, num_hidden_layers=1, max_position_embeddings=512, visual=vision)
    monkeypatch.setattr(common, "make_ops", lambda: CudaOps(FakeDriver(), Images()))
    monkeypatch.setattr(common, "true_config", lambda *layers: small)
    newer = json.loads((Path(__file__).parent / "golden/families/ckpt/q3-tied/config.json").read_text())
    monkeypatch.setattr(common, "newer_configs", lambda: {"tiny": newer})
    for module in (common, model, setup, speed):
        monkeypatch.setattr(module, "torch_or_none", lambda: None)
    monkeypatch.setattr(common, "BEYOND_CACHE", 1 << 20)
    monkeypatch.setattr(speed, "DECODER_SHAPES", ((256, 128),))
    monkeypatch.setattr(parity, "TRUE_SHAPES", ((64, 128),))
    monkeypatch.setattr(parity, "GATE_SHAPE", (256, 128))
    monkeypatch.setattr(parity, "PROMPT", 40)
    for module in (speed, model):
        monkeypatch.setattr(module, "copy_bandwidth", lambda ops: 1e12)
    monkeypatch.setattr(speed, "HEAD_SHAPE", (640, 128))
    monkeypatch.setattr(speed, "GATE_SHAPE", (256, 128))
    monkeypatch.setattr(speed, "LAYERS", 1)
    import families
    import test_ops

    monkeypatch.setattr(families, "CHECKPOINTS", ("q3-tied",))
    monkeypatch.setattr(test_ops, "CASES", test_ops.CASES[::100])
    monkeypatch.setattr(test_ops, "truth", lambda index: np.ones(test_ops.CASES[index].shape))
    monkeypatch.setattr(test_ops, "CACHES", test_ops.CACHES[-1:])
    monkeypatch.setattr(parity, "_cases", lambda index: _cases(index)[:1])
    monkeypatch.setattr(gpu, "available", lambda: (True, "Fake GPU"))
    monkeypatch.setattr(gpu, "CudaOps", lambda progress: CudaOps(FakeDriver(executor=_choose), Images()), raising=False)
    monkeypatch.chdir(ROOT)
    yield {"setup": setup, "parity": parity, "speed": speed, "model": model}
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu_bench"]:
        del sys.modules[name]


def _cases(index: str) -> list[dict]:
    return json.loads((Path(__file__).parent / "golden" / index).read_text())["cases"]


def _choose(launch) -> None:
    """Whatever is asked, the answer is token 65."""
    if launch.name == "argmax.any":
        choose(65, launch.args["out"], launch.grid[1], launch.args["logits"], launch.args["size"])


def _bench(name: str = "gpu"):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARITY = ["operations", "golden", "families", "true_sizes", "true_model"]
SPEED = ["setup", "matvec", "matmul", "attention", "decode", "newer", "picture", "memory"]


@pytest.mark.parametrize("name", PARITY + SPEED)
def test_sections_run_and_return_plain_data(rehearsal, name, capsys):
    module, function = _bench().SECTIONS[name][0].split(".")
    with np.errstate(all="ignore"):
        found = getattr(rehearsal[module], function)()
    json.dumps(found)
    assert found and capsys.readouterr().out


def test_the_summary_names_every_bar(rehearsal):
    from gpu_bench.bars import bars

    assert {row["met"] for row in bars({})} == {None}
    found = {
        "matvec": {"rows": {"int4 a": {"of_copy": 0.9, "faster": 2.0}, "int4 b": {"of_copy": 0.7, "faster": None}}},
        "memory": {"smallest: picture + 2048 tokens": {"in_use": 7e9}},
    }
    rows = {row["what"]: row for row in bars(found)}
    assert len(rows) == 19
    share = rows["int4 matrix-vector: share of the copy bandwidth"]
    assert (share["found"], share["met"]) == (0.7, False)
    assert rows["int4 matrix-vector: times torch int4"]["met"] is True
    assert rows["memory, smallest: picture + 2048 tokens"]["met"] is True


def test_one_failing_section_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    bench, out = _bench(), tmp_path / "gpu.json"
    code = bench.main(["--only", "setup", "bandwidth", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["sections"].keys() == {"setup", "bandwidth"}
    statuses = {section["status"] for section in report["sections"].values()}
    if code:  # without a GPU both say so
        assert statuses == {"failed"}
        assert all("DeviceError" in section["error"] for section in report["sections"].values())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    monkeypatch.setitem(bench.SECTIONS, "setup", ("setup.setup", 1))
    assert bench.main(["--only", "setup", "--minutes", "0", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["sections"]["setup"]["status"] == "skipped"


def test_wrong_arguments_are_refused():
    with pytest.raises(SystemExit):
        _bench().main(["--only", "nonsense"])


@pytest.mark.parametrize(("rows", "architecture"), [(8, 80), (16, 80), (16, 90)])
def test_tuning_keeps_what_is_faster(rehearsal, monkeypatch, rows, architecture):
    tune, ops, tried = _bench("gpu_tune"), CudaOps(FakeDriver(), Images(architecture)), []
    name = f"linear.int4.rows{rows}"
    monkeypatch.setitem(tune.WORK, name, (((256, 128),), 4, (rows,), {"BN": (32, 64), "warps": (1, 4)}))

    def compiled(name, architecture, shape):
        tried.append(shape)
        if shape["warps"] == 1 and shape["BN"] == 64:
            return None
        return tune.Compiled(b"", b"", name, shape["warps"], 0, {"BM": rows, "BN": shape["BN"]})

    launches = ops.driver.launches
    monkeypatch.setattr(tune, "compile_candidate", compiled)
    monkeypatch.setattr(tune.Trial, "results", lambda self: [np.ones(1)])
    monkeypatch.setattr(
        tune.Trial, "seconds", lambda self: [self.calls[0][0]() or 1 / launches[-1].grid[0] / launches[-1].grid[1]]
    )
    before = signatures.tile(name, architecture)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        best, timed = tune.tune(name, ops, pool, time.monotonic() + 60)
    assert {shape.get("optimizer") for shape in (*tried, best)} == {before.get("optimizer")}
    assert best["BN"] == 32 and len(timed) == 1 + 3 * (len(tune.WAVES) if rows == 8 else 1)
    assert signatures.tile(name, architecture) == before
    assert ops.launch.constants(name)["BN"] == before["BN"]


@pytest.mark.parametrize("architecture", signatures.ARCHITECTURES)
def test_the_norm_of_a_lone_row_is_summed_by_as_many_threads_as_that_of_few(architecture):
    """Also with what tuning tries: otherwise its bits differ."""
    few = signatures.tile("few_norm.any", architecture)["warps"]
    smallest = [name for name in signatures.names(architecture) if "waves" in signatures.tile(name, architecture)]
    assert len(smallest) == 6 and {signatures.tile(name, architecture)["warps"] for name in smallest} == {few}
    work = _bench("gpu_tune").WORK
    assert {warps for name in smallest if name in work for warps in work[name][3]["warps"]} == {few}


def test_tuned_shapes_are_written_beside_the_others(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(Path(signatures.__file__).with_name("tiles.json").read_text())
    before = json.loads(path.read_text())
    _bench("gpu_tune").write(path, "90", {"linear.int4.rows16": {"BN": 16, "waves": 4}})
    after = json.loads(path.read_text())
    assert after["90"].pop("linear.int4.rows16") == {"BN": 16, "waves": 4}
    before["90"].pop("linear.int4.rows16", None)
    assert after == before
    assert max(len(line) for line in path.read_text().splitlines()) < 120
