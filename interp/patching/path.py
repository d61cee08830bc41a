"""Path patching: what one attention head tells another directly, through its queries, keys or values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.edits import Edit, Replace
from interp.errors import InputError
from interp.patching.cells import Direction, Experiment, moves_any, prepare, random_like
from interp.patching.corruption import MeanOver, TokenNoise
from interp.patching.direct import INPUTS, Hearing, check_residual, written
from interp.patching.guard import no_patch_moves
from interp.patching.heads import HEAD, Head, as_heads
from interp.patching.metric import MetricFunction, measure, name_of
from interp.patching.options import check_options
from interp.patching.result import PatchingResult
from interp.patching.tokens import layouts_of, per_row


def path(
    vlm: Any,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any] | TokenNoise | MeanOver,
    metric: MetricFunction,
    *,
    receivers: Sequence[Sequence[int]] | str,
    senders: Sequence[Sequence[int]] | None = None,
    through: Sequence[str] = ("q", "k", "v"),
    positions: Any = "all",
    direction: Direction = "noise",
    mlps: str = "frozen",
    control: bool = True,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Patch the direct path from one head to another: the receiver alone hears the sender of the other run.

    The sender's output is taken from the source run; all that lies between it and the receiver keeps the values of the
    base run; the receiver's queries, keys or values that come of it are put into the base run, in which all that
    follows the receiver is computed anew.

    Args:
        vlm, clean, corrupt, metric, control, seed, allow_no_effect, options: as for
            `interp.patching.activation.activation`.
        receivers: heads as (layer, head), or ``"logits"``: the direct path to the unembedding. With grouped keys all
            heads that share a key head hear it through k and v.
        senders: heads; None: all in layers before the last receiver.
        through: which inputs of the receivers.
        positions: one token group, at which the sender's output is patched; ``"all"``: every token together.
        direction: ``"noise"`` puts the corrupt sender into the clean run, ``"denoise"`` the other way round.
        mlps: ``"frozen"``: those between sender and receiver keep their values, so that only the residual stream
            connects the two; ``"recomputed"``: they too are part of the path, as in the paper.

    Returns:
        Axes ``through``, ``sender`` and ``receiver`` (names such as ``"0.3"``); to the logits ``sender`` alone. Pairs
        without a path, whose sender is not in an earlier layer, keep the metric of the base run. The control is
        ``"random vector"``: a change of the same norm, in a random direction, of what the receiver hears.

    Raises:
        InputError: heads that the model does not have, more than one token group, prompts of different lengths, or
            paths none of which changes anything.
        SiteUnavailableError: blocks whose residual stream is not the sum of their parts, so that no direct path exists.

    Source: Wang et al. 2022, section 3.1 and appendix (path patching); Goldowsky-Dill et al. 2023.
    """
    check_options(options)
    to_logits = receivers == "logits"
    if not receivers or (isinstance(receivers, str) and not to_logits):
        raise InputError(f"receivers={receivers!r}: give heads as (layer, head), or 'logits'")
    if mlps not in ("frozen", "recomputed"):
        raise InputError(f"mlps={mlps!r}: give 'frozen' or 'recomputed'")
    if not through or any(letter not in INPUTS for letter in through):
        raise InputError(f"through={through!r}: give some of 'q', 'k', 'v'")
    hearing: list[Head] = [] if to_logits else [_head(vlm, head) for head in receivers]
    depth = vlm.n_layers if to_logits else max(layer for layer, _ in hearing)
    if not depth:
        raise InputError("heads of the first layer hear no head: choose receivers in later layers")
    talking = _all_heads(vlm, depth) if senders is None else [_head(vlm, head) for head in senders]
    if all(layer >= depth for layer, _ in talking):
        raise InputError(f"senders={talking}: none lies in a layer before the receivers")
    groups = {"all": slice(None)} if isinstance(positions, str) and positions == "all" else positions
    wanted = [f"blocks.{layer}.{leaf}" for layer in range(depth)
              for leaf in (HEAD, "hook_attn_out", "hook_mlp_out", "hook_resid_pre", "hook_resid_post")]  # fmt: skip
    layers = sorted({layer for layer, _ in hearing})
    wanted += [f"blocks.{layer}.{leaf}" for layer in layers for leaf in ("hook_resid_pre", *INPUTS.values())]
    experiment = prepare(vlm, clean, corrupt, metric, list(dict.fromkeys(wanted)), groups, direction)
    if len(experiment.groups) > 1:
        raise InputError(f"a path starts at one group of tokens, not at {len(experiment.groups)}")
    names = {"sender": tuple(map(_name, talking))}
    axes = names if to_logits else {"through": tuple(through)} | names | {"receiver": tuple(map(_name, hearing))}
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(one) for one in axes.values()]
    values = torch.stack([run.metric for run in experiment.bases]).mean(dim=0).expand(2, *sizes, -1).clone()
    variants: list[list[Edit]] = []
    places: list[tuple[int, ...]] = []
    if len(experiment.bases) > 1:
        raise InputError("path patching takes one corrupt run: TokenNoise(draws=1)")
    found = (
        _to_logits(experiment, talking, mlps)
        if to_logits
        else _to_heads(experiment, talking, hearing, tuple(through), mlps)
    )
    for place, write in found:
        for kind in range(1 + control):
            variants.append([*experiment.bases[0].edits, *write.edits(experiment, generator if kind else None)])
            places.append((kind, *place))
    plan = "no path changes anything, so nothing ran"
    if variants:
        measured, plan = measure(vlm, experiment.inputs, variants, metric, **options)
        values[tuple(torch.tensor(places).T)] = measured
        real = [index for index, (kind, *_) in enumerate(places) if kind == 0]
        if not allow_no_effect and not moves_any(experiment, [variants[index] for index in real], measured[real],
                                                 [0] * len(real)):  # fmt: skip
            raise no_patch_moves(len(real), metric)
    elif not allow_no_effect:
        raise InputError("no sender differs between the two runs at these tokens, so that no path carries anything")
    return PatchingResult(
        "path",
        name_of(metric),
        values[0],
        axes,
        experiment.clean,
        experiment.corrupt,
        {"random vector": values[1]} if control else {},
        experiment.about(plan=plan, seed=seed, mlps=mlps, receivers="logits" if to_logits else "heads"),
    )


