"""Diffusion models: encode, capture, edit, invert, generate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.conventions import Convention, convention_named
from interp.edits import Edit, as_edits
from interp.latents import Size, VaeMode
from interp.models.conditioning import Conditioning
from interp.models.diffusion_loading import load_pipeline
from interp.models.diffusion_model import DiffusionModel
from interp.models.diffusion_runs import RunOptions, run_generation, run_inversion
from interp.models.run_captures import Consumer, Half
from interp.positions import Indexes
from interp.trajectories import Trajectory

Latents = Float[Tensor, "batch channel height width"]


class Diffusion(DiffusionModel):
    """A text-to-image diffusion pipeline with stable names for its activations.

    `Diffusion.from_pretrained` loads one; ``Diffusion(pipeline)`` wraps what is already loaded. What it is and what
    one call of its denoiser does is in `DiffusionModel`; this adds whole runs.
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> "Diffusion":
        """Load a pipeline.

        Args:
            name: ``"zoo:tiny-diffusion"``, a local folder, or a Hub id.
            dtype: of the weights; None: float32, whatever the files hold.
            device: where it goes; None: the processor.
            options: see `interp.models.diffusion_loading.load_pipeline`, which also says what it raises.
        """
        loaded = cls(load_pipeline(name, dtype=dtype, device=device, **options))
        loaded.name = str(name)
        return loaded

    @torch.no_grad()
    def invert(
        self,
        images: Any,
        prompt: "str | Sequence[str] | Conditioning" = "",
        *,
        steps: int | None = None,
        convention: str | Convention = "dhf",
        guidance_scale: float | None = None,
        size: Size = None,
        vae: VaeMode | None = None,
        seed: int | None = 0,
        capture: str | Sequence[str] | None = None,
        save_steps: Indexes | slice | None = None,
        half: Half = "cond",
        guidance_calls: str = "batch",
        edits: Edit | Sequence[Edit] = (),
        consume: Consumer | None = None,
        stop: bool = False,
        keep_latents: bool = True,
        progress: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Trajectory:
        """Walk images to the noise that they come from, by DDIM (or by a flow's Euler steps) backwards.

        Args:
            images: images as for `encode`, or scaled latents [batch, channel, height, width].
            prompt: one for all images, or one for each.
            steps: how many; None: the convention's.
            convention: ``"dhf"``, ``"rg"``, ``"null_text"``, ``"diffusers"``, or a `Convention`. Flows take
                ``"diffusers"`` only: Euler steps, each evaluated where it starts.
            guidance_scale: above 1, guidance with the empty prompt; None: the convention's.
            size: resize PIL images to this first.
            vae: which latent of the posterior; None: the convention's.
            seed: of a sampled latent.
            capture: sites to keep; None: none.
            save_steps: steps to keep the denoiser's sites at, 0 being the first call, on the clean latent; None: all.
            half: of guidance to keep, or ``"both"``.
            guidance_calls: ``"batch"``: both halves in one doubled batch; ``"two"``: one after the other.
            edits: applied during this run, by their ``steps`` and ``half``.
            consume: takes each capture as it comes (site, step, model timestep, tensor); nothing is kept then.
            stop: end the run after the last captured site of the last saved step.
            keep_latents: all latents, and not only the first and the last.
            progress: show a bar.
            dtype, device: of captures.

        Raises:
            InputError, ShapeError, UnknownNameError, SiteUnavailableError, NeverFiredError: bad images, numbers of
                prompts, steps, sites or edits, or a model that the convention does not serve.

        Source: Denoising Diffusion Implicit Models, section 4.3; Diffusion Hyperfeatures, section 3.1.
        """
        keep = RunOptions(
            edits=tuple(as_edits(edits)),
            capture=capture,
            save_steps=save_steps,
            half=half,
            guidance_calls=guidance_calls,
            consume=consume,
            stop=stop,
            keep_latents=keep_latents,
            progress=progress,
            dtype=dtype,
            device=device,
        )
        return run_inversion(
            self,
            images,
            prompt,
            convention=convention_named(convention),
            steps=steps,
            guidance_scale=guidance_scale,
            size=size,
            vae=vae,
            seed=seed,
            options=keep,
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: "str | Sequence[str] | Conditioning",
        *,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        true_cfg_scale: float | None = None,
        seed: int = 0,
        n: int = 1,
        size: Size = None,
        latents: Latents | None = None,
        convention: str | Convention | None = None,
        guidance: Any = None,
        eta: float | None = None,
        capture: str | Sequence[str] | None = None,
        save_steps: Indexes | slice | None = None,
        half: Half = "cond",
        guidance_calls: str = "batch",
        edits: Edit | Sequence[Edit] = (),
        consume: Consumer | None = None,
        decode: bool = True,
        stop: bool = False,
        keep_latents: bool = True,
        progress: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Trajectory:
        """Generate images from prompts: with the same settings and seed, what ``pipeline(prompt, ...)`` gives.

        Args:
            prompt: one or several, or what `prompt` encoded.
            negative_prompt: one for all prompts, or one for each; None: the empty one, or what the checkpoint takes.
            steps: how many; None: the convention's.
            guidance_scale: above 1, classifier-free guidance; one for all images, or one for each. Flux takes it as a
                condition instead. None: 7.5, or the guide's.
            true_cfg_scale: for Flux, classifier-free guidance beside that; it needs a negative prompt.
            seed: of the noise.
            n: images per prompt, side by side.
            size: in pixels: one side, or (height, width); None: what the model was trained for.
            latents: noise of unit variance to start from, in place of the seed's, such as an inversion's last latents.
            convention: see `interp.conventions`; ``"diffusers"`` is the pipeline's own scheduler. None: that one, or
                the guide's.
            guidance: an `interp.guidance.Guide`: what steers the run by gradients of losses over its activations. The
                trajectory then has its log (``guidance``) and the unguided run beside it (``reference``). Captures see
                the calls that make the steps, not those that gradients are taken of; edits apply in all of them.
            eta: how much fresh noise DDIM adds in each step, 0 to 1, drawn from the seed. None: 0, or the guide's.
            capture, save_steps, half, guidance_calls, edits, consume, stop, keep_latents, progress, dtype, device: as
                for `invert`; step 0 is the noisiest.
            decode: False: images are not to be decoded in the run, even where sites of the autoencoder are captured or
                edited. Otherwise images are decoded when first asked for, or in the run where there are such sites.

        Raises:
            InputError, ShapeError, UnknownNameError, SiteUnavailableError, NeverFiredError: bad prompts, sizes,
                latents, steps, sites or edits, or a model that the convention does not serve.

        Source: Classifier-Free Diffusion Guidance, equation 6; the pipelines of diffusers.
        """
        keep = RunOptions(
            edits=tuple(as_edits(edits)),
            capture=capture,
            save_steps=save_steps,
            half=half,
            guidance_calls=guidance_calls,
            consume=consume,
            stop=stop,
            keep_latents=keep_latents,
            progress=progress,
            dtype=dtype,
            device=device,
        )
        return run_generation(
            self,
            prompt,
            negative_prompt,
            convention=convention,
            steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            seed=seed,
            n=n,
            size=size,
            latents=latents,
            decode=decode,
            guide=guidance,
            eta=eta,
            options=keep,
        )
