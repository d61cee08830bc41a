"""Fewer channels for descriptors of several images, chosen for all of them together."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError


def joint_pca(maps: Sequence[Float[Tensor, "_ _ _"]], dim: int) -> list[Float[Tensor, "_ _ _"]]:
    """Project descriptor maps onto the principal components of all their positions together.

    Args:
        maps: [channel, height, width], such as one layer's features of a source and a target; sizes may differ.
        dim: how many components to keep.

    Returns:
        Centred maps [dim, height, width], strongest component first. The sign of a component is chosen so that its
        largest weight is positive, so that the result is the same on every machine.

    Raises:
        ShapeError: no maps, or maps of different numbers of channels.
        InputError: ``dim`` is not between 1 and the smaller of channels and positions.

    Source: sd-dino (joint PCA of source and target for each layer, 256 components).
    """
    if not maps or len({one.shape[0] for one in maps}) != 1:
        raise ShapeError(f"Maps must have as many channels; they have {[one.shape[0] for one in maps]}.")
    rows = torch.cat([rearrange(one, "channel height width -> (height width) channel").float() for one in maps])
    if not 1 <= dim <= min(rows.shape):
        raise InputError(f"dim is {dim}; {rows.shape[0]} positions of {rows.shape[1]} channels allow 1 to "
                         f"{min(rows.shape)}.")  # fmt: skip
    mean = rows.mean(dim=0)
    _, _, components = torch.linalg.svd(rows - mean, full_matrices=False)
    components = components[:dim]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * largest.sign()
    return [torch.einsum("dc,chw->dhw", components, one.float() - mean[:, None, None]) for one in maps]
