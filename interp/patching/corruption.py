"""The corrupt run of a patching experiment: another prompt or image, noise on some tokens, or a mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.activations import Activations
from interp.edits import Add, Edit, Replace
from interp.errors import InputError
from interp.patching.metric import MetricFunction, evaluate, name_of
from interp.patching.tokens import Aligned, TokenGroup, align, as_groups, layouts_of, per_row

ENTRY = "blocks.0.hook_resid_pre"


@dataclass(frozen=True)
class TokenNoise:
    """Normal noise on what enters the language model at some tokens, as in causal tracing.

    Args:
        at: which tokens, such as ``"image[0]"``: a position by meaning, or several.
        scale: of the noise, in standard deviations of what enters at these tokens.
        draws: how many corrupt runs; results are means over them.
        seed: of the noise.

    Source: Meng et al. 2022, section 2.1 (three standard deviations, ten draws).
    """

    at: Any = "image[0]"
    scale: float = 3.0
    draws: int = 1
    seed: int = 0

    def edits(self, vlm: Any, inputs: Mapping[str, Any]) -> list[list[Edit]]:
        """For each draw, the edits that make a clean run a corrupt one."""
        if self.draws < 1 or not self.scale > 0:
            raise InputError(f"noise of scale {self.scale} in {self.draws} draws: both must be positive")
        group = align([_one_group(self.at, inputs)], inputs, inputs)[0]
        entering = vlm.capture(inputs, ENTRY)[ENTRY]
        tokens = torch.cat([entering[row, here] for row, here in enumerate(group.base)])
        spread = float(tokens.float().std()) * self.scale
        generator = torch.Generator().manual_seed(self.seed)
        edits: list[list[Edit]] = []
        for _ in range(self.draws):
            noise = spread * torch.randn(entering.shape, generator=generator)
            edits.append(_at_group(Add, ENTRY, noise.to(entering), group, inputs))
        return edits


@dataclass(frozen=True, eq=False)
class MeanOver:
    """Some tokens lose what tells the examples of a data set apart: their activations become its mean.

    In the corrupt run what enters the language model at these tokens is its mean over the data set. Where a clean run
    is patched (``direction="noise"``) a site gets its own mean over the data set at the patched tokens.

    Args:
        inputs: the data set, prepared as the clean prompts are.
        at: which tokens, by meaning.

    Source: Wang et al. 2022, section 2 (mean ablation).
    """

    inputs: Mapping[str, Any]
    at: Any

    def edits(self, vlm: Any, inputs: Mapping[str, Any]) -> list[list[Edit]]:
        """The edits that make a clean run a corrupt one."""
        group = _one_group(self.at, inputs)
        here = group.positions(inputs)
        mean = group_mean(vlm.capture(self.inputs, ENTRY)[ENTRY], group, self.inputs)
        if any(len(row) != len(mean) for row in here):
            raise InputError(f"group {group.name!r} has {len(mean)} tokens in the data set, but not in every prompt")
        at = per_row(here, layouts_of(inputs))
        return [[Replace(ENTRY, mean.expand(len(here), -1, -1).clone(), at=at)]]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of an experiment: its inputs, the edits that belong to it, what was captured, and its metric.

    Args:
        inputs: prepared or plain model inputs.
        edits: that make it what it is, such as noise.
        acts: captured activations ``[example, pos, ...]``.
        metric: of each example.
        means: where patches take means over a data set, its activations.
        means_inputs: the data set.
        gradients: of the metric's sum with respect to what was captured, where they were asked for.
    """

    inputs: Mapping[str, Any]
    edits: tuple[Edit, ...]
    acts: Activations
    metric: Float[Tensor, " example"]
    means: Activations | None = None
    means_inputs: Mapping[str, Any] | None = None
    gradients: Mapping[str, Any] = field(default_factory=dict)

    def gather(self, site: str, group: TokenGroup, tokens: Sequence[int], row: int) -> Float[Tensor, "n ..."]:
        """What this run has to give at some tokens of one row."""
        if self.means is not None and self.means_inputs is not None:
            return group_mean(self.means[site], group, self.means_inputs)
        return self.acts[site][row, list(tokens)]


