"""Many variants of one batch, each with edits of its own, with the work they share done once.

Images are encoded once. A patch at block L and position p changes nothing below L nor before p: so the prompt runs
once, and every variant runs the blocks from its first edit on, for the tokens from its first edited position on. Many
variants run in one forward (`interp.sweeps.chunk`). The result is that of the naive loop of edited forwards.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.clock import known_layouts
from interp.errors import InputError, NeverFiredError
from interp.hooks import Applied
from interp.inputs import Inputs
from interp.positions import Layout, layouts_from_mask
from interp.progress import progress as progress_bar
from interp.sweeps.asked import Asked, asked
from interp.sweeps.checks import EffectGuard, SweepMismatchError, as_values, check_against_plain, no_effect
from interp.sweeps.chunk import ChunkRun
from interp.sweeps.fingerprint import fingerprint
from interp.sweeps.folder import Folder
from interp.sweeps.memory import budget, out_of_memory, release
from interp.sweeps.obstacles import foreign_hooks, obstacle, outer_edits
from interp.sweeps.plan import Chunk, Plan, chunked, sizes_of
from interp.sweeps.shared import SharedRun, Unshareable, plain_forward, shared_run
from interp.sweeps.variants import Depths, Variant, depths_of, located

_log = logging.getLogger(__name__)

Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Sweep:
    """Result of a sweep.

    Args:
        plan: what was shared.
        results: per variant and row, logits or what the metric made of them; None after a dry run.
        unedited: the same for the unedited run; None after a dry run.
        measured: whether there was a metric.
    """

    plan: Plan
    results: Float[Tensor, "variant batch ..."] | None = None
    unedited: Float[Tensor, "batch ..."] | None = None
    measured: bool = False

    @property
    def logits(self) -> Float[Tensor, "variant batch *pos vocab"]:
        """At the asked positions, per variant and row.

        Raises:
            InputError: a dry run, or a sweep with a metric, which keeps no logits.
        """
        if self.measured:
            raise InputError("this sweep had a metric, and kept its values only: they are in .values")
        return self._results()

    @property
    def values(self) -> Float[Tensor, "variant batch ..."]:
        """What the metric made of the logits, per variant and row.

        Raises:
            InputError: a dry run, or a sweep without a metric.
        """
        if not self.measured:
            raise InputError("this sweep had no metric: its logits are in .logits")
        return self._results()

    def _results(self) -> Tensor:
        if self.results is None:
            raise InputError("this was a dry run, which has a plan only")
        return self.results


@dataclass(frozen=True, eq=False)
class _Task:
    """A sweep with all its parts resolved."""

    vlm: Any
    inputs: Mapping[str, Any]
    variants: list[Variant]
    layouts: tuple[Layout, ...]
    asked: Asked
    depths: Depths
    metric: Metric | None
    max_rows: int
    memory: int
    guard: bool
    checked: Variant | None

    @property
    def batch(self) -> int:
        """How many prompts there are."""
        return len(self.layouts)

    def value(self, logits: Tensor, like: Tensor | None = None, index: int = -1) -> Tensor:
        """What is kept of a variant, in the shape of the unedited run's; of that run itself without ``like``."""
        return as_values(self.metric, self.asked.shown(logits), self.batch, like, f"variant {index}")


def run_sweep(
    vlm: Any,
    inputs: Mapping[str, Any],
    variants: Sequence[Sequence[Applied]],
    *,
    metric: Metric | None = None,
    positions: Any = "last",
    max_rows: int = 256,
    memory: int | None = None,
    dry_run: bool = False,
    check: bool = True,
    folder: str | Path | None = None,
    progress: bool = True,
    allow_no_effect: bool = False,
    seed: int = 0,
) -> Sweep:
    """Run the variants; see `VLM.sweep`.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        variants: for every variant its edits, placed.
        metric, positions, max_rows, memory, dry_run, check, folder, progress, allow_no_effect, seed: as for
            `VLM.sweep`.

    Raises:
        InputError, ShapeError, UnknownNameError, NeverFiredError, SweepMismatchError: as for `VLM.sweep`.
    """
    if not variants:
        raise InputError("a sweep needs at least one variant")
    if max_rows < 1:
        raise InputError(f"max_rows={max_rows}: at least one row has to fit")
    if memory is not None and memory < 1:
        raise InputError(f"memory={memory}: give a number of bytes, or None to have it found")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or inputs.get("past_key_values") is not None:
        raise InputError("a sweep needs input_ids, and starts without past_key_values")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    layouts = inputs.layout if isinstance(inputs, Inputs) else layouts_from_mask(mask)
    depths = depths_of(vlm)
    with torch.no_grad(), known_layouts(layouts):
        reason = obstacle(vlm, inputs, variants, depths)
        seq_len = int(ids.shape[1])
        found = (
            [Variant(index, tuple(edits), 0, 0) for index, edits in enumerate(variants)]
            if reason
            else located(variants, layouts, seq_len, depths)
        )
        task = _Task(
            vlm=vlm,
            inputs=inputs,
            variants=found,
            layouts=layouts,
            asked=asked(positions, layouts, seq_len),
            depths=depths,
            metric=metric,
            max_rows=max_rows,
            memory=memory or budget({parameter.device for parameter in vlm.decoder.parameters()}),
            guard=not allow_no_effect,
            checked=_drawn(found, seed) if check else None,
        )
        chunks, plan = _planned(task, task.variants, reason)
        if dry_run:
            return Sweep(plan)
        kept = None
        if folder is not None:
            kept = Folder(folder, fingerprint(vlm, inputs, layouts, variants, metric, task.asked, depths))
        return _run(task, chunks, plan, kept, progress)


