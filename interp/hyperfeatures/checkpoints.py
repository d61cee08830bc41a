"""Aggregation networks on disk: weights as safetensors, and a JSON file that says what they are for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError
from interp.hyperfeatures.network import AggregationNetwork
from interp.hyperfeatures.presets import timesteps_of
from interp.hyperfeatures.spec import NOISE, FeatureSpec
from interp.models.diffusion import Diffusion
from interp.saved_files import check_saved, saved_files

FORMAT = "interp aggregation network"
VERSION = 1


@dataclass(frozen=True)
class About:
    """Where an aggregation network comes from.

    Attributes:
        model: the diffusion model's name or Hub id.
        data: what it was trained on, in words.
        training_steps: of the optimizer; None when not known.
        scores: measured figures by name, such as ``{"PCK@0.1 img, validation": 0.71}``.
        notes: anything else, in words.
    """

    model: str
    data: str = ""
    training_steps: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A network with what it is for.

    Attributes:
        net: the network.
        spec: the feature maps it was trained on.
        about: where it comes from.
    """

    net: AggregationNetwork
    spec: FeatureSpec
    about: About

    def check(self, sd: Diffusion, spec: FeatureSpec | None = None, *, transfer: bool = False) -> None:
        """Refuse a diffusion model, or another spec, that does not give the maps this network was trained on.

        Args:
            sd: the model.
            spec: of the maps that are to be aggregated; by default the checkpoint's own.
            transfer: allow other timesteps and another process (as many steps), such as maps of generation for a
                network trained on maps of inversion.

        Raises:
            InputError: naming the first difference: a site, its channels, or a timestep.
            UnknownNameError: the model lacks a site.

        Source: Diffusion Hyperfeatures, section 4.3 (transfer).
        """
        asked = self.spec if spec is None else spec
        _same("site", self.spec.sites, asked.sites)
        by_site = dict(zip(asked.sites, sd.channels(list(asked.sites)), strict=True))
        _same("number of channels", self.net.channels, by_site.values(), [f" of {site}" for site in by_site])
        if asked.n_steps != self.net.n_steps:
            raise InputError(f"the checkpoint mixes {self.net.n_steps} steps, not {asked.n_steps}")
        if transfer:
            return
        for name in ("mode", "convention"):
            if getattr(asked, name) != getattr(self.spec, name):
                raise InputError(
                    f"the checkpoint is for {name} {getattr(self.spec, name)!r}, not {getattr(asked, name)!r}; to use "
                    "it there all the same, say transfer=True"
                )
        seen = asked.timesteps
        if asked.mode != NOISE:
            seen = timesteps_of(sd, asked.mode, asked.convention, asked.steps, asked.saved) or seen
        _same("timestep", self.spec.timesteps, seen)


def save(net: AggregationNetwork, path: str | Path, spec: FeatureSpec, about: About) -> None:
    """Write the weights to ``path.safetensors`` and everything else to ``path.json``; no state of an optimizer.

    Args:
        net: the network.
        path: with or without one of the two suffixes.
        spec: of the maps it was trained on, timesteps included.
        about: where it comes from.

    Raises:
        InputError: a spec without timesteps, or with other numbers of sites or steps than the network.
    """
    if not spec.timesteps:
        raise InputError("a checkpoint states its timesteps: take a spec from interp.hyperfeatures.presets")
    _fits(net, spec)
    weights, description = saved_files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in net.state_dict().items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "about": asdict(about),
        "network": {"channels": list(net.channels), "n_steps": net.n_steps, "dim": net.dim, "width": net.width}
        | {"n_groups": net.n_groups},
        "features": spec.to_json(),
    }
    save_file(tensors, weights)
    description.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> Checkpoint:
    """Read what `save` wrote.

    Args:
        path: with or without one of the two suffixes.

    Returns:
        The network in float32 on the CPU, and what it is for.

    Raises:
        InputError: a file is missing, damaged or of another kind.
    """
    weights, description = saved_files(path)
    check_saved((weights, description), "no checkpoint at {!r}: it is a .safetensors and a .json file")
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        kind = (content.get("format"), content.get("version"))
        if kind != (FORMAT, VERSION):
            raise InputError(f"{str(description)!r} is of format {kind}, not {(FORMAT, VERSION)}")
        spec = FeatureSpec.from_json(content["features"])
        net = AggregationNetwork(**content["network"], sites=spec.sites, timesteps=spec.timesteps)
        load_weights(net, load_file(weights))
        return Checkpoint(net, spec, About(**content["about"]))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the checkpoint at {str(weights)!r} is damaged: {error}") from error


def load_weights(net: AggregationNetwork, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, in either style of keys.

    Raises:
        InputError: naming what is missing, left over, or of another shape.
    """
    try:
        net.load_state_dict(dict(state))
    except RuntimeError as error:
        raise InputError(f"the weights do not fit the network: {' '.join(str(error).split())}") from error


def _fits(net: AggregationNetwork, spec: FeatureSpec) -> None:
    for name, of_net, of_spec in (
        ("layers", net.n_layers, len(spec.sites)),
        ("steps", net.n_steps, spec.n_steps),
    ):
        if of_net != of_spec:
            raise InputError(f"the network has {of_net} {name}, the spec {of_spec}")
    if net.sites is not None:
        _same("site", net.sites, spec.sites)


def _same(name: str, ours: Any, others: Any, where: list[str] | None = None) -> None:
    ours, others = list(ours), list(others)
    for index, (our, other) in enumerate(zip(ours, others, strict=False)):
        if our != other:
            place = where[index] if where else f" {index}"
            raise InputError(f"{name}{place} is {our!r} in the checkpoint, but {other!r} here")
    if len(ours) != len(others):
        raise InputError(f"the checkpoint has {len(ours)} {name}s, not {len(others)}")
