"""Train the estimator and the heads that ship, from nothing: ``python -m interp.zoo.readouts.train``."""

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from interp.models.diffusion import Diffusion
from interp.readouts.creature_heads import HEADS, recipe_of
from interp.readouts.head_study import HEAD, MEAN, PIXELS, HeadStudy, study_head
from interp.zoo import path
from interp.zoo.creatures import draw_scenes, render
from interp.zoo.diffusion.training import Stage
from interp.zoo.readouts import MODEL
from interp.zoo.readouts.card import write_card
from interp.zoo.readouts.estimator import load_estimator, new_estimator, save_estimator
from interp.zoo.readouts.estimator_training import accuracy, train_estimator

STUDY = HeadStudy(samples=(100, 1600))
SHIPPED = tuple(name for name in HEADS if name != "keypoints")  # the pose head reads the same points
STAGE = Stage("estimator", steps=1500, batch=32, rate=3e-3, seed=5)
RENDERS, RENDER_SEED = 12_288, 31
HELD_OUT, HELD_OUT_SEED = 512, 32
ERRORS = "errors.csv"


def train(work: Path) -> None:
    """Train what is not there yet.

    Args:
        work: where everything is left.
    """
    home = work / STAGE.name
    if not (home / "model" / "config.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        started = time.time()
        estimator = new_estimator(STAGE.seed)
        train_estimator(estimator, draw_scenes(RENDERS, RENDER_SEED), STAGE, home)
        (home / "stage.json").write_text(json.dumps(asdict(STAGE) | {"seconds": round(time.time() - started)}))
        save_estimator(estimator, home / "model")
    sd = Diffusion.from_pretrained(f"zoo:{MODEL}")
    for name in SHIPPED:
        if not (work / name / ERRORS).is_file():
            found = study_head(sd, name, STUDY, work)
            (work / name).mkdir(exist_ok=True)
            found.errors.to_csv(work / name / ERRORS, index=False)


def install(work: Path) -> None:
    """Copy estimator and heads to where they ship from, measure, and write their card.

    Args:
        work: where `train` left them.
    """
    model = path(MODEL)
    estimator = load_estimator(work / STAGE.name / "model")
    save_estimator(estimator, model / "estimator")
    largest = max(STUDY.samples)
    heads: dict[str, Any] = {}
    for name in SHIPPED:
        home = model / "readouts" / name
        home.mkdir(parents=True, exist_ok=True)
        for file in ("readout.safetensors", "readout.json"):
            shutil.copyfile(work / f"{name}-{largest}" / file, home / file)
        steps = json.loads((home / "readout.json").read_text())["about"]["training_steps"]
        heads[name] = measured(pd.read_csv(work / name / ERRORS), name, steps)
    sd = Diffusion.from_pretrained(f"zoo:{MODEL}")
    rendered = render(draw_scenes(HELD_OUT, HELD_OUT_SEED))
    seen = {
        "held-out renders": accuracy(estimator, rendered, rendered.images),
        "their reconstructions": accuracy(estimator, rendered, sd.decode(sd.encode(2 * rendered.images - 1))),
    }
    stage = json.loads((work / STAGE.name / "stage.json").read_text())
    data = {"renders": RENDERS, "seed": RENDER_SEED, "held_out": HELD_OUT, "held_out_seed": HELD_OUT_SEED}
    write_card(model / "readouts", asdict(STUDY), heads, {"training": stage, **data, "accuracy": seen})


def measured(errors: pd.DataFrame, name: str, steps: int) -> dict[str, Any]:
    """How long a head was trained, and the mean errors of it and of its bounds."""
    largest = max(STUDY.samples)
    means = errors.groupby(["head", "samples"])["error"].mean()
    own = errors[errors["head"] == HEAD]
    return {
        "error": recipe_of(name).error,
        "lr": recipe_of(name).lr,
        "steps": steps,
        MEAN: round(float(means[MEAN, largest]), 5),
        PIXELS: round(float(means[PIXELS, largest]), 5),
        "by samples and timestep": {str(n): by_timestep(rows) for n, rows in own.groupby("samples")},
    }  # fmt: skip


def by_timestep(rows: pd.DataFrame) -> dict[str, float]:
    """The mean error at each timestep."""
    return {f"{time:g}": round(float(error), 5) for time, error in rows.groupby("timestep")["error"].mean().items()}


def main() -> None:
    """Read the command line, train, and install."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/zoo-readouts"), help="folder of the trainings")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.work)
    install(options.work)


if __name__ == "__main__":
    main()
