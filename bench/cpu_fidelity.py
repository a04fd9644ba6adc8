"""Errors of the CPU backend's activations at true size: a picture end to end, and the first layers one at a time.

    python bench/cpu_fidelity.py MODEL.qvl [--layers 2]

Relative errors in the 2-norm. Features of a random picture: default activations against 16-bit ones. The first ViT and
decoder layers: both kinds of activations against the reference backend, with the reference's input to each layer.
A table, then one JSON document as the last line.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import harness
import numpy as np

from qvl_convert.walk import relative_error
from qvl_runtime import load
from qvl_runtime.families.qwen_vl.vision import Workspace

ACTIVATIONS, TOKENS = ("auto", "int16"), 64


def vision_layers(model, inputs: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The output of the i-th layer for the i-th input."""
    tower = model.pictures.vision.tower
    work = Workspace.empty(model.ops, tower.config)
    for block, x in zip(tower.blocks, inputs):
        model.ops.write(work.x, x)
        block(model.ops, work, tower.config.heads)
        yield model.ops.download(work.x)


def decoder_layers(model, inputs: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The output of the i-th layer for the i-th input."""
    decoder = model.decoder
    context, work = decoder.sequence("fp16", TOKENS), decoder.workspace(TOKENS)
    context.begin(TOKENS)
    for index, x in enumerate(inputs):
        model.ops.write(work.x, x)
        decoder.blocks[index](model.ops, work, context, index)
        yield model.ops.download(work.x)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    reference = load(arguments.model, device="reference")
    side = reference.config.visual.image_size
    # Squares of uniform color: patches of pure noise would all look alike.
    picture = np.kron(random.integers(0, 256, (32, 32, 3), np.uint8), np.ones((side // 32, side // 32, 1), np.uint8))
    shape = reference.config.visual.patches, reference.config.visual.width
    vision = [random.standard_normal(shape, np.float32)]
    decoder = [random.standard_normal((TOKENS, reference.config.hidden_size), np.float32) * np.float32(0.02)]
    for chain, layers in ((vision, vision_layers), (decoder, decoder_layers)):
        for _ in range(arguments.layers):
            *_, last = layers(reference, chain)
            chain.append(last)
    del reference
    gc.collect()
    row: dict = {}
    features = {}
    for name in ACTIVATIONS:
        model = load(arguments.model, device="cpu", activations=name)
        outputs = list(vision_layers(model, vision[:-1]))
        row[f"ViT layers, {name}"] = [relative_error([a], [b]) for a, b in zip(outputs, vision[1:])]
        outputs = list(decoder_layers(model, decoder[:-1]))
        row[f"decoder layers, {name}"] = [relative_error([a], [b]) for a, b in zip(outputs, decoder[1:])]
        features[name] = model.encode_image(picture)
    row["features, auto against int16"] = relative_error([features["auto"]], [features["int16"]])
    for name, values in row.items():
        print(name, values if isinstance(values, float) else [float(f"{value:.3g}") for value in values])
    harness.print_document(**row)


if __name__ == "__main__":
    main()
