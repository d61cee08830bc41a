"""Attention knockout: cut the edges of attention between groups of tokens, in windows of layers.

Where an answer suffers, information was crossing from the one group to the other. Source: Geva et al. 2023, "Dissecting
Recall of Factual Associations in Auto-Regressive Language Models", section 4 (logits of the cut edges at minus
infinity, windows of layers around each layer).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError, ShapeError
from interp.models.vlm import VLM
from interp.patching.metric import MetricFunction, name_of
from interp.patching.options import check_draws
from interp.patching.result import PatchingResult
from interp.patching.tokens import TokenGroup, layouts_of, per_row
from interp.patching.variants import measure_variants
from interp.selection import Group
from interp.sites import Place

PATTERN = "blocks.{layer}.attn.hook_pattern"
_ARROW = re.compile(r"\s*(?:->|→)\s*")

Edge = str | tuple[Any, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Cut(Edit):
    """Cut edges of attention: as if their logits were minus infinity, so that the other edges share what they had.

    Args:
        edges: boolean, True where an edge is cut: the queries that ``at`` selects, in order, by the keys of the padded
            prompt. Rows that select fewer queries leave their last ones unused.
    """

    edges: Tensor
    renormalise: bool = field(default=True, kw_only=True)

    def check(self, place: Place) -> None:
        """Refuse what can be seen to be wrong before anything runs.

        Raises:
            InputError: a site that is no attention pattern, or edges to be cut in decoded tokens.
            ShapeError: edges that are not [batch, query, key].
        """
        super().check(place)
        if place.side != "pattern" or self.when != "prefill":
            raise InputError(f"{self!r}: edges are cut at attention patterns, in the prompt (when='prefill')")
        if self.edges.ndim != 3 or self.edges.dtype != torch.bool:
            raise ShapeError(f"{self!r}: edges are booleans [batch, query, key], not {self.edges.dtype}")

    def transform(
        self, x: Float[Tensor, "row query head key"], group: Group, place: Place
    ) -> Float[Tensor, "row query head key"]:
        """The probabilities with those of the cut edges at zero."""
        if len(self.edges) != group.n_examples or self.edges.shape[1] < group.n_positions:
            raise ShapeError(
                f"{self!r}: edges of {self.edges.shape[0]} rows × {self.edges.shape[1]} queries, the edit selects "
                f"{group.n_examples} rows × {group.n_positions} queries"
            )
        edges = self.edges.to(x.device)[group.examples[:, None], group.ordinals, : x.shape[-1]]
        # A cache of fixed length has room behind the prompt, which no query of the prompt sees.
        edges = torch.nn.functional.pad(edges, (0, x.shape[-1] - edges.shape[-1]))
        return x.masked_fill(edges[:, :, None], 0.0)

    def renormalised(self, pattern: Float[Tensor, "row query head key"]) -> Float[Tensor, "row query head key"]:
        """Probabilities divided by their sum over the keys: the softmax of the logits that are not cut.

        Raises:
            InputError: a query that attended to cut edges alone, as far as the model's number format can tell.
        """
        if not bool((pattern.sum(dim=-1) > 0).all()):
            raise InputError(
                f"{self!r}: some query attends to the cut edges alone: what is left rounds to zero in {pattern.dtype}, "
                "and cannot be shared out. Run the model in float32 (bfloat16 rather than float16), or cut fewer edges"
            )
        return super().renormalised(pattern)


def token_sets(inputs: Mapping[str, Any], group: Any, groups: Mapping[str, Any] | None = None) -> list[tuple[int, ...]]:
    """The tokens of a group by meaning, as places in the padded batch.

    Args:
        inputs: prepared or plain model inputs.
        group: a `TokenGroup`, what positions can be (``"last"``, ``"image"``, ``"question"``, integers), a name in
            ``groups``, ``"all"``, or ``"not X"``: the tokens that are not in group X.
        groups: names for groups.

    Returns:
        For every row its places, ascending.

    Raises:
        UnknownNameError: a row has no segment of that name.
        InputError: no ``input_ids``, or a group that is empty in some row.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
        raise InputError("the inputs have no input_ids, so their tokens cannot be grouped")
    if isinstance(group, str) and group in (groups or {}):
        return token_sets(inputs, (groups or {})[group])
    if not isinstance(group, str) or not (group == "all" or group.startswith("not ")):
        whole = group if isinstance(group, TokenGroup) else TokenGroup(str(group), group)
        return [tuple(sorted(set(row))) for row in whole.positions(inputs)]
    every = [range(layout.start, layout.start + layout.length) for layout in layouts_of(inputs)]
    without = [()] * len(every) if group == "all" else token_sets(inputs, group.removeprefix("not "), groups)
    found = [tuple(sorted(set(row) - set(out))) for row, out in zip(every, without, strict=True)]
    empty = [row for row, tokens in enumerate(found) if not tokens]
    if empty:
        raise InputError(f"the group {group!r} has no token in row {empty[0]}")
    return found


