"""Readers of the official files: hand-made examples of every format, and the errors of broken ones."""

from __future__ import annotations

import base64
import csv
import json
import math
from pathlib import Path

import pytest
from evaluation_files import choice, make, mme, put, qa
from PIL import Image

import qvl_runtime as qvl
from qvl_runtime.evaluation.data import Data, check_pictures, unique
from qvl_runtime.evaluation.prompts import CHAT, FIELDS, RAW, TALK
from qvl_runtime.evaluation.runner import questions
from qvl_runtime.evaluation.tasks import COGNITION, TASKS, find

PEOPLE = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make(tmp_path / "data")


def read(folder: Path, task: str):
    return unique(TASKS[task].read(Data(folder)))


def annotations(folder: Path, name: str) -> None:
    put(folder, name, {"annotations": [{"question_id": 7, "answers": PEOPLE, "question_type": "what"}]})


def test_captions(folder):
    content = {
        "images": [{"id": 3, "image": "data/pictures/a.png"}, {"id": 5, "image": "pictures/b.png"}],
        "annotations": [{"image_id": i, "id": n, "caption": f"c{n}"} for n, i in enumerate([3, 5, 3])],
    }
    for task, name in (("nocaps", "nocaps/nocaps_val.json"), ("flickr30k", "flickr30k/flickr30k_karpathy_test.json")):
        put(folder, name, content)
        found = read(folder, task)
        assert [sample.truth for sample in found] == [["c0", "c2"], ["c1"]]
        assert [sample.pictures[0].name for sample in found] == ["a.png", "b.png"], "with data/ before it or without"
    put(folder, "nocaps/nocaps_val.json", {**content, "annotations": content["annotations"][:1]})
    with pytest.raises(qvl.QvlError, match=r"nocaps_val.json images\[1\]: has no caption"):
        read(folder, "nocaps")


@pytest.mark.parametrize(
    ("task", "stem", "judged"),
    [
        ("vqav2", "vqav2/vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json"),
        ("okvqa", "okvqa/okvqa_val", "okvqa/mscoco_val2014_annotations.json"),
        ("textvqa", "textvqa/textvqa_val", "textvqa/textvqa_val_annotations.json"),
        ("vizwiz", "vizwiz/vizwiz_val", "vizwiz/vizwiz_val_annotations.json"),
    ],
)
def test_questions_with_peoples_answers(folder, task, stem, judged):
    put(folder, f"{stem}.jsonl", qa(), "", qa("b.png"))
    annotations(folder, judged)
    found = read(folder, task)
    assert [sample.truth for sample in found] == [PEOPLE, PEOPLE]
    assert found[0].texts == {"question": "What?"} and found[1].where.endswith("line 3")
    put(folder, f"{stem}.jsonl", qa(question_id=8))
    with pytest.raises(qvl.QvlError, match="line 1: question 8 has no answers in"):
        read(folder, task)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("gqa", "gqa/testdev_balanced.jsonl"),
        ("ocrvqa", "ocrvqa/ocrvqa_test.jsonl"),
        ("ai2d", "ai2diagram/test.jsonl"),
    ],
)
def test_questions_with_their_answer(folder, task, name):
    put(folder, name, qa(answer="cat"), qa(answer=["a cat", "cat"]))
    assert [sample.truth for sample in read(folder, task)] == [["cat"], ["a cat", "cat"]]


def test_documents(folder):
    put(folder, "docvqa/val.jsonl", qa())
    put(folder, "docvqa/val/val_v1.0.json", {"dataset_name": "d", "data": [{"questionId": 7, "answers": ["x", "y"]}]})
    assert read(folder, "docvqa")[0].truth == ["x", "y"]


