"""A guided run: at each guided step the latents are moved, or the prediction is changed, by the terms' gradient."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from interp.errors import ShapeError
from interp.guidance.checkpointing import without_weight_gradients
from interp.guidance.gradients import measure
from interp.guidance.log import Log
from interp.guidance.reading import Maps, Reader, Readings
from interp.guidance.reference import Reference, Spread, Twin, spread_of
from interp.guidance.rules import MOVES
from interp.guidance.terms import at_step
from interp.hooks import captures_of
from interp.models.conditioning import Guided, conditions
from interp.solvers import Solver
from interp.trajectories import Path

Latents = Float[Tensor, "batch channel height width"]


class TwinRun:
    """The unguided run beside a guided one, step by step.

    Args:
        predict: its denoiser.
        seen: the one whose activations count, see `Guide.seen_by`.
        solver: its steps, with the fresh noise of the guided run's.
        latents: its first ones.
        keep: all latents, and not only the first and the last.
    """

    def __init__(self, predict: Guided, seen: Guided, solver: Solver, latents: Latents, keep: bool) -> None:
        self.predict, self.solver, self.keep = replace(predict, solver=solver, last=None), solver, keep
        self.seen = self.predict if seen is predict else replace(seen, solver=solver, last=None)
        self.latents = latents
        self._kept: dict[int, Latents] = {0: latents}
        self._clean: dict[int, Latents] = {}

    def advance(self, step: int, reader: Reader | None, halves: tuple[str, ...]) -> Readings:
        """Take one step.

        Args:
            step: of the run.
            reader: reads the latents before the step; None: nothing is read.
            halves: that are read.
        """
        given = self.solver.model_input(self.latents, step)
        readings: Readings = {}
        if reader is None or self.seen is not self.predict:
            with captures_of(None):
                prediction = self.predict(given, step)
            maps: Maps = {}
        else:
            prediction, maps = reader.collect(lambda: self.predict(given, step))
        if reader is not None:
            missing = tuple(half for half in halves if half not in maps)
            if missing:
                _, more = reader.collect(lambda: self.seen.call(given, step, missing, reader.session))
                maps |= more
            readings = reader.read(maps, halves, self.solver.timesteps[step])
        assert prediction is not None
        self.latents, clean = self.solver.advance(self.latents, prediction, step)
        if self.keep or step == len(self.solver.times) - 1:
            self._kept[step + 1] = self.latents
            if clean is not None:
                self._clean[step] = clean
        return readings

    def path(self, stopped: bool) -> Path:
        """Where it has been."""
        return Path(self._kept, self._clean, stopped)


class Steering:
    """Steers one run; see `steering`.

    Args:
        guide: the guide.
        predict: the run's denoiser.
        seen: the one whose activations count, see `Guide.seen_by`.
        solver: its steps.
        reader: of the terms; None without any.
        twin: the unguided run beside it, if there is one.
    """

    def __init__(
        self, guide: Any, predict: Guided, seen: Guided, solver: Solver, reader: Reader | None, twin: TwinRun | None
    ) -> None:
        self.guide, self.solver, self.reader, self.twin = guide, solver, reader, twin
        self.log = Log()
        self._predict, self._seen = predict, seen
        self._steps = guide.steps(len(solver.times)) if reader is not None else range(0)
        self._change: Latents | None = None

    def move(self, latents: Latents, step: int) -> Latents:
        """The latents of a step, moved as the rule says; outside the guided steps the same ones."""
        guided = step in self._steps
        references, spread = self._references(step, guided)
        self._change = None
        if not guided:
            return latents
        assert self.reader is not None
        size, time = at_step(self.guide.step_size, step), self.solver.timesteps[step]
        if self.guide.rule == "epsilon":
            gradient, measured = measure(self.guide, self.reader, self._seen, latents, step, references, spread)
            self.log.add(step, time, 0, measured)
            self._change = self.solver.shift((size * gradient).to(latents.dtype), step)
            return latents
        rule = MOVES[self.guide.rule](latents, size)
        for again in range(self.guide.recurrence):
            gradient, measured = measure(self.guide, self.reader, self._seen, latents, step, references, spread)
            self.log.add(step, time, again, measured)
            latents = rule(latents, gradient)
        return latents

    def predict(self, latents: Latents, step: int) -> Latents | None:
        """The prediction of a step, changed as the rule says."""
        prediction = self._predict(latents, step)
        return prediction if prediction is None or self._change is None else prediction + self._change

    def _references(self, step: int, guided: bool) -> tuple[Readings, Spread | None]:
        """What the terms compare with at a step; a twin goes on to the next one."""
        if self.twin is not None:
            spread = spread_of(self.twin.latents)
            return self.twin.advance(step, self.reader if guided else None, self.guide.halves), spread
        reference = self.guide.reference
        if not guided or not self.guide.compares or not isinstance(reference, Reference):
            return {}, None
        keys = [term.key for term in self.guide.terms if term.compares]
        device = self._predict.family.device
        return reference.at(step, self.guide.halves, keys, device), reference.spreads[step]


@contextmanager
def steering(
    guide: Any,
    sd: Any,
    *,
    predict: Guided,
    solver: Solver,
    latents: Latents,
    another_solver: Callable[[], Solver],
    keep: bool,
) -> Iterator[Steering]:
    """Steer a run within this block; afterwards weights and hooks are as before.

    Args:
        guide: the guide, checked.
        sd: the model.
        predict: the run's denoiser, its text with the halves that the guide needs.
        solver: the run's steps.
        latents: its first ones.
        another_solver: makes the same steps, with the same fresh noise.
        keep: all latents of a twin, and not only the first and the last.

    Raises:
        InputError, ShapeError: a reference that does not fit the run, or a rule that the solver does not know.
        NeverFiredError: at the end, when the gradient was zero at all guided steps.
    """
    if not guide.terms:
        yield Steering(guide, predict, predict, solver, None, None)
        return
    if guide.rule == "epsilon":
        solver.shift(latents[:1], 0)
    reader, twin, seen = Reader(sd, guide.terms), None, guide.seen_by(predict)
    if guide.compares:
        if isinstance(guide.reference, Reference):
            steps = guide.steps(len(solver.times))
            terms = [term for term in guide.terms if term.compares]
            times = {step: solver.timesteps[step] for step in steps}
            guide.reference.check(terms, guide.halves, times, latents, empty=guide.half == "empty")
        else:
            twin = _twin(guide.reference, guide, (predict, seen), another_solver(), latents, keep)
    with ExitStack() as stack:
        heads = [module for term in guide.terms for module in term.modules]
        stack.enter_context(without_weight_gradients([sd.denoiser, *heads]))
        stack.enter_context(reader.session)
        made = Steering(guide, predict, seen, solver, reader, twin)
        yield made
        made.log.check()
        if not len(made.log):
            # The run was ended before its first guided step, so that the terms' sites had no call to be captured in.
            reader.session.taps.clear()


def _twin(
    twin: Twin, guide: Any, denoisers: tuple[Guided, Guided], solver: Solver, latents: Latents, keep: bool
) -> TwinRun:
    """The twin of a run, ready to start."""
    predict, seen = denoisers
    start, scale, mixes = latents, predict.scale, predict.mixes
    if twin.seed is not None:
        generator = torch.Generator().manual_seed(twin.seed)
        start = solver.start(
            randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        )
    elif twin.latents is not None:
        if twin.latents.shape[1:] != latents.shape[1:] or len(twin.latents) not in (1, len(latents)):
            raise ShapeError(f"the twin's latents are {tuple(twin.latents.shape)}, the run's {tuple(latents.shape)}")
        start = solver.start(twin.latents.to(latents).expand_as(latents).clone())
    if twin.guidance_scale is not None:
        scale, mixes = twin.guidance_scale, twin.guidance_scale > 1
    text = predict.text
    if twin.prompt is not None:
        guided = mixes or guide.reads_uncond
        with captures_of(None):
            text = conditions(predict.family, twin.prompt, len(latents), negative=twin.negative_prompt, guided=guided)
    own = replace(predict, text=text, scale=scale, mixes=mixes)
    # One empty prompt serves both.
    seen = own if seen is predict else replace(seen, text=replace(text, uncond=seen.text.uncond))
    return TwinRun(own, seen, solver, start, keep)
