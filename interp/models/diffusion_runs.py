"""Generation and inversion: what a run needs, checked before anything runs, and the run itself."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp import latents as autoencoding
from interp.conventions import Convention, check_eta, check_scale, convention_named
from interp.edits import Edit
from interp.errors import InputError, ShapeError
from interp.latents import Size, VaeMode
from interp.models.conditioning import Conditioning, Guided, conditions, texts
from interp.models.run_captures import Consumer, Half, RunCaptures, check_edits, run_captures
from interp.positions import Indexes
from interp.solvers import FlowInversion, SchedulerSteps, Solver, ddim
from interp.trajectories import Path, Trajectory, follow

Latents = Float[Tensor, "batch channel height width"]
Prompts = str | Sequence[str] | Conditioning
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What generation and inversion have in common; see `Diffusion.invert` for each."""

    edits: tuple[Edit, ...] = ()
    capture: str | Sequence[str] | None = None
    save_steps: Indexes | slice | None = None
    half: Half = "cond"
    guidance_calls: str = "batch"
    consume: Consumer | None = None
    stop: bool = False
    keep_latents: bool = True
    progress: bool = True
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def captures(self, sd: Any, solver: Solver, *, guided: bool) -> RunCaptures:
        """The taps of a run, once its options and edits are checked.

        Raises:
            InputError, UnknownNameError, SiteUnavailableError: see `run_captures` and `check_edits`.
        """
        if self.guidance_calls not in ("batch", "two"):
            raise InputError(f"guidance_calls={self.guidance_calls!r}: give 'batch' or 'two'")
        timesteps = solver.timesteps
        check_edits(self.edits, n_steps=len(timesteps), guided=guided)
        return run_captures(
            [] if self.capture is None else sd.expanded(self.capture),
            timesteps=timesteps,
            guided=guided,
            save_steps=self.save_steps,
            half=self.half,
            consume=self.consume,
            stop=self.stop,
            dtype=self.dtype,
            device=self.device,
        )


