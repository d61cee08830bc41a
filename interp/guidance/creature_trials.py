"""Trials on the creatures: prompts with goals of the same species, and errors that an independent estimator sees."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, UnknownNameError, nearest
from interp.zoo.creatures import KEYPOINTS, Rendered, Scene, caption, draw_scenes, render
from interp.zoo.readouts.estimator import PIXELS, Estimate, Estimator

ERRORS = {
    "pose": "keypoint error (pixels)",
    "keypoints": "keypoint error (pixels)",
    "depth": "1 − correlation of depth",
    "edge": "1 − correlation of edges",
}
"""What the estimator measures of each property."""


COMMON = ("eye", "nose", "head_top", "neck_base", "back", "belly", "hip", "tail_base", "tail_mid", "tail_tip",
          "near_back_knee", "near_back_foot")  # fmt: skip
"""The keypoints that every species has."""


BORDER = 3.0  # pixels that a target keeps from the frame


@dataclass(frozen=True, eq=False)
class Goals:
    """What is asked for in each trial.

    Attributes:
        scenes: what the prompts describe.
        prompts: their captions.
        goals: other scenes of the same species, whose pose, depth and edges are the targets.
        rendered: the goals' pictures.
    """

    scenes: list[Scene]
    prompts: list[str]
    goals: list[Scene]
    rendered: Rendered


def draw_goals(n: int, seed: int) -> Goals:
    """Draw prompts and goals; nothing but the species is common to a prompt and its goal.

    Args:
        n: how many trials.
        seed: of scenes and goals.

    Raises:
        InputError: numbers out of range.
    """
    scenes = draw_scenes(n, seed)
    goals = [draw_scenes(1, seed + 1 + index, [scene.species])[0] for index, scene in enumerate(scenes)]
    return Goals(scenes, [caption(scene) for scene in scenes], goals, render(goals))


def errors_by(
    estimator: Estimator, images: Mapping[str, Float[Tensor, "trial 3 height width"]], goals: Goals, name: str
) -> dict[str, list[float]]:
    """How far each arm's images are from their goals.

    Args:
        estimator: judges them.
        images: of every arm, 0 to 1.
        goals: what was asked for.
        name: ``"pose"`` or ``"keypoints"``: the median over a trial's keypoints of their distance in pixels;
            ``"depth"`` or ``"edge"``: 1 minus the correlation over the picture's cells, so that an empty picture, whose
            squared error is small, is no better than a wrong one.

    Raises:
        UnknownNameError: no such property.
    """
    measures: dict[str, Callable[[Estimate, Rendered], list[float]]] = {
        "pose": _keypoint_errors,
        "keypoints": _keypoint_errors,
        "depth": lambda seen, true: _picture_errors(seen.depth, true.depth),
        "edge": lambda seen, true: _picture_errors(seen.edges, true.edges),
    }
    if name not in measures:
        raise UnknownNameError(f"no error of {name!r}: there are {', '.join(measures)}. {nearest(name, measures)}")
    return {arm: measures[name](estimator.estimate(some), goals.rendered) for arm, some in images.items()}


def _keypoint_errors(seen: Estimate, true: Rendered) -> list[float]:
    apart = (seen.keypoints - true.keypoints).norm(dim=-1)
    return [float(row[there].median()) for row, there in zip(apart, true.present, strict=True)]


def _picture_errors(
    seen: Float[Tensor, "trial cell_y cell_x"], true: Float[Tensor, "trial height width"]
) -> list[float]:
    pooled = F.adaptive_avg_pool2d(true[:, None], seen.shape[-1])[:, 0]
    a, b = ((maps - maps.mean(dim=(1, 2), keepdim=True)).flatten(1) for maps in (seen, pooled))
    errors: list[float] = (1 - torch.cosine_similarity(a, b, dim=1)).tolist()
    return errors


def creature_boxes(estimate: Estimate, margin: float = 6.0) -> list[tuple[float, float, float, float]]:
    """The box around the creature in each picture: (top, left, bottom, right) in shares of it.

    Args:
        estimate: of the pictures; the keypoints that all species have count.
        margin: pixels around them.
    """
    points = estimate.keypoints[:, [KEYPOINTS.index(name) for name in COMMON]]
    # A creature at the border keeps a box of at least a fifth of the picture.
    low = ((points.amin(dim=1) - margin) / PIXELS).clamp(0, 0.8).tolist()
    high = ((points.amax(dim=1) + margin) / PIXELS).clamp(0.2, 1).tolist()
    return [(top, left, bottom, right) for (top, left), (bottom, right) in zip(low, high, strict=True)]


@dataclass(frozen=True, eq=False)
class Pulls:
    """Parts that are to be moved, one pull for each trial.

    Attributes:
        sources: (y, x) in pixels of the points in the unguided image.
        targets: where they are to go.
        shares: of the way that was asked for: 1, or less where the picture has no room for more. Empty: all of it.
    """

    sources: list[Float[Tensor, "point 2"]]
    targets: list[Float[Tensor, "point 2"]]
    shares: list[float] = field(default_factory=list)

    @property
    def n_cut(self) -> int:
        """How many pulls are shorter than what was asked for."""
        return sum(share < 1 for share in self.shares)

    def moved(self, estimate: Estimate, names: Sequence[str]) -> list[float]:
        """How much of the asked way the points went in each trial: 1 is all of it, 0 none.

        Args:
            estimate: of the guided images.
            names: of the points.
        """
        now = estimate.keypoints[:, [KEYPOINTS.index(name) for name in names]]
        shares = []
        for points, source, target in zip(now, self.sources, self.targets, strict=True):
            way = target - source
            shares.append(float((((points - source) * way).sum(dim=1) / way.square().sum(dim=1)).median()))
        return shares

    def elsewhere(
        self,
        images: Float[Tensor, "trial 3 height width"],
        before: Float[Tensor, "trial 3 height width"],
        radius: float,
    ) -> list[float]:
        """How much the pixels changed that are far from all points and targets: mean absolute difference.

        Args:
            images: guided, 0 to 1.
            before: unguided.
            radius: in pixels; what is nearer to a point or a target is left out.
        """
        side = torch.arange(PIXELS, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
        changes = []
        for index, change in enumerate((images - before).abs().mean(dim=1)):
            points = torch.cat([self.sources[index], self.targets[index]])
            near = (grid[None] - points[:, None, None]).norm(dim=-1).amin(dim=0) <= radius
            changes.append(float(change[~near].mean()))
        return changes


def draw_pulls(estimate: Estimate, names: Sequence[str], way: tuple[float, float], seed: int) -> Pulls:
    """Pulls of some keypoints, up or down, whose targets lie in the picture.

    Where no direction has room for the whole way, the one with most room is taken and the way is cut, for all points
    alike, to what fits: `Pulls.shares` says to how much, and `Pulls.moved` is relative to the way that was cut.

    Args:
        estimate: of the unguided images.
        names: of the keypoints, which every species has.
        way: how far, in pixels, along y and at most along x.
        seed: of directions.

    Raises:
        InputError: a way that is no finite number of pixels, or none along y.
    """
    if not all(math.isfinite(one) and one >= 0 for one in way) or not way[0]:
        raise InputError(f"way={way}: give pixels along y, more than 0, and along x, from 0 on")
    rng = np.random.default_rng(seed)
    sources = list(estimate.keypoints[:, [KEYPOINTS.index(name) for name in names]].float())
    targets, shares = [], []
    for points in sources:
        ways = [(sign * way[0], side * way[1]) for sign in (-1.0, 1.0) for side in (-1.0, 0.0, 1.0)]
        order = [ways[index] for index in rng.permutation(len(ways))]
        # The first of the longest: a whole way, wherever there is one.
        share, chosen = max(((_room(points, one), one) for one in order), key=lambda found: found[0])
        targets.append(points + share * torch.tensor(chosen))
        shares.append(share)
    return Pulls(sources, targets, shares)


def _room(points: Float[Tensor, "point 2"], way: Sequence[float]) -> float:
    """The share of a way, at most 1, that all points can go without coming nearer to the frame than `BORDER`."""
    share = 1.0
    for axis, step in enumerate(way):
        room = PIXELS - BORDER - float(points[:, axis].max()) if step > 0 else float(points[:, axis].min()) - BORDER
        if step:
            share = min(share, max(room, 0.0) / abs(step))
    return share