def test_chartqa_in_halves(folder):
    lines = [
        {"image": "data/pictures/a.png", "question": "How much?", "question_id": 1, "answer": str(i)} for i in (1, 2)
    ]
    put(folder, "chartqa/test_human.jsonl", lines[0])
    put(folder, "chartqa/test_augmented.jsonl", *lines)
    found = read(folder, "chartqa")
    assert [(sample.group, sample.truth) for sample in found] == [
        ("human", ["1"]), ("augmented", ["1"]), ("augmented", ["2"]),
    ]  # fmt: skip
    put(folder, "chartqa/test_augmented.jsonl", "")
    with pytest.raises(qvl.QvlError, match=r"test_augmented.jsonl: holds no question"):
        read(folder, "chartqa")


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("refcoco")])
def test_phrases(folder, task):
    name = f"{task.partition('_')[0]}/{task}.jsonl"
    line = {"image": "data/pictures/a.png", "sent": "the cat", "bbox": [1, 1.5, 4, 5], "width": 8, "height": 6}
    put(folder, name, line)
    found = read(folder, task)[0]
    assert found.texts == {"phrase": "the cat"} and found.truth == {"box": [1, 1.5, 4, 5], "size": [8, 6]}
    for broken in (
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, "4"]},
        {"bbox": [4, 1, 1, 5]},
        {"width": 0},
        {"sent": None},
        {"bbox": [0, 0, 10, 10**400]},
        {"height": math.inf},
    ):
        put(folder, name, line, line | broken)
        with pytest.raises(qvl.QvlError, match=r"jsonl line 2: "):
            read(folder, task)


def test_scienceqa(folder):
    put(folder, "scienceqa/scienceqa_test_img.jsonl", choice(), choice(hint="Look.", choices=["x", "y", "z"], answer=0))
    first, second = read(folder, "scienceqa")
    assert first.texts == {"hint": "N/A", "question": "Which?", "options": "A. x\nB. y"}
    assert (first.truth, first.letters, second.truth) == ("B", ("A", "B"), "A") and second.texts["hint"] == "Look."
    assert RAW["choice"].format_map(first.texts) == (
        "<img></img>Context: N/A\nQuestion: Which?\nOptions: A. x\nB. y\nAnswer:"
    )
    for broken in ({"answer": 2}, {"answer": -1}, {"answer": True}, {"choices": []}, {"choices": ["x"] * 6}):
        put(folder, "scienceqa/scienceqa_test_img.jsonl", choice(), choice(**broken))
        with pytest.raises(qvl.QvlError, match=r"jsonl line 2: "):
            read(folder, "scienceqa")


def test_mmbench_as_published_and_as_converted(folder):
    stem = "mmbench/mmbench_dev_20230712/mmbench_dev_20230712"
    picture = base64.b64encode((folder / "pictures/a.png").read_bytes()).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource"
    rows = [f'{i}\t"Which\none?"\t\tx\ty\t\t\t{answer}\tc\t{picture}\ts' for i, answer in ((4, "B"), (1000004, "A"))]
    put(folder, f"{stem}.tsv", head, *rows)
    csv.field_size_limit(10)
    found = read(folder, "mmbench_dev")
    assert csv.field_size_limit() < 1 << 31  # the C long of Windows
    assert [(s.id, s.unit, s.truth, s.letters) for s in found] == [
        ("4", "4", "B", ("A", "B")), ("1000004", "4", "A", ("A", "B")),
    ]  # fmt: skip
    assert found[0].texts["question"] == "Which\none?"
    assert found[0].pictures == ((folder / "pictures/a.png").read_bytes(),)
    put(folder, f"{stem}.tsv", head, rows[0].replace("\tB\tc", "\tD\tc"))
    with pytest.raises(qvl.QvlError, match=r"tsv line 3: 'answer' is 'D'"):
        read(folder, "mmbench_dev")
    put(folder, f"{stem}.tsv", head, rows[0], "4" * 5000 + rows[1].removeprefix("1000004"))
    with pytest.raises(qvl.QvlError, match=r"tsv line 5: 'index' is '4444.*, expected a number"):
        read(folder, "mmbench_dev")
    put(folder, f"{stem}.jsonl", choice(index=4), choice(index=1000004, answer=0))
    assert [(s.id, s.unit, s.truth) for s in read(folder, "mmbench_dev")] == [("4", "4", "B"), ("1000004", "4", "A")]


