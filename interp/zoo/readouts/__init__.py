"""Readout heads that ship with the small diffusion model, and the estimator that judges what they guide."""

from pathlib import Path

from interp.errors import InputError, UnknownNameError, nearest
from interp.hyperfeatures.checkpoints import About
from interp.models.diffusion import Diffusion
from interp.readouts.checkpoints import about, load
from interp.readouts.readout import Readout
from interp.zoo import path
from interp.zoo.readouts.estimator import Estimate, Estimator, load_estimator

MODEL = "tiny-diffusion"

__all__ = ["Estimate", "Estimator", "estimator", "head", "head_about", "head_names", "heads_folder"]


def heads_folder() -> Path:
    """The folder of the heads that ship: one folder for each."""
    return path(MODEL) / "readouts"


def head_names(folder: Path | None = None) -> list[str]:
    """The names of the heads in a folder; of those that ship without one."""
    home = heads_folder() if folder is None else folder
    return sorted(file.parent.name for file in home.glob("*/readout.json"))


def head(name: str, sd: Diffusion | None = None, folder: str | Path | None = None) -> Readout:
    """A head that ships, or one of the same name from another folder.

    Args:
        name: of the property, such as ``"pose"``.
        sd: the model that it is to be used on, which is checked; those that ship are for ``zoo:tiny-diffusion``.
        folder: of heads, one folder for each; or of a run of ``readout-heads``, whose heads of most samples are taken;
            None: of those that ship.

    Raises:
        UnknownNameError: no such head.
        InputError: another model, or a head of another property under this name.
    """
    home = _home(name, folder)
    found = load(home, sd)
    if found.name != name:
        raise InputError(f"{str(home)!r} holds a head of {found.name!r}, not of {name!r}")
    return found


def head_about(name: str, folder: str | Path | None = None) -> About:
    """What is recorded of such a head: the data that it was trained on, the steps, its errors.

    Args:
        name: as for `head`.
        folder: as for `head`.

    Raises:
        UnknownNameError: no such head.
    """
    return about(_home(name, folder))


def _home(name: str, folder: str | Path | None) -> Path:
    home = heads_folder() if folder is None else Path(folder)
    home = home / "heads" if (home / "heads").is_dir() else home
    known = head_names(home)
    counts = [int(one.removeprefix(f"{name}-")) for one in known if one.removeprefix(f"{name}-").isdigit()]
    name_there = f"{name}-{max(counts)}" if name not in known and counts else name
    if name_there not in known:
        there = f"in {str(home)!r} there are {', '.join(known)}" if known else f"{str(home)!r} holds none"
        raise UnknownNameError(f"no head {name!r}: {there}. {nearest(name, known)}".rstrip())
    return home / name_there


def estimator() -> Estimator:
    """The estimator that ships.

    Raises:
        InputError: it is missing.
    """
    return load_estimator(path(MODEL) / "estimator")
