"""Prompts for denoisers, and the denoiser under classifier-free guidance."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.denoising import running
from interp.errors import InputError, ShapeError
from interp.hooks import Session, Stopped, untouched
from interp.models.families.diffusion import DiffusionFamily, Text
from interp.solvers import Solver

Latents = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: the conditional half, and the unconditional one where it was asked for."""

    cond: Text
    uncond: Text | None = None

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.cond)

    def repeat(self, n: int) -> "Conditioning":
        """Every prompt n times, copies side by side."""
        return Conditioning(self.cond.repeat(n), None if self.uncond is None else self.uncond.repeat(n))


def texts(prompt: str | Sequence[str], what: str = "prompt") -> list[str]:
    """One prompt or several, as a list.

    Raises:
        InputError: none, or something that is no text.
    """
    listed = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
    wrong = [one for one in listed if not isinstance(one, str)]
    if not listed or wrong:
        raise InputError(f"{what}: give one text or several, not {type(wrong[0]).__name__ if wrong else 'none'}")
    return listed


def encode_prompts(
    family: DiffusionFamily, prompt: str | Sequence[str], negative: str | Sequence[str] | None, *, guided: bool
) -> Conditioning:
    """Encode prompts, each half in a call of its own.

    Args:
        family: of the pipeline.
        prompt: one or several.
        negative: one for all prompts, or one for each; None: what the family takes for none.
        guided: whether the unconditional half is wanted.

    Raises:
        InputError: prompts that are no texts, or unequal numbers of them.
    """
    prompts = texts(prompt)
    with running(step=None, halves=("cond",)):
        cond = family.encode(prompts)
    if not guided:
        return Conditioning(cond)
    negatives = None if negative is None else texts(negative, "negative prompt")
    if negatives is not None and len(negatives) == 1:
        negatives = negatives * len(prompts)
    if negatives is not None and len(negatives) != len(prompts):
        raise InputError(f"{len(prompts)} prompts with {len(negatives)} negative prompts: give one, or one for each")
    with running(step=None, halves=("uncond",)):
        return Conditioning(cond, family.unconditional(negatives, cond))


