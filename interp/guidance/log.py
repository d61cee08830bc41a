"""What a guide's terms and gradients were, step by step."""

from typing import Any

import pandas as pd

from interp.errors import NeverFiredError
from interp.guidance.gradients import Measured
from interp.guidance.terms import TOTAL

COLUMNS = ("step", "timestep", "move", "sample", "term", "loss", "weighted", "gradient_norm")


class Log:
    """Collects what was measured at each move, and makes a table of it at the end."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, float, int, Measured]] = []

    def add(self, step: int, timestep: float, move: int, measured: Measured) -> None:
        """Note one move.

        Args:
            step: of the run.
            timestep: what the model saw.
            move: which one of the step's.
            measured: its losses and gradient norms.
        """
        # On the device until the run has ended, lest every step wait for a copy.
        self._entries.append((step, timestep, move, measured))

    def __len__(self) -> int:
        """How many moves there were."""
        return len(self._entries)

    def table(self) -> pd.DataFrame:
        """One row for each step, move, sample and term, and one for all terms (``total``).

        Columns: ``step``, ``timestep``, ``move`` (from 0; more than one with recurrence), ``sample``, ``term``,
        ``loss`` (summed over the halves of guidance; of all terms, missing), ``weighted`` (as it enters the sum),
        ``gradient_norm`` (of a term: missing unless there is one only, or the guide has ``term_gradients``).
        """
        rows: list[tuple[Any, ...]] = []
        for step, timestep, move, measured in self._entries:
            losses = {name: values.tolist() for name, values in measured.losses.items()}
            weighted = {name: values.tolist() for name, values in measured.weighted.items()}
            norms = {name: values.tolist() for name, values in measured.norms.items()}
            for sample in range(len(norms[TOTAL])):
                for name in losses:
                    norm = norms[name][sample] if name in norms else float("nan")
                    rows.append(
                        (step, timestep, move, sample, name, losses[name][sample], weighted[name][sample], norm)
                    )
                together = sum(values[sample] for values in weighted.values())
                rows.append((step, timestep, move, sample, TOTAL, float("nan"), together, norms[TOTAL][sample]))
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def check(self) -> None:
        """Refuse a run in which guidance did nothing.

        Raises:
            NeverFiredError: the gradient was zero at all guided steps.
        """
        if self._entries and not any(bool(measured.norms[TOTAL].any()) for *_, measured in self._entries):
            terms = ", ".join(self._entries[0][3].losses)
            raise NeverFiredError(
                f"the gradient of {terms} was zero at all {len(self._entries)} guided steps, so that nothing was guided"
            )
