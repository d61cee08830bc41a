"""One plain hook on each touched module, shared by all who listen to it, and gone with the last of them.

It runs before hooks that were registered earlier, because transformers' own recorders (which feed LLaVA's
vision features to the language model) must see the edited output. Each listener is heard only in its own
thread; all edits come before all captures, whoever was there first, so that captures see edited values.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn

from interp.attention import disable_pattern, enable_pattern
from interp.errors import InputError
from interp.sites import Place, Side

Listener = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class _Entry:
    """One listener, the thread it belongs to, and whether it changes what it hears."""

    owner: int
    edits: bool
    listener: Listener


class _Station:
    """The hook on one side of one module, and who listens to it."""

    def __init__(self, module: nn.Module, side: Side) -> None:
        self.listeners: list[_Entry] = []
        if side == "pattern":
            enable_pattern(module, self.heard)
            self.remove: Callable[[], None] = lambda: disable_pattern(module)
        elif side == "input":
            self.remove = module.register_forward_pre_hook(self._before, with_kwargs=True).remove
        else:
            self.remove = module.register_forward_hook(self._after, prepend=True).remove

    def heard(self) -> Listener | None:
        """The listeners of this thread as one function, or None."""
        here = threading.get_ident()
        entries = [entry for entry in list(self.listeners) if entry.owner == here]
        mine = [entry.listener for entry in sorted(entries, key=lambda entry: not entry.edits)]
        if not mine:
            return None

        def run(x: Tensor) -> Tensor | None:
            changed = False
            for listener in mine:
                new = listener(x)
                if new is not None:
                    x, changed = new, True
            return x if changed else None

        return run

    def _before(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        run = self.heard()
        # Torch passes no kwargs while another thread is putting the hook in place or taking it away.
        if run is None or kwargs is None:
            return None
        key = find_input(module, args, kwargs)
        new = run(args[0] if key is None else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run = self.heard()
        if run is None:
            return None
        new = run(_find_output(module, output))
        return None if new is None else _with_output(output, new)


_stations: "WeakKeyDictionary[nn.Module, dict[Side, _Station]]" = WeakKeyDictionary()
_lock = threading.RLock()


def attach(module: nn.Module, side: Side, listener: Listener, *, edits: bool) -> Callable[[], None]:
    """Listen to one side of a module in this thread.

    Args:
        module: the module.
        side: its input, its output, or the attention pattern inside it.
        listener: takes the tensor and returns a new one, or None to leave it.
        edits: whether it edits; edits are heard in the order in which they came, and before all others.

    Returns:
        A function that stops it.
    """
    with _lock:
        sides = _stations.setdefault(module, {})
        station = sides.get(side)
        if station is None:
            station = sides[side] = _Station(module, side)
        entry = _Entry(threading.get_ident(), edits, listener)
        station.listeners.append(entry)

    def detach() -> None:
        with _lock:
            station.listeners.remove(entry)
            if not station.listeners:
                station.remove()
                del sides[side]
                if not sides:
                    _stations.pop(module, None)

    return detach


def find_input(module: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """Under which keyword a module is given its activations; None for the first positional argument."""
    if args and isinstance(args[0], Tensor):
        return None
    for key in ("hidden_states", "inputs_embeds", "input_ids", "pixel_values", "context"):
        if isinstance(kwargs.get(key), Tensor):
            return key
    raise InputError(f"{type(module).__name__} was called without a tensor input that a site could name")


def _find_output(module: nn.Module, output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise InputError(
            f"{type(module).__name__} returns {type(output).__name__}, not a tensor or a tuple that starts with one: "
            "name a module further inside"
        )
    return first


def _with_output(output: Any, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    rest = (new, *output[1:])
    return type(output)(rest) if type(output) in (tuple, list) else type(output)(*rest)


def view(x: Tensor, place: Place) -> Tensor:
    """The site's part of a tensor: ``[batch, pos, ...]``, of patterns ``[batch, query, head, key]``."""
    if place.side == "pattern":
        return rearrange(x, "batch head query key -> batch query head key")
    if place.columns is not None:
        x = x[..., slice(*place.columns)]
    if place.n_heads is not None:
        x = rearrange(x, "batch pos (head d) -> batch pos head d", head=place.n_heads)
    return x


def put_back(x: Tensor, part: Tensor, place: Place) -> Tensor:
    """The module's tensor with the site's part exchanged."""
    if place.side == "pattern":
        return rearrange(part, "batch query head key -> batch head query key")
    if place.n_heads is not None:
        part = rearrange(part, "batch pos head d -> batch pos (head d)")
    if place.columns is None:
        return part
    start, stop = place.columns
    return torch.cat([x[..., :start], part, x[..., stop:]], dim=-1)


def axes_back(part: Tensor, place: Place) -> Tensor:
    """A selected part in the order of axes that users see."""
    if place.side == "pattern" and part.ndim == 4:
        return rearrange(part, "batch query head key -> batch head query key")
    return part
