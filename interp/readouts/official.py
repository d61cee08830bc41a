"""The authors' checkpoint files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.errors import InputError
from interp.hyperfeatures.checkpoints import About
from interp.hyperfeatures.official import decoder_branches, read_official
from interp.readouts.head import head_of
from interp.readouts.readout import Readout
from interp.readouts.times import TimeConvention

SIZES = {12: (64, 64), 9: (128, 128)}
"""Latents of the models by the number of layers: Stable Diffusion 1.5, SDXL."""
NAMES = ("pose", "depth", "edge", "correspondence", "appearance", "identity")
_UNCONDITIONED = ("correspondence",)


def load_official(
    path: str | Path,
    *,
    name: str | None = None,
    model: str | Mapping[str, str] | None = None,
    time_convention: TimeConvention = "true_t",
    use_time: bool | None = None,
    sites: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    value_range: tuple[float, float] | None = None,
    n_groups: int = 32,
) -> tuple[Readout, About]:
    """Read a file of the authors, such as ``readout_sdxl_spatial_pose.pt``; nothing in it is executed.

    Args:
        path: a ``.pt`` file that holds ``aggregation_network`` (weights, in either style of keys), ``config``, ``step``
            and ``optimizer_state_dict``. The last is not used.
        name: of the property; by default the one that the file's name ends in.
        model: the diffusion model's id, or a mapping from the id in the file's configuration to the one to use; by
            default the id in the file, which may be none.
        time_convention: which timestep's embedding the head is given. Files do not say: the authors train with
            ``"generation_index"`` and guide with ``"true_t"``.
        use_time: whether the embedding acts; by default where the weights allow it, save for correspondence, which the
            authors guide without.
        sites: names of the layers; by default three resnets to each decoder block.
        size: of the latents; by default 64 for 12 layers and 128 for 9.
        value_range: of spatial targets; by default the configuration's ``control_range``.
        n_groups: of the normalisations, which leave no trace in a file.

    Returns:
        The readout, and where it comes from.

    Raises:
        InputError: no such file, one that holds more than tensors and plain values, weights that are missing, left over
            or contradict the configuration, or something that neither file nor arguments say.

    Source: Readout Guidance, official checkpoints and configurations.
    """
    content = read_official(path)
    config = content.get("config") or {}
    name = _name(Path(path), name)
    if use_time is None and name in _UNCONDITIONED:
        use_time = False
    head = head_of(
        content["aggregation_network"], n_groups=n_groups, use_time=use_time, time_convention=time_convention
    )
    head.sites = sites or decoder_branches(head.n_layers)
    _check(path, config, head.channels, head.dim)
    size = size or SIZES.get(head.n_layers)
    if size is None:
        raise InputError(f"{str(path)!r} mixes {head.n_layers} layers: give the size of the latents as size=")
    kind = "features" if head.out_channels is None else "spatial" if head.squash else "keypoints"
    if kind == "spatial":
        value_range = value_range or _control_range(path, config)
    named = str(config.get("model_id", ""))
    model = model if isinstance(model, str) else (model or {}).get(named, named)
    readout = Readout(
        head=head,
        sites=head.sites,
        size=size,
        kind=kind,
        name=name,
        value_range=value_range if kind == "spatial" else None,
        model=model,
        time_convention=time_convention,
    )
    about = About(model, training_steps=content.get("step"), notes="read from a checkpoint of the authors")
    return readout, about


def _name(path: Path, name: str | None) -> str:
    if name is not None:
        return name
    last = path.stem.rsplit("_", 1)[-1]
    found = {"keypoints": "pose", "keypoint": "pose"}.get(last, last)
    if found not in NAMES:
        raise InputError(f"the name of {str(path)!r} does not say which property it is for: give name=, such as 'pose'")
    return found


def _check(path: str | Path, config: Mapping[str, Any], channels: tuple[int, ...], dim: int) -> None:
    """Refuse weights that their own configuration contradicts."""
    stated = {"dims": tuple(config.get("dims") or channels), "projection_dim": config.get("projection_dim", dim)}
    for key, found in (("dims", channels), ("projection_dim", dim)):
        if stated[key] != found:
            raise InputError(f"the configuration in {str(path)!r} says {key} {stated[key]}, but the weights {found}")


def _control_range(path: str | Path, config: Mapping[str, Any]) -> tuple[float, float]:
    found = (config.get("dataset_args") or {}).get("control_range")
    if found is None:
        raise InputError(f"{str(path)!r} does not state its control_range: give value_range=, such as (-0.5, 0.5)")
    low, high = (float(end) for end in found)
    return low, high
