"""Readers of the official files: each returns the samples of a task in file order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvl_runtime.errors import QvlError
from qvl_runtime.evaluation.data import LETTERS, REMEDY, Data, Line, Sample
from qvl_runtime.inputs.image_tags import split_images

CYCLE = 1_000_000
"""MMBench repeats a question with rotated options; each rotation adds this to the index."""

LARGEST = 1e9
"""Largest side or coordinate in pixels: what is beyond it cannot be computed with."""
INDEX_DIGITS = 18

Read = Callable[[Data], list[Sample]]


def captions(name: str) -> Read:
    """COCO's JSON: ``images`` of ``id, image`` and ``annotations`` of ``image_id, caption``."""

    def read(data: Data) -> list[Sample]:
        content, spoken = data.json(name), defaultdict(list)
        for item in data.items(content, "annotations", name):
            spoken[item.name("image_id")].append(item.take("caption", str))
        samples = []
        for item in data.items(content, "images", name):
            key = item.name("id")
            if key not in spoken:
                raise item.wrong("has no caption among the annotations")
            pictures = (data.picture(item.take("image", str), item.where),)
            samples.append(Sample(key, item.where, pictures, {}, spoken[key]))
        return samples

    return read


def answered(name: str, truth: Callable[[Line], Any], group: str = "") -> Read:
    """JSONL of ``image, question, question_id``; `truth` extracts the references from a line."""

    def read(data: Data) -> list[Sample]:
        samples = []
        for number, line in enumerate(data.lines(name)):
            # AI2D repeats the picture's name as question_id, and ChartQA has none.
            key = f"{group}{number}"
            picture = data.picture(line.take("image", str), line.where)
            texts = {"question": line.text("question")}
            samples.append(Sample(key, line.where, (picture,), texts, truth(line), group=group))
        return samples

    return read


def questions(name: str) -> Read:
    """JSONL of ``image, question, answer``: one reference or several."""
    return answered(name, lambda line: line.texts("answer"))


def halves(**names: str) -> Read:
    """Several files of `questions`; each is a group."""

    def read(data: Data) -> list[Sample]:
        parts = [answered(name, lambda line: line.texts("answer"), group) for group, name in names.items()]
        found = [part(data) for part in parts]
        for samples, name in zip(found, names.values()):
            if not samples:  # or the score would be that of the others
                raise QvlError(f"{data.folder / name}: holds no question; {REMEDY}")
        return [sample for samples in found for sample in samples]

    return read


def annotated(name: str, annotations: str) -> Read:
    """JSONL of ``image, question, question_id``, with human answers in VQA's annotation file."""

    def read(data: Data) -> list[Sample]:
        people = {}
        for item in data.items(data.json(annotations), "annotations", annotations):
            answers = item.take("answers", list)
            if not answers or not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in answers):
                raise item.wrong("'answers' holds what is no answer")
            people[item.name("question_id")] = answers
        return answered(name, lambda line: _found(people, line, annotations))(data)

    return read


def documents(name: str, annotations: str) -> Read:
    """As `annotated`, with DocVQA's annotations: ``data`` of ``questionId, answers``."""

    def read(data: Data) -> list[Sample]:
        items = data.items(data.json(annotations), "data", annotations)
        right = {item.name("questionId"): item.texts("answers") for item in items}
        return answered(name, lambda line: _found(right, line, annotations))(data)

    return read


def _found(answers: dict[str, Any], line: Line, annotations: str) -> Any:
    key = line.name("question_id")
    if key not in answers:
        raise line.wrong(f"question {key} has no answers in {annotations}")
    return answers[key]


def phrases(name: str) -> Read:
    """JSONL of ``image, sent, bbox, width, height``: a box in pixels, left, top, right, bottom."""

    def read(data: Data) -> list[Sample]:
        samples = []
        for number, line in enumerate(data.lines(name)):
            box, size = line.take("bbox", list), [line.take(key, int, float) for key in ("width", "height")]
            numbers = [*box, *size]
            if len(box) != 4 or not all(isinstance(v, int | float) and abs(v) <= LARGEST for v in numbers):
                raise line.wrong(f"'bbox' is {box!r:.60} on {size!r:.60}, expected four numbers up to {LARGEST:g}")
            if min(size) <= 0 or box[2] <= box[0] or box[3] <= box[1]:
                raise line.wrong(f"the box {box!r:.60} or the size {size} is empty")
            picture = data.picture(line.take("image", str), line.where)
            truth = {"box": box, "size": size}
            samples.append(Sample(str(number), line.where, (picture,), {"phrase": line.text("sent")}, truth))
        return samples

    return read


def choices(name: str) -> Read:
    """JSONL of ``image, hint, question, choices, answer``; the answer is an index."""

    def read(data: Data) -> list[Sample]:
        return [
            _choice(line, str(number), data.picture(line.take("image", str), line.where), line.take("answer", int))
            for number, line in enumerate(data.lines(name))
        ]

    return read


