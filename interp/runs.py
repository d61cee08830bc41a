"""A run folder: what was asked, what produced it, and the results, in files that any tool opens.

``config.json`` (what was asked), ``provenance.json`` (what produced it, and how it ended), and one or two
files for each result. A result counts as saved only once all its files are complete, so that a run that was
cut off can be opened again and go on where it stopped.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from interp import __version__
from interp.errors import InputError, UnknownNameError, nearest

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class Run:
    """The folder of one run of an experiment.

    Use it as a context manager: the provenance then tells whether the run was ``done`` or ``failed``.

    Args:
        folder: a folder made by `Run.create`; `Run.open` checks that it is one.
    """

    folder: Path

    @classmethod
    def create(
        cls,
        name: str,
        config: Mapping[str, Any],
        root: str | Path = "runs",
        seed: int | Sequence[int] | None = None,
    ) -> "Run":
        """Make a new folder ``root/name-YYYYMMDD-HHMMSS-xxxx``; an existing one is never touched.

        Args:
            name: of the experiment; letters, digits, ``.``, ``_`` and ``-``.
            config: what was asked: mappings and sequences of strings, numbers, booleans, None and paths.
            root: the folder that holds all runs; made when missing.
            seed: the seed or seeds that the experiment uses. They are recorded, not set.

        Returns:
            The run, with status ``running``.

        Raises:
            InputError: the name is no file name, a value of the config has no place in JSON, or ``root`` is no folder.
        """
        _check_name(name)
        plain_config = to_plain(config, "config")
        started = datetime.now(UTC)
        while True:
            folder = Path(root) / f"{name}-{started:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                check_root(root)
            except OSError as error:
                check_root(root)
                raise InputError(f"no run folder can be made in {str(root)!r}: {error.strerror}.") from error
        run = cls(folder)
        _write_json(folder / "config.json", plain_config)
        seeds = [] if seed is None else [seed] if isinstance(seed, int) else list(seed)
        provenance = {"name": name, "status": "running", "started": started.isoformat(), "seeds": seeds}
        _write_json(folder / "provenance.json", provenance | _environment() | {"results": {}})
        return run

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open the folder of an earlier run, to read it or to go on with it.

        Args:
            path: the folder.

        Returns:
            The run, unchanged.

        Raises:
            InputError: there is no such folder, or it is not the folder of a run.
        """
        folder = Path(path)
        missing = [name for name in ("config.json", "provenance.json") if not (folder / name).is_file()]
        if missing:
            reason = f"it has no {' and no '.join(missing)}" if folder.is_dir() else "there is no such folder"
            raise InputError(f"{str(folder)!r} is not the folder of a run: {reason}.")
        return cls(folder)

    @property
    def config(self) -> dict[str, Any]:
        """What was asked, as it stands in ``config.json``."""
        return _read_json(self.folder / "config.json")

    @property
    def provenance(self) -> dict[str, Any]:
        """What produced this run, as it stands in ``provenance.json``."""
        return _read_json(self.folder / "provenance.json")

    def __enter__(self) -> "Run":
        if self.provenance["status"] != "running":
            self._note(status="running", resumed=datetime.now(UTC).isoformat())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = datetime.now(UTC)
        started = datetime.fromisoformat(self.provenance.get("resumed") or self.provenance["started"])
        self._note(
            status="done" if kind is None else "failed",
            error=None if kind is None else f"{kind.__name__}: {error}",
            ended=ended.isoformat(),
            seconds=round((ended - started).total_seconds(), 3),
        )

    def is_done(self, name: str) -> bool:
        """Say whether a result of this name was saved completely.

        Args:
            name: as given to one of the ``save_`` methods.
        """
        files = self.provenance["results"].get(name, [])
        return bool(files) and all((self.folder / file).is_file() for file in files)

    def save_json(self, name: str, value: Any) -> Path:
        """Save nested mappings and sequences of strings, numbers, booleans, None and paths.

        Args:
            name: of the result.
            value: what to save.

        Returns:
            The file ``name.json``.

        Raises:
            InputError: a value has no place in JSON, or the result exists.
        """
        plain = to_plain(value, name)
        return self._save(name, {".json": lambda path: _write_json(path, plain)})

    def save_table(self, name: str, table: pd.DataFrame) -> Path:
        """Save a table as CSV and as a JSON list of rows; a missing number is empty, or null.

        Args:
            name: of the result.
            table: its columns have plain names; an index that says something becomes columns.

        Returns:
            The file ``name.csv``.

        Raises:
            InputError: a column name is no string or comes twice, a value has no place in JSON, or
                the result exists.
        """
        if not isinstance(table.index, pd.RangeIndex):
            table = table.reset_index()
        wrong = [column for column in table.columns if not isinstance(column, str)]
        if wrong:
            raise InputError(f"Column names of table {name!r} must be strings; these are not: {wrong}.")
        if not table.columns.is_unique:
            twice = list(table.columns[table.columns.duplicated()])
            raise InputError(f"Table {name!r} has these columns twice: {twice}.")
        rows = [
            {
                key: None if value is None or value is pd.NA or value != value else to_plain(value, f"{name}[{key!r}]")
                for key, value in row.items()
            }
            for row in table.to_dict(orient="records")
        ]
        writers = {
            ".csv": lambda path: table.to_csv(path, index=False, lineterminator="\n"),
            ".json": lambda path: _write_json(path, rows),
        }
        return self._save(name, writers)

    def save_figure(self, name: str, figure: Figure) -> Path:
        """Save a figure as PDF (text stays text, in embedded fonts) and as PNG with 200 dots per inch.

        Args:
            name: of the result.
            figure: it stays open and unchanged. The same figure gives the same bytes.

        Returns:
            The file ``name.png``.

        Raises:
            InputError: the result exists.
        """

        def write(path: Path) -> None:
            undated = {
                "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
                "png": {"Software": None},
            }
            kind = path.suffixes[-1][1:]
            with matplotlib.rc_context({"pdf.fonttype": 42}):
                figure.savefig(path, format=kind, dpi=200, bbox_inches="tight", pad_inches=0.02, metadata=undated[kind])

        return self._save(name, {".png": write, ".pdf": write})

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        """Save tensors by name as safetensors, on the CPU, with their own dtypes.

        Args:
            name: of the result.
            tensors: by name.
            metadata: text to keep in the file's header.

        Returns:
            The file ``name.safetensors``.

        Raises:
            InputError: the result exists.
        """
        from safetensors.torch import save_file

        plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        return self._save(
            name, {".safetensors": lambda path: save_file(plain, path, dict(metadata) if metadata else None)}
        )

    def load_json(self, name: str) -> Any:
        """Read what `save_json` saved, or the rows of a table."""
        return _read_json(self._file(name, ".json"))

    def load_table(self, name: str) -> pd.DataFrame:
        """Read a table that `save_table` saved; numbers come back exactly."""
        columns = pd.read_csv(self._file(name, ".csv"), nrows=0).columns
        return pd.DataFrame(self.load_json(name), columns=columns)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read what `save_tensors` saved."""
        from safetensors.torch import load_file

        return load_file(self._file(name, ".safetensors"))

    def _file(self, name: str, suffix: str) -> Path:
        results = self.provenance["results"]
        if f"{name}{suffix}" not in results.get(name, []):
            known = [key for key, files in results.items() if f"{key}{suffix}" in files]
            raise UnknownNameError(
                f"Run {self.folder.name} has no result {name!r} with a {suffix} file; it has {known}. "
                f"{nearest(name, known)}".rstrip()
            )
        return self.folder / f"{name}{suffix}"

    def _save(self, name: str, writers: Mapping[str, Callable[[Path], Any]]) -> Path:
        _check_name(name)
        if name in ("config", "provenance"):
            raise InputError(f"{name!r} is taken: a run keeps its own {name}.json. Choose another name.")
        if self.is_done(name):
            raise InputError(
                f"Run {self.folder.name} already has a result {name!r}; results are not overwritten. "
                "Choose another name, or ask `is_done` first."
            )
        for suffix, write in writers.items():
            with _complete(self.folder / f"{name}{suffix}") as path:
                write(path)
        files = [f"{name}{suffix}" for suffix in writers]
        self._note(results=self.provenance["results"] | {name: files})
        return self.folder / files[0]

    def _note(self, **facts: Any) -> None:
        _write_json(self.folder / "provenance.json", self.provenance | facts)


def to_plain(value: Any, where: str) -> Any:
    """Turn a value into what JSON can say, or tell which part of it cannot be said.

    Args:
        value: nested mappings and sequences of strings, finite numbers, booleans, None and paths.
        where: what to call the value in an error.

    Returns:
        The same in dicts, lists and plain scalars.

    Raises:
        InputError: naming the part, as in ``config['layers'][2]``.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise InputError(f"{where} is {value}, which JSON cannot say; use None or a finite number.")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise InputError(f"{where} has the key {wrong[0]!r}; keys must be strings.")
        return {key: to_plain(part, f"{where}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part, f"{where}[{index}]") for index, part in enumerate(value)]
    raise InputError(
        f"{where} is a {type(value).__name__}, which JSON cannot say; "
        "expected strings, numbers, booleans, None, paths, and lists or dicts of these."
    )


def check_root(root: str | Path) -> None:
    """Refuse a place that cannot be a folder of runs, before any work is done for them.

    Args:
        root: as for `Run.create`.

    Raises:
        InputError: it is a file, or lies below one.
    """
    for place in (Path(root), *Path(root).parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"{str(root)!r} cannot be a folder of runs: {str(place)!r} is a file.")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{name!r} cannot name a file here: letters, digits, '.', '_' and '-' can.")


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    # Written beside its place and moved there, so that a file is complete or absent.
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    with _complete(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _environment() -> dict[str, Any]:
    versions = {"interp": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    from torch import cuda

    return {
        "argv": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "accelerators": [cuda.get_device_name(index) for index in range(cuda.device_count())],
        "git": {
            "interp": _checkout(Path(__file__).parent, __file__),
            "working_folder": _checkout(Path.cwd(), "."),
        },
    }


def _checkout(folder: Path, tracked: str) -> dict[str, Any] | None:
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package in a virtual environment lies inside the user's checkout, but is not part of it.
    if git("ls-files", "--error-unmatch", "--", tracked) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}
