"""How well heads read the creatures, by timestep and by number of training samples, between two bounds."""

import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from interp.errors import InputError
from interp.hyperfeatures.checkpoints import About
from interp.hyperfeatures.fitting import Training
from interp.models.diffusion import Diffusion
from interp.readouts.checkpoints import save
from interp.readouts.creature_heads import (
    N_GROUPS,
    creature_examples,
    creature_readout,
    error_of,
    error_of_the_mean,
    recipe_of,
)
from interp.readouts.evaluation import evaluate
from interp.readouts.examples import InMemory
from interp.readouts.pixels import evaluate_on_pixels, pixel_head, train_on_pixels
from interp.readouts.readout import Readout
from interp.readouts.training import train_readout

MEAN, PIXELS, HEAD = "predicting the mean", "same head, clean pixels", "readout"
N_PREVIEWS = 4


@dataclass(frozen=True)
class HeadStudy:
    """What is trained and measured.

    Attributes:
        samples: numbers of training samples, one head for each.
        held_out: renders that heads are measured on.
        timesteps: where they are.
        steps: of every training; recipes may ask for some times as many, see `HeadRecipe.longer`.
        batch: of every training.
        dim, width: of every head.
        train_seed, test_seed: of the renders.
        seed: of weights, order, timesteps and noise.

    Raises:
        InputError: no numbers of samples or timesteps, one of them twice, sizes that no head has, or one seed for both
            kinds of renders.
    """

    samples: tuple[int, ...] = (100, 400, 1600)
    held_out: int = 128
    timesteps: tuple[int, ...] = (1, 100, 250, 500, 750, 950)
    steps: int = 400
    batch: int = 8
    dim: int = 64
    width: int = 32
    train_seed: int = 51
    test_seed: int = 52
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.samples or not self.timesteps or min(self.samples) < 1:
            raise InputError(f"samples={self.samples}, timesteps={self.timesteps}: give at least one of each")
        for what, numbers in (("samples", self.samples), ("timesteps", self.timesteps)):
            if len(set(numbers)) < len(numbers):
                raise InputError(f"{what}={numbers}: one is there twice")
        sizes = {"held_out": self.held_out, "steps": self.steps, "batch": self.batch}
        for what, number in sizes.items():
            if number < 1:
                raise InputError(f"{what}={number}: give at least 1")
        if min(self.dim, self.width) < 1 or self.dim % N_GROUPS or self.width % N_GROUPS:
            raise InputError(f"dim={self.dim}, width={self.width}: give multiples of {N_GROUPS}, its groups")
        if self.train_seed == self.test_seed:
            raise InputError(f"train_seed and test_seed are both {self.test_seed}: give different ones")


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What came of one property.

    Attributes:
        readouts: by number of samples.
        trainings: theirs.
        errors: a row for each ``property``, ``head`` (readout or bound), ``samples``, ``timestep`` (missing for the
            bounds, which see no noise) and ``example``, with its ``error``.
        parameters: of the head.
        seconds: of each training, here and now; without what a training that went on had taken before.
    """

    readouts: dict[int, Readout]
    trainings: dict[int, Training]
    errors: pd.DataFrame
    parameters: int
    seconds: dict[int, float]


def study_head(sd: Diffusion, name: str, study: HeadStudy, folder: Path | None = None) -> HeadResult:
    """Train a head on every number of samples, and measure it beside its bounds.

    Args:
        sd: the model.
        name: a key of `interp.readouts.creature_heads.HEADS`.
        study: what is trained and measured.
        folder: keeps trainings, which go on where they are found, and the heads themselves; None: nothing is kept.

    Raises:
        UnknownNameError: no such head.
        InputError: numbers out of range, or a folder of another study.
    """
    recipe, measure = recipe_of(name), error_of(name)
    seen, held_out = (
        creature_examples(name, n, seed)
        for n, seed in ((max(study.samples), study.train_seed), (study.held_out, study.test_seed))
    )
    seen_latents, held_out_latents = seen.encoded(sd), held_out.encoded(sd)
    steps = study.steps * recipe.longer
    tables = [_bounds(sd, name, study, seen, held_out)]
    readouts, trainings, seconds = {}, {}, {}
    for n in study.samples:
        readout = creature_readout(sd, name, dim=study.dim, width=study.width, seed=study.seed)
        started = time.perf_counter()
        trainings[n] = train_readout(
            sd,
            readout,
            seen_latents.first(min(n, len(seen))),
            recipe.loss,
            steps=steps,
            batch=study.batch,
            lr=recipe.lr,
            latents=True,
            validate_every=steps,
            previews=[held_out_latents(index) for index in range(N_PREVIEWS)],
            seed=study.seed,
            folder=None if folder is None else folder / f"{name}-{n}" / "training",
            settings={"property": name, "train_seed": study.train_seed},
        )
        seconds[n] = time.perf_counter() - started
        table = evaluate(sd, readout, held_out_latents, measure, study.timesteps, latents=True, seed=study.seed)
        tables.append(_rows(table, name, HEAD, n))
        readouts[n] = readout
        if folder is not None:
            data = f"{n} creatures, seed {study.train_seed}"
            scores = {f"{recipe.error} at t={timestep:g}": error for timestep, error in by_timestep(table).items()}
            save(readout, folder / f"{name}-{n}", About(sd.name, data, steps, scores, f"loss: {recipe.loss}"))
    head = readouts[max(study.samples)].head
    return HeadResult(readouts, trainings, pd.concat(tables, ignore_index=True), n_parameters(head), seconds)


def by_timestep(table: pd.DataFrame) -> dict[float, float]:
    """The mean of what `interp.readouts.evaluate` measured at each timestep."""
    means = table.groupby("timestep")["value"].mean()
    return {float(timestep): round(float(value), 5) for timestep, value in means.items()}


def n_parameters(head: object) -> int:
    """How many numbers a head has learned."""
    return sum(parameter.numel() for parameter in head.parameters())  # type: ignore[attr-defined]


def _bounds(sd: Diffusion, name: str, study: HeadStudy, seen: InMemory, held_out: InMemory) -> pd.DataFrame:
    recipe = recipe_of(name)
    readout = creature_readout(sd, name, dim=study.dim, width=study.width, seed=study.seed)
    mean = pd.DataFrame({"example": range(len(held_out)), "value": error_of_the_mean(name, seen, held_out)})
    head = pixel_head(readout, seen.images, study.seed)
    steps = study.steps * recipe.longer
    train_on_pixels(head, readout, seen, recipe.loss, steps=steps, batch=study.batch, lr=recipe.lr)
    pixels = evaluate_on_pixels(head, readout, held_out, error_of(name))
    named = [_rows(mean, name, MEAN, len(seen)), _rows(pixels, name, PIXELS, len(seen))]
    return pd.concat(named, ignore_index=True)


def _rows(table: pd.DataFrame, name: str, head: str, samples: int) -> pd.DataFrame:
    named = table.rename(columns={"value": "error"}).assign(property=name, head=head, samples=samples)
    if "timestep" not in named:
        named["timestep"] = float("nan")
    return named[["property", "head", "samples", "timestep", "example", "error"]]
