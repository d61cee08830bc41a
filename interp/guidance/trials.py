"""Trials of guidance: the same prompts and noise with several guides or none, measured and compared pair by pair."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from interp.errors import InputError, UnknownNameError, nearest
from interp.guidance.guide import Guide
from interp.guidance.terms import TOTAL
from interp.metrics import bootstrap_interval
from interp.models.diffusion import Diffusion
from interp.progress import track
from interp.runs import check_root

UNGUIDED = "unguided"


@dataclass(frozen=True)
class Arm:
    """One way to sample.

    Attributes:
        name: in tables; ``"unguided"`` is what others are compared with.
        guide: makes the guide of some trials, whose indexes it is given; None: there is none.
    """

    name: str
    guide: Callable[[Sequence[int]], Guide] | None = None


@dataclass(frozen=True, eq=False)
class Trials:
    """What came of the trials.

    Attributes:
        images: of every arm, 0 to 1; trial i of all arms began with the same noise and prompt.
        references: the unguided images that the terms of an arm compared with, where they ran in lockstep.
        seconds: of every arm, for all its trials.
        gradients: the norm of the gradient in each guided arm, median over trials and guided steps.
    """

    images: dict[str, Float[Tensor, "trial 3 height width"]]
    references: dict[str, Float[Tensor, "trial 3 height width"]]
    seconds: dict[str, float]
    gradients: dict[str, float]

    def __or__(self, other: "Trials") -> "Trials":
        """The arms of both, which sampled the same trials."""
        return Trials(
            self.images | other.images,
            self.references | other.references,
            self.seconds | other.seconds,
            self.gradients | other.gradients,
        )

    def relative_times(self, baseline: str = UNGUIDED) -> list[float]:
        """The time of each arm beside the baseline's."""
        return [one / self.seconds[baseline] for one in self.seconds.values()]


def run_trials(
    sd: Diffusion,
    prompts: Sequence[str],
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float = 3.0,
    convention: str = "rg",
    batch: int = 16,
    progress: bool = True,
) -> Trials:
    """Sample every prompt in every arm from the same noise.

    Args:
        sd: the model.
        prompts: one for each trial.
        arms: the first of them unguided, or guided in some way.
        seeds: of the noise, one for each trial.
        steps: of a run.
        guidance_scale: of classifier-free guidance, in all arms.
        convention: of all arms.
        batch: trials in one run.
        progress: show a bar.

    Raises:
        InputError: numbers of prompts and seeds that differ, arms of one name, and what `Diffusion.generate` refuses.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise InputError(f"{len(prompts)} prompts with {len(seeds)} seeds: give one seed for each prompt")
    if batch < 1:
        raise InputError(f"batch={batch}: give how many trials are sampled at once, from 1 on")
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"arms need different names, at least one: {names}")
    images: dict[str, list[Tensor]] = {name: [] for name in names}
    references: dict[str, list[Tensor]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    norms: dict[str, list[float]] = {name: [] for name in names}
    parts = [range(at, min(at + batch, len(prompts))) for at in range(0, len(prompts), batch)]
    cells = [(part, arm) for part in parts for arm in arms]
    for part, arm in track(cells, "sampling with and without guidance") if progress else cells:
        started = time.perf_counter()
        made = sd.generate(
            [prompts[index] for index in part],
            latents=noise(sd, [seeds[index] for index in part]),
            seed=seeds[part[0]],
            steps=steps,
            guidance_scale=guidance_scale,
            convention=convention,
            guidance=None if arm.guide is None else arm.guide(part),
            keep_latents=False,
            progress=False,
        )
        images[arm.name].append(made.pixels.cpu())
        seconds[arm.name] += time.perf_counter() - started
        if made.guidance is not None:
            norms[arm.name] += made.guidance.loc[made.guidance["term"] == TOTAL, "gradient_norm"].tolist()
        if made.reference is not None:
            references[arm.name].append(made.reference.pixels.cpu())
    return Trials(
        {name: torch.cat(some) for name, some in images.items()},
        {name: torch.cat(some) for name, some in references.items() if some},
        seconds,
        {name: float(np.median(some)) for name, some in norms.items() if some},
    )


def check_sampling(settings: Mapping[str, Any], *, steps: int, guidance_scale: float, out: str | Path = "runs") -> None:
    """Refuse settings of trials before a model is loaded for them.

    Args:
        settings: fields of the `Guide` of all arms.
        steps: of a run.
        guidance_scale: of classifier-free guidance.
        out: where run folders are made.

    Raises:
        InputError: settings that no guide has, none of whose steps is guided, or an ``out`` that is no folder.
    """
    Guide([], guidance_scale=guidance_scale, **settings).steps(steps)
    check_root(out)


def noise(sd: Diffusion, seeds: Sequence[int]) -> Float[Tensor, "trial channel height width"]:
    """The first latents of each seed, whichever batch it is in.

    Args:
        sd: the model.
        seeds: one for each.
    """
    family = sd.adapter
    height, width = family.default_size
    shape = (family.latent_channels, height // family.scale, width // family.scale)
    drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(sd.device, sd.dtype)


def compared(values: Mapping[str, Sequence[float]], baseline: str = UNGUIDED, seed: int = 0) -> pd.DataFrame:
    """Compare each arm's measurements with the baseline's, trial by trial.

    Args:
        values: of every arm, one for each trial in the same order.
        baseline: the arm that the others are compared with.
        seed: of the resampling.

    Returns:
        A row for each arm: ``arm``, ``n``, ``median``, ``mean``, ``low`` and ``high`` (95 % bootstrap interval of the
        mean), ``difference`` from the baseline with ``difference_low`` and ``difference_high`` (mean of the paired
        differences and its interval), and ``p`` (Wilcoxon's signed-rank test, two-sided); the last four are missing for
        the baseline itself.

    Raises:
        UnknownNameError: there is no such baseline.
        InputError: arms of different lengths, or values that are not finite.
    """
    if baseline not in values:
        raise UnknownNameError(f"no arm {baseline!r}: there are {', '.join(values)}. {nearest(baseline, values)}")
    counts = {name: len(some) for name, some in values.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"arms have different numbers of trials: {counts}")
    base = np.asarray(values[baseline], dtype=float)
    rows: list[dict[str, Any]] = []
    for name, some in values.items():
        here = np.asarray(some, dtype=float)
        own = bootstrap_interval(here, seed=seed)
        row = {"arm": name, "n": len(here), "median": float(np.median(here))}
        row |= {"mean": own.mean, "low": own.low, "high": own.high}
        if name != baseline:
            apart = here - base
            gain = bootstrap_interval(apart, seed=seed)
            row |= {"difference": gain.mean, "difference_low": gain.low, "difference_high": gain.high}
            row["p"] = float(stats.wilcoxon(apart).pvalue) if apart.any() else 1.0
        rows.append(row)
    return pd.DataFrame(rows)
