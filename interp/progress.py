"""Progress bars: shown on a terminal and in Jupyter, silent in a pipe or a log file."""

import importlib.util
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Element = TypeVar("Element")


def in_jupyter() -> bool:
    """Say whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def visible() -> bool:
    """Say whether anybody would see a bar: on a terminal, or in a notebook."""
    return in_jupyter() or sys.stderr.isatty()


def progress(total: int | None, description: str) -> tqdm:
    """Open a progress bar that is moved by hand.

    Args:
        total: how many units make it full; None when unknown.
        description: the words before the bar.

    Returns:
        A tqdm bar, also a context manager: ``with progress(10, "layers") as bar: bar.update(1)``.
        In a pipe the same object draws nothing.
    """
    return _bar(None, description, total)


def track(iterable: Iterable[Element], description: str, total: int | None = None) -> Iterator[Element]:
    """Iterate over something and show how far it is.

    Args:
        iterable: what to iterate over; its elements pass through unchanged.
        description: the words before the bar.
        total: how many elements there are, when ``len(iterable)`` cannot tell.

    Returns:
        An iterator over the same elements. The bar stays where it stopped when the loop ends early.
    """
    with _bar(iterable, description, total) as bar:
        yield from bar


def _bar(iterable: Iterable[Any] | None, description: str, total: int | None) -> tqdm:
    # Not tqdm's own idea of the size: it draws nothing on a terminal that reports none.
    size = shutil.get_terminal_size()
    shape = {"ncols": size.columns, "nrows": size.lines}
    settings: dict[str, Any] = {"desc": description, "total": total} | shape
    if in_jupyter():
        # tqdm's own choice (tqdm.auto) warns where ipywidgets is missing; a text bar needs no warning.
        if importlib.util.find_spec("ipywidgets") is None:
            return tqdm(iterable, file=sys.stderr, disable=False, **settings)
        from tqdm.notebook import tqdm as notebook_tqdm

        return notebook_tqdm(iterable, desc=description, total=total)
    return tqdm(iterable, file=sys.stderr, disable=not visible(), **settings)
