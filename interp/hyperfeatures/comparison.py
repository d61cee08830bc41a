"""The comparison of the paper: aggregated hyperfeatures beside single cells, concatenation, one step, DIFT, pixels."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from interp.correspondence import Evaluation, compare, pck_interval
from interp.correspondence.pck import BASES
from interp.correspondence.points import Size
from interp.errors import InputError
from interp.hyperfeatures import presets
from interp.hyperfeatures.baselines import concatenate
from interp.hyperfeatures.images import prepare
from interp.hyperfeatures.network import AggregationNetwork
from interp.hyperfeatures.spec import GENERATION, FeatureSpec, calls
from interp.hyperfeatures.study import (
    Recipe,
    Split,
    Stacks,
    aggregated,
    best,
    cells,
    fit,
    gathered,
    patches,
    score,
    score_many,
)
from interp.hyperfeatures.training import Training
from interp.models.diffusion import Diffusion
from interp.progress import track

AGGREGATED = "aggregated hyperfeatures"
ONE_STEP = "aggregated, one step"
TRANSFER = "aggregated, on generation features"
SINGLE = "best single layer and timestep"
CONCATENATED = "all layers and timesteps concatenated"
CONCATENATED_STEP = "all layers concatenated, best timestep"
DIFT = "DIFT, best block"
DIFT_PRESET = "DIFT, block 1"
PIXELS = "pixels (9 × 9 patches)"
BATCH = 32  # images inverted at a time


@dataclass(frozen=True, eq=False)
class Fitted:
    """A network of one fold and seed, and how its training went."""

    fold: int
    seed: int
    net: AggregationNetwork
    training: Training


@dataclass(eq=False)
class Comparison:
    """What the methods predicted, over the test pairs of all folds.

    Attributes:
        evaluations: by method, one for each training seed; one alone for methods without training.
        cells: one for each single (step, layer).
        chosen: what was chosen on validation pairs, by fold and method.
        fitted: the networks of the main method.
        reconstruction: mean squared error of the images that generation from their inverted latents gave, against what
            the autoencoder alone makes of them, in 0 to 1.
    """

    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    cells: dict[tuple[int, int], Evaluation] = field(default_factory=dict)
    chosen: list[dict[str, str]] = field(default_factory=list)
    fitted: list[Fitted] = field(default_factory=list)
    reconstruction: float | None = None

    def table(self) -> pd.DataFrame:
        """PCK@0.1 of every method with its interval, and by how much the main method is better, pair by pair.

        Returns:
            One row for each method and base: method, base, pck, low, high, n_seeds, n_pairs, n_points, gain, gain_low,
            gain_high. Intervals are over pairs, and over training seeds where there are several; missing (NaN) where
            there is one pair only.

        Source: Diffusion Hyperfeatures, table of PCK on SPair-71k.
        """
        rows = []
        for method, runs in self.evaluations.items():
            for base in BASES:
                found = pck_interval(runs, base=base)
                row = {"method": method, "base": base, "pck": found.mean, "low": found.low, "high": found.high}
                row |= {"n_seeds": len(runs), "n_pairs": len(runs[0].results)}
                row["n_points"] = sum(len(result.predicted) for result in runs[0].results)
                if method != AGGREGATED:
                    gain = compare(self.evaluations[AGGREGATED], runs, base=base)
                    row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
                rows.append(row)
        return pd.DataFrame(rows)

    def by_seed(self) -> pd.DataFrame:
        """PCK@0.1 of every method for each training seed: method, seed, base, pck."""
        rows = [
            {"method": method, "seed": seed, "base": base, "pck": pck_interval(run, base=base, n_resamples=1).mean}
            for method, runs in self.evaluations.items()
            for seed, run in enumerate(runs)
            for base in BASES
        ]
        return pd.DataFrame(rows)

    def by_category(self) -> pd.DataFrame:
        """PCK in every convention, by method and category, of the first training seed."""
        parts = [run[0].table(n_resamples=500).assign(method=method) for method, run in self.evaluations.items()]
        return pd.concat(parts, ignore_index=True)

    def cell_map(self, base: str = "bbox") -> Float[np.ndarray, "step layer"]:
        """PCK@0.1 of every single cell, by step (clean first) and layer.

        Args:
            base: ``"img"`` or ``"bbox"``.
        """
        n_steps, n_layers = (max(cell[axis] for cell in self.cells) + 1 for axis in (0, 1))
        values = np.zeros((n_steps, n_layers))
        for cell, evaluation in self.cells.items():
            values[cell] = pck_interval(evaluation, base=base, n_resamples=1).mean
        return values

    def mixing(self) -> pd.DataFrame:
        """Mixing weights, the mean over folds and seeds: a row for each timestep, a column for each layer.

        Source: Diffusion Hyperfeatures, section 3.2.
        """
        tables = [one.net.mixing_table() for one in self.fitted]
        return sum(tables[1:], start=tables[0]) / len(tables)


def compare_methods(
    sd: Diffusion,
    splits: Sequence[Split],
    spec: FeatureSpec,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    size: Size | None = None,
    hold: int | None = None,
    folder: Path | None = None,
) -> Comparison:
    """Train and evaluate every method on every split.

    Args:
        sd: the model.
        splits: the folds, of one set of images; their test pairs are pooled.
        spec: the stack of the main method.
        recipe: of the training.
        seeds: of the trainings.
        size: to match at; None: the images' own sizes.
        hold: how many images' stacks are held in memory at a time; None: all.
        folder: keeps the states of the trainings, from which an interrupted run goes on.

    Returns:
        The predictions of all methods.

    Raises:
        InputError: no split or seed, fewer than two blocks in the decoder, a point outside its image, or a folder of
            trainings with other settings.
        UnknownNameError: the model lacks a site.

    Source: Diffusion Hyperfeatures, section 4.
    """
    if not splits or not seeds:
        raise InputError(f"{len(splits)} splits and {len(seeds)} seeds: expected at least one of each")
    first = splits[0]
    stacks = Stacks(sd, spec, first.images, hold=hold)
    single_step = Stacks(sd, _one_step(sd, spec), first.images, hold=hold)
    blocks = [site for site in sd.sites("up.*.hook_out") if site.count(".") == 2]
    if len(blocks) < 2:
        raise InputError(f"DIFT takes the second block of the decoder; this model has {len(blocks)}: {blocks}")
    dift = {
        site: Stacks(sd, presets.dift(sd, block=index, **_images_of(spec)), first.images, hold=hold)
        for index, site in enumerate(blocks)
    }
    every = [pair for split in splits for pair in (*split.train, *split.validation, *split.test)]
    stacks.prepare(every, "features")
    single_step.prepare(every, "features of one step")
    for one in dift.values():
        one.prepare([pair for split in splits for pair in (*split.validation, *split.test)], "DIFT features")

    result = Comparison()
    by_fold: list[dict[str, list[Evaluation]]] = []
    cells_by_fold: list[dict[tuple[int, int], Evaluation]] = []
    generation = Generation(sd, spec, first, hold)
    for fold, split in enumerate(splits):
        found: dict[str, list[Evaluation]] = {AGGREGATED: [], TRANSFER: [], ONE_STEP: []}
        generated = generation.stacks(split)
        for seed in seeds:
            home = None if folder is None else folder / f"fold-{fold}-seed-{seed}"
            net, training = fit(stacks, split, recipe, seed, size=size, folder=home)
            result.fitted.append(Fitted(fold, seed, net, training))
            found[AGGREGATED].append(score(aggregated(net, stacks), split, split.test, size))
            found[TRANSFER].append(score(aggregated(net, generated), split, split.test, size))
            home = None if folder is None else folder / f"one-step-fold-{fold}-seed-{seed}"
            lone, _ = fit(single_step, split, recipe, seed, size=size, folder=home)
            found[ONE_STEP].append(score(aggregated(lone, single_step), split, split.test, size))
        untrained, cells_here, chosen = _untrained(stacks, dift, split, size)
        by_fold.append(found | untrained)
        cells_by_fold.append(cells_here)
        result.chosen.append(chosen)
    result.evaluations = {
        method: [_pooled([fold[method][k] for fold in by_fold]) for k in range(len(by_fold[0][method]))]
        for method in by_fold[0]
    }
    result.cells = {cell: _pooled([fold[cell] for fold in cells_by_fold]) for cell in cells_by_fold[0]}
    result.reconstruction = generation.error
    return result


def _untrained(
    stacks: Stacks, dift: Mapping[str, Stacks], split: Split, size: Size | None
) -> tuple[dict[str, list[Evaluation]], dict[tuple[int, int], Evaluation], dict[str, str]]:
    """Everything that no training is needed for; choices are made on the validation pairs."""
    choice = score_many(lambda key: cells(stacks, key), split, split.validation, size, "single cells, validation")
    every = score_many(lambda key: cells(stacks, key), split, split.test, size, "single cells")
    cell = best(choice)
    steps = range(stacks.spec.n_steps)

    def joined(key: Hashable) -> dict[int, Tensor]:
        return {step: concatenate(stacks[key][None], [step])[0] for step in steps}

    step = best(score_many(joined, split, split.validation, size, "layers concatenated, validation"))
    at_blocks = {block: lambda key, block=block: dift[block][key][0] for block in dift}
    block = best({name: score(describe, split, split.validation, size) for name, describe in at_blocks.items()})
    evaluations = {
        SINGLE: every[cell],
        CONCATENATED: score(lambda key: concatenate(stacks[key][None])[0], split, split.test, size),
        CONCATENATED_STEP: score(lambda key: concatenate(stacks[key][None], [step])[0], split, split.test, size),
        DIFT: score(at_blocks[block], split, split.test, size),
        DIFT_PRESET: score(at_blocks[list(at_blocks)[1]], split, split.test, size),
        PIXELS: score(patches(split.images, size=size), split, split.test, size),
    }
    site, timesteps = stacks.spec.sites[cell[1]], stacks.spec.timesteps
    chosen = {SINGLE: f"{site}, t = {timesteps[cell[0]]:g}", DIFT: block, CONCATENATED_STEP: f"t = {timesteps[step]:g}"}
    return {method: [evaluation] for method, evaluation in evaluations.items()}, every, chosen


class Generation:
    """Features of the test images from the other process: inverted to noise, then generated from that noise.

    The images come back nearly as they were (see ``error``), so that their keypoints still hold, and features of
    generation can be scored exactly.

    Args:
        sd: the model.
        spec: the stack of the inversion.
        split: knows the images.
        hold: how many stacks are held, and images inverted at a time; None: all, and 32.

    Attributes:
        error: mean squared error of the images that came back, against what the autoencoder alone makes of the
            originals, in 0 to 1; None before the first.

    Source: Diffusion Hyperfeatures, section 4.3 (transfer to generation).
    """

    def __init__(self, sd: Diffusion, spec: FeatureSpec, split: Split, hold: int | None) -> None:
        self.sd, self.spec, self.hold = sd, spec, hold
        self.error: float | None = None
        self._errors: list[float] = []
        self._noises: dict[Hashable, Tensor] = {}

    def stacks(self, split: Split) -> Stacks:
        """Stacks of the images of a split's test pairs, from generation."""
        keys = dict.fromkeys(key for pair in split.test for key in (pair.source, pair.target))
        missing = [key for key in keys if key not in self._noises]
        batch = min(BATCH, self.hold or BATCH)
        for k in track(range(0, len(missing), batch), "inverting test images", -(-len(missing) // batch)):
            self._invert(missing[k : k + batch], split)
        indices = [self.spec.steps - 1 - call for call in self.spec.saved]
        saved = calls(indices, self.spec.steps, GENERATION)
        # The timesteps are those of the other process: noisier, by a step of it, for each mixing weight.
        seen = presets.timesteps_of(self.sd, GENERATION, self.spec.convention, self.spec.steps, saved)
        spec = replace(self.spec, mode=GENERATION, saved=saved, timesteps=seen, load_size=None, image_size=None)
        found = Stacks(self.sd, spec, self._noises, hold=self.hold)
        found.prepare(split.test, "features of generation")
        return found

    def _invert(self, keys: Sequence[Hashable], split: Split) -> None:
        pixels = prepare(gathered(split.images, keys), self.spec.load_size, self.spec.image_size)
        latents = self.sd.encode(pixels, vae=self.spec.vae, seed=self.spec.seed)
        found = self.sd.invert(
            latents,
            self.spec.prompt,
            steps=self.spec.steps,
            convention=self.spec.convention,
            keep_latents=False,
            progress=False,
        )
        noises = found.final
        again = self.sd.generate(
            [self.spec.prompt] * len(keys),
            latents=noises,
            steps=self.spec.steps,
            guidance_scale=1.0,
            convention=self.spec.convention,
            decode=False,
            keep_latents=False,
            progress=False,
        )
        there = self.sd.decode(again.clean)
        here = self.sd.decode(latents)
        self._errors += (there - here).square().mean(dim=(1, 2, 3)).tolist()
        self.error = float(np.mean(self._errors))
        self._noises.update(zip(keys, noises.cpu(), strict=True))


def _pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    return Evaluation(tuple(result for evaluation in evaluations for result in evaluation.results))


def _images_of(spec: FeatureSpec) -> dict[str, Any]:
    """What all methods see alike."""
    names = ("load_size", "image_size", "vae", "seed", "prompt")
    return {name: getattr(spec, name) for name in names}


def _one_step(sd: Diffusion, spec: FeatureSpec) -> FeatureSpec:
    same = {"output_size": spec.output_size, "convention": spec.convention}
    return presets.one_step(sd, sites=spec.sites, **same, **_images_of(spec))
