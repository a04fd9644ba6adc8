"""Write a synthetic checkpoint of the true shapes, to measure conversion, loading and speed.

    python bench/synthetic.py FOLDER                        Qwen-VL-Chat: 10 pickle shards, bf16, 19.3 GB
    python bench/synthetic.py FOLDER --format safetensors   the same in safetensors shards
    python bench/synthetic.py FOLDER --text-only            Qwen-7B: 15.4 GB
    python bench/synthetic.py FOLDER --layers 2             two decoder layers and two of the ViT
    python bench/synthetic.py FOLDER --model qwen3-vl-4b    another size (published_vl.py lists them), in safetensors

Names and shapes come from the published configs beside this file; shards of Qwen-VL are split like the published ones.
Values are random with a fixed seed, in magnitudes that keep activations in range. The tokenizer is the published one,
which the test dependency dashscope ships. Tensors are streamed: memory stays below 1 GB.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import ml_dtypes
import numpy as np
import published_vl

from qvl_convert.published import published_shapes
from qvl_runtime.families import family_of
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.tensors import tensors

CONFIGS = Path(__file__).parent / "qwen-vl-chat"
SHARD_BYTES = 2_000_000_000
CHUNK_VALUES = 4 << 20
BF16 = np.dtype(ml_dtypes.bfloat16)
STORAGE_ALIGNMENT = 64
ADDED = tuple(
    f".{layer}.weight"
    for layer in ("c_proj", "out_proj", "o_proj", "down_proj", "attn.proj", "mlp.fc2", "mlp.linear_fc2")
)
"""Suffixes of the matrices whose product is added to the residual stream."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A bf16 tensor to be written."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * BF16.itemsize


def published_order(config: ModelConfig) -> list[Tensor]:
    """All tensors in the order of the published files: decoder, ViT, adapter, output head."""
    visual, first = "transformer.visual.", "transformer.visual.proj"
    rank = {"lm_head.weight": 3, first: 1}
    shapes = published_shapes(tensors(config))
    names = sorted(shapes, key=lambda name: rank.get(name, 2 if name.startswith(visual) else 0))
    return [Tensor(name, shapes[name]) for name in names]


