"""Train an aggregation network on pairs of images with corresponding keypoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.hyperfeatures import training_files
from interp.hyperfeatures.loss import symmetric_cross_entropy
from interp.hyperfeatures.network import AggregationNetwork
from interp.hyperfeatures.training_files import Progress
from interp.progress import progress as progress_bar


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


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        steps: how many were taken.
        best_step: after which step the weights that the network has now were reached.
        best_score: their validation score; None without validation.
        stopped_early: whether the patience ran out.
        history: one row for each step: ``step`` (from 1), ``loss``, ``score`` (missing where it was not measured).
    """

    steps: int
    best_step: int
    best_score: float | None
    stopped_early: bool
    history: pd.DataFrame


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
    _check(n_pairs, steps, batch, validate_every, patience, save_every, validate is not None)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    asked: dict[str, Any] = {"n_pairs": n_pairs, "batch": batch, "lr": lr, "weight_decay": weight_decay}
    asked |= {"seed": seed, "validate_every": validate_every, "channels": list(net.channels), "n_steps": net.n_steps}
    asked |= {"dim": net.dim, "width": net.width, "n_groups": net.n_groups, **(settings or {})}
    home = None if folder is None else Path(folder)
    state = (training_files.load(home, asked, net, optimizer) if home else None) or Progress()
    every = validate_every if save_every is None else save_every

    def out_of_patience() -> bool:
        return patience is not None and state.stale >= patience

    with progress_bar(steps, "training the aggregation network") as bar:
        bar.update(min(state.step, steps))
        while state.step < steps and not out_of_patience():
            pairs = [Pair(*source(index)) for index in _drawn(state.step, batch, n_pairs, seed)]
            loss = _step(net, optimizer, pairs, describe, state.step)
            state.step += 1
            score = None
            if validate is not None and (state.step % validate_every == 0 or state.step == steps):
                score = _measure(net, validate, state)
            state.history.append({"step": state.step, "loss": loss, "score": score})
            bar.set_postfix({"loss": f"{loss:.3f}", "best": state.best_score}, refresh=False)
            bar.update(1)
            if home and (state.step % every == 0 or state.step == steps or out_of_patience()):
                training_files.save(home, asked, net, optimizer, state)
    if state.best:
        net.load_state_dict(state.best)
    history = pd.DataFrame(state.history, columns=["step", "loss", "score"]).astype({"score": float})
    best_step = state.best_step if state.best else state.step
    return Training(state.step, best_step, state.best_score, out_of_patience(), history)


def _step(
    net: AggregationNetwork,
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
    describe: Callable[[AggregationNetwork, Sequence[Any]], Sequence[Tensor]],
    step: int,
) -> float:
    net.train()
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
    loss = torch.stack(losses).mean()
    if not math.isfinite(loss.item()):
        raise InputError(f"the loss is {loss.item()} at step {step + 1}: are all features finite?")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def _measure(net: AggregationNetwork, validate: Callable[[AggregationNetwork], float], state: Progress) -> float:
    net.eval()
    with torch.no_grad():
        score = float(validate(net))
    if not math.isfinite(score):
        raise InputError(f"the validation score is {score} after step {state.step}")
    if state.best_score is None or score > state.best_score:
        state.best_step, state.best_score, state.stale = state.step, score, 0
        state.best = {key: tensor.detach().clone() for key, tensor in net.state_dict().items()}
    else:
        state.stale += 1
    return score


def _drawn(step: int, batch: int, n_pairs: int, seed: int) -> list[int]:
    """The pairs of a step: epoch after epoch, each in an order that only the seed and the epoch decide."""
    positions = range(step * batch, (step + 1) * batch)
    epochs = {position // n_pairs for position in positions}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(n_pairs) for epoch in epochs}
    return [int(orders[position // n_pairs][position % n_pairs]) for position in positions]


def _check(
    n_pairs: int,
    steps: int,
    batch: int,
    validate_every: int,
    patience: int | None,
    save_every: int | None,
    validated: bool,
) -> None:
    numbers = {"n_pairs": n_pairs, "steps": steps, "batch": batch, "validate_every": validate_every}
    numbers |= {name: n for name, n in (("patience", patience), ("save_every", save_every)) if n is not None}
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    if patience is not None and not validated:
        raise InputError("patience counts validations: give validate as well")
