"""Results of matching, pair by pair, and the tables and intervals made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from interp.correspondence.pairs import Pair
from interp.correspondence.pck import BASES, REDUCTIONS, base_length, distances, reduced, within
from interp.correspondence.points import Size, rescale
from interp.errors import InputError
from interp.metrics import Interval, bootstrap_interval

SPACES = ("original", "resized")


@dataclass(frozen=True, eq=False)
class PairResult:
    """The predicted points of one pair.

    Attributes:
        pair: the pair.
        predicted: (y, x) of each point in the target, in pixels of ``size``.
        size: (height, width) that the target was matched at.
        image_size: (height, width) of the original target image.
    """

    pair: Pair
    predicted: Float[Tensor, "point 2"]
    size: Size
    image_size: Size

    def points(self, space: str = "original") -> tuple[Float[Tensor, "point 2"], Float[Tensor, "point 2"]]:
        """Predicted and true (y, x), in pixels of the ``"original"`` target image or of the ``"resized"`` one."""
        _check_space(space)
        if space == "original":
            return rescale(self.predicted, self.size, self.image_size), self.pair.target_points.double()
        return self.predicted.double(), rescale(self.pair.target_points, self.image_size, self.size)

    def limit(self, threshold: float, base: str, space: str = "original") -> float:
        """The largest distance of a correct point in pixels: a share of the image's or the box's longer side."""
        _check_space(space)
        top, left, bottom, right = self.pair.target_box
        if space == "original":
            return threshold * base_length(base, self.image_size, self.pair.target_box)
        down, across = self.size[0] / self.image_size[0], self.size[1] / self.image_size[1]
        return threshold * base_length(base, self.size, (top * down, left * across, bottom * down, right * across))

    def correct(self, threshold: float, base: str, *, inclusive: bool = True, space: str = "original") -> list[bool]:
        """Which points are correct."""
        pred, true = self.points(space)
        return within(pred, true, self.limit(threshold, base, space), inclusive=inclusive).tolist()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of one method on a list of pairs.

    Attributes:
        results: one for each pair.
        settings: what produced them.
    """

    results: tuple[PairResult, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(
        self,
        thresholds: Sequence[float] = (0.05, 0.1, 0.15),
        *,
        inclusive: bool = True,
        space: str = "original",
        seed: int = 0,
        confidence: float = 0.95,
        n_resamples: int = 2000,
    ) -> pd.DataFrame:
        """Score the results in every way that papers do, both bases always together.

        Args:
            thresholds: shares of the base.
            inclusive: whether a point exactly at the threshold is correct.
            space: distances in pixels of the ``"original"`` target image, or of the ``"resized"`` one.
            seed: of the resampling.
            confidence: of the intervals.
            n_resamples: how many.

        Returns:
            One row for each threshold, base (``img``, ``bbox``), reduction (``point``, ``pair``, ``category``) over
            all pairs, then for each category by point and by pair: threshold, base, inclusive, space, reduce,
            category ("all" or its name), n_points, n_pairs, pck, low, high. The interval is over pairs; it is
            missing (NaN) where a category has only one.

        Raises:
            InputError: a bad threshold, space or confidence.
        """
        rows = []
        for threshold, base in product(thresholds, BASES):
            scored = _scored([self], threshold, base, inclusive, space)
            said: dict[str, Any] = {"threshold": threshold, "base": base, "inclusive": inclusive, "space": space}
            parts: list[tuple[str, str, _Scored]] = [("all", reduce, scored) for reduce in REDUCTIONS]
            for name in dict.fromkeys(scored.categories):
                part = scored.of(name)
                parts += [(name, "point", part), (name, "pair", part)]
            for category, reduce, part in parts:
                found = part.interval(reduce, seed, confidence, n_resamples)
                counts = {"n_points": int(part.counts.sum()), "n_pairs": len(part.counts)}
                share = {"pck": found.mean, "low": found.low, "high": found.high}
                rows.append(said | {"reduce": reduce, "category": category} | counts | share)
        return pd.DataFrame(rows)

    def points(self) -> pd.DataFrame:
        """One row for each point, in pixels of the original target image.

        Returns:
            pair (its index), category, source, target, point (its name or index), predicted_y, predicted_x,
            target_y, target_x, distance, img and bbox (the base lengths).
        """
        rows = []
        for index, result in enumerate(self.results):
            pair = result.pair
            pred, true = result.points()
            lengths = {base: result.limit(1.0, base) for base in BASES}
            for point, away in enumerate(distances(pred, true).tolist()):
                which = {
                    "pair": index,
                    "category": pair.category,
                    "source": pair.source,
                    "target": pair.target,
                    "point": pair.names[point] if pair.names else point,
                }
                places = {
                    f"{kind}_{axis}": float(points[point, at])
                    for kind, points in (("predicted", pred), ("target", true))
                    for at, axis in enumerate("yx")
                }
                rows.append(which | places | {"distance": away} | lengths)
        return pd.DataFrame(rows)


def pck_interval(
    runs: Evaluation | Sequence[Evaluation],
    *,
    threshold: float = 0.1,
    base: str = "img",
    reduce: str = "point",
    inclusive: bool = True,
    space: str = "original",
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 2000,
) -> Interval:
    """Compute one PCK with its percentile bootstrap interval over pairs, and over seeds when there are several.

    Args:
        runs: one evaluation, or one for each training seed on the same pairs: seeds and pairs are both drawn with
            replacement, the same pairs for every seed. By category, pairs are drawn within each.
        threshold: a share of the base.
        base: ``"img"`` or ``"bbox"``.
        reduce: as in `pck`.
        inclusive: whether a point exactly at the threshold is correct.
        space: ``"original"`` or ``"resized"`` pixels.
        seed: of the resampling.
        confidence: such as 0.95.
        n_resamples: how many.

    Returns:
        The PCK and its interval; the interval is NaN when a single pair leaves nothing to draw.

    Raises:
        InputError: no evaluation, evaluations of different pairs, or a bad setting.
    """
    return _scored(_runs(runs), threshold, base, inclusive, space).interval(reduce, seed, confidence, n_resamples)


def compare(
    a: Evaluation | Sequence[Evaluation],
    b: Evaluation | Sequence[Evaluation],
    *,
    threshold: float = 0.1,
    base: str = "img",
    reduce: str = "point",
    inclusive: bool = True,
    space: str = "original",
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = 2000,
) -> Interval:
    """Compute by how much the PCK of one method exceeds that of another on the same pairs, with its interval.

    Args:
        a: one evaluation, or one for each seed.
        b: the other method on the same pairs: as many evaluations, or one for all seeds of ``a``.
        threshold, base, reduce, inclusive, space, seed, confidence, n_resamples: as in `pck_interval`.

    Returns:
        PCK of ``a`` minus that of ``b``. Pairs are drawn for both methods together, so what makes a pair hard for
        both does not widen the interval.

    Raises:
        InputError: the pairs differ, or the numbers of evaluations do not fit.
    """
    first, second = _runs(a), _runs(b)
    _check_same_pairs([first[0], second[0]])
    if len(second) not in (1, len(first)):
        raise InputError(f"There are {len(first)} evaluations against {len(second)}; expected as many, or one.")
    one = _scored(first, threshold, base, inclusive, space)
    other = _scored(second, threshold, base, inclusive, space)
    difference = _Scored(one.correct - other.correct, one.counts, one.categories)
    return difference.interval(reduce, seed, confidence, n_resamples)


@dataclass(frozen=True, eq=False)
class _Scored:
    correct: Float[np.ndarray, "seed pair"]
    counts: Float[np.ndarray, " pair"]
    categories: list[str]

    def of(self, category: str) -> "_Scored":
        rows = [name == category for name in self.categories]
        return _Scored(self.correct[:, rows], self.counts[rows], [category] * sum(rows))

    def interval(self, reduce: str, seed: int, confidence: float, n_resamples: int) -> Interval:
        mean = reduced(self.correct, np.broadcast_to(self.counts, self.correct.shape), self.categories, reduce)
        parts = [self]
        if reduce == "category":
            parts = [self.of(name) for name in dict.fromkeys(self.categories)]
        if min(len(part.counts) for part in parts) < 2:
            return Interval(mean, float("nan"), float("nan"))
        if reduce == "pair":
            shares = self.correct / self.counts
            return bootstrap_interval(shares, seed=seed, confidence=confidence, n_resamples=n_resamples)
        if not 0 < confidence < 1:
            raise InputError(f"confidence must be between 0 and 1, not {confidence}.")
        generator = np.random.default_rng(seed)
        n_seeds = len(self.correct)
        # One draw for all categories: a seed's luck is the same network's in each of them.
        seeds = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples) / n_seeds
        drawn = np.mean([_resampled_shares(part, seeds, generator) for part in parts], axis=0)
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(mean, float(low), float(high))


