"""Where in a network and when in the process a property is readable: one small head for each site and timestep."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.errors import InputError
from interp.hyperfeatures.features import add_noise, as_maps
from interp.models.diffusion import Diffusion
from interp.progress import progress as progress_bar
from interp.readouts.head import ReadoutHead
from interp.readouts.losses import match_size
from interp.readouts.probes import AttentionProbe, ProbeLoss, fit_probe
from interp.readouts.readout import fingerprint
from interp.readouts.sweep_files import COLUMNS, Cells, digest
from interp.readouts.times import allowed_timesteps


@dataclass(frozen=True, eq=False)
class ReadoutTask:
    """A property that is to be read, and what reads it.

    Attributes:
        name: of the property.
        targets: one for each example, as `fit_probe` takes them.
        head: makes a head for a site's channels, from a seed.
        loss: as for `fit_probe`.
        score: of readouts and targets of held-out examples, the training targets for reference; more is better.
        settings: what the head is, in what JSON can say; compared when a sweep goes on.
    """

    name: str
    targets: Tensor
    head: Callable[[int, int], nn.Module]
    loss: str | ProbeLoss
    score: Callable[[Tensor, Tensor, Tensor], float]
    settings: Mapping[str, Any] = field(default_factory=dict)


def picture_task(
    name: str, targets: Float[Tensor, "example channel height width"], *, dim: int = 32, n_groups: int = 8
) -> ReadoutTask:
    """Read a picture or heat maps with a small `ReadoutHead`; the score is R² over the mean picture.

    Args:
        name: of the property.
        targets: of all examples.
        dim: channels of the head.
        n_groups: of its normalisations.
    """

    def head(channels: int, seed: int) -> nn.Module:
        widths = (dim, dim // 2)
        return ReadoutHead(
            [channels], dim, dim, out_channels=targets.shape[1], output_widths=widths, squash=False,
            n_groups=n_groups, seed=seed,
        )  # fmt: skip

    settings = {"head": ReadoutHead.__name__, "dim": dim, "n_groups": n_groups}
    return ReadoutTask(name, targets, head, "mse", explained, settings)


def class_task(
    name: str, labels: Int[Tensor, " example"], n_classes: int | None = None, *, n_heads: int = 4
) -> ReadoutTask:
    """Read a class, such as a species, with an `AttentionProbe`; the score is the share of right ones.

    Args:
        name: of the property.
        labels: of all examples.
        n_classes: how many there are; one more than the greatest label, when not given.
        n_heads: of the probe.

    Raises:
        InputError: no labels, or some that are no classes.
    """
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or int(labels.min()) < 0:
        raise InputError(f"labels of {name!r} are whole numbers from 0 on, one for each example: {labels}")
    n = int(labels.max()) + 1 if n_classes is None else n_classes
    if int(labels.max()) >= n:
        raise InputError(f"labels of {name!r} go up to {int(labels.max())}, with n_classes={n}")

    def head(channels: int, seed: int) -> nn.Module:
        return AttentionProbe(channels, n, n_heads=n_heads, seed=seed)

    settings = {"head": AttentionProbe.__name__, "n_classes": n, "n_heads": n_heads}
    return ReadoutTask(name, labels, head, "cross_entropy", right, settings)


def explained(read: Tensor, targets: Tensor, reference: Tensor) -> float:
    """R² of readouts: 1 minus the squared error over that of the mean of other targets.

    Args:
        read: what was read from held-out examples.
        targets: theirs; resized by the nearest pixel.
        reference: targets whose mean is predicted without reading anything.
    """
    size = (read.shape[-2], read.shape[-1])
    true, mean = match_size(targets, size), match_size(reference, size).mean(dim=0)
    return 1 - float((read - true).square().sum() / (mean - true).square().sum())


def right(read: Tensor, targets: Tensor, reference: Tensor) -> float:
    """Share of examples whose highest class is the right one."""
    return float((read.argmax(dim=1) == targets).float().mean())


def readout_sweep(
    sd: Diffusion,
    sites: str | Sequence[str],
    timesteps: Sequence[int],
    images: Float[Tensor, "example channel height width"],
    tasks: Sequence[ReadoutTask],
    *,
    n_train: int,
    latents: bool = False,
    size: tuple[int, int] | None = None,
    steps: int = 300,
    batch: int = 32,
    lr: float = 3e-3,
    model_batch: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    folder: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train the same small head for every site, timestep and property.

    The model sees every example once at each timestep, however many sites and properties there are; the maps of one
    timestep are held at a time.

    Args:
        sd: the diffusion model; prompt "", no guidance.
        sites: names or patterns.
        timesteps: what the model sees; examples have the same noise at all of them.
        images: in -1 .. 1, or latents.
        tasks: what is to be read.
        n_train: how many examples, the first, heads are trained on; they are scored on the rest.
        latents: whether ``images`` are latents.
        size: (height, width) that maps are resized to, bilinearly; None: the latents'.
        steps, batch, lr: of every head's training.
        model_batch: examples in one call of the model.
        seed: of noise, initial weights and order.
        dtype: in which maps are held; float16 halves them.
        folder: keeps every cell that is done; a sweep of the same model, examples, targets and settings that is found
            there goes on.
        progress: show a bar over cells.

    Returns:
        A row for each cell: ``task``, ``site``, ``timestep``, ``score`` (held out), ``train_score`` and ``loss`` (mean
        of the last tenth of the steps).

    Raises:
        InputError: no examples to train on or to score, another number of targets, a timestep out of range, or a folder
            of another sweep.
        UnknownNameError, SiteUnavailableError: sites that the model lacks.
    """
    names = [place.site for place in sd.expanded(sites)]
    _check(names, timesteps, tasks, len(images), n_train, size, batch, model_batch)
    allowed_timesteps(sd, "true_t", timesteps)
    asked = {"model": sd.name, "n_train": n_train, "n_examples": len(images), "steps": steps, "batch": batch, "lr": lr}
    asked |= {"model_batch": model_batch, "latents": latents}
    asked |= {"seed": seed, "size": None if size is None else list(size), "dtype": str(dtype).removeprefix("torch.")}
    if folder is not None:
        # A sweep goes on cell by cell: cells of other data would stand beside new ones, and nobody could tell.
        asked |= {"weights": list(fingerprint(sd)), "images": digest(images)}
    done = Cells(None if folder is None else Path(folder), asked, {} if folder is None else _described(tasks))
    clean = images if latents else _encoded(sd, images, model_batch)
    cells = [(time, task.name, site) for time in timesteps for task in tasks for site in names]
    with progress_bar(len(cells), "sweeping sites and timesteps") if progress else nullcontext() as bar:
        for time in timesteps:
            missing = [site for site in names if any((time, task.name, site) not in done.rows for task in tasks)]
            maps = _maps(sd, clean, time, missing, size or tuple(clean.shape[-2:]), model_batch, seed, dtype)
            for site in names:
                found = maps.pop(site, None)
                for task in tasks:
                    if (time, task.name, site) not in done.rows:
                        assert found is not None
                        row = _cell(task, found, n_train, steps, batch, lr, seed, sd.device)
                        done.add({"task": task.name, "site": site, "timestep": time} | row)
                    if bar is not None:
                        bar.update(1)
    rows = [done.rows[time, task.name, site] for task in tasks for site in names for time in timesteps]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _described(tasks: Sequence[ReadoutTask]) -> dict[str, str]:
    """What each task is made of, as a digest."""
    found = {}
    for task in tasks:
        loss = task.loss if isinstance(task.loss, str) else "a function"
        made = json.dumps([digest(task.targets), loss, dict(task.settings)])
        found[task.name] = hashlib.sha256(made.encode()).hexdigest()[:16]
    return found


