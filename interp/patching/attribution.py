"""Attribution patching: the first-order estimate of every patch, from two forwards and one backward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from interp.edits import Interpolate
from interp.errors import InputError
from interp.patching.activation import ATTENTION, MLP, RESIDUAL, grid_of
from interp.patching.cells import Cell, Direction, Experiment, language_sites, measure_cells, prepare, random_like
from interp.patching.corruption import ENTRY, MeanOver, TokenNoise, run_once
from interp.patching.heads import HEAD, head_axes, head_cells
from interp.patching.metric import MetricFunction, name_of
from interp.patching.options import check_options
from interp.patching.result import PatchingResult
from interp.patching.tokens import layouts_of

# What comes of one site after another, in the order of the cells: by site, or by head.
_FLAT = {
    False: "site group example -> (site group) example",
    True: "site group example head -> (site head group) example",
}


@dataclass(frozen=True)
class Agreement:
    """How well an estimate agrees with exact patching, over the cells of their means.

    Args:
        rank_correlation: Spearman's.
        largest_difference: of the means, in units of the metric.
        n_cells: compared cells.
    """

    rank_correlation: float
    largest_difference: float
    n_cells: int


def attribution(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any] | TokenNoise | MeanOver,
    metric: MetricFunction,
    *,
    sites: Sequence[str] = (RESIDUAL, ATTENTION, MLP),
    layers: Sequence[int] | None = None,
    positions: Any = None,
    direction: Direction = "denoise",
    integrated: bool = False,
    steps: int = 8,
    check: int = 24,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Estimate what `activation` measures: the change of an activation times the metric's gradient there.

    Args:
        vlm, clean, corrupt, metric, sites, layers, positions, direction: as for
            `interp.patching.activation.activation`; ``sites=["attn.hook_z"]`` gives the estimate of every head.
        integrated: take the mean of the gradients on the straight way from what enters the language model in one run to
            what enters in the other, where gradients at its beginning mislead.
        steps: of that way; each costs a forward and a backward.
        check: cells that are also measured exactly, in one sweep: half of them those with the largest estimates, the
            others drawn at random. 0: none.
        seed: of the drawn cells and of the control.
        allow_no_effect: do not raise where every estimate is that of no change.
        options: of `VLM.sweep`, for the check.

    Returns:
        As of `activation`, or of `interp.patching.heads.heads` where the site is ``"attn.hook_z"`` alone; values are
        the metric that the patched run is estimated to have. The control ``"random vector"`` is the estimate for a
        change of the same norm in a random direction. ``about["agreement"]`` says how the check went; its rank
        correlation is None where there is one cell or values do not vary.

    Raises:
        InputError: as for `activation`; a metric without a gradient; or runs that agree wherever they are compared.
        NeverFiredError: the metric does not depend on a site at all.

    Source: Nanda 2023 (attribution patching); Hanna et al. 2024 (integrated gradients over inputs).
    """
    check_options(options)
    kinds = language_sites(vlm, sites, layers)
    by_head = list(kinds) == [HEAD]
    if HEAD in kinds and not by_head:
        raise InputError(f"{HEAD!r} has an axis of heads, the others have none: estimate them apart")
    if integrated and steps < 1:
        raise InputError(f"steps={steps}: at least one is needed")
    named = [site for by_layer in kinds.values() for site in by_layer.values()]
    needed = list(dict.fromkeys([*named, ENTRY]))
    experiment = prepare(
        vlm, clean, corrupt, metric, needed if integrated else named, positions, direction, gradients=not integrated
    )
    if by_head:
        cells = head_cells(vlm, kinds[HEAD], len(experiment.groups))
        axes, shape, sizes = head_axes(vlm, kinds[HEAD], experiment)
    else:
        cells = [Cell(group, (site,)) for site in named for group in range(len(experiment.groups))]
        layer_names = tuple(str(layer) for layer in next(iter(kinds.values())))
        axes = {"site": tuple(kinds), "layer": layer_names, "position": experiment.names}
        shape = "(site layer position) example -> site layer position example"
        sizes = {"site": len(kinds), "layer": len(layer_names), "position": len(experiment.groups)}
    generator = torch.Generator().manual_seed(seed)
    tokens = _tokens(experiment)
    estimates: list[Tensor] = []
    random: list[Tensor] = []
    for draw, base in enumerate(experiment.bases):
        gradients = _integrated(experiment, named, draw, steps) if integrated else base.gradients
        changes = [_changes(experiment, site, gradients[site], draw, tokens, generator) for site in named]
        for kept, of_sites in zip((estimates, random), zip(*changes, strict=True), strict=True):
            kept.append(base.metric + rearrange(torch.stack(of_sites), _FLAT[by_head]))
    values = torch.stack(estimates).mean(dim=0)
    if not allow_no_effect and torch.equal(values, experiment.base_metric.expand_as(values)):
        raise InputError(
            f"the estimates are that {name_of(metric)} does not change at all: clean and corrupt runs agree at "
            f"{', '.join(experiment.names[:4])}, or nothing there reaches the metric; corrupt something that these "
            "tokens see, or pass allow_no_effect=True"
        )
    about = experiment.about(integrated=steps if integrated else 0, seed=seed, **grid_of(positions))
    if check:
        about |= _checked(experiment, cells, values, check, generator, options)
    return PatchingResult(
        "attribution",
        name_of(metric),
        rearrange(values, shape, **sizes),
        axes,
        experiment.clean,
        experiment.corrupt,
        {"random vector": rearrange(torch.stack(random).mean(dim=0), shape, **sizes)},
        about,
    )


