"""Pairs of pictures of the creatures that ship, with whole species held out of training."""

from collections.abc import Hashable, Sequence

from torch import Tensor

from interp.correspondence import Pair
from interp.errors import InputError
from interp.hyperfeatures.study import Split
from interp.zoo.creatures import SPECIES, draw_pairs

FOLDS = (("giraffe", "bird"), ("dog", "dragon"), ("horse", "lizard"))
"""Species that are held out together; every species is held out once."""

_SEEDS = {"train": 501, "validation": 502, "test": 503}  # of the pictures; the model was trained on others


def creature_splits(
    n_train: int, n_validation: int, n_test: int, folds: Sequence[Sequence[str]] = FOLDS
) -> list[Split]:
    """Splits of one set of pictures: each is tested on the species that it holds out.

    Args:
        n_train, n_validation, n_test: pairs of each species.
        folds: the species that each split holds out.

    Returns:
        One split for each fold. Splits share images, so that features need be computed once.

    Raises:
        InputError: fewer than one pair, or a fold that leaves no species to train on.
        UnknownNameError: no such species.
    """
    images: dict[Hashable, Tensor] = {}
    pairs: dict[str, dict[str, list[Pair]]] = {}
    for part, n in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        pairs[part] = {species: _draw(part, species, n, images) for species in SPECIES}
    splits = []
    for held_out in folds:
        seen = [species for species in SPECIES if species not in held_out]
        if not seen:
            raise InputError(f"holding out {', '.join(held_out)} leaves no species to train on")
        train, validation = (
            tuple(pair for species in seen for pair in pairs[part][species]) for part in ("train", "validation")
        )
        test = tuple(pair for species in held_out for pair in pairs["test"][species])
        splits.append(Split(images, train, validation, test, tuple(held_out)))
    return splits


def _draw(part: str, species: str, n: int, images: dict[Hashable, Tensor]) -> list[Pair]:
    # Each species has pictures of its own seed, so that one more pair of one changes none of another.
    drawn = draw_pairs(n, seed=1000 * _SEEDS[part] + SPECIES.index(species), species=[species])
    names = [f"{part}/{species}-{index:04d}" for index in range(len(drawn.images))]
    images.update(zip(names, drawn.images, strict=True))
    return [
        Pair(
            names[pair.source],
            names[pair.target],
            pair.category,
            pair.source_points,
            pair.target_points,
            pair.source_box,
            pair.target_box,
            pair.names,
        )
        for pair in drawn.pairs
    ]
