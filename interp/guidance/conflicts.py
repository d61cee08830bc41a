"""Terms that cannot be had together."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from interp.errors import InputError
from interp.guidance.appearance import Appearance
from interp.guidance.drag import Drag
from interp.guidance.reference import Reference, Twin
from interp.guidance.spatial import Spatial
from interp.guidance.terms import TOTAL, Term


def check_together(terms: Sequence[Term], reference: Twin | Reference) -> None:
    """Refuse terms that ask for different things of the same readout, or of one reference.

    Args:
        terms: of a guide.
        reference: that it compares with.

    Raises:
        InputError: naming both terms.
    """
    if any(term.name == TOTAL for term in terms):
        raise InputError(f"a term is called {TOTAL!r}, which tables call all terms together: give name=")
    for one, two in combinations(terms, 2):
        if one.name == two.name:
            raise InputError(f"two terms are called {one.name!r}, so that no table can tell them apart: give name=")
        if one.key == two.key and one.source is not two.source:
            raise InputError(
                f"terms {one.name!r} and {two.name!r} read with two different things of one name ({one.key}): name "
                "them apart, or use one readout for both"
            )
        if one.key == two.key:
            _check_pair(one, two)
    drags = [term for term in terms if isinstance(term, Drag)]
    others = [term for term in terms if isinstance(term, Appearance)]
    if drags and isinstance(reference, Twin) and not reference.shares_noise:
        fights = f", while {others[0].name!r} is to look like another image" if others else ""
        raise InputError(
            f"term {drags[0].name!r} moves parts of the image that comes from the sample's own noise, but the "
            f"reference ({reference}) starts from other noise{fights}: a guide has one reference"
        )


def _check_pair(one: Term, two: Term) -> None:
    """Two terms over the same readout."""
    if isinstance(one, Spatial) and isinstance(two, Spatial):
        raise InputError(
            f"terms {one.name!r} and {two.name!r} ask the {one.title} readout for two targets at once: give one target"
        )
    if isinstance(one, Drag) and isinstance(two, Drag):
        for goals, others in _paired(_goals(one), _goals(two)):
            torn = [cell for cell in goals if cell in others and others[cell] != goals[cell]]
            if torn:
                raise InputError(
                    f"terms {one.name!r} and {two.name!r}: what the reference has at cell {torn[0]} is asked to go to "
                    f"{goals[torn[0]]} and to {others[torn[0]]}"
                )
    if isinstance(one, Appearance) and isinstance(two, Appearance) and _overlap(one, two):
        raise InputError(
            f"terms {one.name!r} and {two.name!r} compare the same cells of the sample with two parts of the "
            f"reference, by one readout ({one.title}): give boxes that do not overlap, or keep one of them"
        )


def _goals(term: Drag) -> list[dict[tuple[int, ...], tuple[int, ...]]]:
    return [
        {tuple(a): tuple(b) for a, b in zip(start.tolist(), end.tolist(), strict=True)} for start, end in term.cells
    ]


def _overlap(one: Appearance, two: Appearance) -> bool:
    return any(
        all(a.start < b.stop and b.start < a.stop for a, b in zip(*boxes, strict=True))
        for boxes in _paired(one.observed, two.observed)
    )


def _paired(ones: list[Any], twos: list[Any]) -> list[tuple[Any, Any]]:
    """What two terms have for each sample, where either may have one for all."""
    rows = max(len(ones), len(twos))
    return list(zip(ones * rows if len(ones) == 1 else ones, twos * rows if len(twos) == 1 else twos, strict=False))
