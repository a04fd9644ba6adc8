"""Sampling: functions on a float32 vector of logits, and the callable that chains them.

Each step takes the logits [vocab] and returns new ones; -inf means "never". A new step is one more function and one
more line in `Sampler.__post_init__`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from qvl_runtime.errors import QvlError, excerpt

LARGEST = 1e6
"""Largest temperature and penalty of repetition; logits times this are still finite."""


def apply_repetition_penalty(logits: np.ndarray, token_ids: Sequence[int], penalty: float) -> np.ndarray:
    """Penalize ids that occurred: positive logits are divided, negative ones multiplied (CTRL, 2019).

    Parameters
    ----------
    logits : numpy.ndarray
        float32 [vocab].
    token_ids : sequence of int
        The prompt and the answer so far; the number of occurrences does not matter.
    penalty : float
        1 has no effect.
    """
    occurs = np.zeros(logits.size, bool)  # sorting a long prompt would take longer than a step
    occurs[np.asarray(token_ids, np.int64)] = True
    out, seen = logits.copy(), np.flatnonzero(occurs)
    out[seen] = np.where(out[seen] < 0, out[seen] * np.float32(penalty), out[seen] / np.float32(penalty))
    return out


def apply_temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logits by the temperature (> 0), clamped to 1e-6 to prevent overflow."""
    return logits / np.float32(max(temperature, 1e-6))


