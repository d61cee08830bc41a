"""The authors' checkpoint files."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from interp.conventions import generation_timesteps, inversion_timesteps
from interp.errors import InputError
from interp.hyperfeatures.checkpoints import About, Checkpoint, load_weights
from interp.hyperfeatures.network import AggregationNetwork, shape_of
from interp.hyperfeatures.spec import INVERSION, FeatureSpec, calls

_TRAINED_STEPS = {"num_train_timesteps": 1000}
_BLOCK = 3  # resnets in each decoder block of Stable Diffusion


def load_official(
    path: str | Path,
    *,
    model: str | Mapping[str, str] | None = None,
    sites: tuple[str, ...] | None = None,
    n_groups: int = 32,
) -> Checkpoint:
    """Read a file of the authors, such as ``aggregation_network.pt``; nothing in it is executed.

    Args:
        path: a ``.pt`` file that holds ``aggregation_network`` (weights, in either style of keys), ``config``, ``step``
            and ``optimizer_state_dict``. The last is not used.
        model: the diffusion model's id, or a mapping from the id in the file's configuration to the one to use (the
            Hub id of Stable Diffusion 1.5 there is withdrawn); by default the id in the file.
        sites: names of the layers; by default three resnets to each decoder block.
        n_groups: of the normalisations, which leave no trace in a file.

    Returns:
        The network, the spec its configuration stands for (convention ``dhf``), and where it comes from.

    Raises:
        InputError: no such file, one that holds more than tensors and plain values, or one that lacks a part.

    Source: Diffusion Hyperfeatures, official checkpoints and configurations.
    """
    content = read_official(path)
    state, config = content["aggregation_network"], content.get("config") or {}
    shape = shape_of(state)
    spec = _spec(config, shape, sites)
    net = AggregationNetwork(**shape, n_groups=n_groups, sites=spec.sites, timesteps=spec.timesteps)
    load_weights(net, state)
    named = str(config.get("model_id", ""))
    about = About(
        model=model if isinstance(model, str) else (model or {}).get(named, named),
        data=str(config.get("train_path", "")),
        training_steps=content.get("step"),
        notes="read from a checkpoint of the authors",
    )
    return Checkpoint(net, spec, about)


def read_official(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file of the authors holds: tensors and plain values, ``aggregation_network`` among them.

    Raises:
        InputError: no such file, one that holds more than that, or one that lacks the weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # What stands in a file of another kind decides which error its reader trips over.
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is no checkpoint of tensors and plain values: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(content, dict) or "aggregation_network" not in content:
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{str(path)!r} has no 'aggregation_network'; it holds {found}")
    return content


def decoder_branches(n_layers: int) -> tuple[str, ...]:
    """The sites that the authors' networks mix: the branches of three resnets to each decoder block."""
    return tuple(f"up.{n // _BLOCK}.resnets.{n % _BLOCK}.hook_branch" for n in range(n_layers))


def _spec(config: Mapping[str, Any], shape: Mapping[str, Any], sites: tuple[str, ...] | None) -> FeatureSpec:
    n_layers, n_steps = len(shape["channels"]), shape["n_steps"]
    steps = int(config.get("num_timesteps", 50 if n_steps > 1 else 1))
    mode = str(config.get("diffusion_mode", INVERSION))
    indices = config.get("save_timestep", (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0) if n_steps > 1 else (0,))
    saved = calls([int(index) for index in indices], steps, mode)
    if len(saved) != n_steps:
        raise InputError(f"the configuration saves {len(saved)} timesteps, the weights mix {n_steps}")
    table = inversion_timesteps if mode == INVERSION else generation_timesteps
    seen = table("dhf", _TRAINED_STEPS, steps)
    guidance = float(config.get("guidance_scale", -1))
    return FeatureSpec(
        sites=sites or decoder_branches(n_layers),
        mode=mode,
        steps=steps,
        saved=saved,
        timesteps=tuple(float(seen[call]) for call in saved),
        output_size=_square(config.get("output_resolution", 64)),
        load_size=_square(config.get("load_resolution")),
        image_size=_square(config.get("image_resolution", 512)),
        seed=int(config.get("seed", 0)),
        prompt=str(config.get("prompt", "")),
        negative_prompt=config.get("negative_prompt") or None,
        guidance_scale=guidance if guidance > 1 else None,
    )


def _square(side: Any) -> tuple[int, int] | None:
    return None if side is None or int(side) < 1 else (int(side), int(side))