def test_seed_bench(folder):
    frames = "".join(f"<img>pictures/{name}</img>\n" for name in ("a.png", "b.png", "a.png", "b.png"))
    for task, prompt in (("seed_image", "<img>data/pictures/a.png</img>\nQuestion: Q"), ("seed_video", frames + "Q")):
        name = {"seed_image": "image_input", "seed_video": "video_input_4"}[task]
        put(folder, f"seed_bench/{name}.jsonl", {"question_id": "v0", "prompt": prompt, "answer": "C"})
        found = read(folder, task)[0]
        assert found.id == "v0" and found.truth == "C" and found.letters == ("A", "B", "C", "D")
        assert [picture.name for picture in found.pictures] == ["a.png", "b.png", "a.png", "b.png"][
            : prompt.count("<img>")
        ]
        assert found.texts["prompt"].count("<img></img>\n") == len(found.pictures)
    for broken in ("Error in decoding", "<img>pictures/a.png", "<img>../x.png</img>\nQ"):
        put(folder, "seed_bench/image_input.jsonl", {"question_id": "v0", "prompt": broken, "answer": "C"})
        with pytest.raises(qvl.QvlError, match=r"image_input.jsonl line 1: "):
            read(folder, "seed_image")


def test_mme(folder):
    mme(folder)
    found = read(folder, "mme_cognition")
    assert [(s.group, s.truth) for s in found[:2]] == [("code_reasoning", "yes"), ("code_reasoning", "no")]
    assert {s.unit for s in found} == {f"{subtask}/a.png" for subtask in COGNITION}
    assert len(read(folder, "mme_perception")) == 20 and len(check_pictures(found)) == 4
    question = "Is it\u2028red\x85or\x0bblue?"  # only "\\n" ends a line
    put(folder, "mme/Your_Results/OCR.txt", f"a.png\t{question}\tYes\r", f"a.png\t{question}\tNo")
    assert [s.texts["question"] for s in read(folder, "mme_perception") if s.group == "OCR"] == [question] * 2
    put(folder, "mme/Your_Results/OCR.txt", "a.png\tIs it?\tYes", "a.png\tIs it")
    with pytest.raises(qvl.QvlError, match=r"OCR.txt line 2: has 2 columns instead of 3"):
        read(folder, "mme_perception")
    put(folder, "mme/Your_Results/OCR.txt", "a.png\tIs it?\tYes")
    with pytest.raises(qvl.QvlError, match=r"OCR.txt: picture 'a.png' has not two questions"):
        read(folder, "mme_perception")
    (folder / "mme/Your_Results/OCR.txt").unlink()
    with pytest.raises(qvl.QvlError, match=r"has no OCR.txt"):
        read(folder, "mme_perception")