def most_likely(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k highest logits, of those equal to the k-th, and of some others, in ascending order.

    The k-th highest of the maxima of more than k parts is at most the k-th highest logit. What follows then handles a
    few hundred numbers instead of the 151,936.
    """
    part = max(logits.size // max(4 * k, 256), 1)
    maxima = np.maximum.reduceat(logits, np.arange(0, logits.size, part))
    if len(maxima) < k:
        return np.arange(logits.size)
    return np.flatnonzero(logits >= np.partition(maxima, len(maxima) - k)[len(maxima) - k])


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep the k highest logits, and those equal to the k-th; the others become -inf."""
    if k >= logits.size:
        return logits
    threshold = np.partition(logits, logits.size - k)[logits.size - k]
    return np.where(logits >= threshold, logits, np.float32(-np.inf))


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep the smallest set of tokens whose probability reaches p, at least one; the others become -inf."""
    probabilities = softmax(logits)
    # Tokens below this probability sum to less than 1 - p and cannot be in the set. Only the others are sorted, often a
    # few hundred of the 151,936.
    candidates = np.flatnonzero(probabilities >= (1 - p) / logits.size)
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    mass = np.cumsum(probabilities[order], dtype=np.float64)
    kept = order[: np.searchsorted(mass, p) + 1]
    out = np.full_like(logits, -np.inf)
    out[kept] = logits[kept]
    return out


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep tokens at least p times as likely as the most likely one (Nguyen et al. 2024); the others become -inf."""
    return np.where(logits >= logits.max() + np.float32(math.log(p)), logits, np.float32(-np.inf))


def apply_count_penalties(
    logits: np.ndarray, answer_ids: Sequence[int], presence: float, frequency: float
) -> np.ndarray:
    """Lower the logits of ids in the answer: by `presence` once, and by `frequency` per occurrence (OpenAI)."""
    out = logits.copy()
    seen, counts = np.unique(np.asarray(answer_ids, np.int64), return_counts=True)
    out[seen] -= np.float32(presence) + np.float32(frequency) * counts.astype(np.float32)
    return out


def softmax(logits: np.ndarray) -> np.ndarray:
    """Convert logits to probabilities, both float32 [vocab]; exactly 0 for a logit of -inf."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@dataclasses.dataclass
class Sampler:
    """Chooses the next token: penalties, temperature, top_k, top_p, min_p, then one random draw.

    A sampler serves one answer: it holds the state of the random generator.

    Parameters
    ----------
    temperature : float
        0 takes the most likely token (greedy); top_k, top_p, min_p and seed then have no effect.
    top_k : int
        0 disables it.
    top_p : float
        1 disables it.
    repetition_penalty : float
        1 disables it. Applies to prompt and answer, also with greedy selection.
    seed : int, optional
        The same seed and logits give the same tokens. None takes a random seed.
    min_p : float
        0 disables it.
    presence_penalty, frequency_penalty : float
        From -2 to 2; 0 disables it. Apply to the answer only, also with greedy selection.

    Raises
    ------
    QvlError
        A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check("top_k", self.top_k, _is_integer(self.top_k) and self.top_k >= 0, "a whole number, 0 for off")
        self.top_k = int(self.top_k)  # int8 has no room for a number of tokens
        for name, low, high, wanted in (
            ("temperature", 0, LARGEST, f"a number from 0 (greedy) to {LARGEST:g}"),
            ("top_p", 0, 1, "a number from 0 to 1 (off)"),
            ("repetition_penalty", 1 / LARGEST, LARGEST, f"a number from {1 / LARGEST:g} to {LARGEST:g}, 1 for off"),
            ("min_p", 0, 1, "a number from 0 (off) to 1"),
            ("presence_penalty", -2, 2, "a number from -2 to 2, 0 for off"),
            ("frequency_penalty", -2, 2, "a number from -2 to 2, 0 for off"),
        ):
            value = getattr(self, name)
            value = float(value) if isinstance(value, np.floating) else value  # float16 does not reach `high`
            _check(name, value, _is_number(value) and low <= value <= high, wanted)
            setattr(self, name, float(value))
        seed_fits = self.seed is None or (_is_integer(self.seed) and self.seed >= 0)
        _check("seed", self.seed, seed_fits, "a whole number from 0 up, or None")

        # A greedy sampler draws nothing, and a generator takes longer to make than a token to choose.
        self._random = np.random.default_rng(self.seed) if self.temperature > 0 else None
        self._prompt_length: int | None = None
        self._steps: list[Callable[[np.ndarray], np.ndarray]] = []
        if self.temperature > 0:
            if self.top_k > 0:
                self._steps.append(partial(keep_top_k, k=self.top_k))
            if self.top_p < 1:
                self._steps.append(partial(keep_top_p, p=self.top_p))
            if self.min_p > 0:
                self._steps.append(partial(keep_min_p, p=self.min_p))

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is always the highest logit, so that logits need not be downloaded."""
        return self.temperature == 0 and not self._penalises

    @property
    def _penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def __call__(self, logits: np.ndarray, token_ids: Sequence[int]) -> int:
        """Choose a token.

        Parameters
        ----------
        logits : numpy.ndarray
            float32 [vocab]; not changed.
        token_ids : sequence of int
            The ids so far: the prompt at the first call, then prompt and answer.

        Raises
        ------
        QvlError
            The highest logit is not finite: the model's weights or arithmetic are damaged.
        """
        logits = self.penalize(logits, token_ids)
        if self.temperature == 0:
            return int(np.argmax(logits))
        logits = apply_temperature(logits, self.temperature)
        ids = most_likely(logits, self.top_k) if self.top_k > 0 else None
        if ids is not None:
            logits = logits[ids]
        for step in self._steps:
            logits = step(logits)
        probabilities = softmax(logits)
        assert self._random is not None, "the temperature is above 0"
        possible = np.flatnonzero(probabilities)
        mass = np.cumsum(probabilities[possible], dtype=np.float64)
        chosen = possible[np.searchsorted(mass[:-1], self._random.random() * mass[-1], side="right")]
        return int(chosen if ids is None else ids[chosen])

    def penalize(self, logits: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
        """Check the logits and apply the penalties; return those that the steps truncate."""
        best = int(np.argmax(logits))  # argmax returns a NaN if there is one
        if not np.isfinite(logits[best]):
            raise QvlError(f"the model's logits hold {logits[best]} (token {best}): check the model file")
        if self._prompt_length is None:
            self._prompt_length = len(token_ids)
        if self.repetition_penalty != 1:
            logits = apply_repetition_penalty(logits, token_ids, self.repetition_penalty)
        if self.presence_penalty or self.frequency_penalty:
            answer = token_ids[self._prompt_length :]
            logits = apply_count_penalties(logits, answer, self.presence_penalty, self.frequency_penalty)
        return logits


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise QvlError(f"{name} is {excerpt(repr(value))}, expected {wanted}")
