"""Generation and inversion: what a run needs, checked before anything runs, and the run itself."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from interp import latents as autoencoding
from interp.conventions import Convention
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
        predict = Guided(family, solver, text, scale, scale, options.guidance_calls, session, plan.stop_at)
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
    convention: Convention,
    steps: int | None,
    guidance_scale: float,
    true_cfg_scale: float | None,
    seed: int,
    n: int,
    size: Size,
    latents: Latents | None,
    decode: bool,
    options: RunOptions,
) -> Trajectory:
    """See `Diffusion.generate`."""
    family = sd.adapter
    prompts = prompt if isinstance(prompt, Conditioning) else texts(prompt)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n={n!r}: give the number of images per prompt, from 1 on")
    scale, guided = _guidance(sd, prompts, negative_prompt, float(guidance_scale), true_cfg_scale)
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
    generator = torch.Generator().manual_seed(seed)
    solver = solver_for(sd, convention, steps, cells, invert=False, generator=generator)
    plan = options.captures(sd, solver, guided=guided)
    places = [tap.place for tap in plan.taps] + [sd.place(edit.site) for edit in options.edits]
    in_run = decode and any(place.part == "vae" for place in places)
    with sd.session(plan.taps, options.edits) as session:
        text = conditions(family, prompts, rows, negative=negative_prompt, guided=guided)
        if latents is None:
            shape = (rows, family.latent_channels, *cells)
            latents = randn_tensor(shape, generator=generator, device=sd.device, dtype=text.cond.states.dtype)
        else:
            latents = latents.to(sd.device, text.cond.states.dtype)
        condition = float(guidance_scale)
        predict = Guided(family, solver, text, scale, condition, options.guidance_calls, session, plan.stop_at)
        path = follow(
            solver,
            solver.start(latents),
            predict,
            keep=options.keep_latents,
            description=f"generation ({convention.name})" if options.progress else None,
        )
        pixels = sd.decode(path.latents[len(solver.times)]) if in_run and not path.stopped else None
    return _trajectory(sd, path, solver, plan, convention, "generation", pixels)


def solver_for(
    sd: Any,
    convention: Convention,
    steps: int | None,
    cells: tuple[int, int],
    *,
    invert: bool,
    generator: torch.Generator | None = None,
) -> Solver:
    """The steps of a run.

    Args:
        sd: the model.
        convention: how.
        steps: how many; None: the convention's.
        cells: height and width of the latents.
        invert: from image to noise.
        generator: for schedulers that add noise.

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
        forward = SchedulerSteps(scheduler, steps, sd.device, generator, sd.adapter.schedule(cells, steps))
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
        return SchedulerSteps(scheduler, steps, sd.device, generator)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"convention {convention.name!r} needs a scheduler with alphas_cumprod; {name} has none")
    return ddim(convention, scheduler, sd.prediction, steps, invert=invert)


def _guidance(
    sd: Any,
    prompts: list[str] | Conditioning,
    negative_prompt: str | Sequence[str] | None,
    guidance_scale: float,
    true_cfg_scale: float | None,
) -> tuple[float, bool]:
    """The scale of classifier-free guidance, and whether there is any."""
    encoded = isinstance(prompts, Conditioning)
    if encoded and negative_prompt is not None:
        raise InputError("encoded prompts come with their negative ones: sd.prompt(prompt, negative)")
    if not sd.adapter.embeds_guidance:
        if true_cfg_scale is not None:
            raise InputError(f"true_cfg_scale is for Flux; the family {sd.family!r} is guided by guidance_scale")
        scale = guidance_scale
        wanted = scale > 1
    else:
        # As in diffusers: the scale alone guides nothing.
        scale = 1.0 if true_cfg_scale is None else float(true_cfg_scale)
        wanted = scale > 1
        if wanted and negative_prompt is None and not encoded:
            raise InputError("true_cfg_scale needs a negative prompt: negative_prompt=''")
    if negative_prompt is not None and not wanted:
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
    return Trajectory(
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
        decode=sd.decode if pixels is None else lambda latents: pixels,
    )
