"""What steers a run: terms, and how their gradient moves it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from interp.conventions import Convention, check_eta, check_scale, convention_named
from interp.errors import InputError, nearest
from interp.guidance.conflicts import check_together
from interp.guidance.reference import Reference, Twin
from interp.guidance.sampler import Steering, steering
from interp.guidance.terms import Term, Weight, is_number, values_of
from interp.models.conditioning import Guided

Rule = Literal["signed_step", "latent_gradient", "epsilon"]
GuideHalf = Literal["both", "cond", "uncond", "empty"]
RULES: tuple[Rule, ...] = ("signed_step", "latent_gradient", "epsilon")
HALVES: dict[str, tuple[str, ...]] = {
    "both": ("uncond", "cond"),
    "cond": ("cond",),
    "uncond": ("uncond",),
    "empty": ("uncond",),
}


@dataclass(frozen=True, eq=False)
class Guide:
    """Guidance of a generation by the gradient of losses over captured activations.

    At each guided step the denoiser is called on the latents, the terms read its activations, and the gradient g of
    their weighted sum with respect to the latents, through readouts and denoiser, steers the step. Losses are summed
    over the halves of classifier-free guidance, and each sample has its own. Pass it to ``sd.generate``.

    Args:
        terms: what is asked for; none: the run is not guided.
        convention: of the run, where ``generate`` is given none; see `interp.conventions`.
        rule: ``"signed_step"``: one step of Adam, new at each sampling step, so ``x - step_size · g / (|g| + 1e-8)``:
            the size of the losses plays no part, only their ratios do. ``"latent_gradient"``: ``x - step_size · g``.
            After both the denoiser is called again on the moved latents. ``"epsilon"``: the predicted noise becomes
            ``eps + step_size · g``, and the latents stay.
        step_size: see ``rule``; one for the run, or one for each of its steps.
        start, end: guided steps, in shares of the run: step i of n where ``int(start · n) <= i < int(end · n)``.
        half: of classifier-free guidance whose activations count. ``"empty"``: those of the empty prompt, which
            readouts are trained on, in a call beside the run's (a twin's too), whatever the negative prompt. Text
            encoders encode it without edits; in the denoiser it counts as the unconditional half.
        recurrence: how many moves are made in a step, the losses anew for each; Adam's moments go on.
        checkpointing: compute activations again in the backward pass instead of keeping them: the same numbers, less
            memory, more time.
        eta: fresh noise in the steps, 0 to 1, where ``generate`` is given none. A sample and its twin get the same.
        reference: what terms compare with: a `Twin`, an unguided run in lockstep, or a recorded `Reference`.
        guidance_scale: of classifier-free guidance, where ``generate`` is given none.
        negative_prompt: where ``generate`` is given none.
        term_gradients: measure the gradient norm of each term, at a backward pass for each.

    Raises:
        InputError: settings out of range, or terms that contradict each other.

    Source: Readout Guidance, sections 3.1 and 3.2 (epsilon) and official code (signed_step).
    """

    terms: Sequence[Term]
    convention: str | Convention = "rg"
    rule: Rule = "signed_step"
    step_size: Weight = 2e-2
    start: float = 0.0
    end: float = 0.5
    half: GuideHalf = "both"
    recurrence: int = 1
    checkpointing: bool = True
    eta: float = 0.0
    reference: Twin | Reference = field(default_factory=Twin)
    guidance_scale: float | Sequence[float] = 7.5
    negative_prompt: str | None = None
    term_gradients: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a run."""
        if isinstance(self.terms, str | Term) or not isinstance(self.terms, Iterable):
            raise InputError(f"terms are a {type(self.terms).__name__}: give a list of terms, empty for no guidance")
        object.__setattr__(self, "terms", tuple(self.terms))
        wrong = [term for term in self.terms if not isinstance(term, Term)]
        if wrong:
            raise InputError(
                f"terms hold a {type(wrong[0]).__name__}: give Spatial, Drag, Appearance, Identity or "
                "Term.from_function(sites, function)"
            )
        convention_named(self.convention)
        for name, value, options in (("rule", self.rule, RULES), ("half", self.half, tuple(HALVES))):
            if value not in options:
                hint = nearest(str(value), options)
                raise InputError(f"{name}={value!r}: give one of {', '.join(options)}. {hint}".rstrip())
        if not (is_number(self.start) and is_number(self.end) and 0 <= self.start < self.end <= 1):
            raise InputError(
                f"start={self.start!r}, end={self.end!r}: guided steps are shares of the run, 0 <= start < end <= 1"
            )
        if not any(values_of(self.step_size, "step_size")):
            raise InputError(f"step_size={self.step_size!r}: nothing moves")
        if isinstance(self.recurrence, bool) or not isinstance(self.recurrence, int) or self.recurrence < 1:
            raise InputError(f"recurrence={self.recurrence!r}: give how many moves a step makes, from 1 on")
        if self.rule == "epsilon" and self.recurrence > 1:
            raise InputError("rule='epsilon' moves no latents, so that a second gradient would be the first one again")
        check_eta(self.eta)
        check_scale(self.guidance_scale)
        if not isinstance(self.checkpointing, bool) or not isinstance(self.term_gradients, bool):
            raise InputError(
                f"checkpointing={self.checkpointing!r}, term_gradients={self.term_gradients!r}: give True or False"
            )
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise InputError(f"negative_prompt={self.negative_prompt!r}: give a text; several go to sd.generate")
        if not isinstance(self.reference, Twin | Reference):
            raise InputError(f"reference is a {type(self.reference).__name__}: give a Twin or a recorded Reference")
        check_together(self.terms, self.reference)

    @property
    def halves(self) -> tuple[str, ...]:
        """The halves whose activations count, in the order of their rows."""
        return HALVES[self.half]

    def seen_by(self, predict: Guided) -> Guided:
        """The denoiser whose activations count: the run's, or the same with the empty prompt.

        Args:
            predict: of a run.
        """
        return predict.with_empty_prompt() if self.half == "empty" else predict

    @property
    def compares(self) -> bool:
        """Whether any term needs a reference."""
        return any(term.compares for term in self.terms)

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional half has to be there, also where the run itself has none."""
        twin = self.reference.guidance_scale if isinstance(self.reference, Twin) and self.compares else None
        return bool(self.terms) and (self.reads_uncond or (twin is not None and twin > 1))

    @property
    def reads_uncond(self) -> bool:
        """Whether activations of the run's own unconditional half count."""
        return self.half in ("both", "uncond")

    def steps(self, n_steps: int) -> range:
        """The guided steps of a run.

        Args:
            n_steps: of the run.

        Raises:
            InputError: there is none.
        """
        chosen = range(int(self.start * n_steps), int(self.end * n_steps))
        if not chosen:
            raise InputError(
                f"start={self.start}, end={self.end} hold no step of a run of {n_steps}: steps "
                f"int({self.start} · {n_steps}) up to int({self.end} · {n_steps}) are guided"
            )
        return chosen

    def check(self, sd: Any, rows: int, cells: tuple[int, int], n_steps: int) -> None:
        """Refuse a run that cannot be guided like this, before anything runs.

        Args:
            sd: the model.
            rows: how many samples there are.
            cells: height and width of the latents.
            n_steps: of the run.

        Raises:
            InputError, ShapeError, UnknownNameError, SiteUnavailableError: see `Term.check`; no guided step, or step
                sizes of another number.
        """
        chosen = self.steps(n_steps)
        sizes = values_of(self.step_size)
        if not is_number(self.step_size) and len(sizes) != n_steps:
            raise InputError(f"{len(sizes)} step sizes for a run of {n_steps} steps: give one, or one for each")
        for term in self.terms:
            term.check(sd, rows, cells, n_steps)
        given = {"step_size": self.step_size} | {f"the weight of term {t.name!r}": t.weight for t in self.terms}
        for name, value in given.items():
            if not is_number(value) and not any(values_of(value)[step] for step in chosen):
                raise InputError(f"{name} is 0 at all guided steps, {chosen.start} to {chosen.stop - 1}: nothing acts")

    def steering(self, sd: Any, **run: Any) -> AbstractContextManager[Steering]:
        """Steer a run; see `interp.guidance.sampler.steering`."""
        return steering(self, sd, **run)
