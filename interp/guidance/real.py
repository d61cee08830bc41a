"""Guidance of real images: inversion first."""

from collections.abc import Sequence
from typing import Any

from interp.errors import InputError
from interp.guidance.guide import Guide
from interp.latents import Size
from interp.trajectories import Trajectory


def edit_real(
    sd: Any,
    images: Any,
    prompt: str | Sequence[str],
    guide: Guide,
    *,
    steps: int | None = None,
    size: Size = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Trajectory:
    """Walk real images to their noise, and generate from it under a guide.

    With a twin at ``guidance_scale`` 1 (as in the preset ``drag_real``), the trajectory's ``reference`` reconstructs
    the images.

    Args:
        sd: the model.
        images: as for ``sd.invert``; or scaled latents.
        prompt: of the images, one for all or one for each; for both ways.
        guide: what steers the way back.
        steps: of both ways; None: the convention's.
        size: resize PIL images to this first.
        seed: of the latent that is sampled of the autoencoder's posterior, and of fresh noise.
        progress: show bars.
        options: further arguments of ``sd.generate``.

    Raises:
        InputError, ShapeError, UnknownNameError, SiteUnavailableError, NeverFiredError: as ``sd.invert`` and
            ``sd.generate``.

    Source: Readout Guidance, section 3.3 (real images) and official code.
    """
    if not isinstance(guide, Guide):
        raise InputError(f"edit_real takes an interp.guidance.Guide, not {type(guide).__name__}")
    convention = options.pop("convention", None) or guide.convention
    inverted = sd.invert(
        images, prompt, steps=steps, convention=convention, guidance_scale=1.0, size=size, seed=seed,
        keep_latents=False, progress=progress,
    )  # fmt: skip
    return sd.generate(
        prompt, steps=steps, convention=convention, latents=inverted.final, seed=seed, guidance=guide,
        progress=progress, **options,
    )  # fmt: skip
