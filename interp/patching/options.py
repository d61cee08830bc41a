"""What a patching experiment lets through to its sweep."""

from collections.abc import Mapping
from typing import Any

from interp.errors import InputError, nearest

# The experiment itself chooses what else a sweep takes: the metric, the positions, the seed, the guard.
SWEEP_OPTIONS = ("check", "folder", "max_rows", "memory", "progress")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that a sweep does not have, before anything runs.

    Args:
        options: what an experiment was given beside its own settings.

    Raises:
        InputError: an unknown name, or a dry run.
    """
    for name in options:
        if name == "dry_run":
            raise InputError(
                "dry_run: an experiment without a run has no values; vlm.sweep(..., dry_run=True) plans a sweep of "
                "edits of your own, and about['plan'] says what an experiment's sweep shared"
            )
        if name not in SWEEP_OPTIONS:
            raise InputError(
                f"no option {name!r}. {nearest(name, SWEEP_OPTIONS)} Options of the sweep: {', '.join(SWEEP_OPTIONS)}"
                .replace("  ", " ")
            )  # fmt: skip


def check_draws(**counts: int) -> None:
    """Refuse negative numbers of draws.

    Raises:
        InputError: such a number.
    """
    for name, count in counts.items():
        if count < 0:
            raise InputError(f"{name}={count}: 0 leaves them out, and there cannot be fewer")
