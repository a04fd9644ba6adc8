"""What the tests of the text side share: vocabularies, and the notation of the golden ids."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from qvl_runtime.families.qwen_vl.tokenizer import QwenTokenizer

GOLDEN = Path(__file__).parent / "golden"
TINY_RANKS = (GOLDEN / "ckpt/tiny-vl/qwen.tiktoken").read_bytes()
TINY = QwenTokenizer.from_ranks(TINY_RANKS, image_tags=True, vocab_size=640)
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def real_ranks() -> bytes:
    """The published vocabulary, which the package dashscope ships."""
    dashscope = importlib.util.find_spec("dashscope")
    if dashscope is None:
        pytest.skip("the real vocabulary comes with the package dashscope")
    data = (Path(dashscope.origin).parent / "resources/qwen.tiktoken").read_bytes().replace(b"\r\n", b"\n")
    assert hashlib.sha256(data).hexdigest() == RANKS_SHA256
    return data


def read(name: str) -> dict:
    """A file of golden/tok."""
    return json.loads((GOLDEN / "tok" / name).read_text(encoding="utf-8"))


def expand(runs: list) -> list[int]:
    """Undo the run-length notation of the golden ids."""
    return [i for run in runs for i in ([run[0]] * run[1] if isinstance(run, list) else [run])]


def pad_slots(ids: list[int], tokenizer: QwenTokenizer) -> list[int]:
    """Replace the path bytes that the original writes into an image slot."""
    out, inside = [], False
    for i in ids:
        if i == tokenizer.img_end_id:
            inside = False
        out.append(tokenizer.img_pad_id if inside else i)
        if i == tokenizer.img_start_id:
            inside = True
    return out