@dataclass(frozen=True, eq=False)
class _Write:
    """What a receiver hears in place of what it heard, at every token: ``[batch, pos, ...]``."""

    site: str
    new: Tensor
    old: Tensor
    tokens: list[list[int]]
    head: int | None = None
    freeze: tuple[Edit, ...] = ()

    def edits(self, experiment: Experiment, generator: torch.Generator | None) -> list[Edit]:
        """The edits of one variant, or of its control."""
        new = self.new if generator is None else self.old + random_like(self.new - self.old, generator)
        at = per_row(self.tokens, layouts_of(experiment.inputs))
        by_size: dict[int, list[int]] = {}
        for row, tokens in enumerate(self.tokens):
            by_size.setdefault(len(tokens), []).append(row)
        heads = None if self.head is None else [self.head]
        written = [
            Replace(self.site, torch.stack([new[row, self.tokens[row]] for row in rows]), at=at, rows=rows, heads=heads)
            for rows in by_size.values()
        ]
        return [*self.freeze, *written]


def _to_logits(experiment: Experiment, senders: Sequence[Head], mlps: str) -> Iterator[tuple[tuple[int, ...], _Write]]:
    """The direct paths from each sender to the unembedding."""
    vlm, base = experiment.vlm, experiment.bases[0]
    last = f"blocks.{vlm.n_layers - 1}.hook_resid_post"
    check_residual(base.acts, range(vlm.n_layers))
    tokens = [[row.start + row.length - 1] for row in layouts_of(base.inputs)]
    for index, sender in enumerate(senders):
        said = _said(experiment, sender)
        if said is None:
            continue
        if mlps == "frozen":
            change = written(vlm, sender, said, base.acts)
            if bool(change[:, -1].any()):
                yield (index,), _Write(last, base.acts[last] + change, base.acts[last], tokens)
            continue
        group = experiment.groups[0].base
        freeze = tuple(_frozen(base.acts, range(sender[0] + 1, vlm.n_layers)))
        site = f"blocks.{sender[0]}.{HEAD}"
        old, head = base.acts[site], [sender[1]]
        yield (index,), _Write(site, said[:, :, head], old[:, :, head], group, sender[1], freeze)


