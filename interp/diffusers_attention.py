"""Attention probabilities of diffusers' models, read and written through their attention processors.

A touched attention module is given a processor that calls its own one, with the one call of the fused kernel in
it answered by explicit attention. So any processor works whose attention is one call of torch's kernel, or one
softmax of explicit scores, and every other module keeps its kernel.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.attention import PatternHandler, explicit_attention
from interp.errors import SiteUnavailableError

# Held here, lest it matter who else wraps the function of this name.
_KERNEL = torch.nn.functional.scaled_dot_product_attention
_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)


class _Probing:
    """A processor that calls another one and sees its attention probabilities.

    Args:
        original: the module's own processor.
        handler: called at each forward; says who takes the probabilities in this thread, or None.
    """

    def __init__(self, original: Any, handler: Callable[[], PatternHandler | None]) -> None:
        self.original, self.handler = original, handler
        # Attention modules read the parameters of their processor's __call__ to know what they may pass.
        vars(self)["__call__"] = original.__call__

    def __call__(self, attention: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        handle = self.handler()
        if handle is None:
            return self.original(attention, hidden_states, *args, **kwargs)
        mode = _Explicit(attention, self.original, len(hidden_states), handle)
        with mode:
            output = self.original(attention, hidden_states, *args, **kwargs)
        if not mode.times:
            raise SiteUnavailableError(
                f"{type(self.original).__name__} computes attention without torch's kernel and without a softmax over "
                "whole heads, so its probabilities cannot be read or written: turn off attention slicing and "
                "xformers, or set AttnProcessor2_0 (pipeline.unet.set_attn_processor)"
            )
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["original"], name)


class _Explicit(TorchFunctionMode):
    """Answers the one call of the attention kernel within a block by attention that shows its probabilities."""

    def __init__(self, module: Any, processor: Any, batch: int, handle: PatternHandler) -> None:
        super().__init__()
        self.module, self.processor, self.batch, self.handle = module, processor, batch, handle
        self.times = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _KERNEL:
            self._once()
            return self._attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and result.ndim == 3 and len(result) == self.batch * self.module.heads:
            self._once()
            edited = self.handle(rearrange(result, "(batch head) query key -> batch head query key", batch=self.batch))
            return result if edited is None else rearrange(edited, "batch head query key -> (batch head) query key")
        return result

    def _once(self) -> None:
        self.times += 1
        if self.times > 1:
            raise SiteUnavailableError(
                f"{type(self.processor).__name__} attends several times in one forward (as IP adapters do), so that "
                "which probabilities are meant is not clear"
            )

    def _attention(
        self,
        query: Float[Tensor, "batch head query d_head"],
        key: Float[Tensor, "batch kv_head key d_head"],
        value: Float[Tensor, "batch kv_head key d_value"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Float[Tensor, "batch head query d_value"]:
        """The arguments are those of torch's kernel."""
        mask = attn_mask
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        elif is_causal:
            mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        output, _ = explicit_attention(
            self.module, query, key, value, mask, scale, float(dropout_p), self.handle, is_causal=False
        )
        return rearrange(output, "batch query head d -> batch head query d")


_own: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()


def has_processor(module: nn.Module) -> bool:
    """Whether a module's attention is computed by a processor, as in diffusers."""
    return hasattr(module, "processor") and callable(getattr(module, "set_processor", None))


def enable_processor(module: nn.Module, handler: Callable[[], PatternHandler | None]) -> None:
    """Make one attention module form its probabilities until `disable_processor`.

    Args:
        module: a diffusers attention module.
        handler: called at each forward; says who takes the probabilities in this thread. None: nobody does, and the
            module's own processor runs.
    """
    # The instance's dictionary comes before its submodules, so that a processor with weights stays one of them.
    _own[module] = vars(module).get("processor")
    vars(module)["processor"] = _Probing(module.processor, handler)


def disable_processor(module: nn.Module) -> None:
    """Put the module's own processor back, unless it was exchanged in the meantime."""
    own = _own.pop(module)
    if not isinstance(vars(module).get("processor"), _Probing):
        return
    if own is None:
        del vars(module)["processor"]
    else:
        vars(module)["processor"] = own
