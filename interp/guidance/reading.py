"""What the terms of a guide see of one call of the denoiser."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from interp.guidance.terms import Reading, Term
from interp.hooks import Session, Tap, captures_of
from interp.selection import Call

Output = TypeVar("Output")
# By half of guidance, then by site.
Maps = dict[str, dict[str, Tensor]]
# By half of guidance, then by what the terms read with.
Readings = dict[str, dict[str, Reading]]


class Reader:
    """Captures the sites of terms, during its own calls only.

    Args:
        sd: the model.
        terms: whose sites.

    Attributes:
        session: to be open while the reader is used.
    """

    def __init__(self, sd: Any, terms: Sequence[Term]) -> None:
        self.sd, self.terms = sd, terms
        self._caught: Maps = {}
        places = sd.expanded(list(dict.fromkeys(site for term in terms for site in term.sites)))
        taps = [Tap(place, graph=True, consume=partial(self._keep, place.site)) for place in places]
        self.session: Session = sd.session(taps, [])
        self.session.quiet = True

    def collect(self, call: Callable[[], Output]) -> tuple[Output, Maps]:
        """Call the denoiser, once or more, and keep what it has at the sites, with a graph where it has one.

        Args:
            call: calls it.

        Returns:
            What it gave, and the activations by half and site.
        """
        self._caught = {}
        try:
            with captures_of(self.session):
                output = call()
            return output, self._caught
        finally:
            self._caught = {}

    def read(self, maps: Mapping[str, Mapping[str, Tensor]], halves: Sequence[str], timestep: float) -> Readings:
        """Read with every readout once.

        Args:
            maps: what `collect` gave.
            halves: which of them.
            timestep: what the model saw.
        """
        sources = {term.key: term for term in self.terms}
        return {
            half: {key: term.read(maps[half], timestep, self.sd) for key, term in sources.items()} for half in halves
        }

    def _keep(self, site: str, kept: Tensor, call: Call) -> None:
        halves = call.halves or ("cond",)
        for half, rows in zip(halves, kept.chunk(len(halves)), strict=True):
            self._caught.setdefault(half, {})[site] = rows