def _to_heads(
    experiment: Experiment, senders: Sequence[Head], receivers: Sequence[Head], through: tuple[str, ...], mlps: str
) -> Iterator[tuple[tuple[int, ...], _Write]]:
    """The direct paths from each sender to each receiver's inputs."""
    vlm, base = experiment.vlm, experiment.bases[0]
    layers = sorted({layer for layer, _ in receivers})
    check_residual(base.acts, range(max(layers)))
    heard_by = {layer: Hearing(vlm, layer, base.inputs) for layer in layers} if mlps == "frozen" else {}
    for hearing in heard_by.values():
        hearing.check(base.acts)
    for index, sender in enumerate(senders):
        said = _said(experiment, sender)
        later = [layer for layer in layers if layer > sender[0]]
        if said is None or not later:
            continue
        if mlps == "frozen":
            change = written(vlm, sender, said, base.acts)
            heard = {f"blocks.{layer}.{INPUTS[letter]}": heard_by[layer](letter, change, base.acts)
                     for layer in later for letter in through}  # fmt: skip
        else:
            heard = _recomputed(experiment, sender, said, later, through)
        for (j, letter), (k, (layer, head)) in _pairs(through, receivers):
            site = f"blocks.{layer}.{INPUTS[letter]}"
            if site not in heard:
                continue
            # Keys and values may have fewer heads than queries.
            own = head * int(vlm.place(site).n_heads) // int(vlm.place(f"blocks.{layer}.{HEAD}").n_heads)
            new, old = heard[site][:, :, [own]], base.acts[site][:, :, [own]]
            tokens = experiment.groups[0].base
            if mlps == "recomputed":
                tokens = [list(range(row.start, row.start + row.length)) for row in layouts_of(base.inputs)]
            if not torch.equal(new, old):
                yield (j, index, k), _Write(site, new, old, tokens, own)


def _recomputed(
    experiment: Experiment, sender: Head, said: Tensor, layers: Sequence[int], through: Sequence[str]
) -> dict[str, Tensor]:
    """What receivers hear when all other heads between keep their values, and MLPs are computed anew."""
    base = experiment.bases[0]
    sites = [f"blocks.{layer}.{INPUTS[letter]}" for layer in layers for letter in through]
    site = f"blocks.{sender[0]}.{HEAD}"
    edits = [*base.edits, Replace(site, said), *_frozen(base.acts, range(sender[0] + 1, max(layers)))]
    acts = experiment.vlm.capture(base.inputs, sites, edits=edits, logits_to_keep=1)
    return {site: acts[site] for site in sites}


def _said(experiment: Experiment, sender: Head) -> Tensor | None:
    """All heads' outputs of the base run, with the sender's taken from the source run; None where it is the same."""
    layer, head = sender
    site = f"blocks.{layer}.{HEAD}"
    aligned, source = experiment.groups[0], experiment.sources[0]
    old = experiment.bases[0].acts[site]
    new = old.clone()
    for row, tokens in enumerate(aligned.base):
        new[row, tokens, head] = source.gather(site, aligned.group, aligned.source[row], row)[:, head]
    return None if torch.equal(new, old) else new


def _frozen(acts: Mapping[str, Tensor], layers: Sequence[int]) -> list[Edit]:
    """Edits that keep what attention writes in some layers."""
    return [Replace(f"blocks.{layer}.hook_attn_out", acts[f"blocks.{layer}.hook_attn_out"]) for layer in layers]


def _pairs(through: Sequence[str], receivers: Sequence[Head]) -> Iterator[tuple[tuple[int, str], tuple[int, Head]]]:
    for letter in enumerate(through):
        for receiver in enumerate(receivers):
            yield letter, receiver


def _all_heads(vlm: Any, depth: int) -> list[Head]:
    return [(layer, head) for layer in range(depth) for head in range(int(vlm.place(f"blocks.{layer}.{HEAD}").n_heads))]


def _head(vlm: Any, head: Any) -> Head:
    """A head that the model has."""
    (pair,) = as_heads([head])
    known = _all_heads(vlm, vlm.n_layers)
    if pair not in known:
        raise InputError(f"{head!r} is no head: give (layer, head), from {known[0]} to {known[-1]}")
    return pair


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"
