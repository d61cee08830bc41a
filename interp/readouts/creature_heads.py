"""The heads that are trained on the creatures: what each reads, how it learns, and how well it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.correspondence import match
from interp.errors import UnknownNameError, nearest
from interp.hyperfeatures.presets import BRANCHES
from interp.models.diffusion import Diffusion
from interp.readouts.creatures import GRID, RANGES, creature_frames, creature_pictures, creature_triplets
from interp.readouts.examples import InMemory
from interp.readouts.head import ReadoutHead
from interp.readouts.readout import Readout, fingerprint
from interp.readouts.times import time_dim
from interp.zoo.creatures import KEYPOINTS

Measure = Callable[[Float[Tensor, "example image out height width"], Sequence[Any]], Float[Tensor, " example"]]

N_GROUPS = 8  # of every head's normalisations
WRONG_ORDER = "triplets in the wrong order"
MISSED = 0.1  # of the map's side: farther than this a point counts as missed


@dataclass(frozen=True)
class HeadRecipe:
    """What one head reads, and how it is trained.

    Attributes:
        name: of the property.
        kind: of the readout.
        out_channels: of the output head; None: there is none.
        loss: a name that `interp.readouts.train_readout` knows.
        lr: learning rate.
        error: what is measured on held-out renders; less is better.
        chance: the error of knowing nothing of the picture, where that is no prediction of the mean target.
        longer: times the steps of other heads.
    """

    name: str
    kind: str
    out_channels: int | None
    loss: str
    lr: float
    error: str
    chance: float | None = None
    longer: int = 1


HEADS: dict[str, HeadRecipe] = {
    recipe.name: recipe
    for recipe in (
        HeadRecipe("pose", "spatial", 3, "sparse_mse", 3e-3, "MSE"),
        HeadRecipe("depth", "spatial", 1, "mse", 3e-3, "MSE"),
        HeadRecipe("edge", "spatial", 1, "sparse_mse", 3e-3, "MSE"),
        HeadRecipe("keypoints", "keypoints", len(KEYPOINTS), "mse", 3e-3, "MSE"),
        HeadRecipe("correspondence", "features", None, "correspondence", 3e-3, "points missed"),
        # Creatures are elsewhere in each picture, so that cells cannot be compared one by one; and half of the triplets
        # are soon told apart by species or background, which leaves the others to learn colours from.
        HeadRecipe("appearance", "features", None, "pooled_appearance", 3e-3, WRONG_ORDER, 0.5, longer=3),
        HeadRecipe("identity", "features", None, "pooled_appearance", 3e-3, WRONG_ORDER, 0.5, longer=3),
    )
}


def recipe_of(name: str) -> HeadRecipe:
    """The recipe of a head.

    Raises:
        UnknownNameError: there is no such head.
    """
    if name not in HEADS:
        raise UnknownNameError(f"no head {name!r}: there are {', '.join(HEADS)}. {nearest(name, HEADS)}".rstrip())
    return HEADS[name]


def creature_readout(
    sd: Diffusion, name: str, *, dim: int = 64, width: int = 32, sites: Sequence[str] = (), seed: int = 0
) -> Readout:
    """A head with random weights for a property of the creatures.

    Args:
        sd: the model that it will read.
        name: a key of ``HEADS``.
        dim, width: channels of the mixture, and inside the bottlenecks.
        sites: what it reads; by default the branches of all resnets of the up blocks.
        seed: of the weights.

    Raises:
        UnknownNameError: no such head, or a site that the model lacks.
        InputError: sizes that no head has.
    """
    recipe = recipe_of(name)
    chosen = tuple(sites) or tuple(sd.sites(BRANCHES))
    head = ReadoutHead(
        sd.channels(list(chosen)),
        dim,
        width,
        out_channels=recipe.out_channels,
        time_dim=time_dim(sd),
        n_groups=N_GROUPS,
        sites=chosen,
        seed=seed,
    )
    return Readout(
        head,
        chosen,
        (GRID, GRID),
        kind=recipe.kind,
        name=name,
        value_range=RANGES.get(name),
        model=sd.name,
        fingerprint=fingerprint(sd),
    )


def creature_examples(name: str, n: int, seed: int) -> InMemory:
    """Examples that a head is trained or measured on.

    Args:
        name: a key of ``HEADS``.
        n: how many.
        seed: of the scenes.

    Raises:
        UnknownNameError: no such head.
        InputError: numbers out of range.
    """
    recipe = recipe_of(name)
    if recipe.name in RANGES:
        return creature_pictures(n, seed, recipe.name)
    if recipe.loss == "correspondence":
        return creature_frames(n, seed)
    return creature_triplets(n, seed, recipe.name)


def error_of(name: str) -> Measure:
    """How the error of a head is measured; see `HeadRecipe.error`.

    Args:
        name: a key of ``HEADS``.

    Returns:
        A function of readouts and targets, as `interp.readouts.evaluate` takes it.

    Raises:
        UnknownNameError: no such head.
    """
    loss = recipe_of(name).loss
    return _missed if loss == "correspondence" else _wrong_order if loss.endswith("appearance") else _squared_error


def error_of_the_mean(name: str, seen: InMemory, held_out: InMemory) -> float:
    """The error of predicting the mean of the training targets for every picture.

    For correspondence that is the mean place of the points; for triplets, whose distances it makes all alike, chance.

    Args:
        name: a key of ``HEADS``.
        seen: training examples.
        held_out: others.

    Raises:
        UnknownNameError: no such head.
    """
    recipe = recipe_of(name)
    if recipe.chance is not None:
        return recipe.chance
    assert seen.targets is not None and held_out.targets is not None
    if recipe.loss != "correspondence":
        mean = torch.stack(list(seen.targets)).mean(dim=0)
        return float((torch.stack(list(held_out.targets)) - mean).square().mean())
    place = torch.cat([target.points_b for target in seen.targets]).mean(dim=0)
    missed = [((target.points_b - place).norm(dim=-1) > MISSED).float().mean() for target in held_out.targets]
    return float(torch.stack(missed).mean())


def _squared_error(
    maps: Float[Tensor, "example image out height width"], targets: Sequence[Any]
) -> Float[Tensor, " example"]:
    return (maps[:, 0] - torch.stack(list(targets)).to(maps)).square().mean(dim=(1, 2, 3))


def _missed(maps: Float[Tensor, "example image out height width"], targets: Sequence[Any]) -> Float[Tensor, " example"]:
    side = maps.shape[-1]
    shares = []
    for pair, points in zip(maps.cpu(), targets, strict=True):
        there, here = points.cells((side, side))
        found = match(pair[0], pair[1], there.round().long().clamp(0, side - 1), size=None)
        shares.append(((found - here.round()).float().norm(dim=-1) > MISSED * side).float().mean())
    return torch.stack(shares)


def _wrong_order(
    maps: Float[Tensor, "example image out height width"], targets: Sequence[Any]
) -> Float[Tensor, " example"]:
    looks = maps.mean(dim=(-2, -1))
    alike = F.cosine_similarity(looks[:, :1], looks[:, 1:], dim=2)
    return (alike[:, 0] <= alike[:, 1]).float()
