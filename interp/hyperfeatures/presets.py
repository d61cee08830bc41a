"""The feature specs of the published methods, for any diffusion model with the sites they name."""

from typing import Any

from interp.conventions import convention_named, generation_timesteps, inversion_timesteps
from interp.errors import InputError
from interp.hyperfeatures.spec import GENERATION, INVERSION, NOISE, FeatureSpec, calls, saved_indices
from interp.models.diffusion import Diffusion

BRANCHES = "up.*.resnets.*.hook_branch"
"""The outputs of the second convolution of every resnet of the decoder, before the skip is added."""

NEGATIVE_PROMPT = (
    "poorly drawn, ugly, tiling, out of frame, mutation, mutated, extra limbs, extra legs, extra arms, disfigured, "
    "deformed, cross-eye, body out of frame, blurry, bad art, bad anatomy, blurred, text, watermark, grainy,  writing, "
    "calligraphy, sign, cut off"
)
"""The authors' negative prompt for generated images; the two spaces are theirs."""


def hyperfeatures(
    sd: Diffusion,
    *,
    sites: str | tuple[str, ...] = BRANCHES,
    steps: int = 50,
    indices: tuple[int, ...] | None = None,
    **settings: Any,
) -> FeatureSpec:
    """All resnets of the decoder at 11 of 50 steps of an inversion with the empty prompt.

    Args:
        sd: the model; its sites and its noise schedule fill in the spec.
        sites: a pattern or names.
        steps: of the whole process.
        indices: the authors' saved indices, 0 the noisy end; by default ``49, 45, 40, ..., 5, 0``, scaled to ``steps``.
        **settings: other fields of `FeatureSpec`. ``output_size`` is by default the size of the model's latents.

    Returns:
        The spec, its timesteps filled in.

    Raises:
        InputError: an index out of range, or a model that does not say the size of its latents.
        UnknownNameError: the model lacks the sites.

    Source: Diffusion Hyperfeatures, sections 3 and 4 and the official configuration.
    """
    return _process(sd, INVERSION, sites, steps, indices, settings)


def generated(
    sd: Diffusion,
    prompt: str,
    *,
    sites: str | tuple[str, ...] = BRANCHES,
    steps: int = 50,
    indices: tuple[int, ...] | None = None,
    **settings: Any,
) -> FeatureSpec:
    """The same maps while an image is generated: guidance 7.5, the authors' negative prompt, conditional maps.

    Args:
        sd: the model.
        prompt: of the image.
        sites, steps, indices, **settings: as for `hyperfeatures`.

    Source: Diffusion Hyperfeatures, section 4.3 and the official configuration.
    """
    guided = {"prompt": prompt, "negative_prompt": NEGATIVE_PROMPT, "guidance_scale": 7.5}
    return _process(sd, GENERATION, sites, steps, indices, guided | settings)


def one_step(sd: Diffusion, *, sites: str | tuple[str, ...] = BRANCHES, **settings: Any) -> FeatureSpec:
    """All resnets of the decoder in one call at timestep -1 on the clean latent.

    Args:
        sd: the model.
        sites, **settings: as for `hyperfeatures`.

    Source: Diffusion Hyperfeatures, official configuration of the one-step variant.
    """
    return _process(sd, INVERSION, sites, 1, (0,), settings)


def dift(sd: Diffusion, *, block: int = 1, timestep: int = 261, n_noises: int = 8, **settings: Any) -> FeatureSpec:
    """The output of one decoder block at one timestep, averaged over noises.

    Args:
        sd: the model.
        block: of the decoder.
        timestep: of 1000; scaled to the number that the model was trained with.
        n_noises: how many noises.
        **settings: other fields of `FeatureSpec`, such as ``prompt="a photo of a cat"`` and ``image_size=(768, 768)``.

    Source: Emergent Correspondence from Image Diffusion (DIFT), section 4 and official code.
    """
    scaled = round(timestep * int(sd.pipeline.scheduler.config["num_train_timesteps"]) / 1000)
    return noised(sd, f"up.{block}.hook_out", (float(scaled),), n_noises=n_noises, **settings)


def noised(sd: Diffusion, sites: str | tuple[str, ...], timesteps: tuple[float, ...], **settings: Any) -> FeatureSpec:
    """Maps of a noised image, one call of the model for each timestep and noise.

    Args:
        sd: the model.
        sites: a pattern or names.
        timesteps: clean first.
        **settings: other fields of `FeatureSpec`. Without an ``output_size`` the maps must have one size.

    Source: DIFT, section 4; DDPM features as in sd-dino (timestep 100).
    """
    return FeatureSpec(sites=_sites(sd, sites), mode=NOISE, timesteps=timesteps, **settings)


def timesteps_of(sd: Diffusion, mode: str, convention: str, steps: int, saved: tuple[int, ...]) -> tuple[float, ...]:
    """What the model sees as its timestep at each kept call.

    Args:
        sd: the model, whose scheduler's configuration the convention may use.
        mode: ``"inversion"`` or ``"generation"``.
        convention: a name in `interp.conventions`.
        steps: of the whole process.
        saved: kept calls, counted as they happen.

    Returns:
        One timestep for each; nothing where the pipeline's own scheduler decides (``diffusers``: in generation, and for
        flows).

    Source: Diffusion Hyperfeatures, official code: -1, 60, 160, ..., 960 by inversion, 0, 80, ..., 980 by generation.
    """
    if convention_named(convention).own_scheduler and (mode == GENERATION or sd.prediction == "flow"):
        return ()
    table = inversion_timesteps if mode == INVERSION else generation_timesteps
    seen = table(convention, dict(sd.pipeline.scheduler.config), steps)
    return tuple(float(seen[call]) for call in saved)


def _process(
    sd: Diffusion,
    mode: str,
    sites: str | tuple[str, ...],
    steps: int,
    indices: tuple[int, ...] | None,
    settings: dict[str, Any],
) -> FeatureSpec:
    names = _sites(sd, sites)
    saved = calls(saved_indices(steps) if indices is None else indices, steps, mode)
    seen = timesteps_of(sd, mode, settings.get("convention", "dhf"), steps, saved)
    size = {"output_size": settings["output_size"] if "output_size" in settings else _latent_size(sd)}
    return FeatureSpec(sites=names, mode=mode, steps=steps, saved=saved, timesteps=seen, **settings | size)


def _sites(sd: Diffusion, sites: str | tuple[str, ...]) -> tuple[str, ...]:
    asked = (sites,) if isinstance(sites, str) else sites
    return tuple(dict.fromkeys(site for one in asked for site in sd.sites(one)))


def _latent_size(sd: Diffusion) -> tuple[int, int]:
    side = getattr(sd.denoiser.config, "sample_size", None)
    if side is None:
        raise InputError("this model does not say the size of its latents: give output_size=(height, width)")
    return (side, side) if isinstance(side, int) else (side[0], side[1])
