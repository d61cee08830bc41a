"""Readouts on disk: weights as safetensors, and a JSON file that says everything else."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from interp.errors import InputError
from interp.hyperfeatures.checkpoints import About
from interp.models.diffusion import Diffusion
from interp.readouts.head import ReadoutHead, load_head_weights
from interp.readouts.probes import AttentionProbe, LinearProbe
from interp.readouts.readout import Readout
from interp.readouts.times import TimeConvention

FORMAT = "interp readout"
VERSION = 1
WEIGHTS, DESCRIPTION = "readout.safetensors", "readout.json"

_HEADS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (ReadoutHead, LinearProbe, AttentionProbe)}


def save(readout: Readout, folder: str | Path, about: About | None = None) -> None:
    """Write a readout to ``readout.safetensors`` and ``readout.json``; no state of an optimizer.

    Args:
        readout: with a head of this library.
        folder: made when missing.
        about: data, training steps and scores; its model is the readout's own where it names none.

    Raises:
        InputError: a head of another kind, or a folder that cannot be made.
    """
    kind = type(readout.head).__name__
    if _HEADS.get(kind) is not type(readout.head):
        raise InputError(f"a head of the kind {kind!r} has no format: there are {', '.join(_HEADS)}")
    home = Path(folder)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be a folder: {error.strerror}") from error
    content = {
        "format": FORMAT,
        "version": VERSION,
        "about": asdict(about if about is not None else About(readout.model)),
        "head": {"kind": kind} | readout.head.settings(),  # type: ignore[operator]
        "readout": {
            "sites": list(readout.sites),
            "size": list(readout.size),
            "kind": readout.kind,
            "name": readout.name,
            "value_range": None if readout.value_range is None else list(readout.value_range),
            "model": readout.model,
            "time_convention": readout.time_convention,
            "fingerprint": list(readout.fingerprint),
        },
    }
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in readout.head.state_dict().items()}
    save_file(tensors, home / WEIGHTS)
    (home / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(
    folder: str | Path,
    sd: Diffusion | None = None,
    *,
    time_convention: TimeConvention | None = None,
    override: bool = False,
) -> Readout:
    """Read what `save` wrote.

    Args:
        folder: of the checkpoint.
        sd: the model it is to be used on, which is checked; the head goes to its device.
        time_convention: the one that is expected; None: whatever the checkpoint states.
        override: use ``time_convention`` although the checkpoint states the other one.

    Returns:
        The readout, its head in evaluation mode.

    Raises:
        InputError: a file is missing, damaged or of another kind; another time convention than expected; or another
            model.
        UnknownNameError, SiteUnavailableError: the model lacks a site.
    """
    home = Path(folder)
    content = _content(home)
    try:
        fields, head = dict(content["readout"]), dict(content["head"])
        stated = fields["time_convention"]
        if time_convention not in (None, stated):
            if not override:
                raise InputError(
                    f"the readout in {str(home)!r} was trained with time convention {stated!r}, not "
                    f"{time_convention!r}: to use it under that one all the same, say override=True"
                )
            fields["time_convention"] = time_convention
        made = _head(head, fields)
        load_head_weights(made, load_file(home / WEIGHTS))
        for name in ("sites", "size", "value_range", "fingerprint"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        readout = Readout(head=made.eval(), **fields)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the readout in {str(home)!r} is damaged: {error}") from error
    if sd is not None:
        readout.check(sd)
        readout.head.to(sd.device)
    return readout


def about(folder: str | Path) -> About:
    """Where a saved readout comes from.

    Raises:
        InputError: as `load`.
    """
    home = Path(folder)
    try:
        return About(**_content(home)["about"])
    except (KeyError, TypeError) as error:
        raise InputError(f"the readout in {str(home)!r} is damaged: {error}") from error


def _content(home: Path) -> Mapping[str, Any]:
    for name in (WEIGHTS, DESCRIPTION):
        if not (home / name).is_file():
            raise InputError(f"no readout in {str(home)!r}: {name!r} is missing")
    try:
        content = json.loads((home / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(home / DESCRIPTION)!r} is damaged: {error}") from error
    kind = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
    if kind != (FORMAT, VERSION):
        raise InputError(f"{str(home / DESCRIPTION)!r} is of format {kind}, not {(FORMAT, VERSION)}")
    found: Mapping[str, Any] = content
    return found


def _head(settings: dict[str, Any], fields: Mapping[str, Any]) -> nn.Module:
    kind = settings.pop("kind")
    if kind not in _HEADS:
        raise InputError(f"no kind of head {kind!r}: there are {', '.join(_HEADS)}")
    if kind == ReadoutHead.__name__:
        settings |= {"sites": fields["sites"], "time_convention": fields["time_convention"]}
        settings["output_widths"] = tuple(settings["output_widths"])
    return _HEADS[kind](**settings)
