"""The training loop of small networks on a frozen model's features: seeded, validated, resumable."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from interp.errors import InputError, UnknownNameError, nearest
from interp.hyperfeatures import training_files
from interp.hyperfeatures.training_files import Progress
from interp.progress import progress as progress_bar

COLUMNS = ("step", "loss", "score")


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        steps: how many were taken.
        best_step: after which step the weights that the network has now were reached.
        best_score: their validation score; None without validation.
        stopped_early: whether the patience ran out.
        history: one row for each step: ``step`` (from 1), ``loss``, ``score`` (missing where it was not measured), and
            what else was noted of it.
    """

    steps: int
    best_step: int
    best_score: float | None
    stopped_early: bool
    history: pd.DataFrame


def fit(
    net: nn.Module,
    loss_of: Callable[[list[int], int], tuple[Tensor, Mapping[str, Any]]],
    n_examples: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float = 0.0,
    rates: Mapping[str, float] | None = None,
    validate: Callable[[], float] | None = None,
    validate_every: int = 1000,
    patience: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: int | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "training",
    progress: bool = True,
    after_saving: Callable[[pd.DataFrame], None] | None = None,
) -> Training:
    """Train a network in place with AdamW; at the end it has the weights of the best validation score.

    What a step sees depends on the seed and the step's number alone, so that a training that is resumed goes on as if
    it had never stopped.

    Args:
        net: the network; only its weights change.
        loss_of: gives the loss of a step, with a graph, and what else is to be noted of it; takes the indexes of the
            step's examples and the number of the step, from 0.
        n_examples: how many there are; every epoch sees each once, in an order of its own.
        steps: of the optimizer.
        batch: examples a step.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        rates: learning rates of single parameters, by name, in place of ``lr``.
        validate: measures the network; more is better. It runs without gradients.
        validate_every: steps between two measurements; the last step is always measured.
        patience: stop after this many measurements without a new best; None: never.
        seed: of the order of the examples.
        folder: keeps the state of the training, and a training found there goes on; None: nothing is kept.
        save_every: steps between two savings; by default ``validate_every``.
        settings: what makes the steps what they are, in what JSON can say; kept in the folder and compared when its
            training goes on.
        title: the words before the progress bar.
        progress: show a bar.
        after_saving: called with the history so far whenever the state was saved.

    Returns:
        The history, and how the training ended.

    Raises:
        InputError: numbers out of range, a loss or score that is not finite, patience without validation, or a
            folder of a training with other settings.
        UnknownNameError: ``rates`` names a parameter that the network does not have.
    """
    _check(n_examples, steps, batch, validate_every, patience, save_every, validate is not None)
    _check_rates({"lr": lr, "weight_decay": weight_decay, **(rates or {})}, seed)
    optimizer = torch.optim.AdamW(_groups(net, rates or {}), lr=lr, weight_decay=weight_decay)
    asked: dict[str, Any] = {"batch": batch, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    asked |= {"validate_every": validate_every, "rates": dict(rates or {}), **(settings or {})}
    home = None if folder is None else Path(folder)
    state = (training_files.load(home, asked, net, optimizer) if home else None) or Progress()
    every = validate_every if save_every is None else save_every

    def out_of_patience() -> bool:
        return patience is not None and state.stale >= patience

    with progress_bar(steps, title) if progress else nullcontext() as bar:
        if bar is not None:
            bar.update(min(state.step, steps))
        while state.step < steps and not out_of_patience():
            net.train()
            loss, noted = loss_of(drawn(state.step, batch, n_examples, seed), state.step)
            value = _take(optimizer, loss, state.step)
            state.step += 1
            score = None
            if validate is not None and (state.step % validate_every == 0 or state.step == steps):
                score = _measure(net, validate, state)
            state.history.append({"step": state.step, "loss": value, "score": score, **noted})
            if bar is not None:
                bar.set_postfix({"loss": f"{value:.3g}", "best": state.best_score}, refresh=False)
                bar.update(1)
            if home and (state.step % every == 0 or state.step == steps or out_of_patience()):
                training_files.save(home, asked, net, optimizer, state)
                if after_saving is not None:
                    after_saving(_table(state))
    if state.best:
        net.load_state_dict(state.best)
    net.eval()
    best_step = state.best_step if state.best else state.step
    return Training(state.step, best_step, state.best_score, out_of_patience(), _table(state))


def drawn(step: int, batch: int, n_examples: int, seed: int) -> list[int]:
    """The examples of a step: epoch after epoch, each in an order that only the seed and the epoch decide."""
    positions = range(step * batch, (step + 1) * batch)
    epochs = {position // n_examples for position in positions}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(n_examples) for epoch in epochs}
    return [int(orders[position // n_examples][position % n_examples]) for position in positions]


def _table(state: Progress) -> pd.DataFrame:
    columns: Sequence[str] = tuple(dict.fromkeys((*COLUMNS, *(state.history[0] if state.history else ()))))
    return pd.DataFrame(state.history, columns=list(columns)).astype({"score": float})


def _groups(net: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    named = dict(net.named_parameters())
    for name in rates:
        if name not in named:
            raise UnknownNameError(f"{type(net).__name__} has no parameter {name!r}. {nearest(name, named)}")
    own = [{"params": [named[name]], "lr": rate} for name, rate in rates.items()]
    return [{"params": [parameter for name, parameter in named.items() if name not in rates]}, *own]


def _take(optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"{list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"a loss is one number as a tensor, not {found}")
    value = loss.item()
    if not math.isfinite(value):
        raise InputError(f"the loss is {value} at step {step + 1}: are all features finite?")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def _measure(net: nn.Module, validate: Callable[[], float], state: Progress) -> float:
    net.eval()
    with torch.no_grad():
        score = float(validate())
    if not math.isfinite(score):
        raise InputError(f"the validation score is {score} after step {state.step}")
    if state.best_score is None or score > state.best_score:
        state.best_step, state.best_score, state.stale = state.step, score, 0
        state.best = {key: tensor.detach().clone() for key, tensor in net.state_dict().items()}
    else:
        state.stale += 1
    return score


def _check_rates(rates: Mapping[str, Any], seed: Any) -> None:
    for name, rate in rates.items():
        if not isinstance(rate, Real) or not math.isfinite(rate) or rate < 0:
            raise InputError(f"{name}={rate!r}: give a finite number from 0 on")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed={seed!r}: give a whole number from 0 on")


def _check(
    n_examples: int,
    steps: int,
    batch: int,
    validate_every: int,
    patience: int | None,
    save_every: int | None,
    validated: bool,
) -> None:
    numbers = {"the number of examples": n_examples, "steps": steps, "batch": batch, "validate_every": validate_every}
    numbers |= {name: n for name, n in (("patience", patience), ("save_every", save_every)) if n is not None}
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    if patience is not None and not validated:
        raise InputError("patience counts validations: give validate as well")
