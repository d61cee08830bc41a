"""Activation patching in diffusion models: which site at which step fixes the layout, which the colour?

Two runs differ in their prompt, or in their noise. What one computes at a site in some steps is put into the other, and
the finished image is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.conventions import Convention
from interp.edits import Replace
from interp.errors import InputError
from interp.latents import Size, size_of
from interp.models.diffusion import Diffusion
from interp.patching.image_metrics import Compared, ImageMetric, measured, title
from interp.patching.result import PatchingResult
from interp.progress import track
from interp.trajectories import Trajectory


@dataclass(frozen=True, eq=False)
class _Patch:
    """What one edit of a variant puts where, and what is there without it."""

    site: str
    step: int
    half: str
    value: Float[Tensor, "example ..."]
    own: Float[Tensor, "example ..."]

    @property
    def same(self) -> bool:
        """Whether both runs compute the same here."""
        return bool(torch.equal(self.value, self.own))

    def away(self, generator: torch.Generator) -> "_Patch":
        """As far from what is there, example by example, in a random direction."""
        moved = (self.value - self.own).flatten(1).float()
        noise = torch.randn(moved.shape, generator=generator).to(moved.device)
        noise = noise / noise.norm(dim=1, keepdim=True) * moved.norm(dim=1, keepdim=True)
        value = self.own + noise.reshape(self.own.shape).to(self.own.dtype)
        return _Patch(self.site, self.step, self.half, value, self.own)

    def edit(self, first_row: int) -> Replace:
        """The edit of the variant whose rows begin there."""
        rows = list(range(first_row, first_row + len(self.value)))
        return Replace(self.site, self.value, rows=rows, steps=[self.step], half=self.half)


def diffusion(
    sd: Diffusion,
    clean: str | Sequence[str],
    corrupt: str | Sequence[str],
    metric: ImageMetric | Compared,
    *,
    sites: Mapping[str, str | Sequence[str]] | Sequence[str],
    seeds: int | Sequence[int] = 0,
    corrupt_seeds: int | Sequence[int] | None = None,
    steps: int = 20,
    starts: Sequence[int] | None = None,
    window: int = 1,
    half: str = "both",
    guidance_scale: float = 7.5,
    convention: str | Convention = "diffusers",
    size: Size = None,
    control: bool = True,
    seed: int = 0,
    max_rows: int = 16,
    allow_no_effect: bool = False,
    progress: bool = True,
) -> PatchingResult:
    """Put the clean run's activations into the corrupt run, site by site and step by step.

    Variants are rows of one generation each with edits of their own. What the clean and the corrupt run compute at the
    sites is held in memory: steps × sites × examples.

    Args:
        sd: the model.
        clean: prompt of the run that activations come from; one for all examples, or one for each.
        corrupt: of the run that they are put into.
        metric: images [batch, 3, height, width] in 0..1 -> [batch], such as `option_difference`; or a `Compared`, such
            as `layout_agreement`, which also sees the images of the two runs.
        sites: names or patterns, one row of the result each; or label -> sites that are patched together, such as
            ``{"text": ["*.cross.hook_k", "*.cross.hook_v"]}``.
        seeds: of the noise, one for each example.
        corrupt_seeds: of the corrupt run's noise; None: the same.
        steps: of both runs.
        starts: first steps of the windows, 0 being the noisiest; None: every multiple of ``window``.
        window: steps that are patched together.
        half: of guidance: ``"both"``, or ``"cond"`` or ``"uncond"`` alone.
        guidance_scale: of both runs; without guidance (1 or less) there is one half only.
        convention: see `Diffusion.generate`.
        size: of the images; None: what the model was trained for.
        control: also move each activation as far in a random direction.
        seed: of those directions.
        max_rows: images in one generation.
        allow_no_effect: take variants in which both runs compute the same, such as sites before the text at step 0, and
            a metric that is the same for both runs or that no patch moves.
        progress: show bars.

    Returns:
        The metric of the finished images, axes ``site`` and ``step`` (the window's first, or ``first-last``); ``clean``
        and ``corrupt`` are those of the two runs. Control ``"random vector"``.

    Raises:
        InputError: unequal numbers of prompts and seeds, runs that are the same, no sites, steps that the run does not
            have, a half of guidance that it does not have, a variant without effect, or a metric that nothing moves.
        UnknownNameError, SiteUnavailableError: sites that the model lacks.
        ShapeError: a metric that gives other than one number for each example.
    """
    prompts, noise = _sides(sd, clean, corrupt, seeds, corrupt_seeds, size)
    n = len(prompts[0])
    if max_rows < n:
        raise InputError(f"max_rows={max_rows} for {n} examples: one variant has to fit")
    groups = site_groups(sd, sites)
    windows = _windows(steps, window, starts)
    kept = sorted({step for span in windows.values() for step in span})
    halves = _halves(half, guided=guidance_scale > 1 and not sd.adapter.embeds_guidance)

    def generate(side: int, copies: int = 1, **options: Any) -> Trajectory:
        return sd.generate(
            prompts[side] * copies,
            latents=noise[side].repeat(copies, 1, 1, 1),
            steps=steps,
            guidance_scale=guidance_scale,
            convention=convention,
            keep_latents=False,
            progress=False,
            **options,
        )

    wanted = sorted({site for group in groups.values() for site in group})
    captured: dict[str, Any] = {"capture": wanted, "save_steps": kept, "half": "both" if "uncond" in halves else "cond"}
    donor, own = generate(0, **captured), generate(1, **captured)
    measure = measured(metric, donor.pixels.float().cpu(), own.pixels.float().cpu())
    ends = [measure(run.pixels) for run in (donor, own)]
    if not allow_no_effect and torch.equal(*ends):
        raise InputError(
            f"the metric is the same {title(metric)} for the images of both runs, so that there is nothing to find: "
            "corrupt more, or allow it with allow_no_effect=True"
        )
    variants = []
    for label, group in groups.items():
        for span in windows.values():
            patches = [
                _Patch(site, step, name, *(_kept(run, name, site, kept.index(step)) for run in (donor, own)))
                for site in group
                for step in span
                for name in halves
            ]
            if not allow_no_effect and all(patch.same for patch in patches):
                raise InputError(
                    f"both runs compute the same at {label!r} in steps {list(span)}, so that patching it changes "
                    "nothing: leave it out, or allow it with allow_no_effect=True"
                )
            # What both runs share needs no edit.
            variants.append([patch for patch in patches if not patch.same])
    n_cells = len(variants)
    if control:
        generator = torch.Generator().manual_seed(seed)
        variants += [[patch.away(generator) for patch in patches] for patches in variants]
    found: list[Tensor] = []
    per_run = max(1, max_rows // n)
    chunks = range(0, len(variants), per_run)
    for start in track(chunks, "diffusion patching", len(chunks)) if progress else chunks:
        chunk = variants[start : start + per_run]
        edits = [patch.edit(index * n) for index, patches in enumerate(chunk) for patch in patches]
        found += [measure(part) for part in generate(1, len(chunk), edits=edits).pixels.split(n)]
    if not allow_no_effect and all(torch.equal(values, ends[1]) for values in found[:n_cells]):
        raise InputError(
            f"none of the {n_cells} patches moves {title(metric)} by anything; allow it with allow_no_effect=True"
        )
    table = torch.stack(found).reshape(1 + control, len(groups), len(windows), n)
    return PatchingResult(
        name="diffusion patching",
        metric=title(metric),
        values=table[0],
        axes={"site": tuple(groups), "step": tuple(windows)},
        clean=ends[0],
        corrupt=ends[1],
        controls={"random vector": table[1]} if control else {},
        about={
            "model": sd.name,
            "clean": prompts[0],
            "corrupt": prompts[1],
            "sites": groups,
            "steps": steps,
            "timesteps": list(donor.timesteps),
            "half": half,
            "guidance_scale": guidance_scale,
            "seed": seed,
        },
    )


def _halves(half: str, *, guided: bool) -> tuple[str, ...]:
    """The halves of guidance that are patched."""
    if half not in ("both", "cond", "uncond"):
        raise InputError(f"half={half!r}: give 'both', 'cond' or 'uncond'")
    if half == "uncond" and not guided:
        raise InputError("half='uncond': a run without guidance has no unconditional half")
    if half == "both":
        return ("cond", "uncond") if guided else ("cond",)
    return (half,)


def site_groups(sd: Diffusion, sites: Mapping[str, str | Sequence[str]] | Sequence[str]) -> dict[str, list[str]]:
    """The sites that each label stands for.

    Args:
        sd: the model.
        sites: as for `diffusion`.

    Raises:
        InputError: no sites, or one outside the denoiser, which does not run at every step.
        UnknownNameError, SiteUnavailableError: sites that the model lacks.
    """
    groups = {}
    for label, given in _labelled(sites).items():
        places = sd.expanded(given)
        for place in places:
            if place.part != "denoiser":
                raise InputError(f"{label!r}: {place.site} is in the {place.part}, which does not run at every step; "
                                 "give sites of the denoiser")  # fmt: skip
        groups[label] = [place.site for place in places]
    return groups


def _kept(run: Trajectory, half: str, site: str, index: int) -> Float[Tensor, "example ..."]:
    acts = run.activations if half == "cond" else run.uncond
    if acts is None:
        raise InputError("the run has no unconditional half")
    return acts[site][index]


def _labelled(sites: Mapping[str, str | Sequence[str]] | Sequence[str]) -> dict[str, str | Sequence[str]]:
    if not sites or isinstance(sites, str):
        raise InputError(f"sites={sites!r}: give several sites, or label -> sites that are patched together")
    return dict(sites) if isinstance(sites, Mapping) else {site: site for site in sites}


def _windows(steps: int, window: int, starts: Sequence[int] | None) -> dict[str, range]:
    if window < 1:
        raise InputError(f"window={window}: at least one step is patched")
    begin = list(range(0, steps, window)) if starts is None else list(starts)
    if not begin or len(set(begin)) < len(begin) or not all(0 <= start < steps for start in begin):
        raise InputError(f"windows from steps {begin} on: the runs have steps 0 to {steps - 1}; give each once")
    spans = [range(start, min(start + window, steps)) for start in begin]
    return {str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}": span for span in spans}


def _sides(
    sd: Diffusion,
    clean: str | Sequence[str],
    corrupt: str | Sequence[str],
    seeds: int | Sequence[int],
    corrupt_seeds: int | Sequence[int] | None,
    size: Size,
) -> tuple[tuple[list[str], list[str]], tuple[Tensor, Tensor]]:
    """Prompts and noise of the clean and of the corrupt run, example by example."""
    texts = [[one] if isinstance(one, str) else list(one) for one in (clean, corrupt)]
    both_seeds = (seeds, seeds if corrupt_seeds is None else corrupt_seeds)
    drawn = [[one] if isinstance(one, int) else list(one) for one in both_seeds]
    counts = [*map(len, texts), *map(len, drawn)]
    n = max(counts)
    if any(count not in (1, n) for count in counts):
        raise InputError(f"prompts and seeds of the two runs number {counts}: give one for all examples, or one each")
    texts, drawn = [one * (n // len(one)) for one in texts], [one * (n // len(one)) for one in drawn]
    same = [i for i in range(n) if texts[0][i] == texts[1][i] and drawn[0][i] == drawn[1][i]]
    if same:
        raise InputError(f"example(s) {same}: the clean and the corrupt run have the same prompt and the same seed")
    family = sd.adapter
    height, width = size_of(size, family.multiple) or family.default_size
    shape = (family.latent_channels, height // family.scale, width // family.scale)
    noise = [torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in row])
             for row in drawn]  # fmt: skip
    return (texts[0], texts[1]), (noise[0], noise[1])
