"""Edits are values: what to write, where, and when. They print, compare, save, and compose as plain lists.

Values follow the site's axes from the right: at a residual site ``[d_model]`` goes everywhere, ``[batch,
d_model]`` gives each example its own, ``[batch, pos, d_model]`` each position too; at a site with heads the
same with ``[head, d_head]`` in place of ``d_model``; attention patterns take ``[key]``, ``[query, key]``,
``[head, query, key]`` or ``[batch, head, query, key]``; feature maps take ``[channel]``, ``[channel, height,
width]`` or ``[batch, channel, height, width]``, of which a region takes its cells. A value is cast to the
dtype and device of what it replaces. Under classifier-free guidance the examples are those of one half.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.positions import Indexes, plain
from interp.selection import Group
from interp.sites import Place
from interp.values import aligned, precise
from interp.where import When, Where


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What every edit has.

    Args:
        site: a site name.
        at: positions: None (all), ``"last"``, a segment's name, an integer, a slice, or a list of these; in a
            diffusion model integers, or an `interp.Region` of the image. In a pattern the queries.
        heads: heads to touch, at a site that has a head axis. None: all.
        rows: rows of the batch (images, in a vision tower; of one guidance half, in a diffusion model). None: all.
        when: ``"prefill"`` (the prompt only), ``"every"`` (also each decoded token), or the first k steps, of
            which the prompt is the first.
        steps: in a diffusion model, calls of the denoiser, 0 being the first of the run: an integer, several, or a
            slice. None: all.
        half: in a diffusion model, ``"cond"`` or ``"uncond"`` of classifier-free guidance. None: both.
        renormalise: at an attention pattern, divide each query's edited probabilities by their sum.
    """

    site: str
    at: Any = field(default=None, kw_only=True)
    heads: Indexes | None = field(default=None, kw_only=True)
    rows: Indexes | None = field(default=None, kw_only=True)
    when: When = field(default="prefill", kw_only=True)
    steps: Indexes | slice | None = field(default=None, kw_only=True)
    half: str | None = field(default=None, kw_only=True)
    renormalise: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Turn arrays of other libraries into lists, so that edits print, compare and save."""
        for name in ("at", "heads", "rows", "steps"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def mixes(self) -> bool:
        """Whether the new value of one entry depends on other selected entries, which it then has to see."""
        return False

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        """The new values of the selected entries; ``x`` itself is left as it is."""
        raise TypeError(f"{type(self).__name__} is not an edit by itself: use Replace, Add, Scale, ...")

    def transform_all(
        self, xs: Sequence[Float[Tensor, "_ _ ..."]], groups: Sequence[Group], place: Place
    ) -> list[Float[Tensor, "_ _ ..."]]:
        """The new values of all groups of one call."""
        return [self.transform(x, group, place) for x, group in zip(xs, groups, strict=True)]

    @property
    def where(self) -> Where:
        """The selection, in the form that the engine resolves."""
        return Where(self.at, self.rows, self.heads, self.when, steps=self.steps, half=self.half)

    def renormalised(self, pattern: Float[Tensor, "row query head key"]) -> Float[Tensor, "row query head key"]:
        """Probabilities divided by their sum over the keys.

        Raises:
            InputError: probabilities that sum to zero or less.
        """
        total = pattern.to(precise(pattern)).sum(dim=-1, keepdim=True)
        if not bool((total > 0).all()):
            raise InputError(f"{self!r}: the probabilities of a query sum to zero or less, and cannot be renormalised")
        return (pattern / total).to(pattern.dtype)

    def check(self, place: Place) -> None:
        """Refuse what can be seen to be wrong before anything runs.

        Raises:
            InputError, ShapeError: a selection or value that the site cannot have.
        """
        where = self.where
        where.check(place)
        heads = [] if where.heads is None else [head % int(place.n_heads or 1) for head in where.heads]
        if len(set(heads)) < len(heads):
            raise InputError(f"heads={where.heads} at {self.site}: a head is selected twice")
        if self.renormalise and (place.side != "pattern" or isinstance(self, Zero)):
            why = "zeros have no sum" if place.side == "pattern" else "the site is no attention pattern"
            raise InputError(f"{type(self).__name__} at {self.site}: renormalise=True, but {why}")
        for f in fields(self):
            value = getattr(self, f.name)
            _check_kind(self, f.name, f.type, value)
            if not isinstance(value, Tensor):
                continue
            if not torch.isfinite(value).all():
                raise InputError(f"{type(self).__name__} at {self.site}: {f.name} holds NaN or infinite numbers")
            axis = -3 if place.layout == "grid" and value.ndim >= 3 else -1
            if value.ndim and place.width not in (None, value.shape[axis]):
                raise ShapeError(
                    f"{type(self).__name__} at {self.site}: {f.name} has width {value.shape[axis]}, "
                    f"the site has {place.width}"
                )

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((type(self), self.site))

    def __repr__(self) -> str:
        shown = [repr(self.site)]
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                size = "×".join(map(str, value.shape)) or "scalar"
                shown.append(f"{f.name}=<{size}, norm {value.float().norm():.4g}>")
            elif value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False, repr=False)
class Replace(Edit):
    """Put a value in place of what is there.

    Args:
        value: see the module's text for its shapes.
    """

    value: Tensor

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        return aligned(self, self.value, x, group, place).expand_as(x)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Edit):
    """Add a value: ``x + scale * value``."""

    value: Tensor
    scale: float = 1.0

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        return x + aligned(self, self.value.to(precise(x)) * self.scale, x, group, place)


@dataclass(frozen=True, eq=False, repr=False)
class Interpolate(Edit):
    """Move towards a value: ``(1 - weight) * x + weight * value``."""

    value: Tensor
    weight: float

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        return torch.lerp(x, aligned(self, self.value, x, group, place).expand_as(x), self.weight)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by a factor."""

    factor: float

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        return x * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Set to zero."""

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblate(Edit):
    """Replace by a mean.

    Args:
        mean: a mean taken over a data set, with the shapes of `Replace`. None: the mean over the selected
            entries of this very call, padding left out, of each half of guidance by itself.
    """

    mean: Tensor | None = None

    @property
    def mixes(self) -> bool:
        return self.mean is None

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        return self.transform_all([x], [group], place)[0]

    def transform_all(
        self, xs: Sequence[Float[Tensor, "_ _ ..."]], groups: Sequence[Group], place: Place
    ) -> list[Float[Tensor, "_ _ ..."]]:
        if self.mean is not None:
            pairs = zip(xs, groups, strict=True)
            return [aligned(self, self.mean, x, group, place).expand_as(x) for x, group in pairs]
        # Halves in one doubled batch or in two calls give the same.
        halves = [torch.zeros_like(group.rows) if group.halves is None else group.halves for group in groups]
        new = [torch.empty_like(x) for x in xs]
        for half in torch.cat(halves).unique():
            rows = [one == half for one in halves]
            parts = zip(xs, groups, rows, strict=True)
            real = torch.cat([x[mine][group.real[mine]] for x, group, mine in parts])
            if not len(real):
                raise InputError(f"{self!r} selects padding only, which has no mean")
            mean = real.to(precise(real)).mean(dim=0)
            for one, mine in zip(new, rows, strict=True):
                one[mine] = mean.to(one.dtype)
        return new


@dataclass(frozen=True, eq=False, repr=False)
class Resample(Edit):
    """Replace each example's activation by another one's.

    Args:
        source: a bank ``[n, ...]`` with the axes of one example after the first; each example draws one
            entry. None: the batch itself, moved round by a random step, so that no example keeps its own.
        seed: of the draw.
    """

    source: Tensor | None = None
    seed: int = 0

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        generator = torch.Generator().manual_seed(self.seed)
        if self.source is not None:
            drawn = torch.randint(len(self.source), (group.n_examples,), generator=generator)
            return aligned(self, self.source[drawn.to(self.source.device)], x, group, place).expand_as(x)
        n_examples = len(group.examples.unique())
        if n_examples < 2 or not bool(group.real.all()):
            raise InputError(
                f"Resample at {self.site} without a source exchanges activations between examples: it needs at least "
                "two that have equally many selected positions, none of them padding"
            )
        step = int(torch.randint(1, n_examples, (), generator=generator))
        # Beams, samples and guidance halves of one prompt are one example, whose rows move together.
        order = group.examples.argsort(stable=True)
        moved = torch.empty_like(x)
        moved[order] = x[order].roll(step * (len(x) // n_examples), dims=0)
        return moved


@dataclass(frozen=True, eq=False, repr=False)
class Project(Edit):
    """Remove a direction or subspace, or keep nothing else.

    Args:
        directions: ``[d]`` or ``[k, d]``; orthonormalised here, so they need be neither unit nor orthogonal.
        onto: keep only the part inside the subspace, where the default removes it.
        center: a point ``[d]`` that the subspace passes through, where the default is the origin.
    """

    directions: Tensor
    onto: bool = False
    center: Tensor | None = None

    def check(self, place: Place) -> None:
        super().check(place)
        basis = torch.atleast_2d(self.directions).float()
        if basis.ndim != 2 or int(torch.linalg.matrix_rank(basis)) < len(basis):
            raise ShapeError(
                f"Project at {self.site}: directions of shape {tuple(self.directions.shape)} must be [d] or [k, d], "
                "not zero and linearly independent"
            )

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        dtype = precise(x)
        basis, _ = torch.linalg.qr(torch.atleast_2d(self.directions).to(x.device, dtype).T)
        center = 0.0 if self.center is None else self.center.to(x.device, dtype)
        moved = x.to(dtype) - center
        inside = moved @ basis @ basis.T
        return ((inside if self.onto else moved - inside) + center).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Function(Edit):
    """Apply any function to the selected entries.

    Args:
        function: takes ``[row, pos, d_model]`` (``[row, pos, head, d_head]`` with heads; ``[row, head, query,
            key]`` for patterns; ``[row, cell, channel]`` for feature maps), a copy, and returns the same shape.
    """

    function: Callable[[Tensor], Tensor]

    @property
    def mixes(self) -> bool:
        return True

    def check(self, place: Place) -> None:
        super().check(place)
        if not callable(self.function):
            raise InputError(f"Function at {self.site}: {type(self.function).__name__} cannot be called")

    def transform(self, x: Float[Tensor, "row n ..."], group: Group, place: Place) -> Float[Tensor, "row n ..."]:
        pattern = place.side == "pattern"
        given = rearrange(x, "row query head key -> row head query key") if pattern else x
        new = self.function(given.clone())
        if not isinstance(new, Tensor) or new.shape != given.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ShapeError(
                f"the function of {self!r} returned {got}, expected a tensor of shape {tuple(given.shape)}"
            )
        new = new.to(x.dtype)
        return rearrange(new, "row head query key -> row query head key") if pattern else new


def as_edits(edits: Any) -> list[Edit]:
    """One edit or several, as a list.

    Args:
        edits: an edit, or a sequence of edits.

    Raises:
        InputError: something that is not an edit.
    """
    listed = list(edits) if isinstance(edits, Iterable) else [edits]
    for edit in listed:
        if not isinstance(edit, Edit):
            raise InputError(f"expected an edit such as Replace(site, value), got {type(edit).__name__}")
    return listed


def _check_kind(edit: Edit, name: str, kind: Any, value: Any) -> None:
    """Refuse a value that is no tensor, or a factor that is no finite number."""
    what = f"{type(edit).__name__} at {edit.site}: {name}"
    if kind in (Tensor, Tensor | None) and not isinstance(value, Tensor) and not (value is None and kind != Tensor):
        raise InputError(f"{what} is {type(value).__name__}, expected a tensor: torch.as_tensor makes one of numbers")
    if kind is float and not (isinstance(value, Tensor) and value.ndim == 0):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputError(f"{what} is {value!r}, expected a number")
        if not math.isfinite(value):
            raise InputError(f"{what} is {value!r}, expected a finite number")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.cpu(), b.cpu()))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)


__all__ = [
    "Add",
    "Edit",
    "Function",
    "Interpolate",
    "MeanAblate",
    "Project",
    "Replace",
    "Resample",
    "Scale",
    "Zero",
    "as_edits",
]
