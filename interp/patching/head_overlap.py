"""How far two rankings or two sets of heads agree, against chance."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.patching.heads import as_heads


class Correlation(NamedTuple):
    """A rank correlation, and the share of random orders that have one at least as far from 0."""

    rho: float
    p: float


def rank_correlation(
    a: Float[Tensor, "*heads"], b: Float[Tensor, "*others"], *, seed: int = 0, n_permutations: int = 10_000
) -> Correlation:
    """Spearman's rank correlation of two sets of effects, with a permutation test.

    Args:
        a, b: effects of the same heads; ties share their mean rank.
        seed: of the permutations.
        n_permutations: how many.

    Raises:
        ShapeError: of different shapes, or fewer than three heads.
        InputError: effects that are all alike, which have no ranks.
    """
    if a.shape != b.shape or a.numel() < 3:
        raise ShapeError(f"effects of shapes {tuple(a.shape)} and {tuple(b.shape)}: give the same three or more heads")
    ranks = [torch.from_numpy(pd.Series(x.flatten().double().numpy()).rank().to_numpy().copy()) for x in (a, b)]
    left, right = (rank - rank.mean() for rank in ranks)
    scale = left.norm() * right.norm()
    if not bool(scale > 0):
        raise InputError("the effects are all alike, so that they have no order")
    rho = float(left @ right / scale)
    generator = torch.Generator().manual_seed(seed)
    drawn = [right[torch.randperm(len(right), generator=generator)] @ left for _ in range(n_permutations)]
    # The order at hand is one of those possible, so that p is never 0.
    as_far = int((torch.stack(drawn).abs() / scale >= abs(rho) - 1e-12).sum())
    return Correlation(rho, (1 + as_far) / (1 + n_permutations))


class Overlap(NamedTuple):
    """Heads that two sets share, what chance gives, their Jaccard index, and the p of as many by chance."""

    shared: int
    expected: float
    jaccard: float
    p: float


def overlap(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], n_total: int) -> Overlap:
    """How far two sets of heads overlap, against sets of the same sizes drawn at random.

    Args:
        a, b: the sets, of (layer, head).
        n_total: heads that could have been chosen, such as ``n_layers * n_heads``.

    Returns:
        With the exact probability, of the hypergeometric distribution, that random sets share as many or more.

    Raises:
        InputError: a head twice in a set, or more heads than there are.
    """
    first, second = as_heads(a), as_heads(b)
    for one in (first, second):
        if len(set(one)) < len(one) or not 1 <= len(one) <= n_total:
            raise InputError(f"{len(one)} heads of {n_total}, {len(one) - len(set(one))} of them twice")
    union = len(set(first) | set(second))
    if union > n_total:
        raise InputError(f"the sets have {union} different heads, more than the {n_total} there are")
    shared, n_a, n_b = len(set(first) & set(second)), len(first), len(second)
    ways = sum(math.comb(n_a, k) * math.comb(n_total - n_a, n_b - k) for k in range(shared, min(n_a, n_b) + 1))
    return Overlap(shared, n_a * n_b / n_total, shared / union, float(Fraction(ways, math.comb(n_total, n_b))))