def two_runs(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Any,
    metric: MetricFunction,
    sites: Sequence[str],
    gradients: Literal["clean", "corrupt"] | None = None,
) -> tuple[Run, list[Run]]:
    """Run clean and corrupt, and capture both.

    Args:
        vlm: the model.
        clean: prepared or plain model inputs.
        corrupt: inputs with another prompt or image in each row, or `TokenNoise`, or `MeanOver`.
        metric: of the logits at the last token.
        sites: to capture.
        gradients: which run goes backward too.

    Returns:
        The clean run, and one corrupt run for each draw.

    Raises:
        InputError: different numbers of prompts, something that is no corruption, or clean and corrupt runs that do
            not differ.
    """
    first = run_once(vlm, clean, (), metric, sites, gradients == "clean")
    backward = gradients == "corrupt"
    if isinstance(corrupt, TokenNoise | MeanOver):
        runs = [run_once(vlm, clean, tuple(edits), metric, sites, backward) for edits in corrupt.edits(vlm, clean)]
        if isinstance(corrupt, MeanOver):
            means = vlm.capture(corrupt.inputs, list(sites)) if sites else None
            runs = [replace(run, means=means, means_inputs=corrupt.inputs) for run in runs]
    elif isinstance(corrupt, Mapping):
        if len(corrupt["input_ids"]) != len(clean["input_ids"]):
            n_clean, n_corrupt = len(clean["input_ids"]), len(corrupt["input_ids"])
            raise InputError(f"there are {n_clean} clean and {n_corrupt} corrupt prompts: they come in pairs")
        runs = [run_once(vlm, corrupt, (), metric, sites, backward)]
    else:
        raise InputError(f"corrupt={corrupt!r}: give inputs, TokenNoise or MeanOver")
    return first, runs


def group_mean(acts: Float[Tensor, "example pos ..."], group: TokenGroup, inputs: Mapping[str, Any]) -> Tensor:
    """The mean over a data set of a group's tokens, token by token.

    Raises:
        InputError: prompts of the data set with different numbers of such tokens.
    """
    found = group.positions(inputs)
    if len({len(row) for row in found}) > 1:
        counts = sorted({len(row) for row in found})
        raise InputError(f"group {group.name!r} has {counts} tokens in the data set: a mean needs equally many")
    return torch.stack([acts[row, tokens] for row, tokens in enumerate(found)]).mean(dim=0)


def run_once(
    vlm: Any,
    inputs: Mapping[str, Any],
    edits: Sequence[Edit],
    metric: MetricFunction,
    sites: Sequence[str],
    backward: bool = False,
) -> Run:
    """Run the model once, capture, and take the gradients if they are asked for.

    Args:
        vlm, inputs, metric, sites: as for `two_runs`.
        edits: that belong to the run.
        backward: whether the metric's gradients at the sites are wanted.

    Raises:
        InputError: a metric without a gradient where it is wanted.
    """
    acts = vlm.capture(inputs, list(sites) or [ENTRY], edits=list(edits), grad=backward, logits_to_keep=1)
    values = evaluate(metric, acts.output.logits[:, -1])
    gradients: Mapping[str, Any] = {}
    if backward:
        if not values.requires_grad:
            raise InputError(f"metric {name_of(metric)!r} has no gradient: compute it from the logits with torch alone")
        gradients = acts.gradients(values.sum())
    kept = Activations({site: [acts[site].detach()] for site in acts}, {site: acts.axes(site) for site in acts})
    return Run(inputs, tuple(edits), kept, values.detach().float().cpu(), gradients=gradients)


def _one_group(at: Any, inputs: Mapping[str, Any]) -> TokenGroup:
    several = isinstance(at, list | tuple)
    return TokenGroup(", ".join(map(str, at)), list(at)) if several else as_groups(at, inputs)[0]


def _at_group(edit: Any, site: str, values: Tensor, group: Aligned, inputs: Mapping[str, Any]) -> list[Edit]:
    """An edit at the group's tokens, with its values at these tokens; several where rows have different numbers."""
    at = per_row(group.base, layouts_of(inputs))
    return [
        edit(site, torch.stack([values[row, group.base[row]] for row in rows]), at=at, rows=rows)
        for rows in group.rectangles()
    ]