def _choice(line: Line, key: str, picture: Path | bytes, answer: int, unit: str = "") -> Sample:
    options = line.texts("choices")
    if not 0 <= answer < len(options) <= len(LETTERS):
        raise line.wrong(f"the answer {answer} is none of {len(options)} choices, of which there may be {len(LETTERS)}")
    if any("<img>" in option or "</img>" in option for option in options):
        raise line.wrong("'choices' holds an image tag")
    letters = tuple(LETTERS[: len(options)])
    texts = {
        "hint": line.text("hint") or "N/A",
        "question": line.text("question"),
        "options": "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options)),
    }
    return Sample(key, line.where, (picture,), texts, letters[answer], letters, unit)


def circular(stem: str) -> Read:
    """MMBench: the official table with embedded pictures, or the JSONL of Qwen-VL's converter.

    A unit is a question with all rotations of its options.
    """

    def read(data: Data) -> list[Sample]:
        if data.exists(f"{stem}.jsonl"):
            lines = [(line, line.take("index", int)) for line in data.lines(f"{stem}.jsonl")]
            rows = [
                _choice(
                    line,
                    str(index),
                    data.picture(line.take("image", str), line.where),
                    line.take("answer", int),
                    str(index % CYCLE),
                )
                for line, index in lines
            ]
        else:
            needed = ("index", "question", "hint", "A", "B", "answer", "image")
            rows = [_table_choice(data, line) for line in data.table(f"{stem}.tsv", needed)]
        return rows

    return read


def _table_choice(data: Data, line: Line) -> Sample:
    options = [line[letter] for letter in LETTERS if line.get(letter)]
    if not line["index"].isdecimal() or len(line["index"]) > INDEX_DIGITS:
        raise line.wrong(f"'index' is {line['index']!r:.40}, expected a number")
    if line["answer"] not in tuple(LETTERS[: len(options)]):
        raise line.wrong(f"'answer' is {line['answer']!r:.40}, expected the letter of a choice")
    index, answer = int(line["index"]), LETTERS.index(line["answer"])
    made = Line({**line, "choices": options}, line.where)
    return _choice(made, str(index), data.embedded(line, "image"), answer, str(index % CYCLE))


def prompted(name: str) -> Read:
    """SEED-Bench's JSONL of ``question_id, prompt, answer``: a prompt with its pictures, and a letter."""

    def read(data: Data) -> list[Sample]:
        samples = []
        for line in data.lines(name):
            try:
                pieces = split_images(line.take("prompt", str))
            except QvlError as error:
                raise line.wrong(str(error)) from None
            if len(pieces) < 3:
                raise line.wrong("the prompt holds no picture")
            pictures = tuple(data.picture(source, line.where) for source in pieces[1::2])
            letters = tuple(LETTERS[:4])
            if line.take("answer", str) not in letters:
                raise line.wrong(f"'answer' is {line['answer']!r:.40}, expected one of {', '.join(letters)}")
            texts = {"prompt": "<img></img>".join(pieces[0::2])}
            samples.append(Sample(line.name("question_id"), line.where, pictures, texts, line["answer"], letters))
        return samples

    return read


def yes_no(folder: str, subtasks: tuple[str, ...]) -> Read:
    """MME: one file per subtask, of ``picture, question, Yes or No``; the two questions of a picture are a unit."""

    def read(data: Data) -> list[Sample]:
        samples = []
        for name in data.names(f"{folder}/Your_Results", ".txt"):
            subtask = Path(name).stem
            if subtask not in subtasks:
                continue
            asked: Counter[str] = Counter()
            for where, (image, question, truth) in data.rows(name, 3):
                line = Line({"question": question, "truth": truth}, where)
                if truth.lower() not in ("yes", "no"):
                    raise line.wrong(f"the answer is {truth!r:.40}, expected Yes or No")
                unit = f"{subtask}/{image}"
                picture = data.picture(f"{folder}/images/{unit}", where)
                texts = {"question": line.text("question")}
                key = f"{unit} {asked[image]}"
                samples.append(Sample(key, where, (picture,), texts, truth.lower(), unit=unit, group=subtask))
                asked[image] += 1
            odd = [image for image, count in asked.items() if count != 2]
            if odd:
                raise QvlError(f"{data.folder / name}: picture {odd[0]!r:.80} has not two questions; {REMEDY}")
        missing = set(subtasks) - {sample.group for sample in samples}
        if missing:
            raise QvlError(f"{data.folder / folder}/Your_Results: has no {min(missing)}.txt; download it there")
        return samples

    return read


def conversations(name: str) -> Read:
    """TouchStone's table: a picture, a question, and fields for its judge; the whole row is the reference."""

    def read(data: Data) -> list[Sample]:
        needed = ("index", "question", "human_annotation", "gpt4_ha_answer", "category", "task_name", "image")
        samples = []
        for line in data.table(name, needed):
            row = {key: line[key] for key in needed if key != "image"}
            picture = data.embedded(line, "image")
            samples.append(Sample(row["index"], line.where, (picture,), {"question": line.text("question")}, row))
        return samples

    return read
