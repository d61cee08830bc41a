"""The cells of a patching grid: which activations one variant takes from the other run, and their measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit, Replace
from interp.errors import InputError
from interp.patching.corruption import MeanOver, Run, TokenNoise, two_runs
from interp.patching.guard import moves, no_patch_moves
from interp.patching.metric import MetricFunction, measure, name_of
from interp.patching.options import check_options
from interp.patching.tokens import Aligned, align, as_groups, layouts_of, per_row
from interp.sites import parse

# "denoise" or "noise"; what else is given is refused with a reason when the experiment is prepared.
Direction = str


@dataclass(frozen=True)
class Cell:
    """What one variant patches: a group of tokens at one site, or at several together.

    Args:
        group: index of the token group.
        sites: patched together, such as those of a window of layers.
        head: the only head that is patched; None: all of the site.
    """

    group: int
    sites: tuple[str, ...]
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Experiment:
    """Two runs and the token groups in which they are compared.

    Args:
        vlm: the model.
        metric: of the logits at the last token.
        direction: ``"denoise"``: clean activations are put into the corrupt run, which shows what suffices;
            ``"noise"``: corrupt ones are put into the clean run, which shows what is needed.
        clean, corrupt: the metric of both runs, of each example.
        sources, bases: for each draw, the run that values come from and the one they are put into.
        groups: token groups, in both.
        explicit: whether the caller named the groups.
    """

    vlm: Any
    metric: MetricFunction
    direction: Direction
    clean: Float[Tensor, " example"]
    corrupt: Float[Tensor, " example"]
    sources: tuple[Run, ...]
    bases: tuple[Run, ...]
    groups: tuple[Aligned, ...]
    explicit: bool

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the patched run reads."""
        return self.bases[0].inputs

    @property
    def base_metric(self) -> Float[Tensor, " example"]:
        """The metric of the unpatched run, the mean over draws."""
        return torch.stack([run.metric for run in self.bases]).mean(dim=0)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the groups."""
        return tuple(aligned.group.name for aligned in self.groups)

    def about(self, **more: Any) -> dict[str, Any]:
        """What produced a result."""
        draws = len(self.sources)
        described = {"model": self.vlm.name, "direction": self.direction, "metric": name_of(self.metric)}
        return described | {"draws": draws, "groups": list(self.names)} | more

    def patch(self, cell: Cell, draw: int = 0) -> list[Edit]:
        """The edits of one variant; none where they would write what is there already."""
        return self._edits(cell, draw, None)

    def random_patch(self, cell: Cell, generator: torch.Generator, draw: int = 0) -> list[Edit]:
        """The same with changes of the same norm in random directions, token by token."""
        return self._edits(cell, draw, generator)

    def values(self, cell: Cell, site: str, row: int, draw: int = 0) -> tuple[Tensor, Tensor]:
        """What one row of a site gets, and what is there: ``[n, ...]`` each."""
        aligned, source, base = self.groups[cell.group], self.sources[draw], self.bases[draw]
        new = source.gather(site, aligned.group, aligned.source[row], row)
        old = base.acts[site][row, aligned.base[row]]
        if new.shape != old.shape:
            raise InputError(f"group {aligned.group.name!r}: the mean has {len(new)} tokens, the prompt {len(old)}")
        return (new, old) if cell.head is None else (new[:, [cell.head]], old[:, [cell.head]])

    def _edits(self, cell: Cell, draw: int, generator: torch.Generator | None) -> list[Edit]:
        aligned = self.groups[cell.group]
        at = per_row(aligned.base, layouts_of(self.inputs))
        edits: list[Edit] = []
        for site in cell.sites:
            for rows in aligned.rectangles():
                pairs = [self.values(cell, site, row, draw) for row in rows]
                new, old = (torch.stack(side) for side in zip(*pairs, strict=True))
                if torch.equal(new, old):
                    continue
                if generator is not None:
                    new = old + random_like(new - old, generator)
                edits.append(Replace(site, new, at=at, rows=rows, heads=None if cell.head is None else [cell.head]))
        return edits


def prepare(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Any,
    metric: MetricFunction,
    sites: Sequence[str],
    positions: Any,
    direction: Direction,
    gradients: bool = False,
) -> Experiment:
    """Run clean and corrupt, and find the token groups in both.

    Args:
        vlm: the model.
        clean: prepared or plain model inputs.
        corrupt: inputs with another prompt or image in each row, or `TokenNoise`, or `MeanOver`.
        metric: of the logits at the last token.
        sites: full site names, to capture.
        positions: token groups, as for `interp.patching.tokens.as_groups`.
        direction: of the patches.
        gradients: whether the base run goes backward too.

    Raises:
        InputError: see `activation`.
    """
    check_direction(direction)
    groups = as_groups(positions, clean)
    other = clean if isinstance(corrupt, TokenNoise | MeanOver) else corrupt
    if not isinstance(other, Mapping):
        raise InputError(f"corrupt={corrupt!r}: give inputs, TokenNoise or MeanOver")
    pair = (clean, other) if direction == "denoise" else (other, clean)
    # Before anything runs, so that prompts that do not fit are refused at once.
    aligned = tuple(align(groups, *pair))
    backward: Literal["clean", "corrupt"] | None = None
    if gradients:
        backward = "corrupt" if direction == "denoise" else "clean"
    first, runs = two_runs(vlm, clean, corrupt, metric, sites, backward)
    cleans = (first,) * len(runs)
    sources, bases = (cleans, tuple(runs)) if direction == "denoise" else (tuple(runs), cleans)
    corrupt_metric = torch.stack([run.metric for run in runs]).mean(dim=0)
    explicit = positions is not None
    return Experiment(vlm, metric, direction, first.metric, corrupt_metric, sources, bases, aligned, explicit)


def check_direction(direction: Direction) -> None:
    """Refuse what is no direction of patches.

    Raises:
        InputError: other than ``"denoise"`` or ``"noise"``.
    """
    if direction not in ("denoise", "noise"):
        raise InputError(
            f"direction={direction!r}: give 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)"
        )


def language_sites(vlm: Any, leaves: Sequence[str], layers: Sequence[int] | None = None) -> dict[str, dict[int, str]]:
    """For each kind of activation, the site of each layer of the language model.

    Args:
        vlm: the model.
        leaves: such as ``"hook_resid_post"``: names after ``blocks.N.``.
        layers: which; None: all.

    Raises:
        InputError: none given, a site of another tower, one without tokens, or a layer that is not there.
        UnknownNameError, SiteUnavailableError: the model has no such site.
    """
    if isinstance(leaves, str) or not leaves:
        raise InputError(f"sites={leaves!r}: give a list with at least one, such as ['hook_resid_post']")
    chosen = range(vlm.n_layers) if layers is None else list(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < vlm.n_layers]
    if wrong or not len(chosen):
        raise InputError(f"layers={list(chosen)}: the language model has layers 0 to {vlm.n_layers - 1}")
    found: dict[str, dict[int, str]] = {}
    for leaf in leaves:
        name = parse(leaf)
        if (name is not None and name.tower) or leaf.startswith(("vision.", "projector.")):
            raise InputError(
                f"site {leaf!r} belongs to another tower, whose tokens are not those of the prompt; give kinds of "
                "activations of the language model, such as 'hook_resid_post' (patching.by_tower patches all towers)"
            )
        if name is not None and name.layer is not None:
            raise InputError(f"site {leaf!r} names a layer: give {name.leaf!r}, and layers=[{name.layer}]")
        found[leaf] = {layer: f"blocks.{layer}.{leaf}" for layer in chosen}
        if any(vlm.place(site).side == "pattern" for site in found[leaf].values()):
            raise InputError(f"site {leaf!r} holds attention between tokens: patching.knockout cuts it")
    return found


def measure_cells(
    experiment: Experiment,
    cells: Sequence[Cell],
    *,
    control: bool = True,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> tuple[Float[Tensor, "cell example"], Float[Tensor, "cell example"] | None, str]:
    """The metric of every cell, and of the same patch in a random direction, in one sweep.

    Args:
        experiment: the two runs.
        cells: what to patch.
        control: also measure random vectors of matched norm; it doubles the number of variants.
        seed: of the random vectors.
        allow_no_effect: do not raise for patches that change nothing.
        options: of `VLM.sweep`.

    Returns:
        Values and controls, the means over draws, and the sweep's plan. Cells whose two runs agree cost nothing and
        keep the metric of the unpatched run.

    Raises:
        InputError: no cells; or, unless allowed, runs that agree at a group that the caller named, or everywhere, or
            patches none of which moves the metric.
    """
    check_options(options)
    if not cells:
        raise InputError("there is nothing to patch: no cells")
    generator = torch.Generator().manual_seed(seed)
    kinds = (False, True) if control else (False,)
    base = torch.stack([run.metric for run in experiment.bases])
    values = base[None, :, None].repeat(len(kinds), 1, len(cells), 1)
    variants: list[list[Edit]] = []
    places: list[tuple[int, int, int]] = []
    for draw, run in enumerate(experiment.bases):
        for index, cell in enumerate(cells):
            edits = experiment.patch(cell, draw)
            if not edits:
                continue
            variants.append([*run.edits, *edits])
            places.append((0, draw, index))
            if control:
                variants.append([*run.edits, *experiment.random_patch(cell, generator, draw)])
                places.append((1, draw, index))
    if not allow_no_effect:
        _refuse_idle(experiment, cells, {index for _, _, index in places})
    if not variants:
        kept = values.mean(dim=1)
        return kept[0], kept[1] if control else None, "no patch changes anything, so nothing ran"
    measured, plan = measure(experiment.vlm, experiment.inputs, variants, experiment.metric, **options)
    values[tuple(torch.tensor(places).T)] = measured
    kept = values.mean(dim=1)
    real = [i for i, (kind, _, _) in enumerate(places) if kind == 0]
    if not allow_no_effect and not moves_any(experiment, [variants[i] for i in real], measured[real],
                                             [places[i][1] for i in real]):  # fmt: skip
        raise no_patch_moves(len(cells), experiment.metric)
    return kept[0], kept[1] if control else None, plan


def moves_any(
    experiment: Experiment,
    variants: Sequence[Sequence[Edit]],
    values: Float[Tensor, "variant example"],
    draws: Sequence[int],
) -> bool:
    """Whether any variant moves the metric away from the base run of its draw.

    Args:
        experiment: the two runs.
        variants: for each variant its edits, those of its base run first.
        values: the metric of each.
        draws: which base run each belongs to.
    """
    runs = [experiment.bases[draw] for draw in draws]
    base = torch.stack([run.metric for run in runs])
    own = [run.edits for run in runs]
    return moves(experiment.vlm, experiment.inputs, variants, values, base, experiment.metric, own)


def _refuse_idle(experiment: Experiment, cells: Sequence[Cell], busy: set[int]) -> None:
    """Raise where a group that was asked for, or everything, is the same in both runs."""
    moved = {cells[index].group for index in busy}
    asked = {cell.group for cell in cells}
    idle = sorted(asked - moved)
    if not idle or (moved and not experiment.explicit):
        return
    names = ", ".join(repr(experiment.names[index]) for index in idle)
    where = f"at {names}" if experiment.explicit else "at every token"
    raise InputError(
        f"clean and corrupt runs have the same activations {where}, so that patching changes nothing there; corrupt "
        "something that these tokens see, or pass allow_no_effect=True"
    )


def random_like(change: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions with the norm of each vector (the last axis) of a change."""
    drawn = torch.randn(change.shape, generator=generator).to(change)
    norms = change.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return drawn * norms
