"""The two files of whatever is saved as tensors and a description: safetensors, and JSON beside them."""

from collections.abc import Sequence
from pathlib import Path

from interp.errors import InputError


def saved_files(path: str | Path) -> tuple[Path, Path]:
    """The two files of a saved set; a name may hold dots of its own.

    Args:
        path: with or without one of the two suffixes.

    Returns:
        The ``.safetensors`` and the ``.json`` file, which need not exist.
    """
    path = Path(path)
    stem = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(f"{stem}.safetensors"), path.with_name(f"{stem}.json")


def check_saved(files: Sequence[Path], missing: str) -> None:
    """Refuse a saved set that lacks a file.

    Args:
        files: its files; the first one that does not exist is named.
        missing: the error's text, with ``{}`` or ``{!r}`` where the file is named.

    Raises:
        InputError: a file does not exist.
    """
    for file in files:
        if not file.is_file():
            raise InputError(missing.format(str(file)))
