"""A sweep on disk: the results of each forward as they come, so that one that was cut off goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError
from interp.hooks import Applied

ABOUT = "sweep.json"
# Numbers of each parameter that tell one model from another.
_SAMPLED = 256


class Folder:
    """The results of a sweep that are on disk.

    Args:
        path: the folder; made when missing.
        about: what the sweep is, as `fingerprint` says; a folder of another one is refused.

    Raises:
        InputError: a folder of another sweep, of something else, or a damaged one.
    """

    def __init__(self, path: str | Path, about: Mapping[str, str]) -> None:
        self.path = Path(path)
        self._about = self.path / ABOUT
        if self._about.is_file():
            try:
                held = json.loads(self._about.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{str(self._about)!r} is damaged: {error}") from error
            other = [name for name in about if held.get(name) != about[name]]
            if other:
                raise InputError(
                    f"{str(self.path)!r} holds a sweep with other {' and '.join(other)}: take another folder"
                )
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{str(self.path)!r} is no folder of a sweep, and not empty: take another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._about.write_text(json.dumps(dict(about), indent=1), encoding="utf-8")

    def load(self) -> dict[int, Tensor]:
        """The results that are there, by variant.

        Raises:
            InputError: a damaged file.
        """
        done: dict[int, Tensor] = {}
        for file in sorted(self.path.glob("variants-*.safetensors")):
            try:
                held = load_file(file)
                done |= dict(zip(held["variants"].tolist(), held["values"].unbind(), strict=True))
            except (SafetensorError, KeyError, ValueError) as error:
                raise InputError(
                    f"{str(file)!r} is damaged: {error!r}. Remove it, and the sweep makes it anew"
                ) from error
        return done

    def save(self, values: Mapping[int, Tensor]) -> None:
        """Add the results of some variants.

        Args:
            values: by variant.
        """
        name = f"variants-{min(values):06d}.safetensors"
        tensors = {
            "variants": torch.tensor(list(values)),
            "values": torch.stack([value.detach().cpu() for value in values.values()]).contiguous(),
        }
        # Complete files only: a sweep may be cut off at any time.
        partial = self.path / f"{name}.part"
        save_file(tensors, partial)
        partial.replace(self.path / name)


def fingerprint(
    vlm: Any, inputs: Mapping[str, Any], variants: Sequence[Sequence[Applied]], metric: Callable | None, positions: Any
) -> dict[str, str]:
    """What a sweep is, in parts that are compared one by one.

    Args:
        vlm: the model.
        inputs: its inputs.
        variants: for every variant its edits.
        metric: what is made of the logits.
        positions: whose logits are asked for.
    """
    model = hashlib.sha256(f"{type(vlm.model).__name__} {vlm.dtype}".encode())
    for name, parameter in vlm.model.named_parameters():
        sample = parameter.detach().flatten()[:_SAMPLED]
        _add(model, name, sample if sample.device.type != "meta" else tuple(parameter.shape))
    given = hashlib.sha256()
    for name in sorted(inputs):
        _add(given, name, inputs[name])
    edited = hashlib.sha256()
    for edits in variants:
        _add(edited, "variant", len(edits))
        for applied in edits:
            _add(edited, type(applied.edit).__name__, applied.edit)
    asked = hashlib.sha256()
    _add(asked, "metric", metric)
    _add(asked, "positions", positions)
    return {
        "model": model.hexdigest(),
        "inputs": given.hexdigest(),
        "variants": edited.hexdigest(),
        "metric or positions": asked.hexdigest(),
    }


def _add(digest: Any, name: str, value: Any) -> None:
    digest.update(f"|{name}:".encode())
    if isinstance(value, Tensor):
        exact = value.detach().cpu().contiguous()
        digest.update(f"{exact.dtype} {tuple(exact.shape)}".encode())
        digest.update(exact.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Edit):
        for f in fields(value):
            _add(digest, f.name, getattr(value, f.name))
    elif callable(value):
        # Code cannot be compared in full: its name and instructions are.
        code = getattr(value, "__code__", None)
        digest.update(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}".encode())
        digest.update(b"" if code is None else code.co_code + repr(code.co_consts).encode())
    else:
        digest.update(repr(value).encode())