def test_touchstone(folder):
    picture = base64.b64encode((folder / "pictures/a.png").read_bytes()).decode()
    head = "index\tquestion\thuman_annotation\tgpt4_ha_answer\tcategory\ttask_name\timage"
    put(folder, "touchstone/touchstone_20230831.tsv", head, f'0\tWhat?\t"a\tb"\tcat\tc\tt\t{picture}')
    found = read(folder, "touchstone")[0]
    assert found.texts == {"question": "What?"} and found.truth["human_annotation"] == "a\tb"
    put(folder, "touchstone/touchstone_20230831.tsv", head, "0\tWhat?\tx\ty\tc\tt\t***")
    with pytest.raises(qvl.QvlError, match=r"tsv line 2: 'image' is no base64"):
        read(folder, "touchstone")
    put(folder, "touchstone/touchstone_20230831.tsv", head, "0\tWhat?\tx\ty\tc\tt")
    with pytest.raises(qvl.QvlError, match=r"tsv line 2: has not the 7 columns"):
        read(folder, "touchstone")
    put(folder, "touchstone/touchstone_20230831.tsv", head.replace("category", "kind"))
    with pytest.raises(qvl.QvlError, match=r"tsv line 1: has no column 'category'"):
        read(folder, "touchstone")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"image": "a.png"', "is not readable as JSON"),
        ("[1]", "holds no JSON object"),
        (json.dumps({"image": "pictures/a.png"}), "has no 'question'"),
        (json.dumps(qa(answer=3)), "'answer' is 3, expected str or list"),
        (json.dumps(qa(answer=[])), "'answer' is"),
        (json.dumps(qa(answer="x", question="<img>/etc/passwd</img>What?")), "'question' holds an image tag"),
        (json.dumps(qa(answer="x") | {"image": "../secret.png"}), "does not lie below"),
        (json.dumps(qa(answer="x") | {"image": "/etc/passwd"}), "does not lie below"),
        (json.dumps(qa(answer="x") | {"image": ""}), "does not lie below"),
        (json.dumps(qa(answer="x", question="\ud800")), "which no file can hold"),
        (json.dumps(qa(answer="x") | {"image": "data/../../secret.png"}), "does not lie below"),
    ],
)
def test_a_broken_line_is_named_by_its_number(folder, line, said):
    put(folder, "gqa/testdev_balanced.jsonl", qa(answer="x"), "", line)
    with pytest.raises(qvl.QvlError, match=r"testdev_balanced\.jsonl line 3") as caught:
        read(folder, "gqa")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_link_leads_out_of_the_folder(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "outside.png")
    put(folder, "gqa/testdev_balanced.jsonl", qa("link.png", answer="x"))
    with pytest.raises(qvl.QvlError, match=r"line 1: picture .* does not lie below"):
        read(folder, "gqa")


def test_missing_pictures_and_files_are_named(folder):
    put(folder, "gqa/testdev_balanced.jsonl", *(qa(f"{i}.png", answer="x") for i in range(5)))
    with pytest.raises(qvl.QvlError, match=r"5 pictures are missing: .*0.png \(.*line 1\), .*2.png .* and 2 more"):
        questions(TASKS["gqa"], folder)
    put(folder, "gqa/testdev_balanced.jsonl", qa("a" * 5000, answer="x"))
    with pytest.raises(qvl.QvlError, match=r"1 pictures are missing: .*…a{20} \(.*line 1\)"):
        questions(TASKS["gqa"], folder)
    with pytest.raises(qvl.QvlError, match=r"test.jsonl: no such file; download it there"):
        questions(TASKS["ai2d"], folder)
    with pytest.raises(qvl.QvlError, match="is no folder"):
        questions(TASKS["ai2d"], folder / "nowhere")


def test_an_id_stands_once(folder):
    put(
        folder,
        "seed_bench/image_input.jsonl",
        *[{"question_id": 1, "prompt": "<img>pictures/a.png</img>", "answer": "A"}] * 2,
    )
    with pytest.raises(qvl.QvlError, match=r"line 2: has the id '1' of .*line 1"):
        questions(TASKS["seed_image"], folder)


def test_a_draw_takes_whole_units_and_is_the_same_again(folder):
    mme(folder)
    asked = questions(TASKS["mme_cognition"], folder, limit=2, seed=3)
    assert len(asked.samples) == 4 and len({sample.unit for sample in asked.samples}) == 2
    assert asked.samples == questions(TASKS["mme_cognition"], folder, limit=2, seed=3).samples
    others = [questions(TASKS["mme_cognition"], folder, limit=2, seed=seed) for seed in range(5)]
    assert any(other.samples != asked.samples for other in others)
    assert len({other.fingerprint["samples"] for other in (asked, *others)}) > 1


def test_every_task_has_prompts_and_a_misspelt_one_a_hint():
    for task in TASKS.values():
        assert task.prompt in FIELDS and task.prompt in CHAT and task.prompt in {**RAW, **TALK}
        assert (task.longest > 0) != (task.prompt in ("choice", "ready"))
    with pytest.raises(qvl.QvlError, match=r"'vqa2' is no task; vqav2\?; there are flickr30k"):
        find("vqa2")
