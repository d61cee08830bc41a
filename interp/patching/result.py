"""What a patching experiment found: values with named axes, baselines, controls, and intervals over examples."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError, ShapeError, UnknownNameError, nearest
from interp.saved_files import check_saved, saved_files

_CONTROL = "control "


class Intervals(NamedTuple):
    """Means over examples and their percentile bootstrap intervals, with the axes of the result."""

    mean: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """The metric of every variant of a patching experiment, example by example.

    Args:
        name: of the experiment, such as ``"activation"``.
        metric: what the values measure, such as ``"logit difference"``.
        values: the raw metric, with one axis for each of ``axes`` and the examples last.
        axes: in order, the names along each axis, such as ``{"layer": ("0", "1"), "position": ("image[0]", "last")}``.
        clean: the metric of the clean run, of each example; None where the experiment has no such baseline.
        corrupt: the metric of the corrupt run, of each example.
        controls: by name, the metric of what should do little, such as the same edit at a random site: ``[example]``,
            or with the axes of ``values`` (1 where it does not vary), or that with an axis of draws before it.
        about: what produced the result: model, prompts, direction, plan, seed; whatever JSON can hold.

    Raises:
        ShapeError: values, baselines or controls that do not fit the axes.
        InputError: a value that is not finite, or an axis whose names repeat.
    """

    name: str
    metric: str
    values: Float[Tensor, "*axes example"]
    axes: dict[str, tuple[str, ...]]
    clean: Float[Tensor, " _"] | None = None
    corrupt: Float[Tensor, " _"] | None = None
    controls: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        wanted = tuple(len(names) for names in self.axes.values())
        if tuple(self.values.shape[:-1]) != wanted:
            raise ShapeError(
                f"{self.name}: values have shape {tuple(self.values.shape)}, the axes say {dict(self.sizes)} and then "
                "examples"
            )
        for axis, names in self.axes.items():
            if len(set(names)) < len(names):
                raise InputError(f"{self.name}: a name repeats along axis {axis!r}: {names}")
        for what, tensor in (("clean", self.clean), ("corrupt", self.corrupt)):
            if tensor is not None and tensor.shape != self.values.shape[-1:]:
                raise ShapeError(f"{self.name}: {what} has shape {tuple(tensor.shape)} for {self.n_examples} examples")
        for what, tensor in self.controls.items():
            shape = tuple(self.values.shape)
            own = tuple(tensor.shape[1:]) if tensor.ndim == len(shape) + 1 else tuple(tensor.shape)
            fits = len(own) == len(shape) and all(a in (1, b) for a, b in zip(own, shape, strict=True))
            if own[-1:] != shape[-1:] or not (fits or len(own) == 1):
                raise ShapeError(
                    f"{self.name}: control {what!r} has shape {tuple(tensor.shape)}; it may be [example], or "
                    f"{list(shape)} with 1 where it does not vary, or that with draws before it"
                )
        for what, tensor in self._tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{self.name}: {what} holds {int((~torch.isfinite(tensor)).sum())} NaN or infinities")

    def __repr__(self) -> str:
        axes = " × ".join(f"{len(names)} {axis}" for axis, names in self.axes.items())
        controls = f", controls: {', '.join(self.controls)}" if self.controls else ""
        return f"{type(self).__name__}({self.name!r}, {self.metric!r}: {axes} × {self.n_examples} examples{controls})"

    @property
    def n_examples(self) -> int:
        """How many examples there are."""
        return int(self.values.shape[-1])

    @property
    def sizes(self) -> dict[str, int]:
        """How many names each axis has."""
        return {axis: len(names) for axis, names in self.axes.items()}

    @property
    def has_baselines(self) -> bool:
        """Whether clean and corrupt runs are known, so that values can be normalised."""
        return self.clean is not None and self.corrupt is not None

    def normalised(self, values: Float[Tensor, "*axes example"] | None = None) -> Float[Tensor, "*axes example"]:
        """Values on the scale on which the corrupt run is 0 and the clean run is 1, example by example.

        Args:
            values: what to put on that scale, examples last, such as a control; this result's values without it.

        Raises:
            InputError: no baselines, or an example whose clean and corrupt runs have the same metric.
        """
        if self.clean is None or self.corrupt is None:
            raise InputError(f"{self.name}: without a clean and a corrupt baseline there is no scale from 0 to 1")
        span = self.clean - self.corrupt
        same = (span.abs() <= 1e-6 * (self.clean.abs() + self.corrupt.abs())).nonzero().flatten().tolist()
        if same:
            raise InputError(
                f"{self.name}: clean and corrupt have the same {self.metric} in example(s) {same}, so the corruption "
                "took nothing away there; leave these examples out, corrupt more, or take raw values (normalised=False)"
            )
        return ((self.values if values is None else values) - self.corrupt) / span

    def unpatched(self, normalised: bool = True) -> Float[Tensor, "*axes example"] | None:
        """What a patch that does nothing measures: the metric of the run that patches are put into.

        Args:
            normalised: on the scale of `normalised`, or of the raw metric.

        Returns:
            With the axes of ``values``, of size 1 where it does not vary; None where no run is known.
        """
        from_clean = self.from_clean()
        if normalised:
            return from_clean.to(self.values.dtype).expand(*from_clean.shape[:-1], self.n_examples)
        ends = [end for end in (self.clean, self.corrupt) if end is not None]
        return torch.where(from_clean, ends[0], ends[-1]) if ends else None

    def effects(self, normalised: bool = True) -> Float[Tensor, "*axes example"]:
        """How far each patch moves the metric from the unpatched run towards the other one.

        Args:
            normalised: 1 is all the way; otherwise in units of the metric.

        Raises:
            InputError: as of `normalised`; or no unpatched run.
        """
        base = self.unpatched(normalised)
        if base is None:
            raise InputError(f"{self.name}: effects need the metric of the unpatched run")
        return torch.where(self.from_clean(), -1.0, 1.0) * (self._scaled(normalised) - base)

    def from_clean(self) -> Bool[Tensor, "*axes one"]:
        """Whether patches are put into the clean run, rather than into the corrupt one; of size 1 where alike."""
        alone = self.corrupt is None and self.clean is not None
        by_test = self.about.get("directions", {})
        several = bool(by_test) and "test" in self.axes
        tests = self.axes["test"] if several else (self.about.get("selected", {}).get("test"),)
        said = [by_test.get(test, self.about.get("direction")) for test in tests]
        shape = [len(tests) if several and axis == "test" else 1 for axis in self.axes]
        return torch.tensor([one == "noise" or alone for one in said]).reshape(*shape, 1)

    def mean(self, normalised: bool = True) -> Float[Tensor, "*axes"]:
        """The mean over examples.

        Args:
            normalised: on the scale of `normalised`, or of the raw metric.
        """
        return self._scaled(normalised).mean(dim=-1)

    def interval(
        self, level: float = 0.95, *, seed: int = 0, n_resamples: int = 2000, normalised: bool = True
    ) -> Intervals:
        """Percentile bootstrap intervals of the means, with the same draws of examples for all cells.

        Args:
            level: between 0 and 1.
            seed: of the resampling.
            n_resamples: how many.
            normalised: on the scale of `normalised`, or of the raw metric.

        Returns:
            Mean, low and high, each with the axes of the result.

        Raises:
            InputError: fewer than two examples, no resamples, or a level outside 0 to 1.
        """
        if not 0 < level < 1:
            raise InputError(f"level={level}: give a share between 0 and 1, such as 0.95")
        if n_resamples < 1:
            raise InputError(f"n_resamples={n_resamples}: give one or more, such as 2000")
        if self.n_examples < 2:
            raise InputError(f"{self.name}: an interval over examples needs two or more, there is {self.n_examples}")
        values = self._scaled(normalised).double()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.n_examples, (n_resamples, self.n_examples), generator=generator)
        counts = torch.zeros(n_resamples, self.n_examples, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        cells = values.reshape(-1, self.n_examples)
        # In pieces, so that the resampled means of many cells stay within some tens of megabytes.
        pieces = [torch.quantile(piece @ counts.T, ends, dim=-1) / self.n_examples for piece in cells.split(4096)]
        low, high = torch.cat(pieces, dim=1).reshape(2, *values.shape[:-1]).to(self.values.dtype)
        return Intervals(values.mean(dim=-1).to(self.values.dtype), low, high)

    def select(self, **names: str | int) -> "PatchingResult":
        """Keep one name of some axes, which are dropped: ``result.select(site="hook_attn_out")``.

        Args:
            names: for each axis its name. An integer is a name too where all names of the axis are numbers, such as
                layers, and a place elsewhere; below 0, it counts from the end.

        Returns:
            With what was selected in ``about["selected"]``.

        Raises:
            UnknownNameError: an axis or name that is not there.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        selected = dict(self.about.get("selected", {}))
        for axis, name in names.items():
            if axis not in self.axes:
                raise UnknownNameError(f"no axis {axis!r}: the axes are {', '.join(self.axes)}")
            known = self.axes[axis]
            numbers = all(one.isdigit() for one in known)
            if str(name) in known:
                place = known.index(str(name))
            elif isinstance(name, int) and -len(known) <= name < (0 if numbers else len(known)):
                place = name % len(known)
            else:
                raise UnknownNameError(f"axis {axis!r} has no {name!r}. {nearest(str(name), known)}".rstrip())
            index[list(self.axes).index(axis)] = place
            selected[axis] = known[place]
        axes = {axis: known for axis, known in self.axes.items() if axis not in names}

        def cut(control: Tensor) -> Tensor:
            draws = control.ndim - self.values.ndim
            if control.ndim < self.values.ndim:
                return control
            own = [0 if isinstance(i, int) and control.shape[draws + axis] == 1 else i for axis, i in enumerate(index)]
            return control[(slice(None),) * draws + tuple(own)]

        controls = {what: cut(control) for what, control in self.controls.items()}
        about = self.about | {"selected": selected}
        return replace(self, values=self.values[tuple(index)], axes=axes, controls=controls, about=about)

    def control(self, name: str, normalised: bool = True) -> Float[Tensor, "*axes"]:
        """A control's mean over draws and examples, with the axes of the result (1 where it does not vary).

        Args:
            name: of the control.
            normalised: on the scale of `normalised`, or of the raw metric.

        Raises:
            UnknownNameError: no such control.
        """
        if name not in self.controls:
            raise UnknownNameError(f"{self.name} has no control {name!r}: it has {list(self.controls) or 'none'}")
        values = self.controls[name]
        values = self.normalised(values) if normalised else values
        if values.ndim > self.values.ndim:
            values = values.mean(dim=0)
        return values.reshape((1,) * (self.values.ndim - values.ndim) + tuple(values.shape)).mean(dim=-1)

    def to_dataframe(
        self, *, examples: bool = False, normalised: bool | None = None, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """A table with one row for each cell, or for each cell and example.

        Args:
            examples: one row for each example too.
            normalised: also give values, and give intervals and controls, on the scale of `normalised`; None: where
                there are baselines.
            level, seed: of the intervals.

        Returns:
            The axes as columns; then ``value`` (raw) and, where asked for, ``normalised``. By cell these are means,
            with ``low`` and ``high`` of the normalised value (else of the raw one; missing with one example) and a
            column for each control. By example, a column ``example``.

        Raises:
            InputError: normalised values without baselines, or with the same ones in some example.
        """
        scale = self.has_baselines if normalised is None else normalised
        cells = [dict(zip(self.axes, names, strict=True)) for names in product(*self.axes.values())]
        scaled = {"value": self.values} | ({"normalised": self.normalised()} if scale else {})
        if examples:
            rows = [cell | {"example": index} for cell in cells for index in range(self.n_examples)]
            return pd.DataFrame(rows).assign(**{name: value.flatten().numpy() for name, value in scaled.items()})
        columns = {name: value.mean(dim=-1) for name, value in scaled.items()}
        missing = torch.full(self.values.shape[:-1], math.nan)
        ends = self.interval(level, seed=seed, normalised=scale) if self.n_examples > 1 else None
        columns |= {"low": ends.low if ends else missing, "high": ends.high if ends else missing}
        for name in self.controls:
            columns[_CONTROL + name] = self.control(name, scale).expand(self.values.shape[:-1])
        return pd.DataFrame(cells).assign(**{name: value.flatten().numpy() for name, value in columns.items()})

    def plot(self, ax: Any = None, *, normalised: bool | None = None, image: Any = None, **options: Any) -> Any:
        """Draw the means: one axis as a line with its interval, two as a map, three as maps beside each other.

        In maps white is the unpatched run. Where patches go both ways, as in head sets, they show effects: how far each
        moves the metric towards the other run.

        Args:
            ax: where to draw; a new figure without it.
            normalised: on the scale of `normalised`; where there are baselines, without it.
            image: the picture, or its file, whose patches the positions are (`interp.patching.tokens.image_patches`):
                their values are drawn on it. Other axes must have one name, or be selected.
            options: of `interp.figures.patching.effect_line`, `effect_map`, or `image_heat` with an image.

        Returns:
            The axes.

        Raises:
            InputError: a result of no axis or of more than three: `select` some first; or an image for positions that
                are no grid of one.
        """
        # Drawing needs matplotlib, which measuring does not.
        from interp.figures.patching import draw

        return draw(self, ax, self.has_baselines if normalised is None else normalised, image, **options)

    def save(self, path: str | Path) -> None:
        """Write the tensors to ``path.safetensors`` and all else to ``path.json``.

        Raises:
            InputError: ``about`` holds something that JSON cannot.
        """
        tensors_file, about_file = saved_files(path)
        tensors_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            axes = {axis: list(names) for axis, names in self.axes.items()}
            described = {"name": self.name, "metric": self.metric, "axes": axes, "about": self.about}
            text = json.dumps(described, indent=1)
        except TypeError as error:
            raise InputError(f"{self.name}: about= holds what JSON cannot: {error}") from error
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in self._tensors().items()},
                  tensors_file)  # fmt: skip
        about_file.write_text(text)

    @classmethod
    def load(cls, path: str | Path) -> "PatchingResult":
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        files = saved_files(path)
        check_saved(files, "no patching result at {!r}: it is a .safetensors and a .json file")
        try:
            tensors, about = load_file(files[0]), json.loads(files[1].read_text())
            controls = {
                name.removeprefix(_CONTROL): tensor for name, tensor in tensors.items() if name.startswith(_CONTROL)
            }
            axes = {axis: tuple(names) for axis, names in about["axes"].items()}
            return cls(about["name"], about["metric"], tensors["values"], axes, tensors.get("clean"),
                       tensors.get("corrupt"), controls, about["about"])  # fmt: skip
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the patching result at {str(path)!r} is damaged: {error}") from error

    def _scaled(self, normalised: bool) -> Tensor:
        return self.normalised() if normalised else self.values

    def _tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by the name under which it is saved."""
        baselines = {"clean": self.clean, "corrupt": self.corrupt}
        given = {"values": self.values} | {name: tensor for name, tensor in baselines.items() if tensor is not None}
        return given | {_CONTROL + name: tensor for name, tensor in self.controls.items()}