def conditions(
    family: DiffusionFamily,
    context: Any,
    rows: int,
    *,
    negative: str | Sequence[str] | None = None,
    guided: bool = False,
) -> Conditioning:
    """What a run or a call is conditioned on, one row per latent.

    Args:
        family: of the pipeline.
        context: encoded prompts, prompts, or token states [batch, pos, d] in families that take nothing else.
        rows: how many latents there are; prompts are repeated to as many, copies side by side.
        negative: negative prompts, where prompts are to be encoded.
        guided: whether the unconditional half is wanted.

    Raises:
        InputError: numbers of prompts and latents that do not fit, an encoded prompt without the half that guidance
            needs, or token states alone where the family takes more.
        ShapeError: token states of another width.
    """
    if isinstance(context, Tensor):
        if family.name != "unet":
            raise InputError(
                f"the denoiser of the family {family.name!r} takes more than token states: use sd.prompt()"
            )
        config = family.denoiser.config
        width = getattr(config, "encoder_hid_dim", None) or config.cross_attention_dim
        if context.ndim != 3 or (isinstance(width, int) and context.shape[-1] != width):
            raise ShapeError(f"token states of shape {tuple(context.shape)}: this denoiser takes [batch, pos, {width}]")
        context = Conditioning(Text(context.to(family.device)))
    elif not isinstance(context, Conditioning):
        context = encode_prompts(family, context, negative, guided=guided)
    if guided and context.uncond is None:
        raise InputError("guidance needs the unconditional half, which these encoded prompts lack: use sd.prompt()")
    if rows % len(context):
        raise InputError(f"{len(context)} prompts for {rows} images: give one prompt for all, or one for each")
    halves = context if guided else Conditioning(context.cond)
    return halves.repeat(rows // len(context))


@dataclass(frozen=True)
class Guided:
    """The denoiser under classifier-free guidance, for one run.

    Args:
        family: of the pipeline.
        solver: gives each call its timestep.
        text: one row per latent.
        scale: of guidance, one for all latents or one for each ([batch, 1, 1, 1]).
        mixes: whether there is classifier-free guidance; otherwise the prediction is that of the conditional half.
        condition: the scale that denoisers take as a condition.
        calls: ``"batch"``: both halves in one doubled batch; ``"two"``: one after the other.
        session: the taps and edits of the run.
        last: the step whose remaining sites need not be computed; None: none.
    """

    family: DiffusionFamily
    solver: Solver
    text: Conditioning
    scale: float | Tensor
    mixes: bool
    condition: float
    calls: str
    session: Session
    last: int | None

    def __call__(self, latents: Latents, step: int) -> Latents | None:
        """The guided prediction at a step; None when the call was stopped.

        Source: Classifier-Free Diffusion Guidance, equation 6, as diffusers weighs it.
        """
        stop = self.session if step == self.last else None
        if not self.mixes:
            return self.call(latents, step, ("cond",), stop)
        if self.calls == "two":
            without, given = (self.call(latents, step, (half,), stop) for half in ("uncond", "cond"))
        else:
            both = self.call(latents, step, ("uncond", "cond"), stop)
            without, given = (None, None) if both is None else both.chunk(2)
        if without is None or given is None:
            return None
        scale = self.scale.to(given) if isinstance(self.scale, Tensor) else self.scale
        return without + scale * (given - without)

    def call(
        self, latents: Latents, step: int, halves: tuple[str, ...], stop: Session | None = None
    ) -> Float[Tensor, "rows channel height width"] | None:
        """Call the denoiser once.

        Args:
            latents: as the solver gives them, one row per prompt.
            step: of the run.
            halves: which ones, one after the other: ``("uncond", "cond")``, or one of them.
            stop: a session after whose last captured site nothing is computed; None: the call runs to its end.

        Returns:
            The prediction, the rows of one half after the other; None when the call was stopped.

        Raises:
            InputError: the unconditional half of prompts that were encoded without it.
        """
        text = self._rows(halves)
        given = latents if len(halves) == 1 else torch.cat([latents] * len(halves))

        def predict() -> Latents:
            return self.family.predict(given, self.solver.times[step], text, self.condition)

        with running(step=step, halves=halves):
            return predict() if stop is None else until_captured(stop, halves, predict)

    def with_empty_prompt(self) -> "Guided":
        """The same, whose unconditional half is the empty prompt, as the text encoders have it without edits."""
        with untouched(), running(step=None, halves=("uncond",)):
            empty = self.family.encode([""])
        return replace(self, text=Conditioning(self.text.cond, empty.repeat(len(self.text))))

    def _rows(self, halves: tuple[str, ...]) -> Text:
        cond, uncond = self.text.cond, self.text.uncond
        if halves == ("cond",):
            return cond
        if uncond is None:
            raise InputError("the unconditional half needs its prompt, which was not encoded")
        return uncond if halves == ("uncond",) else uncond.followed_by(cond)


def until_captured(session: Session, halves: tuple[str, ...], predict: Callable[[], Latents]) -> Latents | None:
    """Call the denoiser, but only as far as its last captured site.

    Args:
        session: the taps; those that this call cannot fill (text encoders, the other half of guidance) do not count.
        halves: of guidance that the call's rows hold.
        predict: calls it.

    Returns:
        The prediction where nothing is captured in this call, None where it was stopped.
    """
    taps = session.taps
    wanted = [tap for tap in taps if tap.place.part == "denoiser" and tap.where.half in (None, *halves)]
    session.taps, session.stop = wanted, bool(wanted)
    try:
        return predict()
    except Stopped:
        return None
    finally:
        session.taps, session.stop = taps, False
