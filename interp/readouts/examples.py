"""What readout heads are trained on: pictures with targets, and how targets make losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError, nearest
from interp.hyperfeatures.loss import symmetric_cross_entropy
from interp.models.diffusion import Diffusion
from interp.progress import track
from interp.readouts.losses import MARGIN, cosine_hinge, match_size, mse, sparse_mse
from interp.readouts.readout import Readout


@dataclass(frozen=True)
class Example:
    """One example: pictures that go through the model together, and what should be read from them.

    Attributes:
        images: in -1 .. 1, or their latents where a source gives those: one picture, two of a pair, or anchor,
            positive and negative.
        target: a picture, heat maps, `PointPair`; None for triplets.
    """

    images: Float[Tensor, "image channel height width"]
    target: Any = None


@dataclass(frozen=True)
class PointPair:
    """Points that two pictures share.

    Attributes:
        points_a: (y, x) in shares 0 .. 1 of the first picture's height and width.
        points_b: the same points in the second.
    """

    points_a: Float[Tensor, "point 2"]
    points_b: Float[Tensor, "point 2"]

    def cells(self, size: tuple[int, int]) -> tuple[Float[Tensor, "point 2"], Float[Tensor, "point 2"]]:
        """The points in cells of a map, not rounded.

        Args:
            size: (height, width) of the map.

        Source: Readout Guidance, official code: shares clipped to 0 .. 1, times the size.
        """
        scale = torch.tensor(size, dtype=torch.float32)
        return self.points_a.clamp(0, 1) * scale, self.points_b.clamp(0, 1) * scale


@runtime_checkable
class Source(Protocol):
    """Examples by index. What is random in one comes from the generator."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __call__(self, index: int, generator: np.random.Generator) -> Example:
        """The example of an index."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Examples that are held as tensors.

    Args:
        images: of each example, in -1 .. 1, or latents.
        targets: one for each example; None: none.

    Raises:
        InputError: no examples, images that are no floats, or another number of targets.
    """

    images: Float[Tensor, "example image channel height width"]
    targets: Sequence[Any] | Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.images):
            raise InputError("there are no examples")
        if not self.images.is_floating_point():
            raise InputError(f"images are floats in -1 .. 1, or latents, not {self.images.dtype}")
        if self.targets is not None and len(self.targets) != len(self.images):
            raise InputError(f"{len(self.images)} examples with {len(self.targets)} targets")

    def __len__(self) -> int:
        """How many there are."""
        return len(self.images)

    def __call__(self, index: int, generator: np.random.Generator | None = None) -> Example:
        """The example of an index; nothing is random."""
        return Example(self.images[index], None if self.targets is None else self.targets[index])

    def first(self, n: int) -> "InMemory":
        """The first examples alone.

        Raises:
            InputError: there are not as many.
        """
        if not 1 <= n <= len(self):
            raise InputError(f"n={n}: there are {len(self)} examples")
        return InMemory(self.images[:n], None if self.targets is None else self.targets[:n])

    def encoded(self, sd: Diffusion, *, batch: int = 32) -> "InMemory":
        """The same examples with latents (the posterior's mode) in place of images, so that each is encoded once.

        Args:
            sd: the model.
            batch: images encoded together.
        """
        n_images = self.images.shape[1]
        flat = rearrange(self.images, "example image ... -> (example image) ...")
        latents = [
            sd.encode(flat[at : at + batch]) for at in track(range(0, len(flat), batch), "encoding the examples")
        ]
        stacked = rearrange(torch.cat(latents).cpu(), "(example image) ... -> example image ...", image=n_images)
        return InMemory(stacked, self.targets)


Loss = Callable[[Float[Tensor, "example image out height width"], Sequence[Any]], Tensor]
"""Takes the readouts of every example's pictures, and the examples' targets."""


def mse_loss(maps: Float[Tensor, "example image out height width"], targets: Sequence[Any]) -> Float[Tensor, ""]:
    """Mean squared error of readouts against pictures or heat maps; targets are resized by the nearest pixel.

    Args:
        maps: of one picture each.
        targets: ``[out, any height, any width]`` each.

    Raises:
        ShapeError: several pictures to an example, or targets of other channels.
        InputError: a target that is not finite.
    """
    return mse(*_against(maps, targets))


