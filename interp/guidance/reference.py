"""What terms compare with: an unguided twin in lockstep, or the readings of a recorded run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.conventions import check_scale, convention_named
from interp.errors import InputError, ShapeError
from interp.guidance.drag import Drag
from interp.guidance.reading import Reader, Readings
from interp.guidance.terms import Reading, check_finite, is_number, precise
from interp.models.conditioning import Guided, conditions
from interp.models.diffusion_runs import solver_for
from interp.trajectories import Trajectory

Latents = Float[Tensor, "batch channel height width"]
# The least and the greatest value of each row's latents.
Spread = tuple[Float[Tensor, " row"], Float[Tensor, " row"]]


@dataclass(frozen=True, eq=False)
class Twin:
    """An unguided run beside the guided one, one for each sample, that starts from the same noise by default.

    Its steps are those of an ordinary run, and its fresh noise (``eta``) is that of its sample.

    Args:
        seed: of other noise to start from; None: the sample's own.
        latents: other noise itself, one for each sample, in place of a seed.
        prompt: another prompt, or several; None: the sample's own.
        negative_prompt: beside that prompt.
        guidance_scale: of classifier-free guidance; None: the sample's own.

    Raises:
        InputError: a seed and latents, a negative prompt alone, or values that are none of these.
        ShapeError: latents of other axes.

    Source: Readout Guidance, official code: a batch of two with identical noise, of which the first is not guided.
    """

    seed: int | None = None
    latents: Latents | None = None
    prompt: Any = None
    negative_prompt: str | Sequence[str] | None = None
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.seed is not None and self.latents is not None:
            raise InputError("Twin: give seed or latents, not both: each is the noise to start from")
        if self.negative_prompt is not None and self.prompt is None:
            raise InputError("Twin: a negative_prompt belongs to a prompt: give both")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise InputError(f"Twin: seed={self.seed!r}: give a whole number")
        if self.guidance_scale is not None:
            if not is_number(self.guidance_scale):
                raise InputError(f"Twin: guidance_scale={self.guidance_scale!r}: give one number for all samples")
            check_scale(self.guidance_scale)
        if self.latents is not None:
            check_finite(self.latents, "the noise of a Twin")
            if self.latents.ndim != 4:
                raise ShapeError(f"the noise of a Twin is {tuple(self.latents.shape)}: give [batch, channel, y, x]")

    @property
    def shares_noise(self) -> bool:
        """Whether it starts where its sample does."""
        return self.seed is None and self.latents is None

    def __repr__(self) -> str:
        noise = "the sample's noise" if self.shares_noise else "given latents" if self.seed is None else self.seed
        return f"Twin({'seed=' if self.seed is not None else ''}{noise})"


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """Readings of another run at the guided steps, so that guided runs need no twin. `record` makes one.

    Args:
        readings: by step, half of guidance and what was read with; rows are samples.
        timesteps: what the model saw, by step.
        spreads: the range of the latents, by step.
        start: the noise end of the run.
        empty: whether the unconditional half was the empty prompt's, see `Guide.half`.
    """

    readings: Mapping[tuple[int, str, str], Reading]
    timesteps: Mapping[int, float]
    spreads: Mapping[int, Spread]
    start: Latents
    empty: bool = False

    def __repr__(self) -> str:
        keys = sorted({key for _, _, key in self.readings})
        return f"Reference({', '.join(keys)} of {self.rows} images at {len(self.timesteps)} steps)"

    @property
    def rows(self) -> int:
        """How many images it is of."""
        return len(self.start)

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        sd: Any,
        trajectory: Trajectory,
        guide: Any,
        prompt: Any = "",
        *,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 3.5,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "Reference":
        """Read a run at the steps where a guide acts: a generation, or the inversion of a real image.

        Args:
            sd: the model.
            trajectory: of a run with all its latents, by the convention and in as many steps as the guided one; of one
                image for all samples, or of one for each.
            guide: whose terms, guided steps and halves count; ``dataclasses.replace(guide, reference=...)`` then uses
                the recording.
            prompt: of the conditional half.
            negative_prompt: of the unconditional half.
            guidance_scale: for denoisers that take it as a condition (Flux).
            device, dtype: where the readings are kept, and as what; None: as they come.

        Raises:
            InputError: no term compares, latents that were not kept, or what a term has for each sample is neither for
                one nor for as many as there are images.

        Source: Readout Guidance, discussion of real images (readouts of the inverted image in place of a twin).
        """
        if not isinstance(trajectory, Trajectory) or not hasattr(guide, "terms"):
            raise InputError(
                f"Reference.record takes a trajectory and a guide, not {type(trajectory).__name__} and "
                f"{type(guide).__name__}"
            )
        terms = [term for term in guide.terms if term.compares]
        if not terms:
            raise InputError("no term of this guide compares with a reference, so that there is nothing to record")
        n_steps, (rows, *_, height, width) = trajectory.n_steps, trajectory.latents.shape[1:]
        for term in guide.terms:
            # One image may serve many samples, each with points or boxes of its own: those are for the guided run.
            term.check(sd, None if rows == 1 else rows, (height, width), n_steps)
        convention = convention_named(trajectory.convention)
        solver = solver_for(sd, convention, n_steps, (height, width), invert=False)
        by_step = dict(zip(trajectory.latent_steps, trajectory.latents, strict=True))
        if trajectory.direction == "inversion":
            by_step = {n_steps - step: latents for step, latents in by_step.items()}
        wanted = guide.steps(n_steps)
        missing = [step for step in (0, *wanted) if step not in by_step]
        if missing:
            raise InputError(f"the trajectory lacks the latents of step {missing[0]}: run it with keep_latents=True")
        reader = Reader(sd, terms)
        text = conditions(sd.adapter, prompt, rows, negative=negative_prompt, guided=guide.reads_uncond)
        readings: dict[tuple[int, str, str], Reading] = {}
        with reader.session:
            run = Guided(sd.adapter, solver, text, 1.0, False, guidance_scale, "batch", reader.session, None)
            predict = guide.seen_by(run)
            for step in wanted:
                given = solver.model_input(by_step[step], step)
                found = visit(reader, predict, given, step, guide.halves)
                readings |= {
                    (step, half, key): moved(reading, device, dtype)
                    for half, by_key in found.items()
                    for key, reading in by_key.items()
                }
        return cls(
            readings,
            {step: solver.timesteps[step] for step in wanted},
            {step: spread_of(by_step[step]) for step in wanted},
            by_step[0],
            guide.half == "empty",
        )

    def check(
        self,
        terms: Sequence[Any],
        halves: Sequence[str],
        timesteps: Mapping[int, float],
        start: Latents,
        *,
        empty: bool,
    ) -> None:
        """Refuse a run that this recording does not fit.

        Args:
            terms: those that compare.
            halves: of guidance that count.
            timesteps: of the guided steps.
            start: the run's first latents.
            empty: whether the guide sees the empty prompt.

        Raises:
            InputError: other steps, halves, terms, timesteps or numbers of samples; points to be dragged in images
                that are not these.
        """
        for step, time in timesteps.items():
            if step not in self.timesteps:
                raise InputError(
                    f"the reference was not recorded at step {step}: record it with the same start and end"
                )
            if abs(self.timesteps[step] - time) > 1e-3:
                raise InputError(
                    f"the reference was recorded at timestep {self.timesteps[step]:g} of step {step}, where this run "
                    f"has {time:g}: record it by the same convention and number of steps"
                )
            for half in halves:
                for term in terms:
                    if (step, half, term.key) not in self.readings:
                        raise InputError(
                            f"the reference holds no {term.key!r} of the {half} half: record it with this guide"
                        )
        if self.empty != empty:
            kinds = {True: "half='empty'", False: "another half"}
            raise InputError(
                f"the reference was recorded with {kinds[self.empty]}, and this guide has {kinds[empty]}: record it "
                "with this guide"
            )
        if self.rows not in (1, len(start)):
            raise InputError(f"a reference of {self.rows} images for {len(start)} samples: record one, or one for each")
        here = self.start.to(start).expand_as(start) if self.start.shape[1:] == start.shape[1:] else None
        moves = [term.name for term in terms if isinstance(term, Drag)]
        if moves and (here is None or not torch.allclose(here, start, rtol=1e-2, atol=1e-2)):
            raise InputError(
                f"term {moves[0]!r} moves parts of the image that comes from the sample's own noise, but the reference "
                "was recorded from other noise: start from the recorded run's (latents=...)"
            )

    def at(self, step: int, halves: Sequence[str], keys: Sequence[str], device: torch.device) -> Readings:
        """The readings of a step."""
        return {half: {key: moved(self.readings[step, half, key], device, None) for key in keys} for half in halves}


def visit(reader: Reader, predict: Guided, given: Latents, step: int, halves: tuple[str, ...]) -> Readings:
    """Read latents at a step, by a call that ends after the last site."""
    _, maps = reader.collect(lambda: predict.call(given, step, halves, reader.session))
    return reader.read(maps, halves, predict.solver.timesteps[step])


def spread_of(latents: Latents) -> Spread:
    """The least and the greatest value of each row."""
    values = precise(latents)
    return values.amin(dim=(1, 2, 3)), values.amax(dim=(1, 2, 3))


def moved(reading: Reading, device: torch.device | str, dtype: torch.dtype | None) -> Reading:
    """A reading on another device or in another dtype."""
    if isinstance(reading, dict):
        return {site: tensor.to(device, dtype) for site, tensor in reading.items()}
    return reading.to(device, dtype)
