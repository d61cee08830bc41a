"""One plain hook on each touched tensor of a module, shared by all who listen to it, and gone with the last.

It runs before hooks that were registered earlier, because transformers' own recorders (which feed LLaVA's
vision features to the language model) must see the edited output. Each listener is heard only in its own
thread; all edits come before all captures, whoever was there first, so that captures see edited values.
"""

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn

from interp.attention import disable_pattern, enable_pattern
from interp.diffusers_attention import disable_processor, enable_processor, has_processor
from interp.errors import InputError
from interp.replay import acting_thread
from interp.sites import Place, Side

Listener = Callable[[Tensor], Tensor | None]
Element = int | str | None


@dataclass(frozen=True, eq=False)
class _Entry:
    """One listener, the thread it belongs to, and whether it changes what it hears."""

    owner: int
    edits: bool
    listener: Listener


class _Station:
    """The hook on one tensor that one module takes or returns, and who listens to it."""

    def __init__(self, module: nn.Module, side: Side, element: Element) -> None:
        self.listeners: list[_Entry] = []
        self.element = element
        if side == "pattern":
            of_diffusers = has_processor(module)
            enable, disable = (
                (enable_processor, disable_processor) if of_diffusers else (enable_pattern, disable_pattern)
            )
            enable(module, self.heard)
            self.remove: Callable[[], None] = lambda: disable(module)
        elif side == "input":
            self.remove = module.register_forward_pre_hook(self._before, with_kwargs=True).remove
        else:
            self.remove = module.register_forward_hook(self._after, prepend=True).remove

    def heard(self) -> Listener | None:
        """The listeners of this thread as one function, or None."""
        here = acting_thread()
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
        key = find_input(module, args, kwargs) if self.element is None else _named(module, args, kwargs, self.element)
        new = run(args[key] if isinstance(key, int) else kwargs[key])
        if new is None:
            return None
        if isinstance(key, int):
            return (*args[:key], new, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: new}

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run = self.heard()
        if run is None:
            return None
        new = run(_find_output(module, output, self.element))
        return None if new is None else _with_output(output, new, self.element)


_stations: "WeakKeyDictionary[nn.Module, dict[tuple[Side, Element], _Station]]" = WeakKeyDictionary()
_lock = threading.RLock()


def attach(
    module: nn.Module, side: Side, listener: Listener, *, edits: bool, element: Element = None
) -> Callable[[], None]:
    """Listen to one side of a module in this thread.

    Args:
        module: the module.
        side: its input, its output, or the attention pattern inside it.
        listener: takes the tensor and returns a new one, or None to leave it.
        edits: whether it edits; edits are heard in the order in which they came, and before all others.
        element: which tensor, where there are several: keyword of an input, index in an output. None: the first.

    Returns:
        A function that stops it.
    """
    # The first tensor goes by one key only, so that all who touch it share a hook.
    if element is not None and element in (0, next(iter(inspect.signature(module.forward).parameters), None)):
        element = None
    with _lock:
        sides = _stations.setdefault(module, {})
        station = sides.get((side, element))
        if station is None:
            station = sides[side, element] = _Station(module, side, element)
        entry = _Entry(threading.get_ident(), edits, listener)
        station.listeners.append(entry)

    def detach() -> None:
        with _lock:
            station.listeners.remove(entry)
            if not station.listeners:
                station.remove()
                del sides[side, element]
                if not sides:
                    _stations.pop(module, None)

    return detach


def find_input(module: nn.Module, args: tuple, kwargs: dict) -> int | str:
    """Where a module is given its activations: 0 for the first positional argument, or a keyword."""
    if args and isinstance(args[0], Tensor):
        return 0
    for key in ("hidden_states", "sample", "inputs_embeds", "input_ids", "pixel_values", "context"):
        if isinstance(kwargs.get(key), Tensor):
            return key
    raise InputError(f"{type(module).__name__} was called without a tensor input that a site could name")


