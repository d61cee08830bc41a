"""Activation patching: which layer, at which tokens, carries what tells two runs apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange

from interp.errors import InputError
from interp.patching.cells import Cell, Direction, language_sites, measure_cells, prepare
from interp.patching.corruption import MeanOver, TokenNoise
from interp.patching.metric import MetricFunction, name_of
from interp.patching.options import check_options
from interp.patching.result import PatchingResult
from interp.patching.tokens import PatchGrid

RESIDUAL, ATTENTION, MLP = "hook_resid_post", "hook_attn_out", "hook_mlp_out"


def activation(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any] | TokenNoise | MeanOver,
    metric: MetricFunction,
    *,
    sites: Sequence[str] = (RESIDUAL, ATTENTION, MLP),
    layers: Sequence[int] | None = None,
    positions: Any = None,
    direction: Direction = "denoise",
    window: int = 1,
    control: bool = True,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Put activations of one run into the other, one site, layer and group of tokens at a time.

    Args:
        vlm: the model.
        clean: prepared or plain model inputs, one prompt for each example.
        corrupt: inputs with another prompt, or another image, for each example; or `TokenNoise` on some tokens of the
            clean prompts; or `MeanOver` a data set.
        metric: of the logits at the last token, such as `interp.patching.metric.logit_difference`.
        sites: kinds of activations of the language model.
        layers: which; None: all.
        positions: token groups by meaning: segments' names (``["image[0]", "delimiter[-1]", "last"]``), a mapping from
            names to positions, a grid of image patches (`interp.patching.tokens.image_patches`), or None: every token
            by itself, where clean and corrupt prompts are equally long.
        direction: ``"denoise"`` puts clean activations into the corrupt run; ``"noise"`` the other way round.
        window: layers patched together, around the one that names them, as in causal tracing.
        control: also patch a random vector of matched norm at every cell, at the cost of as many variants.
        seed: of the random vectors.
        allow_no_effect: do not raise where the two runs agree at a group, or no patch moves the metric.
        options: of `VLM.sweep`, such as ``max_rows``.

    Returns:
        Axes ``site``, ``layer`` and ``position``; clean and corrupt baselines; the control ``"random vector"``.

    Raises:
        InputError: prompts of different lengths that are not aligned by named segments, sites of another tower,
            groups of different sizes, a metric that returns NaN, or patches that change nothing.
        UnknownNameError: a site or segment that is not there.

    Source: Meng et al. 2022, section 2 (causal tracing); Heimersheim & Nanda 2024 (denoising and noising).
    """
    check_options(options)
    kinds = language_sites(vlm, sites, layers)
    if window < 1:
        raise InputError(f"window={window}: at least the layer itself is patched")
    names = tuple(str(layer) for layer in next(iter(kinds.values())))
    # A window reaches beyond the layers that name it.
    everywhere = language_sites(vlm, sites)
    windows = [_window(everywhere[leaf], layer, window) for leaf, by_layer in kinds.items() for layer in by_layer]
    needed = list(dict.fromkeys(site for sites_of_one in windows for site in sites_of_one))
    experiment = prepare(vlm, clean, corrupt, metric, needed, positions, direction)
    cells = [Cell(group, sites_of_one) for sites_of_one in windows for group in range(len(experiment.groups))]
    values, random, plan = measure_cells(
        experiment, cells, control=control, seed=seed, allow_no_effect=allow_no_effect, **options
    )
    sizes = {"site": len(kinds), "layer": len(names), "position": len(experiment.groups)}
    shape = "(site layer position) example -> site layer position example"
    about = experiment.about(plan=plan, seed=seed, window=window, **grid_of(positions))
    return PatchingResult(
        "activation",
        name_of(metric),
        rearrange(values, shape, **sizes),
        {"site": tuple(kinds), "layer": names, "position": experiment.names},
        experiment.clean,
        experiment.corrupt,
        {} if random is None else {"random vector": rearrange(random, shape, **sizes)},
        about,
    )


def grid_of(positions: Any) -> dict[str, Any]:
    """How positions lie on an image, for `PatchingResult.about`; empty where they are no grid."""
    if not isinstance(positions, PatchGrid):
        return {}
    return {"grid": {"image": positions.image, "rows": positions.rows, "columns": positions.columns}}


def image_map(result: PatchingResult, *, normalised: bool = True) -> torch.Tensor:
    """The means of a result over image patches, as the rows and columns of the image.

    Args:
        result: whose positions are a `PatchGrid`, as its last axis.
        normalised: on the scale on which the corrupt run is 0 and the clean run 1.

    Returns:
        ``[..., row, column]``.

    Raises:
        InputError: positions that are no grid of an image.
    """
    grid = result.about.get("grid")
    if grid is None or list(result.axes)[-1] != "position":
        raise InputError(f"{result.name}: the positions are no grid of an image; patching.image_patches makes one")
    return rearrange(result.mean(normalised), "... (row column) -> ... row column", row=grid["rows"])


def _window(by_layer: Mapping[int, str], layer: int, window: int) -> tuple[str, ...]:
    """The sites of the layers around one, fewer at the ends."""
    first = layer - (window - 1) // 2
    return tuple(by_layer[near] for near in range(first, first + window) if near in by_layer)
