"""Compare a newer model with llama.cpp on this processor: a prompt, an answer and a picture, in turns in one process.

    pip install llama-cpp-python gguf              # llama.cpp is compiled for this processor
    python bench/family_llama.py write qwen3-vl-4b FOLDER [--vision F16]
    python bench/family_llama.py run MODEL.qvl FOLDER [--only text] [--mapped] [--rounds 3] [--realtime]

`write` makes two GGUF files of a size's true shapes with random values: the decoder as `llama-quantize` makes Q4_K_M,
and the vision part for libmtmd, in Q8_0 (rows of no multiple of 32 values in F16) or F16. `run` times what
`cpu_llama.py run` times, with 2 threads, and a picture of 1024 tokens: ours from pixels to features, theirs the encoder
only. The products of the vision part are compared with the machine's peak for int8 weights. A table, then one
JSON document as the last line.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import published_vl
from cpu_llama import SCALES, Ours, Theirs, add_conditions, compare, conclude
from harness import seconds

from qvl_kernels.cpu.measure import products_per_second
from qvl_runtime.families import family_of
from qvl_runtime.families.qwen2_vl.vocabulary import letters, merges
from qvl_runtime.inputs.tokenizer import read_ranks

SIDE_TOKENS = 32
"""Along each side of the picture."""
BLOCKS = {"Q4_K": 256, "Q6_K": 256, "Q8_0": 32}
THREADS = 2
Entry = tuple[str, tuple[int, ...], str]


def decoder_tensors(name: str) -> Iterator[Entry]:
    """Name, shape and type of every tensor, as `llama-quantize` chooses for Q4_K_M."""
    kind, (heads, kv_heads, hidden, layers, ffn, vocabulary, tied), _ = published_vl.SIZES[name]
    yield "token_embd.weight", (vocabulary, hidden), "Q6_K" if tied else "Q4_K"
    if not tied:
        yield "output.weight", (vocabulary, hidden), "Q6_K"
    yield "output_norm.weight", (hidden,), "F32"
    for i in range(layers):
        eighth = layers // 8
        more = i < eighth or i >= 7 * eighth or (i - eighth) % 3 == 2
        better = "Q6_K" if more else "Q4_K"
        rows = {"q": 128 * heads, "k": 128 * kv_heads, "v": 128 * kv_heads}
        for part, n in rows.items():
            yield f"blk.{i}.attn_{part}.weight", (n, hidden), better if part == "v" else "Q4_K"
            if kind != "qwen3_vl":
                yield f"blk.{i}.attn_{part}.bias", (n,), "F32"
            elif part != "v":
                yield f"blk.{i}.attn_{part}_norm.weight", (128,), "F32"
        yield f"blk.{i}.attn_output.weight", (hidden, 128 * heads), "Q4_K"
        yield f"blk.{i}.ffn_gate.weight", (ffn, hidden), "Q4_K"
        yield f"blk.{i}.ffn_up.weight", (ffn, hidden), "Q4_K"
        yield f"blk.{i}.ffn_down.weight", (hidden, ffn), better
        for norm in ("attn", "ffn"):
            yield f"blk.{i}.{norm}_norm.weight", (hidden,), "F32"


def vision_tensors(name: str, weights: str) -> Iterator[Entry]:
    """The same for the vision part; `weights` is "Q8_0" or "F16"."""
    raw = published_vl.config(name)
    v, newest = family_of(raw, name).read_config(raw, name).visual, raw["model_type"] == "qwen3_vl"

    def linear(base: str, n: int, k: int) -> Iterator[Entry]:
        yield f"{base}.weight", (n, k), weights if k % 32 == 0 else "F16"
        yield f"{base}.bias", (n,), "F32"

    def norm(base: str, width: int) -> Iterator[Entry]:
        yield f"{base}.weight", (width,), "F32"
        if newest:
            yield f"{base}.bias", (width,), "F32"

    patch, merged = raw["vision_config"].get("patch_size", 16 if newest else 14), 4 * v.width
    for suffix in ("weight", "weight.1"):
        yield f"v.patch_embd.{suffix}", (v.width, 3, patch, patch), "F16"
    if newest:
        yield "v.patch_embd.bias", (v.width,), "F32"
        yield "v.position_embd.weight", (48 * 48, v.width), "F32"
    for i in range(v.depth):
        for part in ("ln1", "ln2"):
            yield from norm(f"v.blk.{i}.{part}", v.width)
        if newest:
            yield from linear(f"v.blk.{i}.attn_qkv", 3 * v.width, v.width)
        else:
            for part in "qkv":
                yield from linear(f"v.blk.{i}.attn_{part}", v.width, v.width)
            yield from linear(f"v.blk.{i}.ffn_gate", v.mlp_width, v.width)
        yield from linear(f"v.blk.{i}.attn_out", v.width, v.width)
        yield from linear(f"v.blk.{i}.ffn_up", v.mlp_width, v.width)
        yield from linear(f"v.blk.{i}.ffn_down", v.width, v.mlp_width)
    yield from norm("v.post_ln", v.width)
    yield from linear("mm.0", merged, merged)
    yield from linear("mm.2", v.output_width, merged)
    for i in raw["vision_config"].get("deepstack_visual_indexes", [8, 16, 24] if newest else []):
        yield from norm(f"v.deepstack.{i}.norm", merged)
        yield from linear(f"v.deepstack.{i}.fc1", merged, merged)
        yield from linear(f"v.deepstack.{i}.fc2", v.output_width, merged)


def values(shape: tuple[int, ...], kind: str, random: np.random.Generator) -> np.ndarray:
    """Random codes with constant scales, or numbers near 0; norms are 1 and biases 0."""
    count = int(np.prod(shape))
    if kind == "F32":
        return np.ones(shape, np.float32) if len(shape) == 1 else np.zeros(shape, np.float32)
    if kind == "F16":
        return np.resize(random.normal(0, 0.02, 1 << 20).astype(np.float16), shape)
    where, size, scale = {**SCALES, "Q8_0": ((0, 1), 34, 2e-4)}[kind]
    codes = random.integers(0, 256, (1 << 14, size), np.uint8)
    codes.view(np.float16)[:, where[0] : where[1]] = scale
    return np.resize(codes, (count // BLOCKS[kind], size)).reshape(*shape[:-1], -1)


def write_file(writer: Any, tensors: list[Entry]) -> None:
    """Write the tensors after the metadata that `writer` has."""
    import gguf

    for name, shape, kind in tensors:
        plain = {"F32": np.float32, "F16": np.float16}.get(kind)
        if plain:
            dtype = np.dtype(plain)
            writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        else:
            size = {**SCALES, "Q8_0": ((0, 1), 34, 0.0)}[kind][1]
            stored = (*shape[:-1], shape[-1] // BLOCKS[kind] * size)
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for _, shape, kind in tensors:
        writer.write_tensor_data(values(shape, kind, random))
    writer.close()


def add_tokenizer(writer: Any, name: str, vocabulary: int) -> None:
    """Add the published vocabulary."""
    ranks, alphabet = read_ranks(published_vl.ranks_file().read_bytes()), letters()
    shown = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    forms = published_vl.FORMS[: published_vl.FORM_COUNTS[published_vl.SIZES[name][0]]]
    tokens = [*shown.values(), *forms]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    ordinary, control, unused = 1, 3, 5
    padding = vocabulary - len(ranks) - len(forms)
    writer.add_token_types([ordinary] * len(ranks) + [control] * len(forms) + [unused] * padding)
    writer.add_token_merges([f"{shown[first]} {shown[second]}" for first, second in merges(ranks)])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))


def write(name: str, folder: Path, weights: str) -> None:
    """Write the two GGUF files."""
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    kind, (heads, kv_heads, hidden, layers, ffn, vocabulary, _), _ = published_vl.SIZES[name]
    newest = kind == "qwen3_vl"
    writer = gguf.GGUFWriter(str(folder / "decoder.gguf"), "qwen3vl" if newest else "qwen2vl")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_rope_freq_base(5e6 if newest else 1e6)
    writer.add_rope_dimension_sections([24, 20, 20, 0] if newest else [16, 24, 24, 0])
    writer.add_layer_norm_rms_eps(1e-6)
    if newest:
        writer.add_uint32("qwen3vl.n_deepstack_layers", 3)
    add_tokenizer(writer, name, vocabulary)
    write_file(writer, list(decoder_tensors(name)))

    raw, picture = published_vl.config(name), published_vl.preprocessing(name)
    v = family_of(raw, name).read_config(raw, name).visual
    writer = gguf.GGUFWriter(str(folder / "vision.gguf"), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "qwen3vl_merger" if newest else "qwen2.5vl_merger")
    writer.add_bool("clip.use_gelu" if newest else "clip.use_silu", True)
    numbers = {
        "image_size": 768 if newest else 560,
        "patch_size": picture["patch_size"],
        "embedding_length": v.width,
        "feed_forward_length": v.mlp_width,
        "block_count": v.depth,
        "projection_dim": v.output_width,
        "attention.head_count": v.num_heads,
        "spatial_merge_size": 2,
    }
    for key, number in (numbers if newest else {**numbers, "n_wa_pattern": 8}).items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", picture[key])
    write_file(writer, list(vision_tensors(name, weights)))


# ------------------------------------------------------------------------------------------------ a run
class TheirEncoder:
    """libmtmd's encoder with one picture."""

    def __init__(self, path: str, theirs: Theirs, pixels: np.ndarray):
        from llama_cpp import mtmd_cpp

        self.api = mtmd_cpp
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.n_threads = False, False, THREADS
        settings.warmup = False
        self._context = mtmd_cpp.mtmd_init_from_file(path.encode(), theirs.model, settings)
        if not self._context:
            raise OSError(f"{path}: libmtmd does not load it")
        height, width = pixels.shape[:2]
        data = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
        bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, data)
        text = mtmd_cpp.mtmd_input_text()
        marker = mtmd_cpp.mtmd_default_marker()
        text.text, text.text_len, text.parse_special = marker, len(marker), True
        self._chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd_cpp.mtmd_tokenize(self._context, self._chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError("libmtmd does not take the picture")
        count = mtmd_cpp.mtmd_input_chunks_size(self._chunks)
        chunks = [mtmd_cpp.mtmd_input_chunks_get(self._chunks, i) for i in range(count)]
        self._chunk = max(chunks, key=mtmd_cpp.mtmd_input_chunk_get_n_tokens)
        self.tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(self._chunk)

    def encode(self) -> None:
        if self.api.mtmd_encode_chunk(self._context, self._chunk):
            raise RuntimeError("libmtmd failed to encode")


def vision_products(ours: Ours, rounds: int) -> dict[str, float]:
    """Operations a second of one layer's products over the picture, and their share of the peak, medians in turn."""
    ops, rows = ours.model.ops, 4 * SIDE_TOKENS**2
    weights = [w for part in ours.model.pictures.vision.blocks[0] for w in vars(part).values() if hasattr(w, "bits")]
    random = np.random.default_rng(0)
    calls, operations = [], 2 * rows * sum(w.n * w.k for w in weights)
    for w in weights:
        x, out = random.standard_normal((rows, w.k)).astype(np.float32), ops.empty((rows, w.n))
        calls.append(lambda x=x, w=w, out=out: ops.linear(x, w, out=out))

    def layer() -> None:
        for call in calls:
            call()

    layer()
    peaks, rates = [], []
    for _ in range(rounds):
        peaks.append(products_per_second(ops, 8))
        rates.append(operations / seconds(layer))
    return {
        "ViT GOP/s": float(np.median(rates)) / 1e9,
        "int8 peak GOP/s": float(np.median(peaks)) / 1e9,
        "ViT share": float(np.median(np.array(rates) / peaks)),
    }


def pictures(path: str, folder: Path, theirs: Theirs, rounds: int, realtime: bool) -> dict[str, float]:
    """Seconds of a picture on both sides, in turns."""
    ours = Ours(path, THREADS)
    side = SIDE_TOKENS * ours.model.config.visual.factor
    random = np.random.default_rng(0)

    def pixels() -> np.ndarray:
        return random.integers(0, 256, (side, side, 3), np.uint8)

    encoder = TheirEncoder(str(folder / "vision.gguf"), theirs, pixels())
    found = len(ours.model.encode_image(pixels()))
    if (found, encoder.tokens) != (SIDE_TOKENS**2,) * 2:
        raise RuntimeError(f"the picture has {found} tokens of ours and {encoder.tokens} of theirs")
    if realtime:
        harness.take_processors()
    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        picture = pixels()
        taken["ours"].append(seconds(lambda picture=picture: ours.model.encode_image(picture)))
        taken["theirs"].append(seconds(encoder.encode))
    row = {f"picture {name} s": float(np.median(times)) for name, times in taken.items()}
    row["picture ratio"] = float(np.median(np.array(taken["theirs"]) / taken["ours"]))
    return row | vision_products(ours, rounds)


def run(arguments: argparse.Namespace) -> None:
    theirs = Theirs(str(arguments.folder / "decoder.gguf"), arguments.mapped)
    row: dict[str, Any] = {}
    if "text" in arguments.only:
        row |= compare(arguments.model, theirs, THREADS, arguments.rounds, arguments.realtime)
    if "picture" in arguments.only:
        row |= pictures(arguments.model, arguments.folder, theirs, arguments.rounds, arguments.realtime)
    harness.print_row(row)
    conclude(theirs, arguments.mapped, [row], model=os.path.basename(arguments.model))


def main() -> None:
    parser = harness.parser(__doc__)
    verbs = parser.add_subparsers(required=True)
    writer = verbs.add_parser("write")
    writer.add_argument("name", choices=[name for name in published_vl.SIZES if not name.startswith("qwen2-")])
    writer.add_argument("folder", type=Path)
    writer.add_argument("--vision", choices=["Q8_0", "F16"], default="Q8_0")
    writer.set_defaults(run=lambda a: write(a.name, a.folder, a.vision))
    runner = verbs.add_parser("run")
    runner.add_argument("model")
    runner.add_argument("folder", type=Path)
    runner.add_argument("--only", nargs="+", choices=["text", "picture"], default=["text", "picture"])
    add_conditions(runner)
    runner.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