def _resampled_shares(
    scored: _Scored, seeds: Float[np.ndarray, "resample seed"], generator: np.random.Generator
) -> Float[np.ndarray, " resample"]:
    # A share over points is a ratio of two sums over the drawn pairs, not a mean over pairs.
    n_pairs = scored.correct.shape[1]
    pairs = generator.multinomial(n_pairs, np.full(n_pairs, 1 / n_pairs), size=len(seeds))
    hits = np.einsum("rs,sp,rp->r", seeds, scored.correct, pairs, optimize=True)
    return hits / (pairs @ scored.counts)


def _scored(runs: Sequence[Evaluation], threshold: float, base: str, inclusive: bool, space: str) -> _Scored:
    hits = [
        [float(sum(result.correct(threshold, base, inclusive=inclusive, space=space))) for result in run.results]
        for run in runs
    ]
    results = runs[0].results
    counts = np.array([float(len(result.predicted)) for result in results])
    return _Scored(np.array(hits), counts, [result.pair.category for result in results])


def _check_space(space: str) -> None:
    if space not in SPACES:
        raise InputError(f"space is {space!r}; expected one of {', '.join(map(repr, SPACES))}.")


def _runs(given: Evaluation | Sequence[Evaluation]) -> list[Evaluation]:
    runs = [given] if isinstance(given, Evaluation) else list(given)
    if not runs or not runs[0].results:
        raise InputError("There are no results to score.")
    _check_same_pairs(runs)
    return runs


def _check_same_pairs(runs: Sequence[Evaluation]) -> None:
    keys = [[result.pair.key for result in run.results] for run in runs]
    for index, other in enumerate(keys):
        if other != keys[0]:
            different = sum(one != two for one, two in zip(keys[0], other, strict=False))
            raise InputError(
                f"Evaluations 0 and {index} are not of the same pairs in the same order: {len(keys[0])} and "
                f"{len(other)} pairs, of which {different} differ."
            )
