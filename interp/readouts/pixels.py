"""The bound for what heads read from noisy latents: the same head, trained on the clean pixels themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.hyperfeatures.fitting import Training, fit
from interp.readouts.creature_heads import Measure
from interp.readouts.examples import InMemory, loss_named
from interp.readouts.head import ReadoutHead
from interp.readouts.readout import Readout


def pixel_head(readout: Readout, images: Float[Tensor, "*batch 3 height width"], seed: int = 0) -> ReadoutHead:
    """A head of the same size as a readout's whose every layer is given the clean pixels.

    Args:
        readout: of pictures of this size.
        images: how large they are; each cell of the readout's grid gets all pixels that it covers as channels.
        seed: of the weights.

    Raises:
        InputError: the readout has another kind of head, or its grid does not divide the picture.
    """
    head = readout.head
    if not isinstance(head, ReadoutHead):
        raise InputError(f"the {readout.title} readout has a {type(head).__name__}, not a ReadoutHead")
    factor = _factor(images, readout.size)
    settings = head.settings() | {"channels": [3 * factor**2] * head.n_layers, "time_dim": None, "use_time": True}
    return ReadoutHead(**settings, seed=seed)


def train_on_pixels(
    head: ReadoutHead,
    readout: Readout,
    source: InMemory,
    loss: str,
    *,
    steps: int,
    batch: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Training:
    """Train a pixel head in place; the images stay clean.

    Args:
        head: what `pixel_head` made.
        readout: the one it is compared with.
        source: examples with images.
        loss: a name, as for `interp.readouts.train_readout`.
        steps, batch, lr: of the optimizer.
        seed: of the order.
        progress: show a bar.

    Raises:
        InputError, ShapeError: as `interp.readouts.train_readout`.
    """
    objective = loss_named(loss, readout)

    def loss_of(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        examples = [source(index) for index in indices]
        read = _read(head, torch.stack([example.images for example in examples]), readout.size)
        return objective(read, [example.target for example in examples]), {}

    title = f"training the {readout.title} head on pixels"
    return fit(
        head, loss_of, len(source), steps=steps, batch=batch, lr=lr, validate_every=steps, seed=seed, title=title,
        progress=progress,
    )  # fmt: skip


@torch.no_grad()
def evaluate_on_pixels(
    head: ReadoutHead, readout: Readout, source: InMemory, measure: Measure, *, batch: int = 64
) -> pd.DataFrame:
    """Measure a pixel head on clean pictures, as `interp.readouts.evaluate` measures readouts.

    Args:
        head: trained.
        readout: the one it is compared with.
        source: examples with images.
        measure: gives a number for each example.
        batch: examples at a time.

    Returns:
        A row for each example: ``example``, ``value``.
    """
    values: list[float] = []
    head.eval()
    for at in range(0, len(source), batch):
        examples = [source(index) for index in range(at, min(at + batch, len(source)))]
        read = _read(head, torch.stack([example.images for example in examples]), readout.size)
        values += measure(read, [example.target for example in examples]).tolist()
    return pd.DataFrame({"example": np.arange(len(values)), "value": values})


def _read(
    head: ReadoutHead, images: Float[Tensor, "example image 3 height width"], size: tuple[int, int]
) -> Float[Tensor, "example image out grid_height grid_width"]:
    flat = rearrange(images, "example image ... -> (example image) ...")
    cells = F.pixel_unshuffle(flat, _factor(flat, size))
    maps = repeat(cells, "image channel h w -> layer image channel h w", layer=head.n_layers)
    return rearrange(head(list(maps)), "(example image) ... -> example image ...", image=images.shape[1])


def _factor(images: Tensor, size: Sequence[int]) -> int:
    height, width = images.shape[-2:]
    if height % size[0] or width % size[1] or height // size[0] != width // size[1]:
        raise ShapeError(f"pictures of {height} × {width} pixels do not divide into {size[0]} × {size[1]} cells")
    return int(height // size[0])