def sparse_loss(
    maps: Float[Tensor, "example image out height width"], targets: Sequence[Any], background: float
) -> Float[Tensor, ""]:
    """As `mse_loss`, with background and foreground of equal weight, see `interp.readouts.losses.sparse_mse`."""
    return sparse_mse(*_against(maps, targets), background)


def correspondence_loss(
    maps: Float[Tensor, "example image out height width"], targets: Sequence[Any]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy between the points of each pair, averaged over pairs.

    Args:
        maps: of two pictures each.
        targets: a `PointPair` each.

    Raises:
        ShapeError: not two pictures to an example.
        InputError: a pair without a point.

    Source: Readout Guidance, section 3.2; Diffusion Hyperfeatures, section 3.3.
    """
    _n_images(maps, 2, "correspondence")
    size = (maps.shape[-2], maps.shape[-1])
    losses = []
    for pair, points in zip(maps, targets, strict=True):
        if not isinstance(points, PointPair):
            raise InputError(f"the target of a pair is a PointPair, not {type(points).__name__}")
        there, here = (cells[None].to(maps.device) for cells in points.cells(size))
        losses.append(symmetric_cross_entropy(pair[:1], pair[1:], there, here))
    return torch.stack(losses).mean()


def appearance_loss(
    maps: Float[Tensor, "example image out height width"],
    targets: Sequence[Any],
    margin: float = MARGIN,
    *,
    pooled: bool = False,
) -> Float[Tensor, ""]:
    """The hinge over anchor, positive and negative, summed over examples; see `interp.readouts.losses.cosine_hinge`.

    Args:
        maps: of three pictures each.
        targets: not used.
        margin: of the hinge.
        pooled: compare the means of the descriptors over all cells in place of cell by cell, as
            `interp.guidance.Appearance` does with the same option: for pictures whose subject moves between them.

    Raises:
        ShapeError: not three pictures to an example.
    """
    _n_images(maps, 3, "appearance")
    if pooled:
        maps = maps.mean(dim=(-2, -1), keepdim=True)
    return cosine_hinge(maps[:, 0], maps[:, 1], maps[:, 2], margin)


LOSSES = ("mse", "sparse_mse", "correspondence", "appearance", "pooled_appearance")


def loss_named(loss: str | Loss, readout: Readout) -> Loss:
    """A loss by its name; a function passes through.

    Args:
        loss: ``"mse"``, ``"sparse_mse"`` (the background is the least of the readout's ``value_range``),
            ``"correspondence"``, ``"appearance"``, ``"pooled_appearance"``, or a function.
        readout: what is trained.

    Raises:
        InputError: an unknown name, or a sparse loss without a ``value_range``.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise InputError(f"a loss is a name ({', '.join(LOSSES)}) or a function, not {type(loss).__name__}")
    if loss == "sparse_mse":
        if readout.value_range is None:
            raise InputError("sparse_mse takes the least of the readout's value_range as background: give it one")
        return partial(sparse_loss, background=readout.value_range[0])
    known: dict[str, Loss] = {
        "mse": mse_loss,
        "correspondence": correspondence_loss,
        "appearance": appearance_loss,
        "pooled_appearance": partial(appearance_loss, pooled=True),
    }
    if loss not in known:
        raise InputError(f"no loss {loss!r}: there are {', '.join(LOSSES)}. {nearest(loss, LOSSES)}".rstrip())
    return known[loss]


def _against(maps: Tensor, targets: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Readouts of one picture each, and their targets at the same size."""
    _n_images(maps, 1, "a picture's")
    wrong = [target for target in targets if not isinstance(target, Tensor) or target.ndim != 3]
    if wrong:
        found = list(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
        raise ShapeError(f"a target is [{maps.shape[2]}, height, width], not {found}")
    size = (maps.shape[-2], maps.shape[-1])
    stacked = torch.cat([match_size(target[None].float(), size) for target in targets]).to(maps.device)
    return maps[:, 0], stacked


def _n_images(maps: Tensor, expected: int, what: str) -> None:
    if maps.shape[1] != expected:
        raise ShapeError(f"{what} loss takes {expected} images to an example, not {maps.shape[1]}")
