"""CIDEr-D (Vedantam et al. 2015), computed by pycocoevalcap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.metrics.tokens import java_tokens, own_tokens


def check() -> None:
    """Check that CIDEr can be computed.

    Raises
    ------
    QvlError
        If pycocoevalcap is not installed, or Java is and fails.
    """
    _package()
    java_tokens(["a word"])


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, str]:
    """Compute CIDEr of every picture's caption; the score of a task is the mean.

    The weights of words derive from all references, so a caption's score depends on the other pictures.

    Parameters
    ----------
    answers : sequence of str
        One per picture.
    references : sequence of sequence of str
        Human captions of every picture.

    Returns
    -------
    numpy.ndarray
        float64 ``[pictures]``.
    str
        The tokenizer: "Stanford PTB" or "qvl".

    Raises
    ------
    QvlError
        As for `check`.
    """
    texts = [text for caption, people in zip(answers, references, strict=True) for text in (caption, *people)]
    words = java_tokens(texts)
    tokenizer = "qvl" if words is None else "Stanford PTB"
    left = iter(own_tokens(texts) if words is None else words)
    given, true = {}, {}
    for number, people in enumerate(references):
        given[number] = [next(left)]
        true[number] = [next(left) for _ in people]
    _, scores = _package()().compute_score(true, given)
    return np.asarray(scores, np.float64), tokenizer


def _package() -> Any:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise QvlError(f"CIDEr needs pycocoevalcap ({error}): pip install 'qvl-runtime[eval]'") from None
    return Cider