def shards(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Split a checkpoint as published: a shard ends before the tensor that would take it beyond 2 GB."""
    result, size = [[]], 0
    for tensor in tensors:
        if size + tensor.nbytes > SHARD_BYTES:
            result.append([])
            size = 0
        result[-1].append(tensor)
        size += tensor.nbytes
    return result


def _magnitude(name: str, layers: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name.endswith("bias"):
        return 0.0, 0.02
    if ".ln_" in name or "norm" in name:
        return 1.0, 0.1
    # Otherwise the residual stream would grow with the depth.
    if name.endswith(ADDED):
        return 0.0, 0.02 / math.sqrt(2 * layers)
    return 0.0, 0.02


def chunks(tensor: Tensor, seed: int, layers: int) -> Iterator[np.ndarray]:
    """The values of a tensor, flat, a few million at a time, made by two threads."""
    mean, deviation = _magnitude(tensor.name, layers)

    def make(index: int) -> np.ndarray:
        count = min(CHUNK_VALUES, tensor.size - index * CHUNK_VALUES)
        generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode()), index])
        values = generator.standard_normal(count, np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        return values.astype(BF16)

    with ThreadPoolExecutor(2) as pool:
        count = -(-tensor.size // CHUNK_VALUES)
        for first in range(0, count, 2):
            yield from pool.map(make, range(first, min(first + 2, count)))


def write_safetensors(path: Path, tensors: list[Tensor], seed: int, layers: int) -> None:
    """Write one safetensors shard."""
    header, end = {}, 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for chunk in chunks(tensor, seed, layers):
                file.write(chunk.view(np.uint8))


def write_pickle(path: Path, tensors: list[Tensor], seed: int, layers: int) -> None:
    """Write one shard as `torch.save` does: a zip file of a pickle and one record for each storage."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, f"{path.stem}/data.pkl", [pickle_program(tensors)])
        _write_record(archive, f"{path.stem}/byteorder", [b"little"])
        for index, tensor in enumerate(tensors):
            data = (chunk.view(np.uint8) for chunk in chunks(tensor, seed, layers))
            _write_record(archive, f"{path.stem}/data/{index}", data, tensor.nbytes)
        _write_record(archive, f"{path.stem}/version", [b"3\n"])


def _write_record(archive: zipfile.ZipFile, name: str, pieces: Iterable, size: int = 0) -> None:
    record = zipfile.ZipInfo(name)
    record.file_size = size
    head = archive.fp.tell() + 30 + len(name.encode()) + 4
    padding = -head % STORAGE_ALIGNMENT
    record.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(record, "w") as file:
        for piece in pieces:
            file.write(piece)


def pickle_program(tensors: list[Tensor], storage: str = "BFloat16Storage") -> bytes:
    """The pickle of a dictionary of contiguous tensors; storage `i` belongs to tensor `i`."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    program = b"\x80\x02}("
    for index, tensor in enumerate(tensors):
        strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
        program += text(tensor.name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        program += b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(str(index)) + text("cpu")
        program += number(tensor.size) + b"tQ" + number(0)
        program += b"(" + b"".join(map(number, tensor.shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
        program += b"\x89ccollections\nOrderedDict\n)RtR"
    return program + b"u."


def published_config(*, text_only: bool = False, layers: int | None = None) -> dict:
    """The published `config.json`, without vision or with fewer layers if wanted."""
    config = json.loads((CONFIGS / "config.json").read_text())
    if text_only:
        del config["visual"]
    if layers is not None:
        config["num_hidden_layers"] = layers
        if not text_only:
            config["visual"]["layers"] = layers
    return config


def write_checkpoint(
    folder: Path, *, layout: str = "pickle", text_only: bool = False, layers: int | None = None, seed: int = 0
) -> None:
    """Write a whole folder: shards, index, configs, tokenizer.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    layout : str
        "pickle" or "safetensors".
    text_only : bool
        Qwen-7B instead of Qwen-VL-Chat.
    layers : int, optional
        Fewer layers, of the decoder and of the ViT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = published_config(text_only=text_only, layers=layers)
    config = ModelConfig.from_dict(raw)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    shutil.copy(CONFIGS / "generation_config.json", folder)
    shutil.copy(published_vl.ranks_file(), folder)
    write_shards(folder, published_order(config), layout == "pickle", config.num_hidden_layers, seed)


def write_vl_checkpoint(folder: Path, name: str, *, layers: int | None = None, seed: int = 0) -> None:
    """Write a whole folder of one of `published_vl.SIZES`: safetensors shards, index, configs, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = published_vl.config(name, layers)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(published_vl.preprocessing(name), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    published_vl.write_tokenizer(folder, name)
    family = family_of(raw, name)
    config = family.read_config(raw, name)
    shapes = published_shapes(family.tensors(config))
    parts = [Tensor(published_vl.file_name(tensor, name), shape) for tensor, shape in shapes.items()]
    write_shards(folder, parts, False, config.num_hidden_layers, seed)


def write_shards(folder: Path, tensors: list[Tensor], pickled: bool, layers: int, seed: int) -> None:
    """Write tensors and the index of their files."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    parts = shards(tensors)
    index = {}
    for number, part in enumerate(parts, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        (write_pickle if pickled else write_safetensors)(path, part, seed, layers)
        index |= {tensor.name: path.name for tensor in part}
        print(f"{path.name}: {len(part)} tensors, {sum(t.nbytes for t in part) / 1e9:.2f} GB", flush=True)
    total = sum(tensor.nbytes for part in parts for tensor in part)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / f"{stem}.{suffix}.index.json").write_text(text)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("pickle", "safetensors"), default="pickle")
    parser.add_argument("--text-only", action="store_true")
    parser.add_argument("--model", choices=tuple(published_vl.SIZES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.model is not None:
        write_vl_checkpoint(options.folder, options.model, layers=options.layers, seed=options.seed)
        return
    write_checkpoint(
        options.folder,
        layout=options.format,
        text_only=options.text_only,
        layers=options.layers,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
