"""What a capture returns: named tensors with named axes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import InputError, ShapeError, UnknownNameError, nearest
from interp.hooks import Tap, gradients_of
from interp.saved_files import check_saved, saved_files
from interp.sites import match, parse


# Not Mapping[str, Tensor]: run-time checkers would look inside, and stacking calls of different shapes raises.
class Activations(Mapping):
    """Captured activations, a mapping from site name to tensor.

    A site that ran once gives its tensor; one that ran several times (decoding, denoising) gives its calls
    stacked on a leading ``step`` axis. `axes` names the axes of each.

    Args:
        calls: for every site, one tensor per call.
        axes: for every site, the axes of one call.
        output: the model's own output object, when there was one forward.
        taps: the taps behind the tensors, when gradients can be asked for.
        stepped: whether the calls are the steps of a run, which lead even when there is one only.
    """

    def __init__(
        self,
        calls: Mapping[str, list[Tensor]],
        axes: Mapping[str, tuple[str, ...]],
        output: Any = None,
        taps: tuple[Tap, ...] = (),
        stepped: bool = False,
    ) -> None:
        self._calls = {site: list(tensors) for site, tensors in calls.items()}
        self._axes = dict(axes)
        self._stacked: dict[str, Tensor] = {}
        self._taps = taps
        self.stepped = stepped
        self.output = output

    def __getitem__(self, site: str) -> Tensor:
        """The activation at a site, calls stacked on a leading step axis if there were several.

        Raises:
            UnknownNameError: the site was not captured.
            ShapeError: its calls have different shapes.
        """
        if site not in self._calls:
            raise UnknownNameError(f"{site!r} was not captured. {nearest(site, self._calls)}".rstrip())
        if site not in self._stacked:
            tensors = self._calls[site]
            if len({tensor.shape for tensor in tensors}) > 1:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:4])
                raise ShapeError(
                    f"{site} ran {len(tensors)} times with different shapes ({shapes}, ...): capture one token per "
                    "call (at='last'), or take them apart with .calls(site)"
                )
            single = len(tensors) == 1 and not self.stepped
            self._stacked[site] = tensors[0] if single else torch.stack(tensors)
        return self._stacked[site]

    def __iter__(self) -> Iterator[str]:
        """Site names, in the order asked for."""
        return iter(self._calls)

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._calls)

    def __repr__(self) -> str:
        lines = [f"Activations with {len(self)} sites"]
        for site, tensors in self._calls.items():
            one = tuple(tensors[0].shape)
            single = (1, *one) if self.stepped else one
            shape = single if len(tensors) == 1 else f"{len(tensors)} calls of {one}"
            lines.append(f"  {site}: {shape} {'·'.join(self.axes(site))}")
        return "\n".join([*lines[:20], f"  ... {len(lines) - 20} more"] if len(lines) > 21 else lines)

    def calls(self, site: str) -> list[Tensor]:
        """One tensor per call of a site, whatever their shapes."""
        if site not in self._calls:
            raise UnknownNameError(f"{site!r} was not captured. {nearest(site, self._calls)}".rstrip())
        return list(self._calls[site])

    def axes(self, site: str) -> tuple[str, ...]:
        """Names of the axes of ``self[site]``."""
        return ("step", *self._axes[site]) if self.stepped or len(self.calls(site)) > 1 else self._axes[site]

    def stack(self, leaf: str, tower: str = "") -> Float[Tensor, "layer ..."]:
        """One kind of activation from every captured layer.

        Args:
            leaf: the name after ``blocks.N.``, such as ``hook_resid_post`` or ``attn.hook_z``.
            tower: ``"vision"`` for the vision tower; empty for the language model.

        Returns:
            A tensor with a leading layer axis, in layer order.

        Raises:
            UnknownNameError: no captured layer has it.
        """
        layers = [
            (parsed.layer, site)
            for site in self
            if (parsed := parse(site)) and parsed.layer is not None and (parsed.tower, parsed.leaf) == (tower, leaf)
        ]
        if not layers:
            leaves = [parsed.leaf for site in self if (parsed := parse(site))]
            raise UnknownNameError(f"no captured layer has {leaf!r}. {nearest(leaf, leaves)}".rstrip())
        return torch.stack([self[site] for _, site in sorted(layers)])

    def layers(self, leaf: str, tower: str = "") -> list[int]:
        """Which layers `stack` stacks."""
        parsed = [p for site in self if (p := parse(site)) and (p.tower, p.leaf) == (tower, leaf)]
        return sorted(p.layer for p in parsed if p.layer is not None)

    def select(self, pattern: str) -> "Activations":
        """The captured sites that a name or pattern selects."""
        sites = match(pattern, self)
        taps = tuple(tap for tap in self._taps if tap.place.site in sites)
        calls, axes = {s: self._calls[s] for s in sites}, {s: self._axes[s] for s in sites}
        return Activations(calls, axes, self.output, taps, self.stepped)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Activations":
        """A copy on another device or in another dtype; gradients still come as the capture was made."""
        moved = {site: [t.to(device=device, dtype=dtype) for t in tensors] for site, tensors in self._calls.items()}
        return Activations(moved, self._axes, self.output, self._taps, self.stepped)

    def fill(self, taps: Sequence[Tap]) -> None:
        """Take in what the taps of a session have caught, in place of what was here."""
        self._calls = {tap.place.site: list(tap.caught) for tap in taps}
        self._axes = {tap.place.site: _axes(tap) for tap in taps}
        self._stacked = {}
        self._taps = tuple(tap for tap in taps if tap.grad)

    def gradients(self, metric: Float[Tensor, "..."]) -> "Activations":
        """Gradient of a scalar with respect to every captured site, selected as the captures are.

        Args:
            metric: computed from ``self.output`` (or from the activations), a single number with a graph.

        Raises:
            InputError: the capture was made without ``grad=True``, or the metric is not a single number with
                a graph.
            NeverFiredError: a site that the metric does not depend on.
        """
        if not self._taps:
            raise InputError("these activations have no graph: capture them with grad=True")
        if metric.numel() != 1 or not metric.requires_grad:
            raise InputError(f"the metric must be one number with a graph, not a tensor of shape {tuple(metric.shape)}")
        by_site = zip(self._taps, gradients_of(metric.sum(), self._taps), strict=True)
        return Activations({tap.place.site: grads for tap, grads in by_site}, self._axes, stepped=self.stepped)

    def save(self, path: str | Path) -> None:
        """Write the tensors to ``path.safetensors`` and the axes beside them to ``path.json``."""
        tensors_file, about_file = saved_files(path)
        tensors_file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{site}#{i}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for site in self
            for i, tensor in enumerate(self._calls[site])
        }
        save_file(tensors, tensors_file)
        about = {
            site: {"axes": self._axes[site], "calls": len(self._calls[site]), "stepped": self.stepped} for site in self
        }
        about_file.write_text(json.dumps(about, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "Activations":
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        tensors_file, about_file = saved_files(path)
        missing = "no activations at {!r}: a saved set is a .safetensors and a .json file"
        check_saved((tensors_file, about_file), missing)
        try:
            tensors = load_file(tensors_file)
            about = json.loads(about_file.read_text())
            calls = {site: [tensors[f"{site}#{i}"] for i in range(a["calls"])] for site, a in about.items()}
            stepped = any(a.get("stepped", False) for a in about.values())
            return cls(calls, {site: tuple(a["axes"]) for site, a in about.items()}, stepped=stepped)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the activations at {str(path)!r} are damaged: {error}") from error


def from_taps(taps: list[Tap], output: Any = None, *, stepped: bool = False) -> Activations:
    """Activations of a finished session.

    Args:
        taps: taps that have caught something.
        output: the model's output.
        stepped: whether the calls are the steps of a run, which lead even when there is one only.
    """
    acts = Activations({}, {}, output, stepped=stepped)
    acts.fill(taps)
    return acts


def _axes(tap: Tap) -> tuple[str, ...]:
    """Names of the axes of what a tap has caught in one call."""
    names = tap.place.axes
    n_axes = tap.caught[0].ndim if tap.caught else len(names)
    if tap.place.layout == "grid" and tap.where.at is not None:
        return ("batch", "channel") if n_axes == 2 else ("batch", "cell", "channel")
    if n_axes == len(names) - 1 and tap.place.layout == "tokens":
        return tuple(name for name in names if name not in ("pos", "query"))
    # A raw module's output may have any axes, such as the rows and columns of a convolution.
    return names if n_axes == len(names) else ("batch", *(f"axis_{index}" for index in range(1, n_axes)))
