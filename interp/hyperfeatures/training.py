"""Train an aggregation network on pairs of images with corresponding keypoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hyperfeatures.fitting import Training, fit
from interp.hyperfeatures.loss import symmetric_cross_entropy
from interp.hyperfeatures.network import AggregationNetwork


class Pair(NamedTuple):
    """Two images with corresponding keypoints; a plain tuple of the same will do.

    Attributes:
        features_a: of the first image, whatever ``describe`` takes: by default a stack ``[step, channels, h, w]``.
        features_b: of the second image.
        points_a: ``[point, 2]``, (y, x) in cells of the first descriptor map, see `scale_points`.
        points_b: the same keypoints in cells of the second.
        present: ``[point]``, which points count; None: all.
    """

    features_a: Any
    features_b: Any
    points_a: Tensor
    points_b: Tensor
    present: Tensor | None = None


def describe_stacks(
    net: AggregationNetwork, features: Sequence[Float[Tensor, "step channels _ _"]]
) -> list[Float[Tensor, "dim _ _"]]:
    """Descriptor maps of precomputed stacks, together when they have one size.

    Args:
        net: the network.
        features: one stack for each image, of any float dtype and on any device.

    Returns:
        One map for each image.
    """
    device = net.mixing_weights.device
    moved = [stack.to(device) for stack in features]
    if len({stack.shape for stack in moved}) == 1:
        return list(net(torch.stack(moved)).unbind(0))
    return [net(stack[None])[0] for stack in moved]


def train(
    net: AggregationNetwork,
    source: Callable[[int], Sequence[Any]],
    n_pairs: int,
    *,
    steps: int = 5000,
    batch: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    mixing_lr: float | None = None,
    describe: Callable[[AggregationNetwork, Sequence[Any]], Sequence[Tensor]] = describe_stacks,
    validate: Callable[[AggregationNetwork], float] | None = None,
    validate_every: int = 1000,
    patience: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Training:
    """Train a network in place; at the end it has the weights of the best validation score.

    Which pairs a step sees depends on the seed and the step's number alone, so that a training that is resumed goes on
    as if it had never stopped.

    Args:
        net: the network; only its weights change.
        source: gives the pair of an index from 0 to ``n_pairs - 1``: a `Pair`, or a tuple of the same.
        n_pairs: how many pairs there are; every epoch sees each once, in an order of its own.
        steps: of the optimizer.
        batch: pairs a step.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        mixing_lr: learning rate of the mixing weights; None: ``lr``. A step of AdamW moves a weight by about its rate,
            so that in fewer steps than the paper's the mixing stays near uniform unless it has a larger one.
        describe: turns features into descriptor maps, with a graph; by default `describe_stacks`. With
            ``lambda net, images: [extract(sd, image, net, spec, grad=True)[0] for image in images]`` the features of a
            pair may be its images.
        validate: measures the network, such as its PCK on other pairs; more is better. It runs without gradients.
        validate_every: steps between two measurements; the last step is always measured.
        patience: stop after this many measurements without a new best; None: never.
        seed: of the order of the pairs.
        folder: keeps the state of the training, and a training found there goes on; None: nothing is kept.
        save_every: steps between two savings; by default ``validate_every``.
        settings: what makes the features and scores what they are (model, spec, pairs, ...), in what JSON can say; kept
            in the folder and compared when its training goes on.

    Returns:
        The history, and how the training ended.

    Raises:
        InputError: numbers out of range, a loss or score that is not finite, patience without validation, or a
            folder of a training with other settings.

    Source: Diffusion Hyperfeatures, section 4.1 and official code: one pair a step, 5,000 steps, AdamW 1e-3.
    """
    asked: dict[str, Any] = {"n_pairs": n_pairs, "channels": list(net.channels), "n_steps": net.n_steps}
    asked |= {"dim": net.dim, "width": net.width, "n_groups": net.n_groups, **(settings or {})}

    def loss_of(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        return _loss(net, [Pair(*source(index)) for index in indices], describe), {}

    return fit(
        net,
        loss_of,
        n_pairs,
        steps=steps,
        batch=batch,
        lr=lr,
        weight_decay=weight_decay,
        rates=None if mixing_lr is None else {"mixing_weights": mixing_lr},
        validate=None if validate is None else lambda: validate(net),
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        folder=folder,
        save_every=save_every,
        settings=asked,
        title="training the aggregation network",
    )


def _loss(
    net: AggregationNetwork,
    pairs: list[Pair],
    describe: Callable[[AggregationNetwork, Sequence[Any]], Sequence[Tensor]],
) -> Tensor:
    maps = describe(net, [features for pair in pairs for features in (pair.features_a, pair.features_b)])
    device = maps[0].device
    losses = [
        symmetric_cross_entropy(
            maps[2 * index][None],
            maps[2 * index + 1][None],
            pair.points_a[None].to(device),
            pair.points_b[None].to(device),
            present=None if pair.present is None else pair.present[None].to(device),
            scale=math.exp(net.logit_scale),
        )
        for index, pair in enumerate(pairs)
    ]
    return torch.stack(losses).mean()
