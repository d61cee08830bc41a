"""What a user selects of an activation: positions, rows, heads, and when in a generation or a denoising run."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from interp.errors import InputError
from interp.positions import Indexes, PerRow, indexes, plain
from interp.regions import Region
from interp.sites import Place

When = Literal["prefill", "every"] | int
HALVES = ("cond", "uncond")


@dataclass(frozen=True)
class Where:
    """What a user selected: positions by meaning, rows of the batch, heads, and steps of a generation.

    Args:
        at: positions, or a region of the image at the sites of a diffusion model; None: all.
        rows: prompts of the batch (images, in a vision tower); None: all. Under classifier-free guidance the rows
            of one half.
        heads: heads, at sites that have them; None: all.
        when: for edits, which steps of a generation of tokens.
        variant: which of the copies of each prompt, in a sweep; None: all.
        steps: calls of the denoiser in a run, the first being 0: an integer, several, or a slice; None: all.
        half: ``"cond"`` or ``"uncond"``, of classifier-free guidance; None: both.
    """

    at: Any = None
    rows: Any = None
    heads: Any = None
    when: When = "prefill"
    variant: int | None = None
    steps: Indexes | slice | None = None
    half: str | None = None

    def __post_init__(self) -> None:
        """Turn arrays and integers of other libraries into plain ones, so that selections print and compare."""
        object.__setattr__(self, "at", plain(self.at))
        object.__setattr__(self, "rows", indexes("rows", self.rows))
        object.__setattr__(self, "heads", indexes("heads", self.heads))
        steps = self.steps if isinstance(self.steps, slice) else indexes("steps", self.steps)
        object.__setattr__(self, "steps", steps)

    def check(self, place: Place) -> None:
        """Refuse a selection that the site cannot have, before anything runs.

        Raises:
            InputError: names of positions in a vision tower, heads at a site without heads, an unknown step
                rule, a region where there is no image, steps or halves outside a diffusion model.
        """
        if place.part != "model":
            _check_diffusion(self, place)
        elif self.steps is not None or self.half is not None or isinstance(self.at, Region):
            given = "steps" if self.steps is not None else "half" if self.half is not None else "at"
            raise InputError(
                f"{given}={getattr(self, given)!r} at {place.site}: steps, guidance halves and regions are those of a "
                "diffusion model; this site belongs to a model with prompts"
            )
        if place.part == "model" and not place.positional and _has_name(self.at):
            raise InputError(
                f"{self.at!r} is a position of the prompt, but the positions of {place.site} are those of an image: "
                "give integers, and choose images with rows="
            )
        if self.heads is not None:
            if place.n_heads is None:
                raise InputError(f"heads={self.heads}: site {place.site} has no head axis; its axes are {place.axes}")
            wrong = [head for head in self.heads if not -place.n_heads <= head < place.n_heads]
            if wrong or not self.heads:
                raise InputError(f"heads={self.heads}: site {place.site} has heads 0 to {place.n_heads - 1}")
        if self.when not in ("prefill", "every") and not (
            isinstance(self.when, int) and not isinstance(self.when, bool) and self.when >= 1
        ):
            raise InputError(f"when={self.when!r}: give 'prefill', 'every', or a number of steps from 1 on")
        if self.rows is not None and not self.rows:
            raise InputError("rows=(): no row of the batch is selected")

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What selections of the same entries have in common; positions may not hash, but they print."""
        at = self.at if isinstance(self.at, Region) else repr(self.at)
        return (at, self.rows, self.when, self.variant, self.half)

    @property
    def everything(self) -> bool:
        """Whether rows, positions, steps and halves are left open."""
        return self.at is None and self.rows is None and self.variant is None and not self.timed

    @property
    def timed(self) -> bool:
        """Whether steps or a guidance half are chosen."""
        return self.steps is not None or self.half is not None

    def at_step(self, step: int | None) -> bool:
        """Whether a call of the denoiser is among the steps."""
        if self.steps is None:
            return True
        if step is None:
            return False
        if isinstance(self.steps, slice):
            start, stride = self.steps.start or 0, self.steps.step or 1
            within = step >= start and (self.steps.stop is None or step < self.steps.stop)
            return within and (step - start) % stride == 0
        return step in (indexes("steps", self.steps) or ())


def _check_diffusion(where: Where, place: Place) -> None:
    """Refuse what a site of a diffusion pipeline cannot have."""
    steps, half, site = where.steps, where.half, place.site
    if _has_name(where.at):
        raise InputError(
            f"{where.at!r} is the name of a position, which diffusion models do not have: at {site} give integers, "
            "or interp.Region where the positions are those of the image"
        )
    if where.when != "prefill":
        raise InputError(f"when={where.when!r} at {site}: it counts generated tokens; steps= counts denoiser calls")
    if isinstance(where.at, Region) and place.layout in ("tokens", "vector") and place.image_tokens is None:
        raise InputError(f"{where.at!r} at {site}: the positions of this site are not those of the image")
    if place.layout == "vector" and where.at is not None:
        raise InputError(f"at={where.at!r}: {site} has no positions; its axes are {place.axes}")
    if steps is not None and place.part != "denoiser":
        raise InputError(f"steps={steps!r}: {site} lies outside the denoiser, and so outside its steps")
    if isinstance(steps, slice):
        wrong = any(n is not None and n < 0 for n in (steps.start, steps.stop)) or (steps.step or 1) < 1
    else:
        listed = indexes("steps", steps)
        wrong = listed == () or any(step < 0 for step in listed or ())
    if wrong:
        raise InputError(f"steps={steps!r} at {site}: give steps of the run, 0 being its first, or a slice of them")
    if half is not None and half not in HALVES:
        raise InputError(f"half={half!r} at {site}: the halves of guidance are 'cond' and 'uncond'; None means both")
    if half is not None and place.part == "vae":
        raise InputError(f"half={half!r}: {site} lies in the autoencoder, which guidance has no halves of")


def _has_name(at: Any) -> bool:
    if isinstance(at, str):
        return True
    if isinstance(at, PerRow):
        return _has_name(at.at)
    return isinstance(at, list | tuple) and any(_has_name(one) for one in at)