def _named(module: nn.Module, args: tuple, kwargs: dict, name: int | str) -> int | str:
    """Where a module is given the tensor of one name, by position or by keyword."""
    names = list(inspect.signature(module.forward).parameters)
    if isinstance(kwargs.get(str(name)), Tensor):
        return str(name)
    index = names.index(str(name)) if name in names else len(args)
    if index < len(args) and isinstance(args[index], Tensor):
        return index
    raise InputError(
        f"{type(module).__name__} was called without a tensor {name!r}; it takes {', '.join(names)}".rstrip()
    )


def _find_output(module: nn.Module, output: Any, element: Element) -> Tensor:
    parts = list(_parts(output))
    index = 0 if element is None else int(element)
    if index < len(parts) and isinstance(parts[index], Tensor):
        return parts[index]
    if element is None:
        raise InputError(
            f"{type(module).__name__} returns {type(output).__name__}, not a tensor or a tuple that starts with one: "
            "name a module further inside, or which of several tensors you mean (module.path:output.1)"
        )
    kinds = ", ".join(type(part).__name__ for part in parts)
    raise InputError(f"{type(module).__name__} returns no tensor number {index}: what it returns is ({kinds})")


def _parts(output: Any) -> tuple[Any, ...]:
    """The parts of an output: of a tuple, a list, or the object in which diffusers returns a sample."""
    if isinstance(output, tuple | list):
        return tuple(output)
    return (output["sample"],) if isinstance(output, OrderedDict) and "sample" in output else (output,)


def _with_output(output: Any, new: Tensor, element: Element) -> Any:
    index = 0 if element is None else int(element)
    if isinstance(output, Tensor):
        return new
    if isinstance(output, OrderedDict):
        changed = copy.copy(output)
        changed["sample"] = new
        return changed
    rest = (*output[:index], new, *output[index + 1 :])
    return type(output)(rest) if type(output) in (tuple, list) else type(output)(*rest)


def view(x: Tensor, place: Place) -> Tensor:
    """The site's part of a tensor: ``[batch, pos, ...]``, of patterns ``[batch, query, head, key]``.

    The cells of a feature map are its positions, row by row; a vector has one position.
    """
    if place.side == "pattern":
        return rearrange(x, "batch head query key -> batch query head key")
    if place.layout != "tokens":
        return _positions(x)
    if place.columns is not None:
        x = x[..., slice(*place.columns)]
    if place.n_heads is not None:
        x = rearrange(x, "batch pos (head d) -> batch pos head d", head=place.n_heads)
    return x


def put_back(x: Tensor, part: Tensor, place: Place) -> Tensor:
    """The module's tensor with the site's part exchanged."""
    if place.side == "pattern":
        return rearrange(part, "batch query head key -> batch head query key")
    if place.layout != "tokens":
        back = _from_positions(part, x.shape)
        # Modules reshape their maps with .view(), which needs the order in memory that they expect.
        return back.contiguous() if x.is_contiguous() else back
    if place.n_heads is not None:
        part = rearrange(part, "batch pos head d -> batch pos (head d)")
    if place.columns is None:
        return part
    start, stop = place.columns
    return torch.cat([x[..., :start], part, x[..., stop:]], dim=-1)


def axes_back(part: Tensor, place: Place, shape: torch.Size) -> Tensor:
    """A part with all its positions in the order of axes that users see.

    Args:
        part: what `view` gives.
        place: the site.
        shape: of the module's tensor.
    """
    if place.side == "pattern" and part.ndim == 4:
        return rearrange(part, "batch query head key -> batch head query key")
    return part if place.layout == "tokens" else _from_positions(part, shape)


def _positions(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return rearrange(x, "batch channel height width -> batch (height width) channel")
    return rearrange(x, "batch d -> batch 1 d") if x.ndim == 2 else x


def _from_positions(part: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 4:
        return rearrange(part, "batch (height width) channel -> batch channel height width", height=shape[2])
    return rearrange(part, "batch 1 d -> batch d") if len(shape) == 2 else part