def cut(
    vlm: VLM,
    inputs: Mapping[str, Any],
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    layers: Sequence[int],
) -> list[Edit]:
    """The edits that keep target tokens from attending to source tokens; a token's edge to itself stays.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        source: for every row the absolute positions of the keys, such as from `token_sets`.
        target: the same of the queries.
        layers: blocks of the language model, from 0.

    Returns:
        One edit a layer.

    Raises:
        InputError: a layer that the model lacks, or a row in which no target token sees a source token.
    """
    missing = [layer for layer in layers if not 0 <= layer < vlm.n_layers]
    if missing or not layers:
        raise InputError(f"layers {missing or 'none'}: {vlm.name} has layers 0 to {vlm.n_layers - 1}")
    seq_len = inputs["input_ids"].shape[1]
    edges = torch.zeros(len(target), max(map(len, target)), seq_len, dtype=torch.bool)
    for row, (keys, queries) in enumerate(zip(source, target, strict=True)):
        seen = torch.tensor(list(queries))[:, None] > torch.tensor(list(keys))
        edges[row][: len(queries), list(keys)] = seen
        if not bool(seen.any()):
            raise InputError(f"row {row}: no target token comes after a source token, so there is no edge to cut")
    at = per_row(target, layouts_of(inputs))
    return [Cut(PATTERN.format(layer=layer), edges, at=at) for layer in layers]


def windows_of(n_layers: int, width: int, layers: Sequence[int] | None = None) -> dict[str, range]:
    """Windows of layers around each layer, cut off at the model's ends.

    Args:
        n_layers: blocks of the model.
        width: layers in a window.
        layers: centres; None: every layer.

    Returns:
        Centre -> layers.

    Raises:
        InputError: a width below 1, or a centre that does not exist.

    Source: Geva et al. 2023, section 4: a window of k layers around the l-th.
    """
    centres = range(n_layers) if layers is None else layers
    if width < 1 or not all(0 <= centre < n_layers for centre in centres) or not centres:
        raise InputError(f"windows of {width} layers around {list(centres)}: the model has layers 0 to {n_layers - 1}")
    below = (width - 1) // 2
    return {str(c): range(max(0, c - below), min(n_layers, c - below + width)) for c in centres}