def _drawn(variants: Sequence[Variant], seed: int) -> Variant | None:
    edited = [variant for variant in variants if variant.edits]
    if not edited:
        return None
    return edited[int(torch.randint(len(edited), (), generator=torch.Generator().manual_seed(seed)))]


def _planned(task: _Task, variants: Sequence[Variant], reason: str) -> tuple[list[Chunk] | None, Plan]:
    """The forwards to run, None for one per variant, and the plan that says so."""
    n_layers, batch, seq_len = task.depths.n_layers, task.batch, task.asked.seq_len
    whole = n_layers * batch * seq_len
    edited = [variant for variant in variants if variant.edits]
    one_by_one = Plan(
        n_variants=len(task.variants),
        batch=batch,
        seq_len=seq_len,
        shared_prefix=0,
        images_shared=False,
        variants_per_forward=1,
        token_layers=whole * (len(edited) + 1),
        naive_token_layers=whole * len(task.variants),
        reason=reason,
        memory=task.memory,
    )
    if reason:
        return None, one_by_one
    outer = bool(outer_edits(task.vlm, task.depths))
    chunks = chunked(
        edited,
        batch,
        seq_len,
        int(task.asked.index.shape[1]),
        sizes_of(task.vlm),
        memory=task.memory,
        max_rows=task.max_rows,
        outer=outer,
    )
    again = _clean_again(task)
    costs = [chunk.token_layers(batch, seq_len, n_layers, outer) for chunk in [*chunks, *([again] if again else [])]]
    first = min([seq_len - 1, *(variant.start for variant in edited)])
    plan = replace(
        one_by_one,
        shared_prefix=first,
        images_shared="pixel_values" in task.inputs,
        variants_per_forward=max([1, *(len(chunk.variants) for chunk in chunks)]),
        token_layers=whole + sum(costs),
        layers_shared=sum(batch * variant.layer * (seq_len - variant.start) for variant in edited),
        chunks=tuple(str(chunk) for chunk in chunks),
        checked=None if task.checked is None else task.checked.index,
        reason="edits of outer blocks apply too, which need each variant in rows of its own" if outer else "",
    )
    if plan.token_layers > one_by_one.token_layers:
        return None, replace(one_by_one, reason="sharing would cost more than running the variants one by one")
    return chunks, plan


def _clean_again(task: _Task) -> Chunk | None:
    """What the checked variant's edits have touched in the run that all start from, to be run without them."""
    if task.checked is None:
        return None
    start = min(task.checked.clean_before, task.asked.seq_len - 1)
    untouched = Variant(-1, (), task.checked.clean_layers, start)
    return Chunk("rows", untouched.start, (untouched,))


