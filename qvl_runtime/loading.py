"""Opening a `.qvl` file for use."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator

from qvl_kernels.ops import Ops
from qvl_runtime.backends import backend, check_fit, free_bytes, make_ops, tune
from qvl_runtime.blob import Blob
from qvl_runtime.budget import DEFAULT_WINDOW, KV_CACHES, VISION_PARTS
from qvl_runtime.engine.kv_file import identity
from qvl_runtime.engine.prefix_cache import PrefixCache
from qvl_runtime.engine.scheduler import MAX_BATCH, Scheduler
from qvl_runtime.errors import QvlError
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.picture_cache import MEMORY_BYTES, PictureCache
from qvl_runtime.inputs.pictures import PictureEncoder, PictureReader
from qvl_runtime.model import Model
from qvl_runtime.options import batch_size, whole_number

FEATURES_VERSION = 4
"""Increment when preprocessing or the vision part's arithmetic changes: this invalidates features on disk."""


def load(
    path: str | os.PathLike,
    device: str = "auto",
    kv_cache: str = "fp16",
    *,
    check: bool = False,
    activations: str = "auto",
    context: int | None = None,
    vision_device: str | None = None,
    conversations: int = 1,
    max_batch: int = MAX_BATCH,
    prompts_first: bool = False,
    kv_cache_bytes: int | None = None,
    image_cache_bytes: int = MEMORY_BYTES,
    cache_dir: str | os.PathLike | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    exif: bool | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Model:
    """Open a `.qvl` file.

    Parameters
    ----------
    path : path
        A file made by ``qvl convert``.
    device : str
        "auto" (a usable GPU, or else the CPU), "cpu", "cuda", or "reference" (slow, plain numpy).
    kv_cache : str
        "fp16", or "int8" for half the memory.
    check : bool
        Verify the hash of every tensor first.
    activations : str
        On the CPU, the bits that activations have in products of more than 16 rows: "int16", "int8" (about twice as
        fast), or "auto": int8 for matrices of more than a million weights. With int16 a continued conversation gives
        the same answer as one that is computed again, bit for bit. With int8 it may choose another of two nearly
        equal tokens: generated tokens were computed one by one, with 16 bits; as part of a prompt they use 8.
    context : int, optional
        Limit for prompt and answer together, in tokens; by default the model's window, but at most 32,768. The cache
        grows with the conversation. On a GPU, loading first checks that the cache fits; by default for 2048 tokens.
    vision_device : str, optional
        Another device for the vision part, as `device`: "cpu" saves 2 GB of GPU memory.
    conversations : int
        Number of sequences (keys and values of a prompt and its answer) to cache between calls. A prompt that shares
        a prefix with one of them computes only the rest. 0 disables the prefix cache.
    max_batch : int
        Largest number of concurrent answers, up to 16; others wait.
    prompts_first : bool
        Compute whole prompts before the next tokens of running answers: more answers a second, at uneven speed.
    kv_cache_bytes : int, optional
        Limit for the keys and values of concurrent answers, at their full length. Other requests wait in order. A
        single answer may exceed the limit. By default half of the memory that is free beside the model.
    image_cache_bytes : int
        Limit of the picture cache in memory (4 MiB a picture in Qwen-VL).
    cache_dir : path, optional
        A folder that stores these features between runs, at most 2 GiB.
    min_pixels, max_pixels : int, optional
        Limits of a picture's size in pixels, for models with variable sizes: by default those of the file, with at
        most 1280 tokens a picture.
    exif : bool, optional
        Whether to apply the EXIF orientation of a picture; by default as the published processing does: not for the
        models of 2023, always for later ones.
    progress : callable
        Called with the bytes of every upload to a GPU. On a CPU the file is mapped, and nothing is copied.

    Raises
    ------
    QvlError
        If the file is damaged or an argument is invalid.
    DeviceError
        If the device is missing or has too little memory.
    """
    if kv_cache not in KV_CACHES:
        raise QvlError(f"kv_cache {kv_cache!r} is unknown; choose one of {', '.join(KV_CACHES)}")
    if context is not None:
        whole_number("context", context, 1)
    for name, value in (("conversations", conversations), ("image_cache_bytes", image_cache_bytes)):
        whole_number(name, value)
    batch_size(max_batch)
    for name, number in (("kv_cache_bytes", kv_cache_bytes), ("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if number is not None:
            whole_number(name, number)
    blob = Blob(path)
    if context is not None and context > blob.config.max_position_embeddings:
        raise QvlError(
            f"context is {context}; the model's window is {blob.config.max_position_embeddings} tokens: choose no more"
        )
    if check:
        blob.check()
    ops = make_ops(device, activations, progress)
    vision_ops = ops
    if vision_device is not None and backend(vision_device)[0] != ops.name:
        vision_ops = make_ops(vision_device, activations)
    check_fit(ops, blob, context, kv_cache, vision=vision_ops is ops)
    tune(ops, blob)
    family, config = blob.family, blob.config
    window = min(config.max_position_embeddings, DEFAULT_WINDOW) if context is None else context
    decoder = Decoder(Weights(blob, ops), family.decoder_names(config), family.rotary, window)
    with _naming(blob):
        tokenizer = family.tokenizer(blob.ranks, config)
    pictures = None
    if config.sees:
        reader = _picture_reader(blob, vision_ops, activations, min_pixels, max_pixels, exif)
        cache = PictureCache(config.hidden_size, image_cache_bytes, cache_dir)
        pictures = PictureEncoder(reader, family.vision(Weights(blob, vision_ops)), ops, cache)
    if kv_cache_bytes is None:
        kv_cache_bytes = free_bytes(ops, blob) // 2
    return Model(
        blob,
        tokenizer,
        Scheduler(
            PrefixCache(decoder, kv_cache, conversations),
            max_batch=max_batch,
            room=kv_cache_bytes,
            prompts_first=prompts_first,
        ),
        pictures,
        window=window,
        identity=identity(blob.hashes(), config.to_dict(), ops.name, activations, kv_cache),
    )


def _picture_reader(
    blob: Blob, ops: Ops, activations: str, min_pixels: int | None, max_pixels: int | None, exif: bool | None
) -> PictureReader:
    """Return the reader of pictures; the options are those of `load`, and `ops` is the backend of the vision part."""
    family, config, preprocessing = blob.family, blob.config, blob.metadata["preprocessing"]
    with _naming(blob):
        preprocess = family.preprocess(config, preprocessing, min_pixels=min_pixels, max_pixels=max_pixels)
    facts = [FEATURES_VERSION, blob.hashes(*VISION_PARTS), config.to_dict(), preprocessing]
    facts += [ops.name, activations]
    upright = family.upright if exif is None else exif
    return PictureReader(preprocess, json.dumps(facts, sort_keys=True), upright=upright)


@contextlib.contextmanager
def _naming(blob: Blob) -> Iterator[None]:
    """Let errors begin with the name of the file."""
    try:
        yield
    except QvlError as error:
        raise QvlError(f"{blob.path}: {error}") from None
