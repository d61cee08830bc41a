"""The cells of a sweep on disk: one line for each, so that a sweep that was cut off goes on."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp.errors import InputError

RESULTS = "sweep.jsonl"
COLUMNS = ("task", "site", "timestep", "score", "train_score", "loss")

_log = logging.getLogger(__name__)


class Cells:
    """The cells that are done, in memory and, where there is a folder, on disk.

    Args:
        folder: holds or gets a file of them; None: nothing is kept.
        settings: of the sweep, in what JSON can say; a file with others is refused.
        tasks: what each task is made of; cells of a task that was made of something else are refused.

    Attributes:
        rows: the cells by timestep, task and site.

    Raises:
        InputError: a file that is damaged, or of another sweep.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], tasks: Mapping[str, str]) -> None:
        self.rows: dict[tuple[int, str, str], dict[str, Any]] = {}
        self._tasks = tasks
        self._file = None if folder is None else folder / RESULTS
        if self._file is None:
            return
        lines = self._whole_lines()
        if not lines:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        try:
            held, *rows = (json.loads(line) for line in lines)
            made_of = {row["task"]: row["made_of"] for row in rows}
            for row in rows:
                self.rows[row["timestep"], row["task"], row["site"]] = {key: row[key] for key in COLUMNS}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(self._file)!r} is damaged: {error!r}") from error
        self._check(held, settings, made_of)

    def _whole_lines(self) -> list[str]:
        """The lines of the file; one that was cut off while it was written is taken off, and its cell is done anew."""
        if self._file is None or not self._file.is_file():
            return []
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            _log.warning("The last line of %s was cut off while it was written: it is left out.", self._file)
            with self._file.open("r+b") as opened:
                opened.truncate(len(whole))
        try:
            return whole.decode("utf-8").splitlines()
        except ValueError as error:
            raise InputError(f"{str(self._file)!r} is damaged: {error!r}") from error

    def _check(self, held: Any, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> None:
        if not isinstance(held, dict):
            raise InputError(f"{str(self._file)!r} is damaged: its first line holds no settings")
        there = f"{str(self._file)!r} holds a sweep with"
        for name, value in settings.items():
            if held.get(name) == value:
                continue
            if name in ("weights", "images"):
                raise InputError(f"{there} other {name}: take another folder")
            raise InputError(f"{there} {name} {held.get(name)!r}, not {value!r}: take another folder")
        for name in made_of.keys() & self._tasks.keys():
            if made_of[name] != self._tasks[name]:
                raise InputError(f"{there} other targets, loss or head of {name!r}: take another folder")

    def add(self, row: dict[str, Any]) -> None:
        """One more cell."""
        self.rows[row["timestep"], row["task"], row["site"]] = row
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(row | {"made_of": self._tasks[row["task"]]}) + "\n")


def digest(tensor: Shaped[Tensor, "row ..."]) -> str:
    """A short name of what a tensor holds: its shape, dtype and every number.

    Args:
        tensor: on any device.
    """
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    for row in tensor.detach().reshape(len(tensor), -1):
        found.update(row.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
