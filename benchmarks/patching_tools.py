"""The jobs of `benchmarks/patching.py`, done by plain torch hooks and by this library.

Every tool is a function of a case that returns its jobs by name. What peers offer is in `patching_peers`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import interp
from interp import Edit, Replace, Zero, patching

Cell = tuple[int, int]
LAST, GRID, HEADS = "layers at the last token", "layer x position", "all heads at the last token"
STREAMS, PATTERNS, ATTRIBUTION = "residual streams", "attention patterns", "attribution"
BATCHED = 8


@dataclass(frozen=True)
class Job:
    """What a tool does for one job.

    Args:
        run: does it; returns tensors to compare.
        times: how much of the job it does not do: its time is multiplied by this.
        note: what has to be said about it.
    """

    run: Callable[[], list[Tensor]]
    times: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One model, its inputs, and what is patched.

    Args:
        model: the model; its weights need no gradient.
        inputs: one row, unpadded.
        other: inputs of the same length, whose activations attribution patching puts in.
        value: the vector that patches put into the residual stream.
        positions: of the grid's patches.
        n_timed: patches of a sweep that tools which run a forward for each are timed on.
        jobs: what is done.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    other: dict[str, Tensor]
    value: Tensor
    positions: tuple[int, ...]
    n_timed: int
    jobs: tuple[str, ...]
    vlm: interp.VLM = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vlm", interp.VLM(self.model))

    @property
    def n_layers(self) -> int:
        return self.vlm.n_layers

    @property
    def d_head(self) -> int:
        return self.vlm.d_head

    @property
    def end(self) -> int:
        return int(self.inputs["input_ids"].shape[1]) - 1

    @property
    def sweeps(self) -> Mapping[str, list[Cell]]:
        """The patches of each sweep: (layer, position), or (layer, head)."""
        layers = range(self.n_layers)
        return {
            LAST: [(layer, self.end) for layer in layers],
            GRID: [(layer, position) for layer in layers for position in self.positions],
            HEADS: [(layer, head) for layer in layers for head in range(self.vlm.n_heads)],
        }

    def timed(self, job: str) -> list[int]:
        """Which patches of a sweep are timed and compared, spread evenly."""
        n = len(self.sweeps[job])
        return torch.linspace(0, n - 1, min(n, self.n_timed)).round().int().tolist()

    def loop(self, job: str, patch: Callable[[int, int], Tensor], note: str = "") -> Job:
        """A sweep as a loop of forwards, of which only some are run."""
        cells, timed = self.sweeps[job], self.timed(job)
        parts = [f"timed on {len(timed)} of {len(cells)} patches"] if len(timed) < len(cells) else []
        return Job(
            lambda: [patch(*cells[index]) for index in timed],
            times=len(cells) / len(timed),
            note="; ".join([*parts, *([note] if note else [])]),
        )


def metric(logits: Tensor) -> Tensor:
    """The difference of two answers' logits."""
    return logits[:, 5] - logits[:, 7]


def estimates(
    clean: Sequence[Tensor], corrupt: Sequence[Tensor], grads: Sequence[Tensor], value: Tensor
) -> list[Tensor]:
    """What attribution patching makes of two runs' streams and the gradients in one of them."""
    changes = [((a - b) * g).sum(-1) for a, b, g in zip(clean, corrupt, grads, strict=True)]
    return [(value[:, None] + change).detach() for change in changes]