def _run(task: _Task, chunks: list[Chunk] | None, plan: Plan, folder: Folder | None, progress: bool) -> Sweep:
    done = {} if folder is None else folder.load()
    if done and chunks is not None:
        chunks, _ = _planned(task, [variant for variant in task.variants if variant.index not in done], "")
    with progress_bar(len(task.variants), "sweep") if progress else nullcontext() as bar:

        def keep(values: dict[int, Tensor]) -> None:
            done.update(values)
            if folder is not None and values:
                folder.save(values)
            if bar is not None:
                bar.update(len(values))

        if bar is not None:
            bar.update(len(done))
        unedited = None
        if chunks is not None:
            try:
                unedited = _shared_loop(task, chunks, done, keep)
            except Unshareable as error:
                _, plan = _planned(task, task.variants, str(error))
                # The shared run has been for nothing.
                plan = replace(plan, token_layers=plan.token_layers + plan.naive_token_layers // plan.n_variants)
        if unedited is None:
            unedited = _plain_loop(task, done, keep)
    device = unedited.device
    results = torch.stack([done[index].to(device) for index in range(len(task.variants))])
    return Sweep(plan, results, unedited, task.metric is not None)


def _plain_loop(task: _Task, done: Mapping[int, Tensor], keep: Callable[[dict[int, Tensor]], None]) -> Tensor:
    """One edited forward per variant; returns what is kept of the unedited one."""
    clean = plain_forward(task.vlm, task.inputs, (), task.asked, task.depths)
    guard = EffectGuard(task.vlm, task.inputs, task.asked, task.depths, clean)
    unedited = task.value(clean)
    for variant in task.variants:
        if variant.index in done:
            continue
        if not variant.edits:
            keep({variant.index: unedited})
            continue
        logits = plain_forward(task.vlm, task.inputs, variant.edits, task.asked, task.depths)
        if task.guard and torch.equal(logits, clean):
            raise no_effect(variant)
        if task.guard and any(a.place.side == "pattern" for a in variant.edits):
            guard.check({variant: logits})
        keep({variant.index: task.value(logits, unedited, variant.index)})
    return unedited


def _shared_loop(
    task: _Task, chunks: list[Chunk], done: Mapping[int, Tensor], keep: Callable[[dict[int, Tensor]], None]
) -> Tensor:
    """The shared run, then the chunks; returns what is kept of the unedited run."""
    shared, plain = _start(task)
    guard = EffectGuard(task.vlm, task.inputs, task.asked, task.depths, shared.logits)
    unedited = task.value(shared.logits)
    keep({one.index: unedited for one in task.variants if not one.edits and one.index not in done})
    waiting = list(reversed(chunks))
    backed_off = False
    while waiting:
        chunk = waiting.pop()
        logits = _attempt(task, shared, chunk)
        if logits is None:
            release()
            waiting += reversed(chunk.halves())
            if not backed_off:
                _log.warning("memory ran out with %d variants in one forward: going on with half", len(chunk.variants))
            backed_off = True
            continue
        _check_chunk(task, dict(zip(chunk.variants, logits, strict=True)), plain, guard)
        pairs = zip(chunk.variants, logits, strict=True)
        keep({one.index: task.value(x, unedited, one.index) for one, x in pairs})
    return unedited


def _start(task: _Task) -> tuple[SharedRun, Tensor | None]:
    """The run that all variants start from, and the checked variant's logits in a plain edited forward.

    They are one forward: where the checked variant's edits have touched it, it is run again without them, and
    everywhere else it is the unedited run already.
    """
    again = _clean_again(task)
    starts = [variant.start for variant in task.variants] + ([again.start] if again else [])
    edits = () if task.checked is None else task.checked.edits
    first = min(task.asked.seq_len - 1, *starts)
    shared = shared_run(task.vlm, task.inputs, edits, task.asked, task.depths, first)
    if again is None:
        return shared, None
    plain = shared.logits
    clean = _chunk_run(task, shared, again, store=True).run()[0]
    shared.logits = clean
    return shared, plain


def _chunk_run(task: _Task, shared: SharedRun, chunk: Chunk, *, store: bool = False) -> ChunkRun:
    outer = bool(outer_edits(task.vlm, task.depths))
    return ChunkRun(task.vlm, shared, chunk, task.layouts, task.asked, task.depths, outer=outer, store=store)


def _attempt(task: _Task, shared: SharedRun, chunk: Chunk) -> list[Tensor] | None:
    """The logits of a chunk; None when memory ran out and it can be made smaller."""
    try:
        return _chunk_run(task, shared, chunk).run()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(chunk.variants) == 1:
            raise
    return None


def _check_chunk(task: _Task, logits: Mapping[Variant, Tensor], plain: Tensor | None, guard: EffectGuard) -> None:
    for variant in logits:
        idle = [applied.edit for applied in variant.edits if not applied.times]
        if idle:
            raise NeverFiredError(
                f"{idle[0]!r} of variant {variant.index} never applied: no token of its selection reaches its site "
                "(the unembedding runs at the asked positions only)"
            )
    if plain is not None and task.checked is not None and task.checked in logits:
        check_against_plain(task.checked, logits[task.checked], plain, foreign_hooks(task.vlm, task.depths))
    if task.guard:
        guard.check(logits)


__all__ = ["Plan", "Sweep", "SweepMismatchError", "run_sweep"]
