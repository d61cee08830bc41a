"""Edits on disk: what they are as JSON, their tensors as safetensors."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.edits import (
    Add,
    Edit,
    Interpolate,
    MeanAblate,
    Project,
    Replace,
    Resample,
    Scale,
    Zero,
    as_edits,
)
from interp.errors import InputError, nearest
from interp.positions import PerRow
from interp.regions import Region
from interp.saved_files import check_saved, saved_files

_KINDS: dict[str, type[Edit]] = {
    kind.__name__: kind for kind in (Add, Interpolate, MeanAblate, Project, Replace, Resample, Scale, Zero)
}


def save_edits(edits: Edit | Sequence[Edit], path: str | Path) -> None:
    """Write edits to ``path.json`` and their tensors to ``path.safetensors``.

    Args:
        edits: one edit or several; not `Function`, whose code cannot be saved.
        path: with or without one of the two suffixes.

    Raises:
        InputError: an edit or a position that has no form on disk.
    """
    listed = as_edits(edits)
    tensors: dict[str, Tensor] = {}
    about = []
    for index, edit in enumerate(listed):
        kind = type(edit).__name__
        if type(edit) is not _KINDS.get(kind):
            raise InputError(f"{edit!r} cannot be saved: only {', '.join(_KINDS)} can, which hold numbers and no code")
        entry: dict[str, Any] = {"kind": kind}
        for f in fields(edit):
            value = getattr(edit, f.name)
            if isinstance(value, Region) and value.shape is not None:
                tensors[f"{index}.{f.name}"] = value.shape.clone()
            elif isinstance(value, Tensor):
                tensors[f"{index}.{f.name}"] = value.detach().cpu().contiguous().clone()
            else:
                entry[f.name] = _plain(value, edit)
        about.append(entry)
    tensors_file, json_file = saved_files(path)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, tensors_file)
    json_file.write_text(json.dumps(about, indent=1))


def load_edits(path: str | Path) -> list[Edit]:
    """Read what `save_edits` wrote.

    Args:
        path: with or without one of the two suffixes.

    Raises:
        InputError: a file is missing or damaged.
    """
    tensors_file, json_file = saved_files(path)
    check_saved((json_file, tensors_file), "no edits at {!r}: saved edits are a .json and a .safetensors file")
    try:
        about = json.loads(json_file.read_text())
        tensors = load_file(tensors_file)
        return [_edit(index, dict(entry), tensors) for index, entry in enumerate(about)]
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the edits at {str(json_file)!r} are damaged: {error}") from error


def _edit(index: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    kind = entry.pop("kind")
    if kind not in _KINDS:
        raise InputError(f"there is no edit {kind!r}. {nearest(str(kind), _KINDS)}".rstrip())
    arguments = {name: _restored(value) for name, value in entry.items()}
    prefix = f"{index}."
    arguments |= {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if isinstance(arguments.get("at"), Tensor):
        arguments["at"] = Region.mask(arguments["at"])
    return _KINDS[kind](**arguments)


def _plain(value: Any, edit: Edit) -> Any:
    """A position, number or name in JSON; what JSON has no form for is an object with one key."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(one, edit) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(one, edit) for one in value]}
    if isinstance(value, slice | range):
        kind = type(value).__name__
        return {kind: [_plain(one, edit) for one in (value.start, value.stop, value.step)]}
    if isinstance(value, Region):
        return {"box": list(value.edges)}
    if isinstance(value, PerRow):
        return {"per_row": [_plain(one, edit) for one in value.at]}
    if hasattr(value, "__index__"):
        return int(value)
    raise InputError(f"{edit!r} cannot be saved: {value!r} ({type(value).__name__}) has no form on disk")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(one) for one in value]
    if isinstance(value, dict):
        (kind, parts), *more = value.items()
        makers: dict[str, Callable[[list[Any]], Any]] = {
            "tuple": tuple,
            "slice": lambda p: slice(*p),
            "range": lambda p: range(*p),
            "per_row": _per_row,
            "box": lambda p: Region.box(*p),
        }
        if more or kind not in makers:
            raise InputError(f"{value!r} is no position")
        return makers[kind]([_restored(one) for one in parts])
    return value


def _per_row(parts: list[Any]) -> PerRow:
    return PerRow(tuple(parts))
