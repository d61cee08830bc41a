"""The comparison of the paper: aggregated hyperfeatures beside single cells, concatenation, one step, DIFT, pixels."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from interp.hyperfeatures.features import encoded
from interp.hyperfeatures.fitting import Training
from interp.hyperfeatures.images import prepare
from interp.hyperfeatures.network import AggregationNetwork
from interp.hyperfeatures.spec import GENERATION, FeatureSpec, calls
from interp.hyperfeatures.study import (
    Describe,
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
from interp.models.diffusion import Diffusion
from interp.progress import track

AGGREGATED = "aggregated hyperfeatures"
ONE_STEP = "aggregated, one step"
TRANSFER = "aggregated, on generation features"
SINGLE = "best single layer and timestep"
SINGLE_ON_TEST = "single layer and timestep, chosen on the test pairs"
CONCATENATED = "all layers and timesteps concatenated"
CONCATENATED_STEP = "all layers concatenated, best timestep"
DIFT = "DIFT, best block"
DIFT_PRESET = "DIFT, block 1"
PIXELS = "pixels (9 × 9 patches)"
TEST = "test"
FAMILIAR = "familiar"
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
        familiar: the same on the familiar pairs of the splits, other pictures of categories that were trained on; empty
            where there are none.
        cells: one for each single (step, layer).
        chosen: what was chosen on validation pairs, by fold and method.
        fitted: the networks of the main method.
        reconstruction: mean squared error of the images that generation from their inverted latents gave, against what
            the autoencoder alone makes of them, in 0 to 1.
    """

    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    familiar: dict[str, list[Evaluation]] = field(default_factory=dict)
    cells: dict[tuple[int, int], Evaluation] = field(default_factory=dict)
    chosen: list[dict[str, str]] = field(default_factory=list)
    fitted: list[Fitted] = field(default_factory=list)
    reconstruction: float | None = None

    @property
    def parts(self) -> dict[str, dict[str, list[Evaluation]]]:
        """The evaluations by what was tested on: ``"test"`` and, where there are such pairs, ``"familiar"``."""
        return {TEST: self.evaluations} | ({FAMILIAR: self.familiar} if self.familiar else {})

    def table(self) -> pd.DataFrame:
        """PCK@0.1 of every method with its interval, and by how much the main method is better, pair by pair.

        Returns:
            One row for each part, method and base: part, method, base, pck, low, high, n_seeds, n_pairs, n_points,
            gain, gain_low, gain_high. Intervals are over pairs, and over training seeds where there are several;
            missing (NaN) where there is one pair only.

        Source: Diffusion Hyperfeatures, table of PCK on SPair-71k.
        """
        rows = []
        for part, evaluations in self.parts.items():
            for method, runs in evaluations.items():
                for base in BASES:
                    found = pck_interval(runs, base=base)
                    row: dict[str, Any] = {"part": part, "method": method, "base": base}
                    row |= {"pck": found.mean, "low": found.low, "high": found.high}
                    row |= {"n_seeds": len(runs), "n_pairs": len(runs[0].results)}
                    row["n_points"] = sum(len(result.predicted) for result in runs[0].results)
                    if method != AGGREGATED:
                        gain = compare(evaluations[AGGREGATED], runs, base=base)
                        row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
                    rows.append(row)
        return pd.DataFrame(rows)

    def by_seed(self) -> pd.DataFrame:
        """PCK@0.1 of every method for each training seed: part, method, seed, base, pck."""
        rows = [
            {"part": part, "method": method, "seed": seed, "base": base}
            | {"pck": pck_interval(run, base=base, n_resamples=1).mean}
            for part, evaluations in self.parts.items()
            for method, runs in evaluations.items()
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
    every = [pair for split in splits for pair in split.every]
    stacks.prepare(every, "features")
    single_step.prepare(every, "features of one step")
    for one in dift.values():
        untrained = [pair for split in splits for pair in (*split.validation, *split.test, *split.familiar)]
        one.prepare(untrained, "DIFT features")

    result = Comparison()
    by_part: dict[str, list[dict[str, list[Evaluation]]]] = {TEST: [], FAMILIAR: []}
    cells_by_fold: list[dict[tuple[int, int], Evaluation]] = []
    generation = Generation(sd, spec, first, hold)
    for fold, split in enumerate(splits):
        parts = {TEST: split.test} | ({FAMILIAR: split.familiar} if split.familiar else {})
        found: dict[str, dict[str, list[Evaluation]]] = {part: {AGGREGATED: [], ONE_STEP: []} for part in parts}
        found[TEST][TRANSFER] = []
        generated = generation.stacks(split)
        for seed in seeds:
            home = None if folder is None else folder / f"fold-{fold}-seed-{seed}"
            net, training = fit(stacks, split, recipe, seed, size=size, folder=home)
            result.fitted.append(Fitted(fold, seed, net, training))
            home = None if folder is None else folder / f"one-step-fold-{fold}-seed-{seed}"
            lone, _ = fit(single_step, split, recipe, seed, size=size, folder=home)
            for part, pairs in parts.items():
                found[part][AGGREGATED].append(score(aggregated(net, stacks), split, pairs, size))
                found[part][ONE_STEP].append(score(aggregated(lone, single_step), split, pairs, size))
            found[TEST][TRANSFER].append(score(aggregated(net, generated), split, split.test, size))
        chosen = _chosen(stacks, dift, split, size)
        for part, pairs in parts.items():
            for name, describe in _untrained(stacks, dift, split, chosen, size).items():
                found[part][name] = [score(describe, split, pairs, size)]
            by_part[part].append(found[part])
        cells_by_fold.append(score_many(partial(cells, stacks), split, split.test, size, "single cells"))
        result.chosen.append(chosen.named(spec))
    result.evaluations = _pooled_methods(by_part[TEST])
    result.familiar = _pooled_methods(by_part[FAMILIAR]) if by_part[FAMILIAR] else {}
    result.cells = {cell: _pooled([fold[cell] for fold in cells_by_fold]) for cell in cells_by_fold[0]}
    # More than any choice on validation pairs could reach: what the main method is held against at its hardest.
    result.evaluations[SINGLE_ON_TEST] = [result.cells[best(result.cells)]]
    result.reconstruction = generation.error()
    return result


@dataclass(frozen=True)
class Choice:
    """What the methods without training are set to, by the validation pairs.

    Attributes:
        cell: (step, layer) of the best single map.
        step: whose layers are best concatenated.
        block: site of the best block for DIFT.
    """

    cell: tuple[int, int]
    step: int
    block: str

    def named(self, spec: FeatureSpec) -> dict[str, str]:
        """The choices in words, by method."""
        step, layer = self.cell
        return {
            SINGLE: f"{spec.sites[layer]}, t = {spec.timesteps[step]:g}",
            DIFT: self.block,
            CONCATENATED_STEP: f"t = {spec.timesteps[self.step]:g}",
        }


def _chosen(stacks: Stacks, dift: Mapping[str, Stacks], split: Split, size: Size | None) -> Choice:
    singles = score_many(partial(cells, stacks), split, split.validation, size, "single cells, validation")

    def by_step(key: Hashable) -> dict[int, Tensor]:
        return {step: stacks.at(key, step) for step in range(stacks.spec.n_steps)}

    steps = score_many(by_step, split, split.validation, size, "layers concatenated, validation")
    blocks = {block: score(_first_step(one), split, split.validation, size) for block, one in dift.items()}
    return Choice(best(singles), best(steps), best(blocks))


def _untrained(
    stacks: Stacks, dift: Mapping[str, Stacks], split: Split, choice: Choice, size: Size | None
) -> dict[str, Describe]:
    """Every method that no training is needed for."""
    step, layer = choice.cell
    return {
        SINGLE: lambda key: stacks.at(key, step, layer),
        CONCATENATED: lambda key: concatenate(stacks[key][None])[0],
        CONCATENATED_STEP: lambda key: stacks.at(key, choice.step),
        DIFT: _first_step(dift[choice.block]),
        DIFT_PRESET: _first_step(dift[list(dift)[1]]),
        PIXELS: patches(split.images, size=size),
    }


def _first_step(stacks: Stacks) -> Describe:
    return lambda key: stacks[key][0]


class Generation:
    """Features of the test images from the other process: inverted to noise, then generated from that noise.

    The images come back nearly as they were (see `error`), so that their keypoints still hold, and features of
    generation can be scored exactly.

    Args:
        sd: the model.
        spec: the stack of the inversion.
        split: knows the images.
        hold: how many stacks are held, and images inverted at a time; None: all, and 32.

    Source: Diffusion Hyperfeatures, section 4.3 (transfer to generation).
    """

    def __init__(self, sd: Diffusion, spec: FeatureSpec, split: Split, hold: int | None) -> None:
        self.sd, self.spec, self.hold = sd, spec, hold
        self._encoded: dict[Hashable, Tensor] = {}
        self._noises: dict[Hashable, Tensor] = {}
        self._came: list[dict[Hashable, Tensor]] = []

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
        self._came.append(found.clean)
        return found

    def error(self) -> float | None:
        """Mean squared error of the images that came back, against what the autoencoder alone makes of the originals.

        Returns:
            In 0 to 1; None before the first.
        """
        came = {key: clean for part in self._came for key, clean in part.items()}
        errors = [
            float((self.sd.decode(clean[None]) - self.sd.decode(self._encoded[key][None])).square().mean())
            for key, clean in came.items()
        ]
        return float(np.mean(errors)) if errors else None

    def _invert(self, keys: Sequence[Hashable], split: Split) -> None:
        pixels = prepare(gathered(split.images, keys), self.spec.load_size, self.spec.image_size)
        latents = encoded(self.sd, pixels, self.spec)
        found = self.sd.invert(
            latents,
            self.spec.prompt,
            steps=self.spec.steps,
            convention=self.spec.convention,
            keep_latents=False,
            progress=False,
        )
        self._encoded.update(zip(keys, latents, strict=True))
        self._noises.update(zip(keys, found.final.cpu(), strict=True))


def _pooled_methods(folds: Sequence[Mapping[str, Sequence[Evaluation]]]) -> dict[str, list[Evaluation]]:
    return {
        method: [_pooled([fold[method][run] for fold in folds]) for run in range(len(runs))]
        for method, runs in folds[0].items()
    }


def _pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    return Evaluation(tuple(result for evaluation in evaluations for result in evaluation.results))


def _images_of(spec: FeatureSpec) -> dict[str, Any]:
    """What all methods see alike."""
    names = ("load_size", "image_size", "vae", "seed", "prompt")
    return {name: getattr(spec, name) for name in names}


def _one_step(sd: Diffusion, spec: FeatureSpec) -> FeatureSpec:
    same = {"output_size": spec.output_size, "convention": spec.convention}
    return presets.one_step(sd, sites=spec.sites, **same, **_images_of(spec))
