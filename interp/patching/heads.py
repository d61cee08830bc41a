"""Attention heads: what each one's output carries, which sets suffice and are needed, and in which tower."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit, Replace
from interp.errors import InputError
from interp.patching.activation import grid_of
from interp.patching.cells import (
    Cell,
    Direction,
    Experiment,
    check_direction,
    language_sites,
    measure_cells,
    moves_any,
    prepare,
    random_like,
)
from interp.patching.corruption import MeanOver, TokenNoise, two_runs
from interp.patching.guard import moves, no_patch_moves
from interp.patching.metric import MetricFunction, measure, name_of
from interp.patching.options import check_draws, check_options
from interp.patching.result import PatchingResult
from interp.patching.tokens import as_groups, layouts_of

HEAD = "attn.hook_z"
Head = tuple[int, int]


def heads(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any] | TokenNoise | MeanOver,
    metric: MetricFunction,
    *,
    positions: Any = "last",
    layers: Sequence[int] | None = None,
    direction: Direction = "denoise",
    control: bool = True,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Patch the output of every attention head by itself, before the output projection.

    Args:
        vlm, clean, corrupt, metric, layers, control, seed, allow_no_effect, options: as for
            `interp.patching.activation.activation`.
        positions: token groups by meaning; None: every token by itself.
        direction: ``"denoise"`` shows which heads suffice, ``"noise"`` which are needed.

    Returns:
        Axes ``layer``, ``head`` and ``position``; without ``position`` where there is one group. The control is
        ``"random vector"``.

    Raises:
        InputError, UnknownNameError: as for `interp.patching.activation.activation`.

    Source: Wang et al. 2022, section 3.
    """
    check_options(options)
    sites = language_sites(vlm, [HEAD], layers)[HEAD]
    experiment = prepare(vlm, clean, corrupt, metric, list(sites.values()), positions, direction)
    cells = head_cells(vlm, sites, len(experiment.groups))
    values, random, plan = measure_cells(
        experiment, cells, control=control, seed=seed, allow_no_effect=allow_no_effect, **options
    )
    axes, shape, sizes = head_axes(vlm, sites, experiment)
    return PatchingResult(
        "heads",
        name_of(metric),
        rearrange(values, shape, **sizes),
        axes,
        experiment.clean,
        experiment.corrupt,
        {} if random is None else {"random vector": rearrange(random, shape, **sizes)},
        experiment.about(plan=plan, seed=seed, **grid_of(positions)),
    )


