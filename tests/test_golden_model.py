"""The whole model against the published code's outputs: every stage, on every backend, through the public API."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import BACKENDS, GOLDEN

LOGITS, HIDDEN, STAGE, FINAL = 2e-4, 1e-4, 5e-5, 5e-6


def _cases(index: str) -> list[dict]:
    return json.loads((GOLDEN / index).read_text())["cases"]


def _case_id(case: dict) -> str:
    return case["file"].removesuffix(".npz")


def _rows(case: dict) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    """Each unpadded row of a language-model case: its ids, and its expected values at real positions.

    Left out are rows whose padding changes their own answer in the published code: beyond `seq_length` it counts
    padding as positions.
    """
    data = np.load(GOLDEN / "lm" / case["file"])
    rows = []
    for i, ids in enumerate(data["input_ids"]):
        padding = 0
        if "attention_mask" in data.files:
            padding = int(np.argmax(data["attention_mask"][i]))
        if padding and case["variant"] == "long":
            continue
        expected = {}
        for name, positions in (("pos", "logits"), ("hpos", "hidden")):
            real = data[name] >= padding
            expected[f"{positions}_at"] = data[name][real] - padding
            if positions == "logits":
                expected["logits"] = data["logits"][i][real]
            else:
                expected |= {k[2:]: data[k][i][real] for k in data.files if k.startswith("h_")}
        expected |= {k: data[k][i] for k in ("gen_ids", "gen_gap") if k in data.files}
        rows.append((ids[padding:].tolist(), expected))
    return rows


def _images(ids: list[int], config) -> list[str]:
    """The paths the published tokenizer wrote into the image slots."""
    if config.visual is None:
        return []
    starts = [i for i, token in enumerate(ids) if token == config.visual.image_start_id]
    return [bytes(t for t in ids[s + 1 : s + 257] if t < 256).decode() for s in starts]


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("case", _cases("vis/index.json"), ids=_case_id)
def test_vision_stages(case, device, model, in_golden):
    model = model(case["ckpt"], case["variant"], device=device, bits=16)
    expected = np.load(GOLDEN / "vis" / case["file"])
    last = f"block{model.config.visual.layers - 1}"
    for i, image in enumerate(case["images"]):
        seen = {}

        def trace(stage, values, seen=seen, i=i):
            stage = "block_last" if stage == last and stage != "block0" else stage
            if stage in expected.files:
                rows = "qrows" if stage in ("resampler", "ln_post", "final") else "rows"
                values = model.ops.download(values)
                if stage != "final" or not expected["final_is_full"]:
                    values = values[expected[rows]]
                seen[stage] = np.abs(values - expected[stage][i]).max()

        features = model.encode_image(image, trace=trace)
        assert features.shape == (256, model.config.hidden_size)
        assert {"patch_pos", "ln_pre", "block0", "resampler", "ln_post", "final"} <= seen.keys()
        assert seen.pop("final") < FINAL
        assert max(seen.values()) < STAGE, seen
        # Without a trace the blocks are captured once and replayed for every picture.
        assert np.array_equal(model.encode_image(image), features)


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("case", _cases("lm/index.json") + _cases("lm/index_gptq.json"), ids=_case_id)
def test_logits_hidden_states_and_greedy_ids(case, device, model, in_golden):
    model = model(case["ckpt"], case["variant"], device=device, bits=16)
    for ids, expected in _rows(case):
        images, errors = _images(ids, model.config), {}

        def trace(stage, values, expected=expected, errors=errors):
            if stage in expected:
                errors[stage] = np.abs(model.ops.download(values)[expected["hidden_at"]] - expected[stage]).max()

        logits = model.logits(ids, images, trace=trace)
        assert logits.shape == (len(ids), model.config.vocab_size)
        assert np.abs(logits[expected["logits_at"]] - expected["logits"]).max() < LOGITS
        assert not errors or max(errors.values()) < HIDDEN, errors
        if "gen_ids" in expected:
            _check_greedy(model, ids, images, expected)


def _check_greedy(model, ids, images, expected):
    answer = model.generate(ids, images, max_new_tokens=len(expected["gen_ids"]))
    stops = [i for i, t in enumerate(expected["gen_ids"]) if t in model.stop_ids]
    wanted = expected["gen_ids"][: stops[0] if stops else None].tolist()
    assert expected["gen_gap"].min() > 0.006, "the fp16 cache moves logits by up to 0.003"
    assert answer.token_ids == wanted


@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("case", _cases("lm/index_gptq.json"), ids=_case_id)
def test_imported_int4_stays_within_its_rounding(case, device, model, in_golden):
    """Kept at int4, products are scale * code in float32; the golden data rounds that product to fp16.

    The CPU's 16-bit activations add up to 1e-3 on logits of about 2.
    """
    model = model(case["ckpt"], case["variant"], device=device, bits=4, vision_bits=16, head_bits=16)
    for ids, expected in _rows(case):
        logits = model.logits(ids, _images(ids, model.config))
        rounding = case.get("fp32_product_vs_fp16_product_max", 5e-3)
        limit = 1.2 * rounding + (1e-3 if device == "cpu" else LOGITS)
        assert np.abs(logits[expected["logits_at"]] - expected["logits"]).max() < limit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["tiny-vl", "tiny-vl-bin"])
def test_quantized_cpu_equals_reference(name, bits, model, in_golden):
    """The same quantized weights give the same logits, features and greedy ids on both backends."""
    options = {"bits": bits, "vision_bits": bits, "head_bits": bits}
    cpu, reference = (model(name, device=device, **options) for device in ("cpu", "reference"))
    image = "images/rgb_odd.png"
    wanted = reference.encode_image(image)
    assert np.linalg.norm(cpu.encode_image(image) - wanted) < 1e-3 * np.linalg.norm(wanted)
    for prompt in ("The answer is 42.\n答案", f"Picture 1: <img>{image}</img>\n这是什么?"):
        wanted = reference.logits(prompt)
        assert np.linalg.norm(cpu.logits(prompt) - wanted) < 1e-3 * np.linalg.norm(wanted)
        assert (
            cpu.generate(prompt, max_new_tokens=16).token_ids == reference.generate(prompt, max_new_tokens=16).token_ids
        )


@pytest.mark.parametrize("device", BACKENDS)
def test_int8_cache_is_close(device, model, in_golden):
    """An int8 cache changes logits by about a percent, not more."""
    case = next(c for c in _cases("lm/index.json") if c["case"] == "long_T100")
    ids, expected = _rows(case)[0]
    model = model(case["ckpt"], case["variant"], device=device, kv_cache="int8", bits=16)
    answer = model.generate(ids, max_new_tokens=8)
    agreed = np.sum(np.array(answer.token_ids) == expected["gen_ids"][: len(answer.token_ids)])
    assert agreed >= 6


def test_rotary_and_logn_tables(golden):
    """Against the published code's tables, within the rounding of their dtype."""
    from dataclasses import replace

    from qvl_runtime.families.qwen_vl.config import ModelConfig
    from qvl_runtime.families.qwen_vl.positions import logn_table, ntk_alpha, rotary_table

    behaviour = json.loads((golden / "lm" / "behaviour.json").read_text())
    config = ModelConfig.from_dict(json.loads((golden / "ckpt" / "tiny-vl" / "config.json").read_text()))
    for seq_length, alphas in behaviour["ntk_alpha_of_prefill_length"].items():
        for length, alpha in alphas.items():
            assert ntk_alpha(int(length), replace(config, seq_length=int(seq_length))) == alpha
    for case in behaviour["rotary"]:
        table = rotary_table(2, case["alpha"], replace(config, kv_channels=case["dim"]))
        angles = np.arctan2(*reversed(np.split(table[1].astype(np.float64), 2)))
        np.testing.assert_allclose(angles, case["inv_freq"], rtol=4e-7)
    table = logn_table(behaviour["logn_len"], config)
    for position, scale in behaviour["logn_seq2048"].items():
        assert table[int(position)] == np.float32(scale)
