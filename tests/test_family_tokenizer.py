"""Vocabularies of the newer families: read from either kind of file, stored, and compared with the golden ids."""

import base64
import copy
import json
import shutil

import pytest
from families import CHECKPOINTS, GOLDEN, read
from text_golden import real_ranks

from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen2_vl.vocabulary import Vocabulary, read_vocabulary
from qvl_runtime.inputs.tokenizer import Tokenizer, read_ranks

TINY = read("tok/tiny.json")
FOLDERS = {"q2": "q2-tied", "q25": "q25-tied", "q3": "q3-tied"}


def folder(name: str):
    return GOLDEN / "ckpt" / name


@pytest.mark.parametrize("family", FOLDERS)
def test_tiny_vocabulary(family):
    ranks, special = read_vocabulary(folder(FOLDERS[family]))
    assert special == TINY[family]["special"]
    tokenizer = Tokenizer(ranks, special, 768)
    for case in TINY[family]["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_full_vocabulary():
    """The real vocabulary, with the forms that Qwen3-VL has from 151643 on."""
    special = {form: 151643 + i for i, form in enumerate(TINY["q3"]["special"])}
    tokenizer = Tokenizer(read_ranks(real_ranks()), special, 151936)
    for case in read("tok/full.json")["q3"]["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files_agree(name, tmp_path):
    """`vocab.json` with `merges.txt`, `tokenizer.json` and the blob's form of it give the same tokenizer."""
    vocabulary = read_vocabulary(folder(name))
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder(name) / file, tmp_path)
    assert read_vocabulary(tmp_path) == vocabulary
    assert Vocabulary.from_bytes(vocabulary.to_bytes()) == vocabulary


def test_merges_as_text(tmp_path):
    data = read("ckpt/q3-tied/tokenizer.json")
    joined = {**data, "model": {**data["model"], "merges": [" ".join(pair) for pair in data["model"]["merges"]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(joined))
    assert read_vocabulary(tmp_path) == read_vocabulary(folder("q3-tied"))


def test_special_forms_end_normalization():
    """A combining character after a special token does not become part of it."""
    tokenizer = Tokenizer(*read_vocabulary(folder("q3-tied")))
    tail = tokenizer.encode_ordinary("\u0338x")
    assert tokenizer.encode("<|im_end|>\u0338x") == [tokenizer.im_end_id, *tail]


def test_tokens_that_a_fine_tune_added(tmp_path):
    """transformers' `add_tokens` makes them with ``normalized: true``."""
    data = copy.deepcopy(read("ckpt/q2-tied/tokenizer.json"))
    plain = data["added_tokens"][0] | {"special": False, "normalized": True}
    first = max(token["id"] for token in data["added_tokens"]) + 1
    for i, form in enumerate(("<loc1>", "<loc12>")):
        data["added_tokens"].append(plain | {"id": first + i, "content": form})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer(*read_vocabulary(tmp_path))
    one, two = tokenizer.encode_ordinary("a"), tokenizer.encode_ordinary("\u00e9")
    assert tokenizer.encode("a<loc12>e\u0301<loc1>") == [*one, first + 1, *two, first]


CHANGES = [
    (lambda d: d["model"].update(type="Unigram"), "'type' is 'Unigram'"),
    (lambda d: d["model"].update(merges=None), "'merges' is missing"),
    (lambda d: d["model"]["merges"].pop(), "443 merges for 700 tokens"),
    (lambda d: d["model"]["merges"].reverse(), "merge 1, .* does not make the token 256"),
    (lambda d: d["model"]["merges"].__setitem__(5, ["e"]), "merge 6, .'e'., does not"),
    (lambda d: d["model"]["merges"].__setitem__(5, 7), "merge 6"),
    (lambda d: d["model"]["vocab"].update({"\u4f60": 700}), "letters"),
    (lambda d: d["model"]["vocab"].update({"zzzz": 800}), "gaps"),
    (lambda d: d["model"]["vocab"].update({"e": "e"}), "gaps"),
    (lambda d: d.update(normalizer=None), "'normalizer' is None"),
    (lambda d: d.update(pre_tokenizer={"type": "ByteLevel"}), "another pattern"),
    (lambda d: d["pre_tokenizer"].update(pretokenizers=True), "splits text by another pattern"),
    (lambda d: d["added_tokens"].append({"content": "<x>"}), "an added token is"),
    (lambda d: d["added_tokens"][0].update(id=-1), "'id': -1"),
    (lambda d: d["added_tokens"][0].update(content="\ud800"), "an added token is"),
    (lambda d: d["added_tokens"].append(d["added_tokens"][0]), "each once"),
    (lambda d: d["added_tokens"][0].update(lstrip=True), "'lstrip' is True"),
    (lambda d: d["added_tokens"][0].update(content="<\u00e9>", normalized=True), "'normalized' is True"),
    (lambda d: d.pop("added_tokens"), "'added_tokens' is missing"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_refused(change, message, tmp_path):
    data = copy.deepcopy(read("ckpt/q3-tied/tokenizer.json"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(QvlError, match=message):
        read_vocabulary(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(QvlError, match=r"vocab\.json: no such file"):
        read_vocabulary(tmp_path)
    shutil.copy(folder("q2-tied") / "vocab.json", tmp_path)
    with pytest.raises(QvlError, match=r"merges\.txt: no such file"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("key", ["x", "-1", "1.5", "9" * 5000])
def test_an_added_token_whose_id_is_no_number(key, tmp_path):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(folder("q2-tied") / file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {key: {"content": "<x>"}}}))
    with pytest.raises(QvlError, match=r"tokenizer_config\.json: an added token is"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("line", [b"!! 1", b"YQ== x", b"YQ=="])
def test_broken_special_line(line):
    data = read_vocabulary(folder("q2-tied")).to_bytes()
    with pytest.raises(QvlError, match="special token"):
        Vocabulary.from_bytes(data + line + b"\n")


def test_ids_that_contradict():
    ranks, special = read_vocabulary(folder("q2-tied"))
    with pytest.raises(QvlError, match="id 699"):
        Tokenizer(ranks, {**special, "<x>": 699})
    with pytest.raises(QvlError, match="no '<|im_end|>'".replace("|", r"\|")):
        Tokenizer(ranks, {form: i for form, i in special.items() if form != "<|im_end|>"})
    with pytest.raises(QvlError, match="special tokens are too long"):
        Tokenizer(ranks, {**special, "x" * 1_000_000: 730})
    with pytest.raises(QvlError, match="vocab_size is 710"):
        Tokenizer(ranks, special, 710)
    assert Tokenizer(ranks, special, 768).decode([713, 714, 767]) == "<|video_pad|>"
    assert base64.b64encode(b"<|im_end|>") in Vocabulary(ranks, special).to_bytes()
