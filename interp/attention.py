"""Attention probabilities, read and written in any tower, through transformers' AttentionInterface.

Fused kernels never form the probabilities. A touched attention module is pointed at the function below by a
private copy of its configuration, so every other layer keeps its kernel, and the mask that the model built
for that kernel (boolean, additive, or none) is honoured here.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from interp.errors import SiteUnavailableError

IMPLEMENTATION = "interp_pattern"

PatternHandler = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class _Switch:
    """One attention module that has left its kernel: what to restore, and who takes its probabilities."""

    original: Any
    handler: Callable[[], PatternHandler | None]


_switches: "WeakKeyDictionary[nn.Module, _Switch]" = WeakKeyDictionary()


def enable_pattern(module: nn.Module, handler: Callable[[], PatternHandler | None]) -> None:
    """Make one attention module form its probabilities until `disable_pattern`.

    Args:
        module: an attention module whose forward dispatches on ``self.config._attn_implementation``.
        handler: called at each forward; says who takes the probabilities in this thread. None: nobody does,
            and the module's own kernel runs.

    Raises:
        SiteUnavailableError: the module does not use the AttentionInterface.
    """
    if not hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
        raise SiteUnavailableError(
            f"{type(module).__name__} does not dispatch through transformers' AttentionInterface, "
            "so its attention probabilities cannot be read or written"
        )
    _switches[module] = _Switch(module.config, handler)
    config: Any = copy.copy(module.config)
    # The property's setter would also write into sub-configurations, which the copy shares.
    config._attn_implementation_internal = IMPLEMENTATION
    module.config = config


def disable_pattern(module: nn.Module) -> None:
    """Put the module's own configuration, and with it its kernel, back."""
    module.config = _switches.pop(module).original


def explicit_attention(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    handle: PatternHandler | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
) -> tuple[Float[Tensor, "batch query head d_value"], Float[Tensor, "batch head query key"]]:
    """Attention with the probabilities formed, handed over, and used as they come back.

    Args:
        module: the attention module, for its causality and training mode.
        query, key, value: after rotary embedding and cache.
        attention_mask: boolean (True = visible), additive, a 2-D padding mask, or None.
        scaling: factor on the logits; 1 / sqrt(d_head) when None.
        dropout: probability of dropping an entry, in training.
        handle: receives the probabilities after the softmax; returns new ones (not renormalised) or None.
        softcap: soft cap of the logits (Gemma 2).
        is_causal: whether queries see earlier keys only, where the mask does not say; None: as the module
            says.
        sliding_window: how many keys back a query sees, where the mask does not say.

    Returns:
        The heads' outputs and the probabilities that were used.
    """
    groups = query.shape[1] // key.shape[1]
    key = repeat(key, "batch kv pos d -> batch (kv groups) pos d", groups=groups)
    value = repeat(value, "batch kv pos d -> batch (kv groups) pos d", groups=groups)
    scores = torch.matmul(query, key.transpose(2, 3)).mul_(scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    scores = _masked(scores, attention_mask, causal, sliding_window)
    # The models' own eager attention takes the softmax in float32; fused kernels accumulate in it.
    pattern = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    if handle is not None:
        edited = handle(pattern)
        pattern = pattern if edited is None else edited
    used = nn.functional.dropout(pattern, p=dropout, training=module.training)
    return rearrange(torch.matmul(used, value), "batch head query d -> batch query head d").contiguous(), pattern


def _masked(
    scores: Float[Tensor, "batch head query key"], mask: Tensor | None, causal: bool, window: int | None
) -> Float[Tensor, "batch head query key"]:
    lowest = torch.finfo(scores.dtype).min
    if mask is not None and not isinstance(mask, Tensor):
        raise SiteUnavailableError(
            f"attention patterns need a tensor mask, this kernel uses {type(mask).__name__}: "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if mask is not None and mask.ndim == 4:
        return _hidden(scores, ~mask, lowest) if mask.dtype == torch.bool else scores + mask
    n_query, n_key = scores.shape[-2:]
    visible = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device)
    if causal:
        visible = visible.tril(diagonal=n_key - n_query)
        if window is not None:
            visible = visible.triu(diagonal=n_key - n_query - window + 1)
    if mask is not None:
        visible = visible & rearrange(mask[:, -n_key:].bool(), "batch key -> batch 1 1 key")
    return _hidden(scores, ~visible, lowest)


def _hidden(scores: Tensor, mask: Tensor, lowest: float) -> Tensor:
    # In place where no graph needs them: these are the largest tensors of a model.
    return scores.masked_fill(mask, lowest) if scores.requires_grad else scores.masked_fill_(mask, lowest)


def _dispatch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    switch = _switches.get(module)  # None when another thread has put the kernel back in the meantime
    handle = switch.handler() if switch is not None else None
    if handle is None:  # this thread touches nothing here
        config: Any = switch.original if switch is not None else module.config
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        own = AttentionInterface().get_interface(config._attn_implementation, eager)
        return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise SiteUnavailableError(
                f"{type(module).__name__} passes {name!r} to its attention kernel, "
                "which explicit attention patterns do not cover"
            )
    return explicit_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        handle=handle,
        softcap=kwargs.get("softcap"),
        is_causal=kwargs.get("is_causal"),
        sliding_window=kwargs.get("sliding_window"),
    )


AttentionInterface.register(IMPLEMENTATION, _dispatch)