def agreement(estimate: PatchingResult, exact: PatchingResult) -> Agreement:
    """Compare an estimate with exact patching, cell by cell.

    Args:
        estimate: of `attribution`.
        exact: of `activation` or `heads` with the same axes.

    Raises:
        InputError: other axes, or values that do not vary, which have no rank correlation.
    """
    if estimate.axes != exact.axes:
        raise InputError(
            f"the estimate has axes {estimate.sizes}, exact patching {exact.sizes}, or other names in them"
        )
    means = (estimate.mean(normalised=False).flatten(), exact.mean(normalised=False).flatten())
    ranks = _rank_correlation(*means)
    if ranks is None:
        raise InputError("estimates or exact values do not vary over the cells, so that they have no rank correlation")
    return Agreement(ranks, float((means[0] - means[1]).abs().max()), len(means[0]))


def _integrated(experiment: Experiment, sites: Sequence[str], draw: int, steps: int) -> dict[str, Tensor]:
    """The mean gradient at every site on the straight way from what enters in the base run to the source run."""
    base, source, vlm = experiment.bases[draw], experiment.sources[draw], experiment.vlm
    lengths = [[(layout.start, layout.length) for layout in layouts_of(run.inputs)] for run in (base, source)]
    if lengths[0] != lengths[1]:
        raise InputError(
            "integrated gradients go from one prompt to the other token by token, so that these must be equally long"
        )
    sums: dict[str, Tensor] = {}
    for step in range(steps):
        # Midpoints, which make the rule exact for gradients that change linearly.
        way = Interpolate(ENTRY, source.acts[ENTRY], (step + 0.5) / steps)
        found = run_once(vlm, base.inputs, [*base.edits, way], experiment.metric, sites, backward=True).gradients
        sums = {site: found[site] / steps + sums.get(site, 0) for site in sites}
    return sums


def _tokens(experiment: Experiment) -> Int[Tensor, "4 token"]:
    """Every token of every group: its group, its row, and its position in the source and in the base run."""
    entries = [
        (index, row, there, here)
        for index, aligned in enumerate(experiment.groups)
        for row in range(len(aligned.base))
        for there, here in zip(aligned.source[row], aligned.base[row], strict=True)
    ]
    return torch.tensor(entries).T


def _changes(
    experiment: Experiment,
    site: str,
    gradient: Tensor,
    draw: int,
    tokens: Int[Tensor, "4 token"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "group example *head"], Float[Tensor, "group example *head"]]:
    """Change times gradient, summed over each group's tokens, and the same of a random change of the same norm."""
    source, base = experiment.sources[draw], experiment.bases[draw]
    group, row, there, here = tokens.to(gradient.device)
    if source.means is None:
        new = source.acts[site][row, there]
    else:
        pairs = [(aligned, row) for aligned in experiment.groups for row in range(len(aligned.base))]
        new = torch.cat([source.gather(site, aligned.group, aligned.source[row], row) for aligned, row in pairs])
    change = (new - base.acts[site][row, here]).float()
    slope = gradient[row, here].float()

    def summed(change: Tensor) -> Tensor:
        products = (change * slope).sum(dim=-1)
        sums = products.new_zeros(len(experiment.groups), len(base.metric), *products.shape[1:])
        return sums.index_put_((group, row), products, accumulate=True).cpu()

    return summed(change), summed(random_like(change, generator))


def _checked(
    experiment: Experiment,
    cells: Sequence[Cell],
    estimates: Float[Tensor, "cell example"],
    n: int,
    generator: torch.Generator,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure some cells exactly, and say how far the estimates agree."""
    size = (estimates - experiment.base_metric).abs().mean(dim=-1)
    order = size.argsort(descending=True)
    top = order[: (n + 1) // 2]
    rest = order[(n + 1) // 2 :]
    chosen = torch.cat([top, rest[torch.randperm(len(rest), generator=generator)[: n // 2]]])
    exact, _, plan = measure_cells(
        experiment, [cells[index] for index in chosen], control=False, allow_no_effect=True, **options
    )
    means = (estimates[chosen].mean(dim=-1), exact.mean(dim=-1))
    return {
        "agreement": {"rank correlation": _rank_correlation(*means), "cells": len(chosen),
                      "largest difference": float((means[0] - means[1]).abs().max())},
        "plan": plan,
    }  # fmt: skip


def _rank_correlation(estimates: Float[Tensor, " cell"], exact: Float[Tensor, " cell"]) -> float | None:
    """Spearman's; None where one side does not vary."""
    if estimates.unique().numel() < 2 or exact.unique().numel() < 2:
        return None
    return float(pd.Series(estimates.numpy()).rank().corr(pd.Series(exact.numpy()).rank()))
