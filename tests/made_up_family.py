"""A fictitious family: text only, with its own config keys, tensor names and chat template."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np

from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.qwen_vl.family import FAMILY as QWEN_VL
from qvl_runtime.families.reading import take
from qvl_runtime.families.rope import TableRotary, cos_sin, inverse_frequencies
from qvl_runtime.families.specs import MatrixSpec, VectorSpec
from qvl_runtime.inputs.prompt import ChatPrompt, Prompt

NAMES = DecoderNames("words", "floor", "in", "look", "say", "out", "gate", "up", "down", "end", "words")


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    floors: int
    eyes: int
    eye_width: int
    inner: int
    words: int
    sees = False
    norm_eps = 1e-5
    max_position_embeddings = 512
    hidden_size = property(lambda self: self.width)
    num_hidden_layers = property(lambda self: self.floors)
    num_attention_heads = property(lambda self: self.eyes)
    num_key_value_heads = property(lambda self: self.eyes)
    head_dim = property(lambda self: self.eye_width)
    ffn_width = property(lambda self: self.inner)
    vocab_size = property(lambda self: self.words)

    def to_dict(self):
        return {"model_type": "made_up", **dataclasses.asdict(self)}


class Prompts:
    """``<Q>question<A>answer``, in plain text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def build(self, prompt, images, access):
        text = prompt if isinstance(prompt, str) else "".join(f"<Q>{m['content']}" for m in prompt) + "<A>"
        return Prompt(self.tokenizer.encode_ordinary(text), [])

    def answer(self, text):
        return self.tokenizer.encode_ordinary(text)

    def chat(self, query, history, images, *, system, window, access):
        said = "".join(f"<Q>{asked}<A>{answer}" for asked, answer in history or ())
        return ChatPrompt(self.build(f"{said}<Q>{query}<A>", None, access), query, 0)


@functools.lru_cache
def _table(count, width):
    return cos_sin(np.arange(count, dtype=np.float32)[:, None] * inverse_frequencies(width, 500.0))


class MadeUp:
    model_type = "made_up"
    upright = False
    calling = None
    grounding = SimpleNamespace(parse=lambda text, pictures: [])

    def read_config(self, data, where):
        return Config(**{f.name: take(data, f.name, int, where) for f in dataclasses.fields(Config)})

    def title(self, config, generation):
        return "Made-up"

    def tensors(self, config):
        d, heads = config.width, config.eyes * config.eye_width

        def matrix(name, part, n, k):
            return MatrixSpec(name, part, n, k, {f"{name}.weight": n})

        yield matrix("words", "embedding", config.words, d)
        for i in range(config.floors):
            yield VectorSpec(f"floor.{i}.in.weight", "decoder", (d,))
            yield matrix(f"floor.{i}.look", "decoder", 3 * heads, d)
            yield matrix(f"floor.{i}.say", "decoder", d, heads)
            yield VectorSpec(f"floor.{i}.out.weight", "decoder", (d,))
            yield matrix(f"floor.{i}.gate", "decoder", config.inner, d)
            yield matrix(f"floor.{i}.up", "decoder", config.inner, d)
            yield matrix(f"floor.{i}.down", "decoder", d, config.inner)
        yield VectorSpec("end.weight", "decoder", (d,))

    def decoder_names(self, config):
        return NAMES

    def tokenizer(self, ranks, config):
        return QWEN_VL.tokenizer(ranks, SimpleNamespace(visual=None, sees=False, vocab_size=config.words))

    def rotary(self, ops, config, capacity):
        return TableRotary(ops, capacity, lambda count, alpha: _table(count, config.eye_width))

    def prompts(self, tokenizer, config, generation, read):
        return Prompts(tokenizer)

    def describe_vision(self, config, preprocessing):
        return ""

    def stage_of(self, spec):
        return ("decoder", int(spec.name.split(".")[1])) if spec.part == "decoder" else ("embedding", 0)

    def levels(self, config):
        return 1

    def published_name(self, name, config):
        return name

    def read_generation(self, folder):
        return GenerationConfig(chat_format="chatml", max_new_tokens=8)

    def read_ranks(self, folder, config):
        return (folder / "words.txt").read_bytes()

    def read_preprocessing(self, folder, config):
        return {}


FAMILY = MadeUp()
