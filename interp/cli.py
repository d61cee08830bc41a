"""The command ``interp``: run experiments, list sites and models."""

import ast
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from interp import __version__, tables
from interp.errors import InputError, InterpError, UnknownNameError, nearest

app = typer.Typer(
    help="Read and write the activations of vision-language and diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. What a user did wrong is one message and exit status 2.

    Args:
        arguments: the words after ``interp``; those of this process without it.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=words, prog_name="interp")
    except InterpError as error:
        if words[0] == "--debug":
            raise
        print(f"interp: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback()
def _settings(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    # `main` reads it: it outlives the command.
    pass


# Options that are not known here are the experiment's own.
@app.command("run", add_help_option=False, context_settings={"ignore_unknown_options": True})
def _run(
    name: Annotated[str, typer.Argument(help="An experiment, or a .py file of your own.")] = "",
    options: Annotated[list[str] | None, typer.Argument(help="Options of the experiment.")] = None,
) -> None:
    """Run an experiment; without a name, list all.

    "interp run NAME --help" tells the options of one.
    """
    if name in ("", "--help", "-h"):
        if name:
            typer.echo("Usage: interp run NAME [OPTIONS]    (interp run NAME --help tells its options)\n")
        rows = [(title, first_line(path)) for title, path in experiments().items()]
        tables.show(("experiment", "what it shows"), rows)
        return
    function = load_experiment(name)
    experiment = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    experiment.command(help=function.__doc__ or sys.modules[function.__module__].__doc__)(function)
    command = typer.main.get_command(experiment)
    # Not standalone: the outer command reports what was wrong with the options.
    status = command.main(args=options or [], prog_name=f"interp run {name}", standalone_mode=False)
    if isinstance(status, int) and status:
        raise typer.Exit(status)


@app.command("sites")
def _sites(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a local folder, or a Hub id.")],
    pattern: Annotated[str, typer.Argument(help="Such as 'blocks.*.hook_resid_post'.")] = "",
    diffusion: Annotated[bool, typer.Option("--diffusion", help="A Hub id of a diffusion pipeline.")] = False,
) -> None:
    """List the sites of a model, one a line."""
    from interp import zoo
    from interp.models.diffusion import Diffusion
    from interp.models.vlm import VLM

    folder = zoo.path(model) if model.startswith(zoo.PREFIX) else Path(model)
    wrapper: Any = Diffusion if diffusion or (folder / "model_index.json").is_file() else VLM
    for site in wrapper.from_pretrained(model).sites(pattern or None):
        typer.echo(site)


@app.command("zoo")
def _zoo() -> None:
    """List the models that ship, with their figures."""
    from interp import zoo

    rows: list[tuple[str, str, float]] = []
    for name in zoo.names():
        size = sum(file.stat().st_size for file in zoo.path(name).rglob("*") if file.is_file())
        rows.append((f"zoo:{name}", "size in MB", size / 1e6))
        rows += [(f"zoo:{name}", *figure) for figure in card_figures(zoo.card(name))]
    tables.show(("model", "figure", "value"), rows)


@app.command("version")
def _version() -> None:
    """Tell the versions of what is installed."""
    rows = [("interp", __version__), ("python", platform.python_version())]
    rows += [(name, importlib.metadata.version(name)) for name in ("torch", "transformers", "diffusers", "tokenizers")]
    tables.show(("package", "version"), rows)


def experiments_folder() -> Path:
    """The folder of the experiments that ship: inside an installed package, or beside it in a checkout.

    Raises:
        InputError: there is none.
    """
    package = Path(__file__).parent
    for folder in (package / "_experiments", package.parent / "experiments"):
        if folder.is_dir():
            return folder
    raise InputError("This installation of interp has no experiments; name a .py file of your own instead.")


def experiments(folder: Path | None = None) -> dict[str, Path]:
    """Find the experiments of a folder.

    Args:
        folder: where to look; `experiments_folder` without it.

    Returns:
        Name (with dashes) -> file, sorted; files that start with an underscore are left out.
    """
    folder = experiments_folder() if folder is None else folder
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in files}


def first_line(path: Path) -> str:
    """Read the first line of a file's docstring, without running the file."""
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return words.partition("\n")[0]


def load_experiment(name: str, folder: Path | None = None) -> Callable[..., Any]:
    """Load the ``run`` function of an experiment.

    Args:
        name: as listed (dashes and underscores are the same), or the path of a ``.py`` file.
        folder: where experiments are; `experiments_folder` without it.

    Returns:
        The function.

    Raises:
        UnknownNameError: there is no such experiment.
        InputError: there is no such file, or it has no function ``run``.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"There is no file {name!r}.")
    else:
        known = experiments(folder)
        wanted = name.replace("_", "-")
        if wanted not in known:
            raise UnknownNameError(
                f"There is no experiment {name!r}. {nearest(wanted, known)} "
                f"Experiments: {', '.join(known) or 'none'}.".replace("  ", " ")
            )
        path = known[wanted]
    module_name = f"interp_experiment_{path.stem}"
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and annotations of the module look themselves up there.
    sys.modules[module_name] = module
    specification.loader.exec_module(module)
    function = getattr(module, "run", None)
    if not callable(function):
        raise InputError(f"{str(path)!r} has no function 'run', which every experiment has.")
    return function


def card_figures(card: dict[str, Any]) -> list[tuple[str, float]]:
    """Pick the main figures of a model's card: accuracies over all tasks, or how well pictures follow captions.

    Args:
        card: as `interp.zoo.card` gives it.

    Returns:
        Condition and first-token accuracy of each prompt and patch; of a diffusion model, the share of generated
        pictures that show what each part of the caption says.
    """
    figures = card["figures"]
    shown = [
        (f"{condition}: {part}", float(share))
        for condition, shares in figures.get("generated", {}).items()
        for part, share in shares.items()
    ]
    return shown + [
        (f"{section}: {condition}", float(measured["first_token"]))
        for section in ("prompts", "patches")
        for condition, measured in figures.get(section, {}).items()
    ]


if __name__ == "__main__":
    main()
