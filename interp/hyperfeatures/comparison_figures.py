"""The figures of the comparison: bars, maps over layers and timesteps, matched points, dense correspondences."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from interp import figures
from interp.correspondence import Evaluation, carried_colours, colour_map, dense_matches, pck_interval, warp
from interp.correspondence.pck import BASES
from interp.correspondence.points import Box, Size
from interp.hyperfeatures.comparison import AGGREGATED, PIXELS, SINGLE, TEST, Comparison
from interp.hyperfeatures.features import extract, stream
from interp.hyperfeatures.network import Accumulator, AggregationNetwork
from interp.hyperfeatures.presets import generated
from interp.hyperfeatures.spec import FeatureSpec
from interp.hyperfeatures.study import Split
from interp.images import ImageLike, load_image
from interp.models.diffusion import Diffusion

SHOWN = 4  # pairs in the figure of matched points
FINEST = 128  # pixels of the longer side at which every pixel is matched: time grows with the fourth power


def draw_all(
    sd: Diffusion,
    splits: Sequence[Split],
    spec: FeatureSpec,
    found: Comparison,
    prompts: tuple[str, str] | None = None,
) -> dict[str, Figure]:
    """Draw every figure of a comparison.

    Args:
        sd: the model.
        splits: the folds.
        spec: of the main method.
        found: the comparison.
        prompts: of a pair of generated images; None: none are generated.

    Returns:
        Figures by name.

    Raises:
        InputError: an image that cannot be read; also as `interp.hyperfeatures.extract`.

    Source: Diffusion Hyperfeatures, figures of mixing weights, matched points and dense warps.
    """
    drawn = {
        **{f"pck-bars{'' if part == TEST else f'-{part}'}": pck(runs) for part, runs in found.parts.items()},
        "single-cells": cells(found, spec),
        "mixing-weights": mixing(found, spec),
        "matched-points": matched(found, splits),
        "dense-correspondence": dense(sd, splits[0], spec, found.fitted[0].net),
    }
    if prompts is not None:
        drawn["dense-correspondence-generated"] = dense_generated(sd, prompts, spec, found.fitted[0].net)
    return drawn


def pck(evaluations: Mapping[str, Sequence[Evaluation]]) -> Figure:
    """PCK@0.1 of every method by both bases, with intervals."""
    scores = {method: {base: pck_interval(runs, base=base) for base in BASES} for method, runs in evaluations.items()}
    return _figure(figures.pck_bars(scores, highlight=AGGREGATED))


def cells(found: Comparison, spec: FeatureSpec) -> Figure:
    """PCK@0.1 of every single layer and timestep."""
    return _figure(figures.layer_timestep_map(found.cell_map(), spec.timesteps, label="PCK@0.1 bbox"))


def mixing(found: Comparison, spec: FeatureSpec) -> Figure:
    """The learned mixing weights."""
    weights = found.mixing().to_numpy()
    return _figure(figures.layer_timestep_map(weights, spec.timesteps, label="mixing weight"))


def matched(found: Comparison, splits: Sequence[Split]) -> Figure:
    """The same points matched by three methods, for the first test pair of several categories."""
    results = found.evaluations[AGGREGATED][0].results
    categories = dict.fromkeys(result.pair.category for result in results)
    first = [next(i for i, r in enumerate(results) if r.pair.category == name) for name in categories][:SHOWN]
    methods = [method for method in (AGGREGATED, SINGLE, PIXELS) if method in found.evaluations]
    figure, axes = figures.panels(len(first), len(methods), width=6.8, height=1.25 * len(first))
    images = {key: image for split in splits for key, image in split.images.items()}
    for row, index in enumerate(first):
        for column, method in enumerate(methods):
            result = found.evaluations[method][0].results[index]
            predicted, true = result.points()
            ax = figures.matched_points(
                images[result.pair.source],
                images[result.pair.target],
                result.pair.source_points,
                predicted,
                true=true,
                correct=result.correct(0.1, "bbox"),
                legend=row == len(first) - 1 and column == 0,
                ax=axes[row][column],
            )
            if row == 0:
                ax.set_title(textwrap.fill(method, 24))
    return figure


def dense(sd: Diffusion, split: Split, spec: FeatureSpec, net: AggregationNetwork) -> Figure:
    """Every pixel of the first test pair's target matched with the source: the source warped, and places as colours."""
    pair = split.test[0]
    images = [_tensor(split.images[key]) for key in (pair.source, pair.target)]
    with torch.no_grad():
        source, target = (extract(sd, image[None] * 2 - 1, net, spec)[0] for image in images)
    return _panel(images[0], images[1], source, target, pair.target_box)


def dense_generated(
    sd: Diffusion, prompts: tuple[str, str], spec: FeatureSpec, net: AggregationNetwork, seed: int = 0
) -> Figure:
    """The same for two generated images, described by the features of their generation.

    Args:
        sd: the model.
        prompts: of the two images.
        spec: that the network was trained on, by inversion.
        net: the network.
        seed: of the images.

    Source: Diffusion Hyperfeatures, section 4.3 (transfer to generated images).
    """
    indices = tuple(spec.steps - 1 - call for call in spec.saved)
    same = {"convention": spec.convention, "output_size": spec.output_size}
    made = generated(sd, "", sites=spec.sites, steps=spec.steps, indices=indices, seed=seed, **same)
    total = Accumulator(net)
    with torch.no_grad():
        images = sd.decode(stream(sd, list(prompts), made, total.add)).cpu()
        source, target = total.result()
    return _panel(images[0], images[1], source, target, None)


def _panel(source: Tensor, target: Tensor, source_map: Tensor, target_map: Tensor, box: Box | None) -> Figure:
    sizes = [_within(image, FINEST) for image in (source, target)]
    matches = dense_matches(source_map, target_map, sizes[0], target_size=sizes[1])
    inside = None
    if box is not None:
        ratio = [new / old for new, old in zip(sizes[1], target.shape[1:], strict=True)]
        top, left, bottom, right = (round(side * ratio[place % 2]) for place, side in enumerate(box))
        inside = torch.zeros(sizes[1], dtype=torch.bool)
        inside[top:bottom, left:right] = True
    panel = figures.warp_panel(
        source,
        target,
        warp(source, matches, mask=inside),
        colour_map(sizes[0]),
        carried_colours(matches, mask=inside),
    )
    return _figure(panel)


def _within(image: Tensor, longest: int) -> Size:
    """The (height, width) of an image, scaled down so that neither is longer than this."""
    height, width = int(image.shape[1]), int(image.shape[2])
    ratio = min(1.0, longest / max(height, width))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _tensor(image: Tensor | ImageLike) -> Tensor:
    if isinstance(image, Tensor):
        return image
    pixels = torch.from_numpy(np.asarray(load_image(image), dtype=np.float32) / 255)
    return rearrange(pixels, "height width colour -> colour height width")
