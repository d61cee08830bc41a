"""A sweep on disk: the results of each forward as they come, so that one that was cut off goes on where it stopped."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError

ABOUT = "sweep.json"


class Folder:
    """The results of a sweep that are on disk.

    Args:
        path: the folder; made when missing.
        about: what the sweep is, as `interp.sweeps.fingerprint` says; a folder of another one is refused.

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
