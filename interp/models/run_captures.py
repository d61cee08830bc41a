"""Which captures a run of a diffusion model makes, and the activations that come of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from interp.activations import Activations, from_taps
from interp.edits import Edit
from interp.errors import InputError, nearest
from interp.hooks import Tap
from interp.positions import Indexes
from interp.selection import HALVES, Where
from interp.sites import Place
from interp.trajectories import chosen_steps

Consumer = Callable[[str, int, float, Tensor], None]
Half = Literal["cond", "uncond", "both"]


@dataclass(frozen=True)
class RunCaptures:
    """The taps of one run.

    Args:
        by_half: taps of each half of guidance; those of the autoencoder count as conditional.
        saved: steps at which the denoiser is captured.
        stop_at: the step that ends the run; None: it goes on to its end.
    """

    by_half: dict[str, list[Tap]]
    saved: tuple[int, ...]
    stop_at: int | None

    @property
    def taps(self) -> list[Tap]:
        """All of them."""
        return [tap for taps in self.by_half.values() for tap in taps]

    def activations(self, half: str) -> Activations:
        """What was caught of one half; a leading step axis at sites of the denoiser, even for a single step."""
        taps = [tap for tap in self.by_half.get(half, []) if tap.consume is None]
        caught = from_taps(taps)
        calls: dict[str, list[Tensor]] = {}
        axes: dict[str, tuple[str, ...]] = {}
        for tap in taps:
            site, tensors = tap.place.site, caught.calls(tap.place.site)
            names = caught.axes(site)[1:] if len(tensors) > 1 else caught.axes(site)
            stepped = tap.place.part == "denoiser"
            calls[site] = [torch.stack(tensors)] if stepped else tensors
            axes[site] = ("step", *names) if stepped else names
        return Activations(calls, axes)


def run_captures(
    places: Sequence[Place],
    *,
    timesteps: Sequence[float],
    guided: bool,
    save_steps: Indexes | slice | None = None,
    half: Half = "cond",
    consume: Consumer | None = None,
    stop: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> RunCaptures:
    """Plan the captures of a run.

    Args:
        places: sites to capture.
        timesteps: of the model, one for each step of the run.
        guided: whether it has an unconditional half.
        save_steps: steps to capture the denoiser at; None: all.
        half: of guidance, or both.
        consume: takes every capture as it comes, instead of keeping it: site, step (-1 outside the denoiser), model
            timestep (NaN there), tensor.
        stop: end the run after the last captured site of the last saved step.
        dtype, device: of what is kept.

    Raises:
        InputError: steps out of range, a half that the run does not have, or settings that contradict each other.
    """
    if half not in (*HALVES, "both"):
        raise InputError(f"half={half!r}: give 'cond', 'uncond' or 'both'. {nearest(str(half), (*HALVES, 'both'))}")
    if half != "cond" and not guided:
        raise InputError(f"half={half!r}: a run without guidance has only the conditional half")
    if consume is not None and half == "both":
        raise InputError("consume= is not told which half a tensor is of: give half='cond' or half='uncond'")
    if not places and (save_steps is not None or consume is not None or stop):
        raise InputError("save_steps, consume and stop say what becomes of captures: name sites with capture=")
    if stop and not any(place.part == "denoiser" for place in places):
        raise InputError("stop=True ends a run after a captured site of the denoiser, and none is captured")
    n_steps = len(timesteps)
    saved = chosen_steps("save_steps", save_steps, n_steps) if places else ()
    wanted = HALVES if half == "both" else (half,)
    by_half: dict[str, list[Tap]] = {name: [] for name in wanted}
    for place in places:
        receive = None if consume is None else _receiver(place.site, consume, timesteps)
        if place.part == "vae":
            by_half.setdefault("cond", []).append(Tap(place, Where(), dtype, device, consume=receive))
            continue
        # A selection of all steps is left open: it costs nothing.
        steps = saved if place.part == "denoiser" and len(saved) < n_steps else None
        for name in wanted:
            where = Where(steps=steps, half=name if guided else None)
            where.check(place)
            by_half[name].append(Tap(place, where, dtype, device, consume=receive))
    return RunCaptures(by_half, saved, saved[-1] if stop else None)


def check_edits(edits: Sequence[Edit], *, n_steps: int, guided: bool) -> None:
    """Refuse edits that this run can never apply.

    Raises:
        InputError: steps that the run does not have, or the unconditional half of a run without guidance.
    """
    for edit in edits:
        if edit.steps is not None:
            chosen_steps(f"steps of {edit!r}", edit.steps, n_steps)
        if edit.half == "uncond" and not guided:
            raise InputError(f"{edit!r} never applies: without guidance there is no unconditional half")


def _receiver(site: str, consume: Consumer, timesteps: Sequence[float]) -> Callable[[Tensor, Any], None]:
    def receive(caught: Tensor, call: Any) -> None:
        # Not the call's own timestep, which some denoisers are given in other units or in half precision.
        outside = call.step is None
        consume(site, -1 if outside else call.step, float("nan") if outside else timesteps[call.step], caught)

    return receive