def run_inversion(
    sd: Any,
    images: Any,
    prompt: Prompts,
    *,
    convention: Convention,
    steps: int | None,
    guidance_scale: float | None,
    size: Size,
    vae: VaeMode | None,
    seed: int | None,
    options: RunOptions,
) -> Trajectory:
    """See `Diffusion.invert`."""
    family = sd.adapter
    is_latents = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == family.latent_channels
    if is_latents:
        sd.check_latents(images)
        if size is not None:
            raise InputError("size= resizes PIL images, and these are latents")
        given, cells = images, tuple(images.shape[-2:])
    else:
        given = autoencoding.pixels(images, size=size, multiple=family.multiple)
        cells = tuple(side // family.scale for side in given.shape[-2:])
    scale = convention.guidance_scale if guidance_scale is None else float(guidance_scale)
    guided = scale > 1 and not family.embeds_guidance
    solver = solver_for(sd, convention, steps, cells, invert=True)
    plan = options.captures(sd, solver, guided=guided)
    with sd.session(plan.taps, options.edits) as session:
        text = conditions(family, prompt, len(given), guided=guided)
        if not is_latents:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            given = autoencoding.encode(sd.pipeline.vae, given, vae or convention.vae, generator)
        predict = Guided(family, solver, text, scale, guided, scale, options.guidance_calls, session, plan.stop_at)
        path = follow(
            solver,
            given.to(sd.device, sd.dtype),
            predict,
            keep=options.keep_latents,
            description=f"inversion ({convention.name})" if options.progress else None,
        )
    return _trajectory(sd, path, solver, plan, convention, "inversion")


def run_generation(
    sd: Any,
    prompt: Prompts,
    negative_prompt: str | Sequence[str] | None,
    *,
    convention: str | Convention | None,
    steps: int | None,
    guidance_scale: float | Sequence[float] | None,
    true_cfg_scale: float | None,
    seed: int,
    n: int,
    size: Size,
    latents: Latents | None,
    decode: bool,
    guide: Any,
    eta: float | None,
    options: RunOptions,
) -> Trajectory:
    """See `Diffusion.generate`."""
    family, given = sd.adapter, _given(guide, convention, guidance_scale, eta)
    prompts = prompt if isinstance(prompt, Conditioning) else texts(prompt)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n={n!r}: give the number of images per prompt, from 1 on")
    needs_uncond = guide is not None and guide.needs_uncond
    scale, guided = _guidance(sd, prompts, negative_prompt, given.scale, true_cfg_scale, needs_uncond=needs_uncond)
    if negative_prompt is None and guide is not None and (guided or needs_uncond) and isinstance(prompts, list):
        negative_prompt = guide.negative_prompt
    rows = len(prompts) * n
    if latents is None:
        height, width = autoencoding.size_of(size, family.multiple) or family.default_size
        cells = (height // family.scale, width // family.scale)
    else:
        sd.check_latents(latents)
        if size is not None:
            raise InputError("give size or latents, not both: the latents have a size")
        rows = len(latents) if rows == 1 else rows
        if len(latents) != rows:
            raise ShapeError(f"{len(latents)} latents for {len(prompts)} prompts with {n} images each: expected {rows}")
        cells = (int(latents.shape[-2]), int(latents.shape[-1]))
    scales = _by_row(scale, rows)
    generator = torch.Generator().manual_seed(seed)

    def solver_of(generator: torch.Generator) -> Solver:
        return solver_for(sd, given.convention, steps, cells, invert=False, generator=generator, eta=given.eta)

    def another_solver() -> Solver:
        return solver_of(torch.Generator().set_state(generator.get_state()))

    solver = solver_of(generator)
    if guide is not None:
        guide.check(sd, rows, cells, len(solver.times))
    plan = options.captures(sd, solver, guided=guided)
    places = [tap.place for tap in plan.taps] + [sd.place(edit.site) for edit in options.edits]
    in_run = decode and any(place.part == "vae" for place in places)
    with ExitStack() as stack:
        if guide is not None:
            # Tensors of inference mode have no gradients. Leaving that mode switches gradients on.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        session = stack.enter_context(sd.session(plan.taps, options.edits))
        text = conditions(family, prompts, rows, negative=negative_prompt, guided=guided or needs_uncond)
        if latents is None:
            shape = (rows, family.latent_channels, *cells)
            latents = randn_tensor(shape, generator=generator, device=sd.device, dtype=text.cond.states.dtype)
        else:
            latents = latents.to(sd.device, text.cond.states.dtype)
        calls, start = options.guidance_calls, solver.start(latents)
        predict = Guided(family, solver, text, scales, guided, given.condition, calls, session, plan.stop_at)
        steering = None
        if guide is not None:
            start, predict = _outside_inference(start), replace(predict, text=_outside_inference(text))
            steered = guide.steering(
                sd, predict=predict, solver=solver, latents=start, another_solver=another_solver,
                keep=options.keep_latents,
            )  # fmt: skip
            steering = stack.enter_context(steered)
        path = follow(
            solver,
            start,
            predict if steering is None else steering.predict,
            keep=options.keep_latents,
            description=f"generation ({given.convention.name})" if options.progress else None,
            move=None if steering is None else steering.move,
        )
        pixels = sd.decode(path.latents[len(solver.times)]) if in_run and not path.stopped else None
    trajectory = _trajectory(sd, path, solver, plan, given.convention, "generation", pixels)
    if steering is None:
        return trajectory
    nothing = replace(plan, by_half={"cond": []}, saved=())
    twin = None if steering.twin is None else steering.twin.path(path.stopped)
    reference = None if twin is None else _trajectory(sd, twin, solver, nothing, given.convention, "generation")
    return replace(trajectory, guidance=steering.log.table(), reference=reference)


def solver_for(
    sd: Any,
    convention: Convention,
    steps: int | None,
    cells: tuple[int, int],
    *,
    invert: bool,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
) -> Solver:
    """The steps of a run.

    Args:
        sd: the model.
        convention: how.
        steps: how many; None: the convention's.
        cells: height and width of the latents.
        invert: from image to noise.
        generator: for schedulers that add noise.
        eta: how much noise DDIM adds.

    Raises:
        InputError: a prediction type that the convention does not serve, steps out of range, a scheduler that clips
            latents or that has no noise levels for DDIM.
    """
    scheduler, steps = sd.pipeline.scheduler, convention.steps if steps is None else steps
    name, config = type(scheduler).__name__, scheduler.config
    convention.check(sd.prediction)
    trained = int(config.get("num_train_timesteps", 1000))
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:
        raise InputError(f"steps={steps!r}: give 1 to {trained}, the steps that the model was trained on")
    if config.get("stochastic_sampling", False):
        raise InputError(f"this {name} draws from the global random state (stochastic_sampling), which no seed covers")
    if sd.prediction == "flow":
        forward = SchedulerSteps(scheduler, steps, sd.device, generator, sd.adapter.schedule(cells, steps), eta)
        if not invert:
            return forward
        if "Euler" not in name:
            raise InputError(f"flows are inverted by Euler steps; this pipeline has a {name}")
        return FlowInversion(forward)
    clips = [setting for setting in ("clip_sample", "thresholding") if config.get(setting, False)]
    if convention.own_scheduler and clips and invert:
        raise InputError(
            f"this {name} has {clips[0]}=True, which ruins latents: set it to False "
            f"(type(scheduler).from_config(scheduler.config, {clips[0]}=False)), or choose another convention"
        )
    if convention.own_scheduler and not invert:
        if clips:
            _log.warning("This %s has %s=True, which ruins latents; the pipeline would do the same.", name, clips[0])
        return SchedulerSteps(scheduler, steps, sd.device, generator, eta=eta)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"convention {convention.name!r} needs a scheduler with alphas_cumprod; {name} has none")
    return ddim(convention, scheduler, sd.prediction, steps, invert=invert, eta=eta, generator=generator)


@dataclass(frozen=True)
class _Given:
    """Settings of a generation that a guide may bring, the user's own first."""

    convention: Convention
    scale: float | tuple[float, ...]
    eta: float

    @property
    def condition(self) -> float:
        """The scale for denoisers that take it as a condition."""
        return self.scale if isinstance(self.scale, float) else self.scale[0]


def _given(
    guide: Any,
    convention: str | Convention | None,
    guidance_scale: Any,
    eta: float | None,
) -> _Given:
    if guide is not None and not hasattr(guide, "steering"):
        raise InputError(
            f"guidance takes an interp.guidance.Guide, not {type(guide).__name__}; the strength of the prompt is "
            "guidance_scale"
        )
    if convention is None:
        convention = "diffusers" if guide is None else guide.convention
    if guidance_scale is None:
        guidance_scale = 7.5 if guide is None else guide.guidance_scale
    if eta is None:
        eta = 0.0 if guide is None else guide.eta
    check_eta(eta)
    check_scale(guidance_scale)
    if isinstance(guidance_scale, Real):
        return _Given(convention_named(convention), float(guidance_scale), float(eta))
    scales = tuple(float(scale) for scale in guidance_scale)
    if not scales or min(scales) < 1:
        raise InputError(f"guidance_scale={guidance_scale!r}: give one for each sample, from 1 (no guidance) on")
    return _Given(convention_named(convention), scales, float(eta))


def _by_row(scale: float | tuple[float, ...], rows: int) -> float | Tensor:
    """The scale of guidance as predictions are multiplied by it."""
    if isinstance(scale, float):
        return scale
    if len(scale) != rows:
        raise InputError(f"{len(scale)} guidance scales for {rows} samples: give one for all, or one for each")
    return rearrange(torch.tensor(scale), "row -> row 1 1 1")


def _outside_inference(value: Any) -> Any:
    """Latents or encoded prompts that gradients may be taken with, also when they were made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    uncond = None if value.uncond is None else value.uncond.apply(_outside_inference)
    return Conditioning(value.cond.apply(_outside_inference), uncond)


def _guidance(
    sd: Any,
    prompts: list[str] | Conditioning,
    negative_prompt: str | Sequence[str] | None,
    guidance_scale: float | tuple[float, ...],
    true_cfg_scale: float | None,
    *,
    needs_uncond: bool = False,
) -> tuple[float | tuple[float, ...], bool]:
    """The scale of classifier-free guidance, and whether there is any."""
    encoded = isinstance(prompts, Conditioning)
    if encoded and negative_prompt is not None:
        raise InputError("encoded prompts come with their negative ones: sd.prompt(prompt, negative)")
    if not sd.adapter.embeds_guidance:
        if true_cfg_scale is not None:
            raise InputError(f"true_cfg_scale is for Flux; the family {sd.family!r} is guided by guidance_scale")
        scale = guidance_scale
        wanted = (scale if isinstance(scale, float) else max(scale)) > 1
    else:
        if not isinstance(guidance_scale, float):
            raise InputError("Flux takes one guidance_scale for all samples, as a condition of the denoiser")
        # As in diffusers: the scale alone guides nothing.
        scale = cfg = 1.0 if true_cfg_scale is None else float(true_cfg_scale)
        wanted = cfg > 1
        if wanted and negative_prompt is None and not encoded:
            raise InputError("true_cfg_scale needs a negative prompt: negative_prompt=''")
    if negative_prompt is not None and not wanted and not needs_uncond:
        setting = "true_cfg_scale" if sd.adapter.embeds_guidance else "guidance_scale"
        raise InputError(f"negative_prompt does nothing without guidance: give {setting} above 1")
    return scale, wanted


def _trajectory(
    sd: Any,
    path: Path,
    solver: Solver,
    plan: RunCaptures,
    convention: Convention,
    direction: Literal["generation", "inversion"],
    pixels: Tensor | None = None,
) -> Trajectory:
    latents, latent_steps, clean = path.stacked()
    made = Trajectory(
        latents=latents,
        latent_steps=latent_steps,
        predicted_x0=clean,
        timesteps=solver.timesteps,
        activations=plan.activations("cond"),
        uncond=plan.activations("uncond") if "uncond" in plan.by_half else None,
        saved_steps=plan.saved,
        convention=convention.name,
        direction=direction,
        stopped=path.stopped,
        decode=sd.decode,
    )
    if pixels is not None:
        # Decoded once already, with the captures and edits of the run.
        vars(made)["pixels"] = pixels
    return made
