"""Diffusion Hyperfeatures: features aggregated over all layers and timesteps beside single ones, by PCK on pairs.

Source: Luo, Dunlap, Park, Holynski & Darrell 2023 (arXiv 2305.14334), its tables of PCK and its figures.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

import interp
from interp import tables
from interp.correspondence import Pair, read_pairs, read_spair
from interp.correspondence.pck import BASES
from interp.errors import InputError
from interp.hyperfeatures import About, FeatureSpec, presets, save
from interp.hyperfeatures.comparison import AGGREGATED, Comparison, compare_methods
from interp.hyperfeatures.comparison_figures import draw_all
from interp.hyperfeatures.creature_pairs import FOLDS, creature_splits
from interp.hyperfeatures.study import Recipe, Split
from interp.runs import Run
from interp.zoo.creatures import caption, draw_scenes


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-diffusion",
    pairs: Annotated[str, typer.Option(help="A pair list to test on, or SPair-71k's folder; empty: creatures.")] = "",
    training: Annotated[str, typer.Option(help="With --pairs: the list to train on, needed.")] = "",
    validation: Annotated[str, typer.Option(help="With --pairs: the list to choose by, needed.")] = "",
    images: Annotated[str, typer.Option(help="With --pairs: the folder of their images.")] = "",
    image_size: Annotated[int, typer.Option(min=8, help="With --pairs: pixels a side that the model sees.")] = 512,
    match_size: Annotated[int, typer.Option(min=8, help="With --pairs: pixels a side to match at.")] = 224,
    hold: Annotated[int, typer.Option(min=2, help="With --pairs: feature stacks in memory at a time.")] = 4,
    process_steps: Annotated[int, typer.Option(min=2, help="Denoiser calls of a process; 50 in the paper.")] = 50,
    folds: Annotated[int, typer.Option(min=1, max=3, help="Creatures: how many times two species are held out.")] = 3,
    train_pairs: Annotated[int, typer.Option(min=1, help="Creatures: training pairs of each species.")] = 40,
    test_pairs: Annotated[int, typer.Option(min=1, help="Creatures: test pairs of each species.")] = 40,
    grid: Annotated[int, typer.Option(min=0, help="Cells a side of the maps; 0: as many as the latents have.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps at most, one pair each; 5000 in the paper.")] = 400,
    lr: Annotated[float, typer.Option(help="Learning rate; 0.001 in the paper.")] = 0.003,
    mixing_lr: Annotated[float, typer.Option(help="Of the mixing weights; 0.001 in the paper.")] = 0.03,
    dim: Annotated[int, typer.Option(help="Channels of the descriptor, a multiple of 16; 384 in the paper.")] = 64,
    device: Annotated[str, typer.Option(help="Such as 'cuda'; empty: the processor.")] = "",
    resume: Annotated[str, typer.Option(help="The folder of an interrupted run, to go on with its trainings.")] = "",
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Train the aggregation network, compare it with every baseline, print the table, draw the figures."""
    config = {name: value for name, value in locals().items() if name not in ("out", "resume")}
    if dim < 16 or dim % 16:
        raise InputError(f"--dim {dim}: expected a multiple of 16, of which a quarter makes whole groups")
    if resume:
        check_options(Run.open(resume), config)
    sd = interp.Diffusion.from_pretrained(model, **({"device": device} if device else {}))
    if pairs:
        sizes = {"load_size": (match_size, match_size), "image_size": (image_size, image_size)}
        split = published(pairs) if Path(pairs).is_dir() else listed(pairs, training, validation, images)
        splits, size, held = [split], (match_size, match_size), hold
    else:
        sizes, size, held = {}, None, None
        splits = creature_splits(train_pairs, max(2, train_pairs // 8), test_pairs, FOLDS[:folds])
    cells = {"output_size": (grid, grid)} if grid else {}
    spec = presets.hyperfeatures(sd, steps=process_steps, **sizes, **cells)
    width = dim // 4
    # Three channels a group, as in the paper, where they come out even.
    n_groups = width // 3 if width % 3 == 0 else width // 4
    network = {"dim": dim, "width": width, "n_groups": n_groups}
    recipe = Recipe(**network, steps=steps, lr=lr, mixing_lr=mixing_lr, validate_every=max(1, steps // 4))
    seen = sum(n_seen(split) for split in splits)
    if seen:
        typer.echo(f"{seen} test pairs show images of training or validation: this is no measurement.")
    folder = (
        Run.open(resume)
        if resume
        else Run.create("hyperfeature-correspondence", config, root=out, seed=list(range(seeds)))
    )
    with folder:
        found = compare_methods(
            sd, splits, spec, recipe, range(seeds), size=size, hold=held, folder=folder.folder / "training"
        )
        chosen = {"chosen": found.chosen, "reconstruction_mse": found.reconstruction, "test_pairs_seen": seen}
        # A run that was cut off while it wrote has some of its results already, and they are the same.
        for name, table in tables_of(found, spec).items():
            if not folder.is_done(name):
                folder.save_table(name, table)
        if not folder.is_done("chosen"):
            folder.save_json("chosen", chosen)
        save_networks(folder, found, splits, spec, model, training)
        prompts = None if pairs else creature_prompts(splits[0].held_out)
        for name, figure in draw_all(sd, splits, spec, found, prompts).items():
            if not folder.is_done(name):
                folder.save_figure(name, figure)
        show(found, model, splits)
        typer.echo(f"\nTables, figures and networks: {folder.folder}")


def check_options(before: Run, config: dict[str, object]) -> None:
    """Refuse to go on with a run whose options were others.

    Raises:
        InputError: naming the first difference.
    """
    for name, value in config.items():
        if before.config.get(name) != value:
            raise InputError(
                f"{str(before.folder)!r} was made with --{name.replace('_', '-')} {before.config.get(name)!r}, "
                f"not {value!r}: give the same options to go on with it"
            )
    if before.provenance["status"] == "done":
        raise InputError(f"{str(before.folder)!r} is done: there is nothing to go on with")


def listed(pairs: str, training: str, validation: str, images: str) -> Split:
    """A split of pair lists in the authors' format.

    Raises:
        InputError: a list or the folder of images is missing; also as `read_pairs`.
    """
    if not images:
        raise InputError("--pairs needs --images, the folder of the images that the list names")
    for option, name in (("--training", training), ("--validation", validation)):
        if not name:
            raise InputError(
                f"--pairs needs {option}, a list of other pairs; to see no more than that everything runs, give the "
                "test list for all three"
            )
    return split_of([read_pairs(name, images=images) for name in (training, validation, pairs)])


def published(folder: str) -> Split:
    """The split of SPair-71k as published: its training, validation and test pairs.

    Raises:
        InputError: as `read_spair`.
    """
    return split_of([read_spair(folder, name) for name in ("trn", "val", "test")])


def split_of(parts: list[list[Pair]]) -> Split:
    """Training, validation and test pairs with the files of their images."""
    files: dict[object, Path] = {}
    for pair in (one for part in parts for one in part):
        for key, file in ((pair.source, pair.source_file), (pair.target, pair.target_file)):
            assert file is not None
            files[key] = file
    return Split(files, *(tuple(part) for part in parts))


def n_seen(split: Split) -> int:
    """How many test pairs show an image of the training or validation pairs."""
    known = {split.images[key] for pair in (*split.train, *split.validation) for key in (pair.source, pair.target)}
    return sum(not known.isdisjoint((split.images[pair.source], split.images[pair.target])) for pair in split.test)


def tables_of(found: Comparison, spec: FeatureSpec) -> dict[str, pd.DataFrame]:
    """What the figures show, and more, as numbers."""
    maps = {base: found.cell_map(base) for base in BASES}
    cells = [
        {"timestep": timestep, "layer": site}
        | {f"pck_{base}": float(values[step, layer]) for base, values in maps.items()}
        for step, timestep in enumerate(spec.timesteps)
        for layer, site in enumerate(spec.sites)
    ]
    return {
        "pck": found.table(),
        "pck-by-seed": found.by_seed(),
        "pck-by-category": found.by_category(),
        "single-cells-table": pd.DataFrame(cells),
        "mixing-weights-table": found.mixing().reset_index(),
    }


def save_networks(
    folder: Run, found: Comparison, splits: list[Split], spec: FeatureSpec, model: str, training: str
) -> None:
    """Write every aggregation network of the main method with what it was trained on."""
    for one in found.fitted:
        data = training or f"creatures, held out: {', '.join(splits[one.fold].held_out)}"
        best = one.training.best_score
        scores = {} if best is None else {"PCK@0.1 bbox, validation": best}
        about = About(model, data, one.training.best_step, scores)
        save(one.net, folder.folder / f"aggregation-fold-{one.fold}-seed-{one.seed}", spec, about)


def creature_prompts(species: tuple[str, ...]) -> tuple[str, str]:
    """Two captions of the first species."""
    first, second = (caption(scene) for scene in draw_scenes(2, seed=7, species=species[:1]))
    return first, second


TITLES = {"test": "species held out of training", "familiar": "species trained on, in other pictures"}


def show(found: Comparison, model: str, splits: list[Split]) -> None:
    """Print PCK@0.1 by both bases, and what the main method gains."""
    columns = ["PCK@0.1", "image", "95 % interval", "box", "95 % interval", "aggregated is better by (box)"]
    table = found.table().set_index(["part", "method", "base"])
    for part, evaluations in found.parts.items():
        rows = []
        for method in evaluations:
            cells: list[object] = [method]
            for base in ("img", "bbox"):
                row = table.loc[(part, method, base)]
                cells += [f"{row['pck']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
            row = table.loc[(part, method, "bbox")]
            gain = f"{row['gain']:+.3f} ({row['gain_low']:+.3f} to {row['gain_high']:+.3f})"
            rows.append([*cells, "" if method == AGGREGATED else gain])
        tables.show(columns, rows, title=f"{model}: {TITLES[part]}" if splits[0].held_out else model)
    if found.reconstruction is not None:
        typer.echo(
            "Generation features are those of the test images, inverted and generated again without a prompt: they "
            f"come back with a mean squared error of {found.reconstruction:.1e} (of 1)."
        )