@torch.no_grad()
def _encoded(sd: Diffusion, images: Tensor, batch: int) -> Tensor:
    return torch.cat([sd.encode(images[at : at + batch]) for at in range(0, len(images), batch)])


@torch.no_grad()
def _maps(
    sd: Diffusion,
    clean: Tensor,
    time: int,
    sites: list[str],
    size: tuple[int, ...],
    batch: int,
    seed: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The maps of all examples at one timestep, one call of the model for each batch."""
    if not sites:
        return {}
    generator = torch.Generator("cpu").manual_seed(seed)
    context = sd.prompt("")
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for at in range(0, len(clean), batch):
        some = clean[at : at + batch].to(sd.device, sd.dtype)
        noise = torch.randn(some.shape, generator=generator, dtype=torch.float32).to(some)
        acts = sd.capture(add_noise(sd, some, noise, float(time)), time, context, sites, stop=True)
        for site in sites:
            found = as_maps(acts[site].float(), clean.shape, site)
            if tuple(found.shape[-2:]) != tuple(size):
                found = F.interpolate(found, size=tuple(size), mode="bilinear", align_corners=False)
            parts[site].append(found.to("cpu", dtype))
    return {site: torch.cat(tensors) for site, tensors in parts.items()}


def _cell(
    task: ReadoutTask,
    maps: Tensor,
    n_train: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    head = task.head(maps.shape[1], seed).to(device)
    maps, targets = maps.to(device), task.targets.to(device)
    training = fit_probe(
        head,
        maps[:n_train],
        targets[:n_train],
        task.loss,
        steps=steps,
        batch=min(batch, n_train),
        lr=lr,
        validate_every=steps,
        seed=seed,
        progress=False,
    )
    head.eval()
    with torch.no_grad():
        read = torch.cat([_read(head, some) for some in maps.split(batch)])
    scores = [
        task.score(read[part], targets[part], targets[:n_train]) for part in (slice(n_train, None), slice(n_train))
    ]
    last = training.history["loss"].tail(max(steps // 10, 1))
    return {"score": scores[0], "train_score": scores[1], "loss": float(last.mean())}


def _read(head: nn.Module, maps: Tensor) -> Tensor:
    read: Tensor = head([maps] if isinstance(head, ReadoutHead) else maps)
    return read.float()


def _check(
    sites: Sequence[str],
    timesteps: Sequence[int],
    tasks: Sequence[ReadoutTask],
    n_examples: int,
    n_train: int,
    size: tuple[int, int] | None,
    batch: int,
    model_batch: int,
) -> None:
    if not sites or not timesteps or not tasks:
        raise InputError("a sweep needs at least one site, one timestep and one task")
    for what, values in (("timesteps", timesteps), ("tasks", [task.name for task in tasks])):
        if len(set(values)) < len(values):
            raise InputError(f"the {what} {list(values)} are not all different")
    if not 1 <= n_train < n_examples:
        raise InputError(f"n_train={n_train} of {n_examples} examples: leave some to train on and some to score")
    sizes = {"model_batch": model_batch, "batch": batch} | dict(zip(("height", "width"), size or (), strict=False))
    for what, number in sizes.items():
        if number < 1:
            raise InputError(f"{what}={number}: give at least 1")
    for task in tasks:
        if len(task.targets) != n_examples:
            raise InputError(f"{task.name} has {len(task.targets)} targets for {n_examples} examples")