def knockout(
    vlm: VLM,
    inputs: Mapping[str, Any],
    edges: Sequence[Edge],
    metric: MetricFunction,
    *,
    window: int = 1,
    layers: Sequence[int] | None = None,
    windows: Mapping[str, Sequence[int]] | None = None,
    groups: Mapping[str, Any] | None = None,
    n_controls: int = 1,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Cut attention between groups of tokens in every window of layers, as one sweep.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs, a batch of examples.
        edges: ``"image -> last"`` (source, then target), or pairs of selectors; see `token_sets` for the groups.
        metric: logits [batch, vocab] at the last position -> [batch], such as the answer's log-probability.
        window: layers in a window.
        layers: centres of the windows; None: every layer.
        windows: label -> layers, in place of ``window`` and ``layers``; such as ``{"all": range(vlm.n_layers)}``.
        groups: names for selectors, usable in ``edges``.
        n_controls: random groups of tokens to cut in place of each source; 0: none.
        seed: of their draw.
        allow_no_effect: take knockouts of which none changes the metric.
        options: of `VLM.sweep`, such as ``max_rows``.

    Returns:
        The metric under each knockout, axes ``edge`` and ``layer``; ``clean`` is that of the model as it is. Control
        ``"random tokens"``: as many tokens cut from the target, drawn for each row among all that it sees.

    Raises:
        InputError: no edges, one without a token or without an edge in some row, windows that the model does not
            have, or a metric that gives NaN.
        UnknownNameError: a group that a prompt lacks.
    """
    check_draws(n_controls=n_controls)
    if not edges:
        raise InputError("knockout needs at least one edge, such as 'image -> last'")
    chosen = windows_of(vlm.n_layers, window, layers) if windows is None else dict(windows)
    named = [_edge(edge) for edge in edges]
    ends = [(token_sets(inputs, source, groups), token_sets(inputs, target, groups)) for _, source, target in named]
    generator = torch.Generator().manual_seed(seed)
    cuts = [cut(vlm, inputs, *pair, span) for pair in ends for span in chosen.values()]
    for _ in range(n_controls):
        drawn = [(_random_tokens(inputs, *pair, generator), pair[1]) for pair in ends]
        cuts += [cut(vlm, inputs, *pair, span) for pair in drawn for span in chosen.values()]
    measured = measure_variants(vlm, inputs, cuts, metric, allow_no_effect=allow_no_effect, **options)
    values = measured.values.reshape(1 + n_controls, len(named), len(chosen), -1)
    return PatchingResult(
        name="attention knockout",
        metric=name_of(metric),
        values=values[0],
        axes={"edge": tuple(label for label, _, _ in named), "layer": tuple(chosen)},
        clean=measured.base,
        controls={"random tokens": values[1:]} if n_controls else {},
        about={
            "model": vlm.name,
            "windows": {label: list(span) for label, span in chosen.items()},
            "seed": seed,
            "plan": measured.plan,
        },
    )


def drops(result: PatchingResult) -> Float[Tensor, "*axes example"]:
    """How much the metric fell by each knockout.

    Raises:
        InputError: a result without the metric of the model as it is.
    """
    if result.clean is None:
        raise InputError(f"{result.name}: the metric of the run without knockout is not known")
    return result.clean - result.values


def crossing(result: PatchingResult, edge: str) -> str:
    """The window of layers in which an edge matters most: whose knockout lowers the mean metric most.

    Args:
        result: of `knockout`.
        edge: one of its edges.

    Raises:
        UnknownNameError: an edge that was not cut.
    """
    one = result.select(edge=edge)
    return one.axes["layer"][int(drops(one).mean(dim=-1).argmax())]


def _edge(edge: Edge) -> tuple[str, Any, Any]:
    if isinstance(edge, str):
        ends = _ARROW.split(edge.strip())
        if len(ends) != 2 or not all(ends):
            raise InputError(f"{edge!r} is no edge: write 'source -> target', such as 'image -> last'")
        return f"{ends[0]} -> {ends[1]}", ends[0], ends[1]
    source, target = edge
    return f"{source} -> {target}", source, target


def _random_tokens(
    inputs: Mapping[str, Any],
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """For every row as many tokens as its source has, drawn among those before its last target token."""
    found = []
    for layout, keys, queries in zip(layouts_of(inputs), source, target, strict=True):
        seen = range(layout.start, max(queries))
        # Source tokens after every target token have no edge, and none is drawn for them.
        count = sum(key in seen for key in keys)
        order = torch.randperm(len(seen), generator=generator)[:count].tolist()
        # The earliest target token may see none of the drawn ones; the last one sees them all.
        found.append(tuple(sorted(seen[index] for index in order)))
    return found