def head_sets(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any] | TokenNoise | MeanOver,
    metric: MetricFunction,
    ranked: Sequence[Sequence[int]],
    *,
    positions: Any = "last",
    sizes: Sequence[int] | None = None,
    draws: int = 10,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """How far a growing set of heads suffices and is needed, against random sets of the same size.

    Args:
        vlm, clean, corrupt, metric, allow_no_effect, options: as for `interp.patching.activation.activation`; each
            test keeps what is done in a folder of its own in ``folder``.
        ranked: heads as (layer, head), the most important first, such as `top_heads` gives.
        positions: one token group, at which the heads are patched.
        sizes: of the sets; None: 1, 2, ... up to all that are ranked.
        draws: random sets of each size, the control.
        seed: of the random sets.

    Returns:
        Axes ``test`` (``"sufficiency"``: clean heads in the corrupt run; ``"necessity"``: corrupt heads in the clean
        run) and ``size``; the control ``"random site"`` has an axis of draws before them.

    Raises:
        InputError: no heads, a head that the model does not have or that repeats, a size that is not there or that
            repeats, or ranked heads that move the metric in neither test.
    """
    check_options(options)
    check_draws(draws=draws)
    ranked = as_heads(ranked)
    sites = language_sites(vlm, [HEAD])[HEAD]
    everywhere = [(layer, head) for layer, site in sites.items() for head in range(_n_heads(vlm, site))]
    wrong = [head for head in ranked if head not in everywhere]
    if not ranked or wrong or len(set(ranked)) < len(ranked):
        raise InputError(f"ranked={list(ranked)}: give heads (layer, head) that the model has, each once")
    wanted = list(range(1, len(ranked) + 1)) if sizes is None else list(sizes)
    if not wanted or min(wanted) < 1 or max(wanted) > len(ranked) or len(set(wanted)) < len(wanted):
        raise InputError(f"sizes={wanted}: there are {len(ranked)} ranked heads; give some sizes up to that, each once")
    n_groups = len(as_groups(positions, clean))
    if n_groups > 1:
        raise InputError(f"head sets are patched at one group of tokens, not at {n_groups}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(everywhere), generator=generator).tolist() for _ in range(draws)]
    sets = [list(ranked[:size]) for size in wanted]
    sets += [[everywhere[index] for index in order[:size]] for order in orders for size in wanted]
    tests: dict[str, Direction] = {"sufficiency": "denoise", "necessity": "noise"}
    experiments = [
        prepare(vlm, clean, corrupt, metric, list(sites.values()), positions, direction) for direction in tests.values()
    ]
    experiment = experiments[0]
    found = []
    for test, one in zip(tests, experiments, strict=True):
        # Two sweeps cannot share a folder.
        own = options | ({"folder": Path(options["folder"]) / test} if options.get("folder") else {})
        found.append(_measure_sets(one, sets, len(wanted), sites, own))
    by_test, plans, moved = zip(*found, strict=True)
    if not allow_no_effect and not any(moved):
        raise no_patch_moves(len(tests) * len(wanted), metric)
    values = torch.stack(by_test)
    return PatchingResult(
        "head sets",
        name_of(metric),
        values[:, : len(wanted)],
        {"test": tuple(tests), "size": tuple(map(str, wanted))},
        experiment.clean,
        experiment.corrupt,
        {"random site": rearrange(values[:, len(wanted) :], "test (draw size) example -> draw test size example",
                                  draw=draws)} if draws else {},
        experiment.about(plan="; ".join(plans), seed=seed, ranked=[list(head) for head in ranked])
        | {"direction": "both", "directions": tests},
    )  # fmt: skip


def by_tower(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    metric: MetricFunction,
    *,
    direction: Direction = "denoise",
    control: bool = True,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Patch all heads of one tower together, layer by layer and in all layers, at all of their tokens.

    Args:
        vlm, clean, corrupt, metric, allow_no_effect, options: as for `interp.patching.activation.activation`; clean
            and corrupt prompts must be equally long and have equally many images.
        direction: as there.
        control: also patch random vectors of matched norm.
        seed: of the random vectors.

    Returns:
        One axis, ``group``: ``"text"``, ``"text 0"``, ... and, where the model has such a tower, ``"vision"``,
        ``"vision 0"``, ...; a tower's name alone stands for all of its layers. The control is ``"random vector"``.

    Raises:
        InputError: prompts of different lengths or with different images, runs that agree everywhere, or patches that
            move nothing.
    """
    check_options(options)
    check_direction(direction)
    if not isinstance(corrupt, Mapping):
        raise InputError("heads of the vision tower see no noise on tokens: corrupt= must be inputs")
    towers = {"text": "blocks.*." + HEAD} | ({"vision": "vision.blocks.*." + HEAD} if vlm.has_vision else {})
    pictures = ["pixel_values" in inputs for inputs in (clean, corrupt)]
    if pictures[0] != pictures[1]:
        raise InputError(
            f"{'clean=' if pictures[1] else 'corrupt='} has no pixel_values, the other inputs have: the heads of a "
            "tower are patched image by image"
        )
    if vlm.has_vision and not pictures[0]:
        del towers["vision"]
    # Blocks of the vision tower that the language model does not read can carry nothing.
    layers = {
        tower: [site for site in vlm.sites(pattern) if vlm._places.no_effect(vlm.place(site)) is None]
        for tower, pattern in towers.items()
    }
    groups = dict(layers)
    groups |= {f"{tower} {i}": [site] for tower, sites in layers.items() for i, site in enumerate(sites)}
    lengths = [[(one.start, one.length) for one in layouts_of(inputs)] for inputs in (clean, corrupt)]
    if lengths[0] != lengths[1]:
        raise InputError("the heads of a whole tower are patched token by token, so prompts must be equally long")
    first, (second,) = two_runs(vlm, clean, corrupt, metric, [site for sites in layers.values() for site in sites])
    source, base = (first, second) if direction == "denoise" else (second, first)
    generator = torch.Generator().manual_seed(seed)
    variants: list[list[Edit]] = []
    places: list[tuple[int, int]] = []
    for index, sites in enumerate(groups.values()):
        for kind in range(1 + control):
            edits = [edit for site in sites for edit in _whole(site, source.acts[site], base.acts[site],
                                                               generator if kind else None)]  # fmt: skip
            if edits:
                variants.append(edits)
                places.append((kind, index))
    if not variants:
        raise InputError("clean and corrupt runs have the same heads' outputs everywhere: nothing is corrupt")
    values = base.metric.expand(1 + control, len(groups), -1).clone()
    measured, plan = measure(vlm, base.inputs, variants, metric, **options)
    values[tuple(torch.tensor(places).T)] = measured
    real = [index for index, (kind, _) in enumerate(places) if kind == 0]
    if not allow_no_effect and not moves(vlm, base.inputs, [variants[index] for index in real], measured[real],
                                         base.metric.expand(len(real), -1), metric):  # fmt: skip
        raise no_patch_moves(len(real), metric)
    about = {"model": vlm.name, "direction": direction, "metric": name_of(metric), "plan": plan, "seed": seed}
    controls = {"random vector": values[1]} if control else {}
    axes = {"group": tuple(groups)}
    return PatchingResult("heads by tower", name_of(metric), values[0], axes, first.metric, second.metric, controls,
                          about)  # fmt: skip


def top_heads(result: PatchingResult, n: int, *, normalised: bool = True) -> list[Head]:
    """The heads of a result with the largest effects.

    Args:
        result: of `heads` or `interp.patching.attribution.attribution`, with axes ``layer`` and ``head``.
        n: how many.
        normalised: whether effects are on the scale of `PatchingResult.normalised`.

    Returns:
        (layer, head), the largest distance from the unpatched run first.

    Raises:
        InputError: other axes, or fewer heads.
    """
    if list(result.axes) != ["layer", "head"]:
        raise InputError(
            f"top heads need the axes layer and head; the result has {list(result.axes)}: select() the rest"
        )
    effects = effect(result, normalised=normalised).mean(dim=-1)
    if not 1 <= n <= effects.numel():
        raise InputError(f"n={n}: there are {effects.numel()} heads")
    order = effects.flatten().argsort(descending=True, stable=True)[:n].tolist()
    layers = result.axes["layer"]
    return [(int(layers[index // effects.shape[1]]), index % effects.shape[1]) for index in order]


def effect(result: PatchingResult, *, normalised: bool = True) -> Float[Tensor, "*axes example"]:
    """How far each patch moves the metric from the unpatched run towards the other one.

    Args:
        result: with baselines and, in ``about``, a direction.
        normalised: 1 is all the way; otherwise in units of the metric.

    Raises:
        InputError: no baselines or direction.
    """
    if result.clean is None or result.corrupt is None or result.about.get("direction") not in ("denoise", "noise"):
        raise InputError(
            f"{result.name}: effects need both baselines and the direction of the patches, as patching.heads gives "
            "them; of patching.mediation, strongest_heads(indirect_effects(result), k) gives the heads"
        )
    return result.effects(normalised)


def head_cells(vlm: Any, sites: Mapping[int, str], n_groups: int) -> list[Cell]:
    """A cell for each layer, head and token group, in this order."""
    return [
        Cell(group, (site,), head)
        for site in sites.values()
        for head in range(_n_heads(vlm, site))
        for group in range(n_groups)
    ]


def head_axes(vlm: Any, sites: Mapping[int, str], experiment: Experiment) -> tuple[dict, str, dict[str, int]]:
    """The axes of head by head results, and how cells are arranged along them."""
    n_heads = _n_heads(vlm, next(iter(sites.values())))
    axes = {"layer": tuple(map(str, sites)), "head": tuple(map(str, range(n_heads)))}
    sizes = {"layer": len(sites), "head": n_heads}
    if len(experiment.groups) == 1:
        return axes, "(layer head) example -> layer head example", sizes
    axes["position"] = experiment.names
    return axes, "(layer head position) example -> layer head position example", sizes


def _n_heads(vlm: Any, site: str) -> int:
    return int(vlm.place(site).n_heads)


def as_heads(heads: Sequence[Any]) -> list[Head]:
    """Heads as (layer, head), also from the lists that files of them hold.

    Raises:
        InputError: something that is no pair of integers.
    """
    found: list[Head] = []
    for head in heads:
        pair = tuple(head) if isinstance(head, list | tuple) else (head,)
        if len(pair) != 2 or not all(isinstance(part, Integral) for part in pair):
            raise InputError(f"{head!r} is no head: give (layer, head)")
        found.append((int(pair[0]), int(pair[1])))
    return found


def _measure_sets(
    experiment: Experiment,
    sets: Sequence[Sequence[Head]],
    n_real: int,
    sites: Mapping[int, str],
    options: Mapping[str, Any],
) -> tuple[Float[Tensor, "set example"], str, bool]:
    """The metric of each set of heads, the mean over draws of the corruption; and whether the first ones move it."""
    base = torch.stack([run.metric for run in experiment.bases])
    values = base[:, None].repeat(1, len(sets), 1)
    variants, places = [], []
    for draw, run in enumerate(experiment.bases):
        for index, chosen in enumerate(sets):
            edits = [edit for layer, head in chosen for edit in experiment.patch(Cell(0, (sites[layer],), head), draw)]
            if edits:
                variants.append([*run.edits, *edits])
                places.append((draw, index))
    if not variants:
        raise InputError(
            "clean and corrupt runs have the same heads' outputs at these tokens: nothing is corrupt there"
        )
    measured, plan = measure(experiment.vlm, experiment.inputs, variants, experiment.metric, **options)
    values[tuple(torch.tensor(places).T)] = measured
    real = [i for i, (_, index) in enumerate(places) if index < n_real]
    moved = moves_any(experiment, [variants[i] for i in real], measured[real], [places[i][0] for i in real])
    return values.mean(dim=0), plan, moved


def _whole(site: str, new: Tensor, old: Tensor, generator: torch.Generator | None) -> list[Edit]:
    """Replace a whole activation; nothing where it is the same."""
    if new.shape != old.shape:
        raise InputError(
            f"{site} has shapes {tuple(new.shape)} and {tuple(old.shape)} in the two runs: they need equally many "
            "images of the same size"
        )
    if torch.equal(new, old):
        return []
    if generator is not None:
        new = old + random_like(new - old, generator)
    return [Replace(site, new)]
