"""The one run of the whole prompt that all variants of a sweep start from."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from interp.clock import Clock
from interp.hooks import Applied, Session, Tap, live_edits
from interp.sweeps.asked import Asked
from interp.sweeps.masks import is_causal
from interp.sweeps.variants import Depths

# What a block may be given besides the residual stream, and how each is cut to some of the tokens.
_CUT = ("attention_mask", "position_ids", "position_embeddings", "cache_position", "past_key_values")


class Unshareable(Exception):
    """Something that only the run itself shows, and that allows no sharing; the message says what."""


@dataclass
class SharedRun:
    """What the variants of a sweep start from.

    Args:
        first: the first position whose residual stream is kept.
        residual: of every block the stream that enters it, and that which leaves the last, from ``first`` on.
        keys, values: of every block, at all positions.
        arguments: what each block was given, by name.
        logits: at the asked positions.
    """

    first: int
    residual: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def unembeds(vlm: Any, edits: Sequence[Applied], depths: Depths) -> bool:
    """Whether an edit, of these or of an outer block, is at the unembedding."""
    return any(depths.unembeds(a.place) for a in (*edits, *live_edits(vlm.model)))


def plain_forward(
    vlm: Any,
    inputs: Mapping[str, Any],
    edits: Sequence[Applied],
    asked: Asked,
    depths: Depths,
    taps: Sequence[Tap] = (),
    **options: Any,
) -> Tensor:
    """One edited forward, as a user would run it; logits at the asked positions.

    Args:
        vlm: the model.
        inputs: its inputs.
        edits: placed edits.
        asked: positions.
        depths: of the model's modules.
        taps: captures that run along.
        options: passed on to the model.

    Raises:
        NeverFiredError: an edit that applied to nothing.
    """
    tail = unembeds(vlm, edits, depths)
    with Session(vlm.model, Clock(vlm.model, vlm.decoder), taps, edits):
        logits = vlm(inputs, logits_to_keep=asked.keep(tail), **options).logits
    return asked.gather(logits, tail)


def shared_run(
    vlm: Any, inputs: Mapping[str, Any], edits: Sequence[Applied], asked: Asked, depths: Depths, first: int
) -> SharedRun:
    """Run the whole prompt once, edits included, and keep what variants start from.

    Args:
        vlm: the model.
        inputs: its inputs.
        edits: placed edits; where they leave their mark, the run is not the unedited one.
        asked: positions whose logits are kept.
        depths: of the model's modules.
        first: position from which on the residual stream is kept.

    Raises:
        Unshareable: a mask that looks ahead, blocks that are given more than a decoder's are, or that remember their
            past in another way than by keys and values, or that are not simply one after the other.
    """
    run = SharedRun(first)
    # Layers with a sliding window keep all their keys in this cache; the mask says which of them a token sees.
    kept = DynamicCache()
    left: list[Tensor] = []
    with _watching(vlm, depths, run, left):
        run.logits = plain_forward(vlm, inputs, edits, asked, depths, past_key_values=kept, use_cache=True)
    n_layers, seq_len = depths.n_layers, asked.seq_len
    if len(run.residual) != n_layers + 1:
        raise Unshareable(f"{type(vlm.decoder).__name__} did not run each of its {n_layers} blocks once")
    for layer, (out, entered) in enumerate(zip(left, run.residual[1:], strict=True)):
        if not torch.equal(out.to(entered.device), entered):
            raise Unshareable(f"something changes the residual stream between block {layer} and what comes after it")
    for layer, arguments in enumerate(run.arguments):
        _check_arguments(vlm, layer, arguments, seq_len)
    if len(kept.layers) != n_layers:
        raise Unshareable(f"{len(kept.layers)} of {n_layers} blocks keep keys and values")
    for layer, of_layer in enumerate(kept.layers):
        keys, values = getattr(of_layer, "keys", None), getattr(of_layer, "values", None)
        if type(of_layer).__name__ != "DynamicLayer" or keys is None or values is None or keys.shape[2] != seq_len:
            raise Unshareable(
                f"block {layer} does not remember its past by keys and values (recurrent, or cross-attention)"
            )
        run.keys.append(keys)
        run.values.append(values)
    return run


@contextmanager
def _watching(vlm: Any, depths: Depths, run: SharedRun, left: list[Tensor]) -> Iterator[None]:
    owner = threading.get_ident()
    undo: list[Callable[[], None]] = []

    # Torch passes no kwargs while another thread is putting the hook in place or taking it away.
    def entering(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if threading.get_ident() == owner and kwargs is not None:
            named = by_name(module, args, kwargs)
            run.residual.append(_first_tensor(named)[:, run.first :].clone())
            run.arguments.append(named)

    def leaving(module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == owner:
            out = output[0] if isinstance(output, tuple) else output
            left.append(out[:, run.first :].clone())

    def ending(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if threading.get_ident() == owner and kwargs is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            run.residual.append(x[:, run.first :].clone())

    try:
        for path in depths.blocks:
            block = vlm.model.get_submodule(path)
            undo.append(block.register_forward_pre_hook(entering, with_kwargs=True, prepend=True).remove)
            undo.append(block.register_forward_hook(leaving).remove)
        norm = vlm.model.get_submodule(depths.final_norm)
        undo.append(norm.register_forward_pre_hook(ending, with_kwargs=True, prepend=True).remove)
        yield
    finally:
        for remove in undo:
            remove()


def by_name(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by their names, in the order of its signature."""
    kind: Any = type(module)
    return dict(zip(_names(kind), args, strict=False)) | dict(kwargs)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    # Not of the instance's forward: accelerate wraps it.
    return tuple(name for name in inspect.signature(kind.forward).parameters if name != "self")


def _first_tensor(named: Mapping[str, Any]) -> Tensor:
    x = next(iter(named.values()), None)
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise Unshareable("blocks are not given the residual stream as their first argument")
    return x


def _check_arguments(vlm: Any, layer: int, arguments: Mapping[str, Any], seq_len: int) -> None:
    x, *_ = arguments.values()
    batch = int(x.shape[0])
    for name, value in list(arguments.items())[1:]:
        parts = value if isinstance(value, tuple | list) else (value,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if tensors and name not in _CUT:
            raise Unshareable(f"block {layer} is given {name}, which belongs to the whole prompt (cross-attention?)")
        if name == "attention_mask" and value is not None:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if shape not in ((batch, 1, seq_len, seq_len), (1, 1, seq_len, seq_len)):
                raise Unshareable(f"the attention mask of block {layer} is {shape}, not [batch, 1, query, key]")
            if not is_causal(value):
                raise Unshareable(f"tokens of block {layer} see later ones")
        if name in ("position_ids", "position_embeddings") and any(
            tensor.shape[0] not in (1, batch) or tensor.shape[1] != seq_len for tensor in tensors
        ):
            raise Unshareable(f"{name} of block {layer} have more axes than batch and position")
    if arguments.get("attention_mask") is None and vlm.decoder.config._attn_implementation != "sdpa":
        raise Unshareable(f"the {vlm.decoder.config._attn_implementation} kernel of block {layer} is given no mask")
