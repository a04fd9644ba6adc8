"""Comparing a file with its original: the figures, the answers, and what the command prints."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from shards import changed_copy
from typer.testing import CliRunner

from qvl_convert import answers as answers_module
from qvl_convert import calibration, verify_plot
from qvl_convert.answers import compare_answers
from qvl_convert.verify import Bf16Ops, judged_positions, mismatch, open_reference, verify
from qvl_convert.verify_plot import plot
from qvl_convert.walk import Walk, stages
from qvl_runtime.backends import make_ops
from qvl_runtime.blob import Blob
from qvl_runtime.boxes import Box, iou
from qvl_runtime.cli.main import _app
from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.metrics.text import edit_distance
from qvl_runtime.families.weights import Weights
from qvl_runtime.saving import check_path

VL = GOLDEN / "ckpt" / "tiny-vl"
INT4 = {"vision_bits": 4, "head_bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def samples(model):
    return calibration.load("builtin", model("tiny-vl", bits=16), count=3, max_tokens=1000, seed=1)


@pytest.fixture(scope="module")
def report(model, samples):
    return verify(model("tiny-vl", **INT4), open_reference(VL), samples, max_new_tokens=0)


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_the_figures_are_those_of_the_two_models_logits(report, model, samples):
    ours, original = model("tiny-vl", **INT4), model("tiny-vl", bits=16)
    kl, same, nll = [], [], []
    for sample in samples:
        p, q = (log_softmax(m.logits(sample.ids, sample.images)) for m in (original, ours))
        kept = judged_positions(sample, ours.tokenizer)
        kl += list((np.exp(p) * (p - q)).sum(1)[kept])
        same += list((p.argmax(1) == q.argmax(1))[kept])
        nll += [-q[i, sample.ids[i + 1]] for i in kept]
    assert report.positions == len(kl)
    assert report.model.kl_mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert report.model.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert report.model.same_top == pytest.approx(np.mean(same), abs=2 / len(same))
    assert report.model.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    pictures = [image for sample in samples for image in sample.images]
    features = [np.stack([m.encode_image(p) for p in pictures]) for m in (ours, original)]
    error = np.linalg.norm(features[0] - features[1]) / np.linalg.norm(features[1])
    assert report.model.features == pytest.approx(error, rel=1e-3)


def test_in_a_chat_the_answers_are_judged_and_else_all_text(model):
    tokenizer = model("tiny-vl", bits=16).tokenizer
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ids = tokenizer.encode(prompt * 2)
    judged = judged_positions(calibration.Sample(ids, []), tokenizer)
    assert tokenizer.decode([ids[i + 1] for i in judged]) == "Yes.<|im_end|>" * 2
    ids = tokenizer.encode("One <img></img> two.")
    start = ids.index(tokenizer.img_start_id) + 1
    slot = SimpleNamespace(start=start, end=start + ids.count(tokenizer.img_pad_id))
    judged = judged_positions(calibration.Sample(ids, [slot]), tokenizer)
    assert tokenizer.decode([ids[0], *(ids[i + 1] for i in judged)]) == "One <img></img> two."


def test_the_noise_floor_is_far_below_int4_and_not_zero(report):
    assert 0 < report.floor.kl_mean < report.model.kl_mean / 50
    assert report.floor.same_top > report.model.same_top


def test_errors_are_given_layer_by_layer_and_position_by_position(report, model):
    config = model("tiny-vl", bits=16).config
    names = [name for name, _ in report.layers]
    assert names[0] == "patches" and names[-1] == "norm" and f"decoder {config.num_hidden_layers - 1}" in names
    assert all(0 < error < 1 for _, error in report.layers)
    assert [at for at, _ in report.kl_by_position] == sorted({at for at, _ in report.kl_by_position})


def test_a_model_is_equal_to_itself(model, samples):
    report = verify(model("tiny-vl", bits=16), open_reference(VL), samples[:2], max_new_tokens=6)
    assert report.model.kl_mean < 1e-9 and report.model.same_top == 1 and report.model.features < 1e-6
    assert report.answers.same == report.answers.count == 2 and report.answers.edit_distance == 0


def test_a_blob_serves_as_reference_too(blob, model, samples, report):
    other = verify(model("tiny-vl", **INT4), open_reference(blob("tiny-vl", bits=16)), samples, max_new_tokens=0)
    assert other.model.kl_mean == pytest.approx(report.model.kl_mean, rel=1e-6)


def test_the_originals_answer_is_exactly_its_greedy_one(model, samples, monkeypatch):
    """For any number of rejected proposals."""
    ours, original, followed = model("tiny-vl", **INT4), model("tiny-vl", bits=16), []
    monkeypatch.setattr(answers_module, "_summary", lambda done, *_: followed.extend(done))
    reference = open_reference(VL)
    weights = Weights(reference, ours.ops)
    walk = Walk(ours.ops, ours.blob.family, ours.config, samples, ours.pictures.reader)
    for stage in stages(ours.blob.family, ours.config):
        if stage.kind in answers_module.PICTURE_STAGES:
            walk.run(stage, weights)
    asked = [sample for sample in samples if sample.asked]
    compare_answers(ours, weights, samples, walk.features, 8, lambda *_: None)
    assert len(followed) == len(asked) == 2
    for answer, sample in zip(followed, asked):
        want = original.generate(sample.ids[: sample.asked], sample.images, max_new_tokens=8).token_ids
        assert answer.agreed[: len(want)] == want


def test_answers_that_never_agree_are_counted_as_left_out(model, samples, monkeypatch):
    monkeypatch.setattr(answers_module, "MAX_ROUNDS", 1)
    found = verify(model("tiny-vl", **INT4), open_reference(VL), samples, max_new_tokens=8).answers
    assert found.unfinished + found.count == 2 and found.unfinished > 0


def test_rounding_to_bfloat16_reaches_every_result():
    ops = Bf16Ops(make_ops("reference"))
    out = ops.empty((1, 4))
    ops.add(np.full((1, 4), 1.0, np.float32), np.full((1, 4), 0.001, np.float32), out=out)
    assert (out == 1.0).all()


def test_another_model_is_refused(model, samples):
    with pytest.raises(QvlError, match="another model"):
        verify(model("tiny-vl", bits=16), open_reference(GOLDEN / "ckpt" / "tiny-q7-gptq-asym"), samples)


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((10, 10, 0, 0), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((5, 5, 5, 5), (5, 5, 5, 5), 1.0),
        ((5, 5, 5, 5), (6, 6, 6, 6), 0.0),
    ],
)
def test_iou(a, b, want):
    assert iou(Box(None, *a), Box("x", *b)) == pytest.approx(want)


@pytest.mark.parametrize(("a", "b", "want"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("红色", "红", 1)])
def test_edit_distance(a, b, want):
    assert edit_distance(a, b) == edit_distance(b, a) == want


def test_the_plot_is_a_picture_and_a_bad_name_an_error(report, tmp_path):
    plot(report, tmp_path / "x.png", title="x.qvl")
    pixels = np.asarray(Image.open(tmp_path / "x.png")).reshape(-1, 3)
    for colour in (verify_plot.LINE, verify_plot.FLOOR):
        assert (pixels == colour).all(axis=1).sum() > 1000, "both lines are there"
    broken = dataclasses.replace(report, floor_layers=[float("nan")] * len(report.layers))
    plot(broken, tmp_path / "x.png", title="x.qvl")
    for name in ("nowhere/x.png", "x.unknown", "x", "", "x.png/x.png", f"{'x' * 300}.png"):
        with pytest.raises(QvlError, match=r"cannot be written"):
            check_path(tmp_path / name)


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.07, [0, 0.02, 0.04, 0.06, 0.08]), (4.1, [0, 1, 2, 3, 4, 5]), (0, [0, 1])],
)
def test_ticks_are_round(largest, ticks):
    assert verify_plot.round_ticks(largest) == pytest.approx(ticks)


def test_the_noise_floor_is_given_stage_by_stage(report):
    assert len(report.floor_layers) == len(report.layers)
    assert all(0 < floor < error for floor, (_, error) in zip(report.floor_layers, report.layers))
    assert [at for at, _ in report.floor_by_position] == [at for at, _ in report.kl_by_position]


def test_pictures_without_captions_are_judged_by_their_questions(model, tmp_path, golden):
    for name in ("rgb_odd.png", "rgba.png"):
        shutil.copy(golden / "images" / name, tmp_path)
    ours = model("tiny-vl", **INT4)
    samples = calibration.load(tmp_path, ours, count=2)
    assert not any(len(judged_positions(sample, ours.tokenizer)) for sample in samples)
    found = verify(ours, open_reference(VL), samples, max_new_tokens=2)
    assert found.positions > 20 and found.answers.count == 2 and not found.failures()


def test_a_file_that_is_broken_fails(report):
    assert not report.failures()
    for change, message in (
        ({"kl_mean": float("nan")}, "not finite"),
        ({"perplexity": float("inf")}, "not finite"),
        ({"kl_mean": 14.7}, "KL divergence is 14.70"),
        ({"features": 1.3}, "features is 130%"),
    ):
        broken = dataclasses.replace(report, model=dataclasses.replace(report.model, **change))
        assert message in broken.failures()[0]


def test_boxes_of_one_answer_alone_count_as_missed(model):
    """Whichever of the two has more."""
    loaded = model("tiny-vl", bits=16)
    tokenizer = loaded.tokenizer
    one, two = (tokenizer.encode("<box>(1,2),(300,400)</box>" * count) for count in (1, 2))
    for ours, theirs in ((one, two), (two, one), ([], one), (one, [])):
        answer = answers_module._Answer(calibration.Sample([], []), ours, theirs, [], done=True)
        found = answers_module._summary([answer], 1, loaded)
        assert found.boxes == max(len(ours), len(theirs)) // len(one)
        assert found.iou_under_half == 1 - min(len(ours), len(theirs)) / max(len(ours), len(theirs))


@pytest.fixture(scope="module")
def cli(blob):
    def command(*more, file=None):
        arguments = [file or blob("tiny-vl", **INT4), "--reference", VL, "--samples", "1", "--device", "reference"]
        return CliRunner().invoke(_app("verify"), ["verify", *map(str, [*arguments, "--max-new-tokens", "0", *more])])

    return command


def test_the_command_prints_a_table_or_json(cli, tmp_path):
    shown = cli("--plot", tmp_path / "p.png", "--max-new-tokens", "2")
    assert shown.exit_code == 0 and shown.stderr == ""
    assert "KL divergence, mean" in shown.stdout and "noise floor" in shown.stdout
    assert (tmp_path / "p.png").exists()
    assert json.loads(cli("--json").stdout)["model"]["kl_mean"] > 0


def test_the_plots_path_is_checked_before_anything_is_read(cli, tmp_path):
    for name in ("nowhere/p.png", "p.unknown"):
        shown = cli("--plot", tmp_path / name, file=tmp_path / "gone.qvl")
        assert shown.exit_code == 1 and name in shown.stderr and shown.stderr.count("\n") == 1


def test_a_plot_that_fails_at_the_end_leaves_the_table(cli, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    shown = cli("--plot", tmp_path / "p.png")
    assert shown.exit_code == 1 and "No space left" in shown.stderr and "KL divergence, mean" in shown.stdout


def test_a_file_beyond_the_limits_fails_after_its_table(cli, monkeypatch):
    monkeypatch.setattr("qvl_convert.verify.MAX_KL", 1e-9)
    shown = cli()
    assert shown.exit_code == 1 and "KL divergence, mean" in shown.stdout
    assert "does not answer as" in shown.stderr and shown.stderr.count("\n") == 1


def test_the_data_are_not_those_of_calibration(cli, monkeypatch):
    seen = []
    monkeypatch.setattr("qvl_runtime.cli.verify.run", lambda *given, **_: seen.append(given))
    cli()
    loaded, _, samples = seen[0]
    used = calibration.load("builtin", loaded, count=1)
    assert calibration.digest(samples) != calibration.digest(used)


def test_what_cannot_belong_together_is_warned_of(blob, tmp_path):
    other = changed_copy(VL, tmp_path / "other")
    assert mismatch(Blob(blob("tiny-vl", **INT4)), open_reference(VL)) is None
    assert mismatch(Blob(blob("tiny-vl", **INT4)), open_reference(blob("tiny-vl", bits=16))) is None
    assert "other weights" in mismatch(Blob(blob("tiny-vl", **INT4)), open_reference(other))


def test_a_quantized_reference_is_warned_of_unless_the_original_is_quantized(blob, cli):
    quantized = blob("tiny-vl", bits=16, head_bits=8)
    assert "a quantized file" in mismatch(Blob(blob("tiny-vl", **INT4)), open_reference(quantized))
    shown = cli("--reference", quantized)
    assert shown.exit_code == 0 and "is compared with a quantized file, not with the original" in shown.stderr
    published = blob("tiny-vl-gptq", vision_bits=16, head_bits=16)
    assert mismatch(Blob(blob("tiny-vl-gptq")), open_reference(published)) is None


def test_an_adapter_is_refused_with_a_file_as_the_reference(blob, tmp_path):
    with pytest.raises(QvlError, match=r"\.qvl: is a file, into which no adapter is merged"):
        open_reference(blob("tiny-vl", bits=16), tmp_path / "adapter")


def test_samples_of_one_token_are_refused(model):
    with pytest.raises(QvlError, match="no token to compare"):
        verify(model("tiny-vl", **INT4), open_reference(VL), [calibration.Sample([5], [])] * 2)
