"""Pairs of pictures of the creatures that ship, with whole species held out of the aggregation network's training.

Held out means that and no more: the diffusion model whose features are aggregated was itself trained on pictures and
captions of all species. No part of its training saw keypoints.
"""

from collections.abc import Hashable, Sequence

from torch import Tensor

from interp.correspondence import Pair
from interp.errors import InputError
from interp.hyperfeatures.study import Split
from interp.zoo.creatures import SPECIES, draw_pairs

FOLDS = (("giraffe", "bird"), ("dog", "dragon"), ("horse", "lizard"))
"""Species that are held out together; every species is held out once."""

_SEEDS = {"train": 501, "validation": 502, "test": 504}  # of the pictures; the model was trained on others


def creature_splits(
    n_train: int, n_validation: int, n_test: int, folds: Sequence[Sequence[str]] = FOLDS
) -> list[Split]:
    """Splits of one set of pictures: each is tested on the species that it holds out.

    Species are held out of the aggregation network's training. The diffusion model was trained on all of them, in other
    pictures and without labels of keypoints.

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
    for fold, held_out in enumerate(folds):
        seen = [species for species in SPECIES if species not in held_out]
        if not seen:
            raise InputError(f"holding out {', '.join(held_out)} leaves no species to train on")
        train, validation = (
            tuple(pair for species in seen for pair in pairs[part][species]) for part in ("train", "validation")
        )
        # What the next fold holds out: over all folds, every species is tested as often as a familiar one as held out.
        following = [species for species in folds[(fold + 1) % len(folds)] if species in seen] or seen
        test, familiar = (
            tuple(pair for species in tested for pair in pairs["test"][species]) for tested in (held_out, following)
        )
        splits.append(Split(images, train, validation, test, tuple(held_out), familiar))
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
