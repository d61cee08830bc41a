"""A diffusion pipeline under stable names: what it is, its latents and prompts, and one call of its denoiser."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp import latents as autoencoding
from interp.activations import Activations, from_taps
from interp.denoising import DenoiserClock, running
from interp.edits import Edit, as_edits
from interp.errors import InputError, ShapeError
from interp.hooks import Applied, Session, Tap
from interp.latents import Size, VaeMode
from interp.models.checks import placed
from interp.models.conditioning import Conditioning, conditions, encode_prompts, until_captured
from interp.models.diffusion_places import components, diffusion_places
from interp.models.families.diffusion import DiffusionFamily, diffusion_family_of
from interp.models.named import Named
from interp.models.run_captures import check_edits
from interp.positions import Indexes
from interp.selection import Where
from interp.sites import Place, expand

Latents = Float[Tensor, "batch channel height width"]


class DiffusionModel(Named):
    """A text-to-image diffusion pipeline with stable names for its activations.

    Args:
        pipeline: a diffusers pipeline of a supported family; it is not changed.

    Raises:
        InputError: no family covers the pipeline, or it lacks a part.
    """

    def __init__(self, pipeline: Any) -> None:
        self.adapter: DiffusionFamily = diffusion_family_of(pipeline)
        self.pipeline = pipeline
        self._root = components(pipeline)
        self._places = diffusion_places(pipeline)
        self.name = str(getattr(pipeline, "name_or_path", None) or type(pipeline).__name__)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, family={self.family!r}, prediction={self.prediction!r}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    # ------------------------------------------------------------ what the model is

    @property
    def family(self) -> str:
        """Name of the pipeline's family: ``unet``, ``sdxl``, ``sd3``, ``flux`` or ``pixart``."""
        return self.adapter.name

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return self.adapter.denoiser

    @property
    def prediction(self) -> str:
        """What the denoiser predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``."""
        scheduler = self.pipeline.scheduler
        kind = str(scheduler.config.get("prediction_type", "epsilon"))
        return "flow" if "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction" else kind

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return self.adapter.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser."""
        return next(self.denoiser.parameters()).dtype

    def channels(self, sites: str | Sequence[str]) -> list[int]:
        """Channels (or width) of sites.

        Args:
            sites: names or patterns.

        Raises:
            UnknownNameError, SiteUnavailableError: sites that the model lacks.
            InputError: a site whose width is not known before it runs.
        """
        places = self.expanded(sites)
        unknown = [place.site for place in places if place.width is None]
        if unknown:
            raise InputError(f"the width of {unknown[0]} is not known before it runs")
        return [int(place.width or 0) for place in places]

    # ------------------------------------------------------------ images and prompts

    @torch.no_grad()
    def encode(self, images: Any, *, size: Size = None, vae: VaeMode = "mode", seed: int | None = None) -> Latents:
        """Scaled latents of images.

        Args:
            images: a PIL image (or a path to one), several, or a float tensor [batch, 3, height, width] in -1..1.
            size: resize PIL images to this side, or (height, width), bilinearly.
            vae: ``"mode"`` or ``"mean"`` of the posterior (the same), or a ``"sample"``.
            seed: of the sample.

        Raises:
            InputError, ShapeError: see `interp.latents.pixels` and `interp.latents.encode`.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        given = autoencoding.pixels(images, size=size, multiple=self.adapter.multiple)
        return autoencoding.encode(self.pipeline.vae, given, vae, generator)

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "batch 3 image_height image_width"]:
        """Images of scaled latents, float32 in 0..1.

        Raises:
            ShapeError: latents of another shape than the model's.
        """
        self.check_latents(latents)
        return autoencoding.decode(self.pipeline.vae, latents)

    @torch.no_grad()
    def prompt(self, prompt: str | Sequence[str], negative: str | Sequence[str] | None = None) -> Conditioning:
        """Encode prompts, and the unconditional half beside them.

        Args:
            prompt: one or several.
            negative: one for all prompts, or one for each. None: the empty prompt, or what the checkpoint takes for it.

        Raises:
            InputError: unequal numbers of prompts, or something that is no text.
        """
        return encode_prompts(self.adapter, prompt, negative, guided=True)

    # ------------------------------------------------------------ one call

    def capture(
        self,
        latents: Latents,
        timestep: float | int | Tensor,
        context: "Conditioning | str | Sequence[str] | Tensor",
        sites: str | Sequence[str],
        *,
        at: Any = None,
        heads: Indexes | None = None,
        rows: Indexes | None = None,
        edits: Edit | Sequence[Edit] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad: bool = False,
        stop: bool = False,
        guidance_scale: float = 3.5,
    ) -> Activations:
        """Call the denoiser once, without guidance, and keep the activations at some sites, edits included.

        Args:
            latents: scaled latents, noised as the timestep says.
            timestep: what the model sees; -1 is a clean latent to conventions that evaluate there.
            context: encoded prompts (their conditional half), prompts, or token states [batch, pos, d] in families
                that take nothing else; one for all latents, or one for each.
            sites: names, patterns, or raw ``path:output``; those of text encoders need prompts as text.
            at: positions, or a region, to keep; None keeps all.
            heads: heads to keep, at sites with a head axis.
            rows: rows of the batch to keep.
            edits: applied during this call only.
            dtype, device: of what is kept.
            grad: keep the graph, so that `Activations.gradients` works.
            stop: do not compute what comes after the last captured site.
            guidance_scale: for denoisers that take it as a condition (Flux).

        Returns:
            The activations; ``.output`` is the prediction [batch, channel, height, width], None when stopped.

        Raises:
            UnknownNameError, SiteUnavailableError, InputError, ShapeError, NeverFiredError: bad names, selections,
                values, latents or numbers of prompts, or sites that did not run.
        """
        self.check_latents(latents)
        latents = latents.to(self.device, self.dtype)
        listed = as_edits(edits)
        check_edits(listed, n_steps=1, guided=False)
        where = Where(at, rows, heads)
        taps = [Tap(place, where, dtype, device, grad) for place in self.expanded(sites)]
        for tap in taps:
            where.check(tap.place)
        time = self._timestep(timestep, len(latents))
        with torch.set_grad_enabled(grad), self.session(taps, listed) as session:
            text = conditions(self.adapter, context, len(latents)).cond

            def predict() -> Latents:
                return self.adapter.predict(latents, time, text, float(guidance_scale))

            with running(step=0, halves=("cond",)):
                output = until_captured(session, ("cond",), predict) if stop else predict()
        return from_taps(taps, output)

    @contextmanager
    def record(
        self,
        sites: str | Sequence[str],
        *,
        at: Any = None,
        heads: Indexes | None = None,
        rows: Indexes | None = None,
        steps: Indexes | slice | None = None,
        half: Literal["cond", "uncond"] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Iterator[Activations]:
        """Keep activations of everything that runs inside the block, ``sd.pipeline(...)`` included.

        Args:
            sites, at, heads, rows, dtype, device: as for `capture`.
            steps: calls of the denoiser to keep, 0 being the first.
            half: of guidance; None: all rows as they come.

        Yields:
            Activations that are filled when the block ends; several calls of a site are stacked on a ``step`` axis.
        """
        taps = []
        for place in self.expanded(sites):
            where = Where(at, rows, heads, steps=steps if place.part == "denoiser" else None, half=half)
            where.check(place)
            taps.append(Tap(place, where, dtype, device))
        acts = from_taps([])
        with self.session(taps, []):
            yield acts
        acts.fill(taps)

    @contextmanager
    def edit(self, *edits: Edit | Sequence[Edit]) -> Iterator["DiffusionModel"]:
        """Apply edits to everything that runs inside the block, in this thread, ``sd.pipeline(...)`` included.

        Args:
            edits: one or many; at one site they apply in the order given; blocks nest.

        Raises:
            NeverFiredError: at the end of the block, for an edit that changed nothing.
            UnknownNameError, SiteUnavailableError, InputError, ShapeError: before anything runs.
        """
        listed = [edit for group in edits for edit in as_edits(group)]
        if not listed:
            raise InputError("edit() needs at least one edit")
        with self.session([], listed):
            yield self

    # ------------------------------------------------------------ for methods built on this

    def expanded(self, sites: str | Sequence[str]) -> list[Place]:
        """The places of names and patterns, each once.

        Raises:
            UnknownNameError, SiteUnavailableError, InputError: see `interp.sites.expand`.
        """
        return [self.place(site) for site in expand(sites, self._places.names(), self._places.reasons)]

    def session(self, taps: Sequence[Tap], edits: Sequence[Edit]) -> Session:
        """Taps and edits as a context: hooks are there from enter to exit.

        Args:
            taps: what to capture.
            edits: what to change.

        Raises:
            UnknownNameError, SiteUnavailableError, InputError, ShapeError: bad edits.
        """
        clock = DenoiserClock(self.denoiser, self.adapter.halves, uncond_follows=self.adapter.uncond_follows)
        applied: list[Applied] = [placed(edit, self._places) for edit in edits]
        return Session(self._root, clock, list(taps), applied)

    def _timestep(self, timestep: Any, rows: int) -> Tensor:
        """A timestep on the model's device, checked."""
        trained = int(self.pipeline.scheduler.config.get("num_train_timesteps", 1000))
        if isinstance(timestep, bool) or not isinstance(timestep, Real | Tensor):
            raise InputError(f"timestep={timestep!r}: give a number or a tensor, from -1 (clean) to {trained}")
        time = torch.as_tensor(timestep, device=self.device)
        if time.shape not in ((), (1,), (rows,)):
            raise ShapeError(f"timestep of shape {tuple(time.shape)}: give one for all latents, or {rows}")
        if not bool(((time >= -1) & (time <= trained)).all()):
            raise InputError(f"timestep={timestep!r} is out of range: the model was trained on 0 to {trained}")
        return time

    def check_latents(self, latents: Tensor) -> None:
        """Refuse latents that the denoiser does not take.

        Raises:
            ShapeError: a tensor of another shape.
            InputError: integers, no rows, or sides that are no multiples of the patches.
        """
        channels, multiple = self.adapter.latent_channels, self.adapter.multiple // self.adapter.scale
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ShapeError(
                f"latents of shape {tuple(latents.shape)}: this model's are [batch, {channels}, height, width]"
            )
        if not latents.is_floating_point() or not latents.numel():
            raise InputError(f"latents of shape {tuple(latents.shape)} and dtype {latents.dtype}: expected some floats")
        height, width = latents.shape[-2:]
        if height % multiple or width % multiple:
            raise ShapeError(f"latents of {height}×{width} cells: the sides have to be multiples of {multiple} here")
        largest = self.adapter.max_cells
        if largest is not None and max(height, width) > largest:
            raise ShapeError(f"latents of {height}×{width} cells: the model has positions for {largest} a side")
