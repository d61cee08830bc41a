"""The run folder of a training: one file holds all of its state, so that it is never half written."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from interp.errors import InputError

STATE = "training.safetensors"
HISTORY = "history.json"


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: steps taken.
        history: one record for each step: ``step`` (from 1), ``loss``, ``score`` (None where it was not measured).
        best_step: after which step the best score was measured, 0 before the first.
        best_score: the best score so far.
        stale: scores measured since the best one.
        best: the weights of the best score.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_score: float | None = None
    stale: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def save(
    folder: Path,
    settings: Mapping[str, Any],
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write the state of a training in place of the one before; the folder is made when missing.

    Args:
        folder: of the run.
        settings: what the steps depend on, in what JSON can say.
        net: the network as it is now.
        optimizer: over the network's parameters, grouped in the same way when it is read.
        progress: how far the training is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{key}": tensor for key, tensor in net.state_dict().items()}
    tensors |= {f"best.{key}": tensor for key, tensor in progress.best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in moments.items()}
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    counts = {
        "step": progress.step,
        "best_step": progress.best_step,
        "best_score": progress.best_score,
        "stale": progress.stale,
        "history": progress.history,
    }
    partial = folder / f".partial-{STATE}"
    save_file(tensors, partial, {"settings": json.dumps(dict(settings)), "progress": json.dumps(counts)})
    os.replace(partial, folder / STATE)
    readable = folder / f".partial-{HISTORY}"
    readable.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    os.replace(readable, folder / HISTORY)


def load(
    folder: Path, settings: Mapping[str, Any], net: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Read the state of a training into a network and an optimizer.

    Args:
        folder: of the run.
        settings: what the steps depend on; they must be those of the run.
        net: gets the weights.
        optimizer: gets its moments.

    Returns:
        How far the training is; None when the folder holds none.

    Raises:
        InputError: the folder belongs to a training with other settings, or its file is damaged.
    """
    file = folder / STATE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in list(opened.keys())}
        before, counts = json.loads(metadata["settings"]), json.loads(metadata["progress"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"the state of the training in {str(file)!r} is damaged: {error}") from error
    for name, value in json.loads(json.dumps(dict(settings))).items():
        if before.get(name) != value:
            raise InputError(
                f"{str(folder)!r} holds a training with {name} {before.get(name)!r}, not {value!r}: give the same "
                "settings to go on with it, or another folder"
            )
    net.load_state_dict(_under(tensors, "network."))
    _load_moments(optimizer, _under(tensors, "optimizer."))
    return Progress(best=_under(tensors, "best."), **counts)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _load_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
