"""Diffusion Hyperfeatures: features aggregated over all layers and timesteps beside single ones, by PCK on pairs.

Source: Luo, Dunlap, Park, Holynski & Darrell 2023 (arXiv 2305.14334), its tables of PCK and its figures.
"""

from pathlib import Path
from typing import Annotated

import typer

import interp
from interp import tables
from interp.correspondence import read_pairs
from interp.errors import InputError
from interp.hyperfeatures import About, presets, save
from interp.hyperfeatures.comparison import AGGREGATED, Comparison, compare_methods
from interp.hyperfeatures.comparison_figures import draw_all
from interp.hyperfeatures.creature_pairs import FOLDS, creature_splits
from interp.hyperfeatures.study import Recipe, Split
from interp.runs import Run
from interp.zoo.creatures import caption, draw_scenes


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-diffusion",
    pairs: Annotated[str, typer.Option(help="A pair list to test on; empty: pictures of the creatures.")] = "",
    training: Annotated[str, typer.Option(help="With --pairs: the list to train on.")] = "",
    validation: Annotated[str, typer.Option(help="With --pairs: the list to choose by.")] = "",
    images: Annotated[str, typer.Option(help="With --pairs: the folder of their images.")] = "",
    image_size: Annotated[int, typer.Option(min=8, help="With --pairs: pixels a side that the model sees.")] = 512,
    match_size: Annotated[int, typer.Option(min=8, help="With --pairs: pixels a side to match at.")] = 224,
    hold: Annotated[int, typer.Option(min=2, help="With --pairs: feature stacks in memory at a time.")] = 4,
    folds: Annotated[int, typer.Option(min=1, max=3, help="Creatures: how many times two species are held out.")] = 3,
    train_pairs: Annotated[int, typer.Option(min=1, help="Creatures: training pairs of each species.")] = 40,
    test_pairs: Annotated[int, typer.Option(min=1, help="Creatures: test pairs of each species.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps at most, one pair each.")] = 600,
    dim: Annotated[int, typer.Option(help="Channels of the descriptor, a multiple of 32.")] = 128,
    device: Annotated[str, typer.Option(help="Such as 'cuda'; empty: the processor.")] = "",
    resume: Annotated[str, typer.Option(help="The folder of an interrupted run, to go on with its trainings.")] = "",
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Train the aggregation network, compare it with every baseline, print the table, draw the figures."""
    config = {name: value for name, value in locals().items() if name not in ("out", "resume")}
    if dim % 32:
        raise InputError(f"--dim {dim}: expected a multiple of 32, of which a quarter makes whole groups")
    sd = interp.Diffusion.from_pretrained(model, **({"device": device} if device else {}))
    if pairs:
        sizes = {"load_size": (match_size, match_size), "image_size": (image_size, image_size)}
        splits, size, held = [listed(pairs, training, validation, images)], (match_size, match_size), hold
    else:
        sizes, size, held = {}, None, None
        splits = creature_splits(train_pairs, max(2, train_pairs // 8), test_pairs, FOLDS[:folds])
    spec = presets.hyperfeatures(sd, **sizes)
    recipe = Recipe(dim=dim, width=dim // 4, n_groups=dim // 16, steps=steps, validate_every=max(1, steps // 8))
    folder = Run.open(resume) if resume else Run.create("hyperfeature-correspondence", config, root=out, seed=seeds)
    if resume and folder.config != config:
        raise InputError(f"{resume} was made with other options: {folder.config}, now {config}")
    with folder:
        found = compare_methods(
            sd, splits, spec, recipe, range(seeds), size=size, hold=held, folder=folder.folder / "training"
        )
        table = found.table()
        folder.save_table("pck", table)
        folder.save_table("pck-by-seed", found.by_seed())
        folder.save_table("pck-by-category", found.by_category())
        folder.save_json("chosen", {"chosen": found.chosen, "reconstruction_mse": found.reconstruction})
        for one in found.fitted:
            about = About(model, f"held out: {', '.join(splits[one.fold].held_out)}", one.training.best_step)
            save(one.net, folder.folder / f"aggregation-fold-{one.fold}-seed-{one.seed}", spec, about)
        for name, figure in draw_all(
            sd, splits, spec, found, None if pairs else creature_prompts(splits[0].held_out)
        ).items():
            folder.save_figure(name, figure)
        show(found, model)
        typer.echo(f"\nTables, figures and networks: {folder.folder}")


def listed(pairs: str, training: str, validation: str, images: str) -> Split:
    """A split of pair lists in the authors' format; without lists of their own, test pairs also train and choose."""
    if not images:
        raise InputError("--pairs needs --images, the folder of the images that the list names")
    parts = [read_pairs(name or pairs, images=images) for name in (training, validation, pairs)]
    files: dict[object, Path] = {}
    for pair in (one for part in parts for one in part):
        for key, file in ((pair.source, pair.source_file), (pair.target, pair.target_file)):
            assert file is not None
            files[key] = file
    return Split(files, *(tuple(part) for part in parts))


def creature_prompts(species: tuple[str, ...]) -> tuple[str, str]:
    """Two captions of the first species."""
    first, second = (caption(scene) for scene in draw_scenes(2, seed=7, species=species[:1]))
    return first, second


def show(found: Comparison, model: str) -> None:
    """Print PCK@0.1 by both bases, and what the main method gains."""
    table = found.table().set_index(["method", "base"])
    rows = []
    for method in found.evaluations:
        cells: list[object] = [method]
        for base in ("img", "bbox"):
            row = table.loc[(method, base)]
            cells += [f"{row['pck']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
        row = table.loc[(method, "bbox")]
        cells.append(
            "" if method == AGGREGATED else f"{row['gain']:+.3f} ({row['gain_low']:+.3f} to {row['gain_high']:+.3f})"
        )
        rows.append(cells)
    columns = ["PCK@0.1", "image", "95 % interval", "box", "95 % interval", "aggregated is better by (box)"]
    tables.show(columns, rows, title=model)
