"""Comparison of a `.qvl` file with the original model: probabilities, answers, and boxes.

The original runs layer by layer from its own files (`walk`), so the memory for a conversion also suffices to verify it.
Every figure has a noise floor: the original with every result rounded to bfloat16, as published, compared with the
original in full precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from qvl_convert.answers import Answers, compare_answers
from qvl_convert.calibration import Sample
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.lora import Merged
from qvl_convert.plan import Published, Source
from qvl_convert.progress import Progress
from qvl_convert.walk import Walk, relative_error, stages
from qvl_kernels.ops import Array, Ops, Weight
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.families.config import Config
from qvl_runtime.families.weights import Tensors, Weights
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.model import Model as Runtime

MAX_KL, MAX_FEATURE_ERROR = 1.0, 1.0
"""Limits in nats and as a share. Matching int4 models have less than a tenth of either, other models more."""

PUBLISHED = ("autogptq", "awq")
"""Methods of matrices that are quantized in the original."""

BIN = 32
"""Positions per bin of `Report.kl_by_position`."""


@dataclasses.dataclass
class Divergence:
    """Differences of two models over the same tokens.

    Attributes
    ----------
    kl_mean, kl_median, kl_p90, kl_p99 : float
        Kullback-Leibler divergence KL(reference || model) of the next token, in nats, over `judged_positions`.
    same_top : float
        Share of positions with the same most likely token.
    perplexity : float
        Perplexity of the model at the same positions.
    features : float or None
        Relative error of the pictures' features, ``|a - b| / |b|``.
    """

    kl_mean: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    same_top: float
    perplexity: float
    features: float | None


@dataclasses.dataclass
class Report:
    """The whole comparison.

    Attributes
    ----------
    samples, positions : int
    reference_perplexity : float
    model, floor : Divergence
    layers : list of (str, float)
        Relative error of the output of each stage of the model.
    floor_layers : list of float
        Noise floor of `layers`, in the same order.
    kl_by_position, floor_by_position : list of (int, float)
        First position and mean KL divergence of each bin; the same for the noise floor.
    answers : Answers or None
    """

    samples: int
    positions: int
    reference_perplexity: float
    model: Divergence
    floor: Divergence
    layers: list[tuple[str, float]]
    floor_layers: list[float]
    kl_by_position: list[tuple[int, float]]
    floor_by_position: list[tuple[int, float]]
    answers: Answers | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return dataclasses.asdict(self)

    def failures(self) -> list[str]:
        """List figures beyond `MAX_KL` and `MAX_FEATURE_ERROR`: such a file does not match the original."""
        found, model = [], self.model
        figures = [v for part in (model, self.floor) for v in dataclasses.asdict(part).values() if v is not None]
        if not np.isfinite([*figures, *(error for _, error in self.layers)]).all():
            found.append("a result is not finite")
        if model.kl_mean > MAX_KL:
            found.append(f"the mean KL divergence is {model.kl_mean:.2f} (limit {MAX_KL})")
        if model.features is not None and model.features > MAX_FEATURE_ERROR:
            found.append(f"the error of picture features is {model.features:.0%} (limit {MAX_FEATURE_ERROR:.0%})")
        return found


class Bf16Ops:
    """A backend that rounds every result to bfloat16."""

    def __init__(self, ops: Ops):
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._ops, name)
        return self._rounded(function) if callable(function) else function

    def _rounded(self, function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            if "out" in options:
                out: Array = options["out"]
                if out.dtype != np.int32:
                    self._ops.write(out, self._ops.download(out).astype(ml_dtypes.bfloat16).astype(out.dtype))
            return result

        return call


def open_reference(path: str | Path, lora: str | Path | None = None) -> Blob | Published:
    """Open the original: a Hugging Face folder (with the merged adapter), or a `.qvl` file of higher precision.

    Raises
    ------
    QvlError
        If it cannot be read, or an adapter is given for a `.qvl` file.
    """
    if Path(path).is_file():
        if lora is not None:
            raise QvlError(f"{path}: is a file, into which no adapter is merged; give the original folder or no --lora")
        return Blob(path)
    return Published(Source(Checkpoint(path) if lora is None else Merged(path, lora)))


def mismatch(blob: Blob, reference: Blob | Published) -> str | None:
    """Return why a reference is not the original of a file, by fingerprints and bits; None if it may be."""
    told = blob.metadata["source"].get("files")
    if isinstance(reference, Blob):
        found = reference.metadata["source"].get("files")
    else:
        found = reference.source.checkpoint.fingerprint()
    if not isinstance(told, dict) or not isinstance(found, dict):
        return None
    told, found = dict(told), dict(found)
    merged, given = ([name for name in files if "/" in name] for files in (told, found))
    if merged and not given:
        adapter = merged[0].partition("/")[0]
        return f"was made with the adapter {adapter!r:.80}, which the reference is without: name it with --lora"
    if given and not merged:
        return "was made without the adapter that --lora names"
    # the adapter's folder may have another name by now
    if [told.pop(name) for name in merged] != [found.pop(name) for name in given]:
        return "was made with another adapter than --lora names"
    if told != found:
        return "was made from other weights than the reference's"
    if isinstance(reference, Blob):
        made = [part for part in reference.metadata["quantization"].values() if isinstance(part, dict)]
        if any(part.get("bits") != 16 and part.get("method") not in PUBLISHED for part in made):
            return "is compared with a quantized file, not with the original"
    return None


def verify(
    model: Runtime,
    reference: Tensors,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 64,
    progress: Progress = lambda name, done, total: None,
) -> Report:
    """Compare a model with its original.

    Parameters
    ----------
    model : qvl_runtime.Model
    reference : Tensors
        The result of `open_reference`.
    samples : sequence of Sample
        Preferably not the calibration samples.
    max_new_tokens : int
        Length of the compared answers; 0 compares none.
    progress : callable
        Called with a stage's name, the finished stages, and the number of stages.

    Raises
    ------
    QvlError
        If they are different models, or no sample has a token to compare.
    """
    config, family = model.config, model.blob.family
    if reference.config != config:
        different = [k for k, v in config.to_dict().items() if reference.config.to_dict().get(k) != v]
        raise QvlError(
            f"{model.blob.path}: is another model than the reference: {', '.join(different)} differ; name its original"
        )
    judged = [judged_positions(sample, model.tokenizer) for sample in samples]
    if not any(map(len, judged)):  # for example pictures without captions: there are no answers
        judged = [text_positions(sample) for sample in samples]
    if not any(map(len, judged)):
        raise QvlError("the conversations have no token to compare: each is a single token; give longer ones")
    bf16 = cast(Ops, Bf16Ops(model.ops))  # it has every operation of its backend
    reader = None if model.pictures is None else model.pictures.reader
    walks = [Walk(ops, family, config, samples, reader) for ops in (model.ops, model.ops, bf16)]
    weights: list[Weights[Config]] = [
        Weights(reference, model.ops),
        Weights(model.blob, model.ops),
        Weights(reference, bf16),
    ]
    layers, floor_layers, plan = [], [], stages(family, config)
    for done, stage in enumerate(plan):
        name = stage.kind if stage.kind not in ("vision", "decoder") else f"{stage.kind} {stage.index}"
        progress(name, done, len(plan))
        for walk, w in zip(walks, weights):
            walk.run(stage, w)
        if outputs := walks[1].outputs(stage):
            layers.append((name, relative_error(outputs, walks[0].outputs(stage))))
            floor_layers.append(relative_error(walks[2].outputs(stage), walks[0].outputs(stage)))
    progress("logits", len(plan), len(plan))
    features = [relative_error(walk.features, walks[0].features) if walk.features else None for walk in walks[1:]]
    nll, scores = _scores(walks, [w.matrix(family.decoder_names(config).head) for w in weights], samples, judged)
    answers = None
    if max_new_tokens and any(sample.asked for sample in samples):
        answers = compare_answers(model, weights[0], samples, walks[0].features, max_new_tokens, progress)
    return Report(
        samples=len(samples),
        positions=len(nll),
        reference_perplexity=float(np.exp(nll.mean())),
        model=_divergence(scores[0], features[0]),
        floor=_divergence(scores[1], features[1]),
        layers=layers,
        floor_layers=floor_layers,
        kl_by_position=_by_position(scores[0]),
        floor_by_position=_by_position(scores[1]),
        answers=answers,
    )


def text_positions(sample: Sample) -> np.ndarray:
    """Return the positions whose next token is not part of a picture."""
    pictures = np.zeros(len(sample.ids), bool)
    for slot in sample.slots:
        pictures[slot.start : slot.end] = True
    return np.flatnonzero(~pictures[1:])


def judged_positions(sample: Sample, tokenizer: Tokenizer) -> np.ndarray:
    """Return the positions whose next token is compared: answers in a chat, else all text.

    A chat model was trained on answers only; its predictions of questions are noise.
    """
    ids = sample.ids
    following = np.array(ids[1:])
    if tokenizer.im_start_id not in ids:
        return text_positions(sample)
    head = [tokenizer.im_start_id, *tokenizer.encode_ordinary("assistant"), *tokenizer.encode_ordinary("\n")]
    positions, answering = [], False
    for i in range(len(following)):
        if answering or list(ids[i + 1 - len(head) : i + 1]) == head:
            answering = ids[i + 1] != tokenizer.im_end_id
            positions.append(i)
    return np.array(positions, int)


def _scores(
    walks: list[Walk], heads: list[Weight], samples: Sequence[Sample], judged: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Compute scores of every judged position.

    Returns
    -------
    nll : ndarray
        Negative log likelihood of the reference, ``[positions]``.
    scores : list of ndarray
        For each other walk ``[4, positions]``: position, KL divergence, whether the most likely token is the same,
        negative log likelihood.
    """
    nll: list[np.ndarray] = []
    scores: list[list[np.ndarray]] = [[] for _ in walks[1:]]
    for i, sample in enumerate(samples):
        ids, start = np.array(sample.ids), 0
        for chunks in zip(*(walk.logits(head, i) for walk, head in zip(walks, heads))):
            at = judged[i][(judged[i] >= start) & (judged[i] < start + len(chunks[0]))]
            reference, *others = (_log_softmax(chunk[at - start]) for chunk in chunks)
            actual = np.arange(len(at)), ids[at + 1]
            nll.append(-reference[actual])
            for score, other in zip(scores, others):
                kl = np.sum(np.exp(reference) * (reference - other), axis=1)
                same = reference.argmax(1) == other.argmax(1)
                score.append(np.stack([at, kl, same, -other[actual]]))
            start += len(chunks[0])
    return np.concatenate(nll), [np.concatenate(score, axis=1) for score in scores]


def _divergence(scores: np.ndarray, features: float | None) -> Divergence:
    _, kl, same, nll = scores
    median, p90, p99 = np.percentile(kl, [50, 90, 99])
    return Divergence(
        float(kl.mean()), float(median), float(p90), float(p99), float(same.mean()), float(np.exp(nll.mean())), features
    )


def _by_position(scores: np.ndarray) -> list[tuple[int, float]]:
    at, kl = scores[0].astype(int) // BIN, scores[1]
    return [(int(b) * BIN, float(kl[at == b].mean())) for b in np.unique(at)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
