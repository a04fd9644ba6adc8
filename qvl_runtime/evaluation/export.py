"""Export of answers in the format of a task's judge."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from qvl_kernels.atomic import replacing
from qvl_runtime.evaluation.data import Sample
from qvl_runtime.evaluation.scores import Answer
from qvl_runtime.file.writing import unwritable


def touchstone(samples: Sequence[Sample], answers: Sequence[Answer], path: Path) -> None:
    """Write TouchStone's submission: its table without the pictures, with a column ``response``.

    Raises
    ------
    QvlError
        If the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*samples[0].truth, "response"], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for sample, answer in zip(samples, answers, strict=True):
        writer.writerow({**sample.truth, "response": answer["text"]})
    try:
        with replacing(path, private=False) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise unwritable(path, error, "make room, and run again to write it") from None
