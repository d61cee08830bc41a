"""The errors of this library, and the nearest-name hint that most of them end with."""

import difflib
from collections.abc import Iterable


class InterpError(Exception):
    """Base class: whatever this library raises about how it was used."""


class UnknownNameError(InterpError, KeyError):
    """A site, position, segment, task or model name that does not exist here."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which turns line breaks into "\n".
        return str(self.args[0]) if self.args else ""


class SiteUnavailableError(InterpError):
    """A well-formed site that this model cannot offer; the message says why."""


class NeverFiredError(InterpError, RuntimeError):
    """A captured site or an edit whose module never ran, or whose selection never met a token."""


class ShapeError(InterpError, ValueError):
    """A value whose shape does not fit the place it is meant for."""


class InputError(InterpError, ValueError):
    """Bad input from a user: a prompt, an image, a task file, a vector file, a setting."""


def nearest(name: str, options: Iterable[str], n: int = 4) -> str:
    """Say which known names look most like a wrong one.

    Args:
        name: the name that was not found.
        options: the names that exist.
        n: how many to offer at most.

    Returns:
        ``"Did you mean 'a', 'b'?"``, or an empty string when nothing is close.
    """
    close = difflib.get_close_matches(name, list(options), n=n, cutoff=0.5)
    return f"Did you mean {', '.join(repr(match) for match in close)}?" if close else ""
