"""Cross-modal task vectors: extract from text, images and instructions, patch across modalities, compare with prompts.

Source: Luo, Darrell & Bar 2025 (arXiv 2410.22330), its table of transfer and the figures around it.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

import interp
from interp import cross_modal, lens, tables
from interp.cross_modal import Bank, Result, Settings
from interp.cross_modal_figures import draw_all
from interp.cross_modal_tables import by_layer, exact_answers, per_item, summary
from interp.errors import InputError
from interp.progress import track
from interp.runs import Run
from interp.tasks import Task, load_task
from interp.zoo.world import tasks as world_tasks

WIDE_TERMINAL = 110  # columns that the table with its tasks needs


def run(
    model: Annotated[str, typer.Option(help="zoo:NAME, a local folder, or a Hub id.")] = "zoo:tiny-llava",
    language_model: Annotated[
        str, typer.Option(help="The model that the VLM started from; 'none' leaves it out.")
    ] = "zoo:tiny-llama",
    tasks: Annotated[
        str, typer.Option(help="Folder of {task}_val.json and {task}_test.json; empty: the world that ships.")
    ] = "",
    image_root: Annotated[str, typer.Option(help="Folder that the image paths of --tasks start from.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of examples.")] = 3,
    shots: Annotated[int, typer.Option(min=1, help="Examples per prompt.")] = 5,
    layer: Annotated[int, typer.Option(help="Block to patch; -1 chooses it on validation items.")] = -1,
    out: Annotated[str, typer.Option(help="Where run folders are made.")] = "runs",
) -> None:
    """Measure how task vectors move between text, images and instructions; print the table, draw the figures."""
    config = {name: value for name, value in locals().items() if name != "out"}
    settings = Settings(n_shots=shots, seeds=tuple(range(1, seeds + 1)))
    vlm, source = load(model, language_model)
    if not -1 <= layer < vlm.n_layers:
        raise InputError(f"--layer {layer}: {model} has layers 0 to {vlm.n_layers - 1}; -1 chooses one")
    world = load_tasks(tasks, image_root)
    with Run.create("task-vector-transfer", config, root=out, seed=list(settings.seeds)) as folder:
        bank = cross_modal.specify(vlm, world, settings, source)
        if layer == -1:
            choice = cross_modal.choose_on_validation(vlm, world, bank, settings)
            folder.save_json("validation", asdict(choice))
            layer = choice.layer
        results: list[Result] = []
        for task in track(list(world.values()), "transfer"):
            for query in ("image", "text"):
                results += cross_modal.run_prompts(vlm, task, query, settings)
                results += cross_modal.run_patches(vlm, task, world, bank, query, settings)
        table = summary(results, list(world), layer, exact_answers(vlm, results, layer))
        folder.save_table("summary", table)
        folder.save_table("by-layer", by_layer(results))
        folder.save_table("items", per_item(vlm, results, layer))
        folder.save_table("decodes", decodes(vlm, bank, layer))
        for name, figure in draw_all(vlm, world, bank, results, table, layer, settings).items():
            folder.save_figure(name, figure)
        for query in ("image", "text"):
            show(table[table["query"] == query], list(world), f"{model}, {query} queries, patched after block {layer}")
        typer.echo(f"\nTables and figures: {folder.folder}")


def load(model: str, language_model: str) -> tuple[interp.VLM, interp.VLM | None]:
    """The VLM, and the language model that it started from."""
    vlm = interp.VLM.from_pretrained(model)
    if not vlm.has_vision:
        raise InputError(f"{model} reads text only; transfer between modalities needs a vision-language model")
    if language_model == "none":
        return vlm, None
    source = interp.VLM.from_pretrained(language_model)
    if (source.n_layers, source.d_model) != (vlm.n_layers, vlm.d_model):
        raise InputError(
            f"{language_model} has {source.n_layers} layers of width {source.d_model}, {model} has {vlm.n_layers} of "
            f"{vlm.d_model}: name the model that it started from with --language-model, or 'none'"
        )
    return vlm, source


def load_tasks(folder: str, image_root: str) -> dict[str, Task]:
    """The paper's six tasks in the world that ships, or a user's own in the official format.

    Own tasks need a file tasks.json beside them: ``{name: {"instruction": ..., "category": ...}}``.
    """
    if not folder:
        return world_tasks(only_paper=True)
    names = sorted(path.name.removesuffix("_val.json") for path in Path(folder).glob("*_val.json"))
    if not names:
        raise InputError(f"no task files named {{task}}_val.json in {folder!r}")
    about = read_about(Path(folder) / "tasks.json", names)
    loaded = {name: load_task(folder, name=name, image_root=image_root or None, **about[name]) for name in names}
    cross_modal.check_tasks(loaded)
    return loaded


def read_about(file: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Instruction and category of own tasks; the paper's six need no file."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    about = {name: known.get(name, {}) for name in names} if isinstance(known, dict) else {}
    if (
        not all(isinstance(one, dict) and set(one) <= {"instruction", "category"} for one in about.values())
        or not about
    ):
        raise InputError(f'{file} must hold {{task: {{"instruction": ..., "category": ...}}}}')
    return about


def decodes(vlm: interp.VLM, bank: Bank, layer: int) -> pd.DataFrame:
    """What the vectors of the first seed stand for, by the model's own final norm and unembedding."""
    rows = [
        {
            "task": task,
            "specification": spec,
            "tokens": " ".join(repr(t) for t, _ in lens.decode(vlm, v[0].at(layer))),
        }
        for task, by_spec in bank.items()
        for spec, v in by_spec.items()
    ]
    return pd.DataFrame(rows)


def show(table: pd.DataFrame, tasks: list[str], title: str) -> None:
    """Print one part of the table; a terminal too narrow for the tasks gets their average alone."""
    console = Console()
    shown = [] if console.is_terminal and console.width < WIDE_TERMINAL else tasks
    columns = [
        f"{table['query'].iloc[0]} queries",
        *(task.split("-")[-1] for task in shown),
        "average",
        "95 % interval",
        "exact",
    ]
    rows = [
        [
            row["condition"],
            *(row[task] for task in shown),
            row["average"],
            f"{row['low']:.2f} to {row['high']:.2f}",
            None if pd.isna(row["exact"]) else row["exact"],
        ]
        for _, row in table.iterrows()
    ]
    tables.show(columns, rows, title=title, console=console)
