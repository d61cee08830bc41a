"""Reading the rows of a task from a JSON or CSV file."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.errors import InputError, nearest
from interp.images import load_image

REQUIRED = ("input", "output")
OPTIONAL = ("image", "aliases", "id")


@dataclass(frozen=True)
class Row:
    """One item as its file states it.

    Args:
        input, output: texts, stripped and not empty.
        image: path of the image under the image root, or None.
        aliases: other right answers.
        id: as stated, or empty.
        where: file and place, for messages.
    """

    input: str
    output: str
    image: Path | None
    aliases: tuple[str, ...]
    id: str
    where: str


def read_rows(path: Path, *, image_root: Path | None = None, check_images: bool = True) -> list[Row]:
    """Read a task file.

    Args:
        path: ``.json`` (a list of objects, or ``{"data": list}``: the official annotation format) or ``.csv``
            with a header. Columns ``input`` and ``output``; optional ``image``, ``aliases`` (a JSON list, or
            separated by ``|``) and ``id``; others are ignored.
        image_root: folder that image paths start from. None: the file's folder.
        check_images: open every image now, so that a broken one is found here.

    Returns:
        The rows in file order.

    Raises:
        InputError: the file is missing or malformed, lacks a column, has an empty input or output, repeats an
            id, or names an image that is missing or unreadable. The message says where.
    """
    if not path.is_file():
        raise InputError(f"Task file {str(path)!r} does not exist.")
    if path.suffix.lower() == ".json":
        records = _json_records(path)
    elif path.suffix.lower() == ".csv":
        records = _csv_records(path)
    else:
        raise InputError(f"Task file {str(path)!r} must be a .json or a .csv file.")
    root = path.parent if image_root is None else image_root
    rows = [_row(record, where, root) for where, record in records]
    if not rows:
        raise InputError(f"Task file {str(path)!r} has no items.")
    _unique_ids(rows)
    if check_images:
        _check_images(rows)
    return rows


def _json_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Task file {str(path)!r} is not valid JSON: {error}") from error
    if isinstance(content, dict):
        if "data" not in content:
            raise InputError(
                f"Task file {str(path)!r} is an object without 'data'; it has {sorted(map(str, content))}. "
                'Expected a list of items, or {"data": list}.'
            )
        content = content["data"]
    if not isinstance(content, list):
        raise InputError(f"Task file {str(path)!r} must hold a list of items, not {type(content).__name__}.")
    records = []
    for index, record in enumerate(content):
        where = f"{path}, item {index}"
        if not isinstance(record, dict):
            raise InputError(f"{where} must be an object with 'input' and 'output', not {type(record).__name__}.")
        _need_columns(record, where)
        records.append((where, record))
    return records


def _csv_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            _need_columns([name.strip() for name in reader.fieldnames or ()], str(path))
            records = []
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise InputError(
                        f"{where} does not have as many cells as the header; quote cells that contain commas."
                    )
                records.append((where, {name.strip(): value for name, value in record.items()}))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"Task file {str(path)!r} is not valid CSV: {error}") from error
    return records


def _need_columns(found: Iterable[str], where: str) -> None:
    found = list(found)
    for name in REQUIRED:
        if name not in found:
            hint = nearest(name, found)
            raise InputError(
                f"{where} has no {name!r}. Expected {', '.join(REQUIRED)} and optionally "
                f"{', '.join(OPTIONAL)}; found {', '.join(map(str, found)) or 'nothing'}. {hint}".rstrip()
            )


def _row(record: dict[str, Any], where: str, root: Path) -> Row:
    texts = {name: _text(record, name, where) for name in REQUIRED}
    image = record.get("image") or None
    if image is not None and not isinstance(image, str):
        raise InputError(f"{where}: the image must be a path, not {type(image).__name__}.")
    aliases = record.get("aliases") or []
    if isinstance(aliases, str):
        aliases = [alias for alias in aliases.split("|") if alias.strip()]
    if not isinstance(aliases, list) or not all(isinstance(a, str) and a.strip() for a in aliases):
        raise InputError(f"{where}: aliases must be a list of texts that are not empty, not {aliases!r}.")
    identity = record.get("id")
    return Row(
        input=texts["input"],
        output=texts["output"],
        image=None if image is None else root / image.strip(),
        aliases=tuple(alias.strip() for alias in aliases),
        id="" if identity is None else str(identity).strip(),
        where=where,
    )


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: the {name} must be a text, not {value!r}.")
    if not value.strip():
        raise InputError(f"{where}: the {name} is empty.")
    return value.strip()


def _unique_ids(rows: list[Row]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.id and row.id in seen:
            raise InputError(f"{row.where} repeats the id {row.id!r} of {seen[row.id]}.")
        seen[row.id] = row.where


def _check_images(rows: list[Row]) -> None:
    good: set[Path] = set()
    for row in rows:
        if row.image is None or row.image in good:
            continue
        try:
            load_image(row.image)
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from error
        good.add(row.image)
