"""Which prompt the forwards of a session belong to, and where in it each of them starts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from interp.errors import InputError
from interp.positions import Layout, layouts_from_mask
from interp.selection import Call

_known_layouts: ContextVar[tuple[Layout, ...] | None] = ContextVar("known_layouts", default=None)


@contextmanager
def known_layouts(layouts: tuple[Layout, ...] | None) -> Iterator[None]:
    """Tell the sessions of this thread where the named positions of the coming inputs are.

    Args:
        layouts: one per prompt. None: a session looks at the attention mask of each call.
    """
    token = _known_layouts.set(layouts)
    try:
        yield
    finally:
        _known_layouts.reset(token)


class Clock:
    """Follows the calls of one session, in the thread that starts it.

    Args:
        model: the model, which embeds tokens before it calls the decoder.
        decoder: the module that runs the decoder, which users may call alone.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self.model, self.decoder = model, decoder
        self.call = Call()
        self._owner: int | None = None
        self._cache: ReferenceType | None = None
        self._inside_model = False

    def start(self) -> list[Callable[[], None]]:
        """Put the hooks in place; returns what takes them away."""
        undo: list[Callable[[], None]] = []
        self._owner = threading.get_ident()
        for module in (self.model, self.decoder):
            undo.append(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            undo.append(module.register_forward_hook(self._after).remove)
        return undo

    # Torch passes no kwargs while another thread is putting the hook in place or taking it away.
    def _before(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if threading.get_ident() != self._owner or kwargs is None:
            return
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1])
        tokens = next((x for x in given if isinstance(x, Tensor)), None)
        if tokens is None:
            raise InputError(f"{type(module).__name__} was called without input_ids or inputs_embeds")
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        within = self._inside_model and module is self.decoder and (past, length) == (self.call.past, self.call.length)
        layouts = _known_layouts.get()
        if layouts is None and past and (within or self._goes_on(past, cache)):
            layouts = self.call.layouts
        if not layouts:
            unpadded = tuple(Layout(0, past + length, named=False) for _ in range(batch))
            layouts = _layouts_of(kwargs.get("attention_mask")) or unpadded
        ids = tokens if tokens.ndim == 2 and not tokens.is_floating_point() else self.call.ids if within else None
        self.call = Call(past, length, layouts, ids)
        self._inside_model = module is self.model
        if cache is not None:
            self._cache = ref(cache)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() != self._owner:
            return
        # A model that was given no cache makes one, which tells the next token of this prompt from a new prompt.
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if cache is not None:
            self._cache = ref(cache)
        self._inside_model = self._inside_model and module is not self.model

    def _goes_on(self, past: int, cache: Any) -> bool:
        """Whether a call continues the prompt of the one before; rejected drafts are cut off the cache."""
        end = self.call.past + self.call.length
        if self._cache is None or self._cache() is not cache or not self.call.layouts:
            return False
        return past == end or self.call.prompt_length <= past <= end


def _layouts_of(mask: Any) -> tuple[Layout, ...] | None:
    return layouts_from_mask(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None
