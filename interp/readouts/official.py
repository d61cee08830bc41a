"""The authors' checkpoint files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from interp.errors import InputError
from interp.hyperfeatures.checkpoints import About
from interp.hyperfeatures.official import decoder_branches, read_official
from interp.readouts.head import PICTURE_CHANNELS, ReadoutHead, head_of, is_wrapped
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
            or contradict the configuration (channels, output head, sequential wrapper), or something that neither file
            nor arguments say.

    Source: Readout Guidance, official checkpoints and configurations.
    """
    content = read_official(path)
    config = _mapping(path, content, "config")
    made_with = _mapping(path, config, "aggregation_kwargs")
    name = _name(Path(path), name)
    if use_time is None and name in _UNCONDITIONED:
        use_time = False
    state = _mapping(path, content, "aggregation_network")
    if not all(isinstance(weight, Tensor) for weight in state.values()):
        raise InputError(f"aggregation_network in {str(path)!r} holds something else than tensors")
    # Configurations that do not say it: tanh for pictures, none for heat maps.
    squash = made_with.get("output_head_act") if any(key.startswith("output_head.") for key in state) else None
    if squash not in (None, True, False):
        raise InputError(f"the configuration in {str(path)!r} says output_head_act {squash!r}: expected true or false")
    head = head_of(state, n_groups=n_groups, use_time=use_time, squash=squash, time_convention=time_convention)
    head.sites = sites or decoder_branches(head.n_layers)
    _check(path, config, made_with, head, wrapped=is_wrapped(state))
    size = size or SIZES.get(head.n_layers)
    if size is None:
        raise InputError(f"{str(path)!r} mixes {head.n_layers} layers: give the size of the latents as size=")
    kind = "features"
    if head.out_channels is not None:
        kind = "spatial" if head.out_channels in PICTURE_CHANNELS else "keypoints"
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


def _mapping(path: str | Path, content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"{key} in {str(path)!r} is a {type(found).__name__}, not a dictionary of settings")
    return found


def _check(
    path: str | Path, config: Mapping[str, Any], made_with: Mapping[str, Any], head: ReadoutHead, *, wrapped: bool
) -> None:
    """Refuse weights that their own configuration contradicts, where it says anything."""
    found = {
        "dims": (tuple(config.get("dims") or head.channels), head.channels),
        "projection_dim": (config.get("projection_dim", head.dim), head.dim),
        "bottleneck_sequential": (made_with.get("bottleneck_sequential", wrapped), wrapped),
        "use_output_head": (
            made_with.get("use_output_head", head.out_channels is not None),
            head.out_channels is not None,
        ),
    }
    if head.out_channels is not None:
        found["output_head_channels"] = (made_with.get("output_head_channels", head.out_channels), head.out_channels)
    for key, (stated, there) in found.items():
        if stated != there:
            raise InputError(f"the configuration in {str(path)!r} says {key} {stated}, but the weights {there}")


def _control_range(path: str | Path, config: Mapping[str, Any]) -> tuple[float, float]:
    found = (config.get("dataset_args") or {}).get("control_range")
    if found is None:
        raise InputError(f"{str(path)!r} does not state its control_range: give value_range=, such as (-0.5, 0.5)")
    low, high = (float(end) for end in found)
    return low, high