def last_logits(case: Case, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return case.model(**(inputs or case.inputs), logits_to_keep=1).logits[:, -1]


@contextmanager
def hooked(found: Sequence[tuple[nn.Module, Callable]], before: bool = False) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        for module, hook in found
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def streams_with_hooks(case: Case, inputs: Mapping[str, Tensor], grad: bool) -> tuple[list[Tensor], Tensor]:
    """Every block's output and the last token's logits; with the graph between them if it is asked for."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if grad:
            # Weights need no gradient, so the graph starts here.
            out = out if out.requires_grad else out.detach().requires_grad_()
            seen.append(out)
            return out
        seen.append(out.detach().clone())
        return None

    with hooked([(block, keep) for block in case.vlm.decoder.layers]), torch.set_grad_enabled(grad):
        logits = case.model(**inputs, logits_to_keep=1).logits[:, -1]
    return seen, logits


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """The attention kernel that forms its probabilities."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kernel)


def plain_hooks(case: Case) -> dict[str, Job]:
    """Torch hooks in a loop, as with baukit."""
    blocks, d_head = case.vlm.decoder.layers, case.d_head

    def patched(layer: int, position: int) -> Tensor:
        def put(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            new = out.clone()
            new[:, position] = case.value
            return new

        with hooked([(blocks[layer], put)]):
            return last_logits(case)

    def without(layer: int, head: int) -> Tensor:
        def drop(module: nn.Module, args: tuple) -> tuple:
            new = args[0].clone()
            new[:, -1, head * d_head : (head + 1) * d_head] = 0
            return (new,)

        with hooked([(blocks[layer].self_attn.o_proj, drop)], before=True):
            return last_logits(case)

    def attribution() -> list[Tensor]:
        clean, _ = streams_with_hooks(case, case.other, grad=False)
        corrupt, logits = streams_with_hooks(case, case.inputs, grad=True)
        value = metric(logits)
        return estimates(clean, corrupt, torch.autograd.grad(value.sum(), corrupt), value)

    def patterns() -> list[Tensor]:
        with eager(case.model), torch.no_grad():
            return list(case.model(**case.inputs, output_attentions=True, logits_to_keep=1).attentions)

    return {
        STREAMS: Job(lambda: streams_with_hooks(case, case.inputs, grad=False)[0]),
        PATTERNS: Job(patterns, note="eager attention, which is switched on by hand"),
        LAST: case.loop(LAST, patched),
        GRID: case.loop(GRID, patched),
        HEADS: case.loop(HEADS, without),
        ATTRIBUTION: Job(attribution),
    }


def batched_hooks(case: Case) -> dict[str, Job]:
    """Torch hooks, with the prompt repeated in rows and another patch in each: the most that batching alone gives."""
    blocks, d_head = case.vlm.decoder.layers, case.d_head

    def rows(cells: Sequence[Cell], heads: bool) -> list[Tensor]:
        by_layer: dict[int, list[tuple[int, int]]] = {}
        for row, (layer, where) in enumerate(cells):
            by_layer.setdefault(layer, []).append((row, where))

        def put(module: nn.Module, args: tuple, out: Tensor, found: list[tuple[int, int]]) -> Tensor:
            new = out.clone()
            for row, position in found:
                new[row, position] = case.value
            return new

        def drop(module: nn.Module, args: tuple, found: list[tuple[int, int]]) -> tuple:
            new = args[0].clone()
            for row, head in found:
                new[row, -1, head * d_head : (head + 1) * d_head] = 0
            return (new,)

        hooks: list[tuple[nn.Module, Callable]] = []
        for layer, found in by_layer.items():
            if heads:
                hooks.append((blocks[layer].self_attn.o_proj, lambda m, args, found=found: drop(m, args, found)))
            else:
                hooks.append((blocks[layer], lambda m, args, out, found=found: put(m, args, out, found)))
        repeated = {name: x.repeat(len(cells), *[1] * (x.ndim - 1)) for name, x in case.inputs.items()}
        with hooked(hooks, before=heads):
            return list(last_logits(case, repeated)[:, None])

    def job(name: str) -> Job:
        cells, timed = case.sweeps[name], case.timed(name)
        chosen = [cells[index] for index in timed]
        parts = [chosen[first : first + BATCHED] for first in range(0, len(chosen), BATCHED)]
        return Job(
            lambda: [logits for part in parts for logits in rows(part, name == HEADS)],
            times=len(cells) / len(timed),
            note=f"timed on {len(timed)} of {len(cells)} patches, {len(parts[0])} in a forward",
        )

    return {name: job(name) for name in case.sweeps}


def two_forwards_and_a_backward(case: Case) -> dict[str, Job]:
    """What attribution patching costs physically, with nothing kept and nothing computed of it."""
    first = case.vlm.decoder.layers[0]

    def run() -> list[Tensor]:
        last_logits(case, case.other)
        seen: list[Tensor] = []

        def begin(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            seen.append(out.detach().requires_grad_())
            return seen[0]

        with hooked([(first, begin)]):
            logits = case.model(**case.inputs, logits_to_keep=1).logits[:, -1]
        return list(torch.autograd.grad(metric(logits).sum(), seen))

    return {ATTRIBUTION: Job(run, note="the physical cost; no result")}


def this_library(case: Case) -> dict[str, Job]:
    """interp: one sweep of all patches, its self-check included."""
    vlm = case.vlm
    post = "blocks.{}.hook_resid_post"

    def swept(name: str, edits: list[Edit]) -> Job:
        # Some patches of the last block cannot reach the last token.
        options = {"progress": False, "allow_no_effect": True}
        plan = vlm.sweep(case.inputs, edits, dry_run=True, **options).plan
        shared = plan.naive_token_layers / plan.token_layers
        return Job(
            lambda: list(vlm.sweep(case.inputs, edits, **options).logits),
            note=f"all {len(edits)} patches; {shared:.1f} x fewer token-layers than a loop",
        )

    def put(name: str) -> Job:
        cells = case.sweeps[name]
        return swept(name, [Replace(post.format(layer), case.value, at=position) for layer, position in cells])

    def attribution() -> list[Tensor]:
        found = patching.attribution(
            vlm, case.other, case.inputs, metric, sites=["hook_resid_post"], direction="denoise", check=0
        )
        return list(found.values[0].transpose(1, 2))

    def captured(sites: str) -> Job:
        return Job(lambda: list(vlm.capture(case.inputs, sites, logits_to_keep=1).values()))

    heads: list[Edit] = [
        Zero(f"blocks.{layer}.attn.hook_z", heads=head, at="last") for layer, head in case.sweeps[HEADS]
    ]
    return {
        STREAMS: captured(post.format("*")),
        PATTERNS: captured("blocks.*.attn.hook_pattern"),
        LAST: put(LAST),
        GRID: put(GRID),
        HEADS: swept(HEADS, heads),
        ATTRIBUTION: Job(attribution),
    }
