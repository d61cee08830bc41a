"""The engine: taps and edits on the touched modules while a session is open, and nothing left behind."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.clock import Clock
from interp.denoising import DenoiserClock
from interp.edits import Edit
from interp.errors import InputError, NeverFiredError, ShapeError, SiteUnavailableError
from interp.replay import is_replay
from interp.selection import Call, Group, Where, groups
from interp.sites import Place
from interp.stations import Element, Listener, Side, attach, axes_back, put_back, view

_live = threading.local()


def live_edits(model: nn.Module) -> "list[Applied]":
    """The edits of a model's sessions that are open in this thread, outermost first."""
    sessions: list[Session] = getattr(_live, "sessions", [])
    return [applied for session in sessions if session.root is model for applied in session.edits]


def live_calls() -> dict[int, Call]:
    """The calls that the sessions of this thread are in, by the ``id`` of their clocks."""
    sessions: list[Session] = getattr(_live, "sessions", [])
    return {id(session.clock): session.clock.call for session in sessions}


class Stopped(Exception):
    """Every tap of a session with ``stop=True`` has caught: the rest of the forward is not needed."""


@dataclass
class Tap:
    """One captured site and what it has caught so far.

    Args:
        place: the site.
        where: what to keep.
        dtype, device: of what is kept; None: as it comes.
        grad: keep the graph, and remember the whole activation for `torch.autograd.grad`.
        graph: keep the graph of the captured tensor alone: gradients flow from it, and none is asked for at the site.
        consume: takes each caught tensor and its call as they come; nothing is kept then.

    Raises:
        InputError: ``grad`` and ``consume`` together.
    """

    place: Place
    where: Where = field(default_factory=Where)
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    grad: bool = False
    consume: Callable[[Tensor, Call], None] | None = None
    graph: bool = False
    caught: list[Tensor] = field(default_factory=list)
    whole: list[tuple[Tensor, list[Group] | None, torch.Size]] = field(default_factory=list)
    times: int = 0
    last: Call | None = None

    def __post_init__(self) -> None:
        """Refuse gradients of what is not kept."""
        if self.grad and self.consume is not None:
            raise InputError(f"capture at {self.place.site}: what is consumed is not kept, so it has no gradient")

    def take(self, part: Tensor, call: Call, shape: torch.Size) -> None:
        """Keep what is selected of one activation, whose module has a tensor of this shape."""
        found = None
        if not self.where.everything:
            found = groups(self.where, self.place, part, call, tap=True, grid=_grid(self.place, shape))
            if not found:
                return
        if self.grad:
            self.whole.append((part, found, shape))
        kept = self.select(part, found, shape)
        self.times, self.last = self.times + 1, call
        if self.consume is None:
            self.caught.append(kept)
        else:
            self.consume(kept, call)

    def select(self, part: Tensor, found: list[Group] | None, shape: torch.Size) -> Tensor:
        """The selected entries of an activation or of its gradient, in the user's order of axes."""
        if found is None:
            kept = part
        elif len(found) > 1:
            counts = sorted(group.positions.shape[1] for group in found)
            raise ShapeError(
                f"capture at {self.place.site}: rows have {counts[0]} to {counts[-1]} positions for "
                f"at={self.where.at!r}, which is no rectangle. Capture rows apart (rows=...), or everything (at=None)"
            )
        else:
            kept = found[0].gather(part)
        if self.where.heads is not None:
            kept = kept[:, :, list(self.where.heads)]
        if isinstance(self.where.at, int | str) and kept.shape[1] == 1:
            kept = kept[:, 0]
        elif self.where.at is None or self.place.layout == "tokens":
            kept = axes_back(kept, self.place, shape)
        # A copy: models and users may write into the tensor afterwards, and a slice would keep all of it alive.
        moved = kept.to(device=self.device or kept.device, dtype=self.dtype or kept.dtype)
        if self.grad:
            return moved
        copied = moved.clone() if moved.data_ptr() == part.data_ptr() else moved
        return copied if self.graph else copied.detach()


@dataclass
class Applied:
    """One edit on its way through a session.

    Args:
        edit: the edit.
        place: its site.
        variant: which copy of each prompt it belongs to in a sweep, else None.
        image_token: id of the tokens whose entries image features overwrite after this site, where there are such.
        times: how often it has changed something.
    """

    edit: Edit
    place: Place
    variant: int | None = None
    image_token: int | None = None
    times: int = 0

    def __post_init__(self) -> None:
        """Settle the selection, which every call asks for."""
        self.where = replace(self.edit.where, variant=self.variant)

    def apply(self, part: Tensor, call: Call, shape: torch.Size) -> Tensor | None:
        """The activation with the edit in it, or None where the call holds nothing of its selection."""
        found = groups(self.where, self.place, part, call, grid=_grid(self.place, shape))
        if not found:
            return None
        self._refuse(found, part, call)
        heads = None if self.where.heads is None else torch.tensor(self.where.heads, device=part.device)
        chosen = [group.gather(part) if heads is None else group.gather(part)[:, :, heads] for group in found]
        new = self.edit.transform_all(chosen, found, self.place)
        if self.edit.renormalise:
            new = [self.edit.renormalised(one) for one in new]
        self.times += 1
        if found[0].whole and heads is None:
            # A copy, lest the model work on the user's value or on many views of one number.
            return new[0].to(part.dtype).clone(memory_format=torch.contiguous_format)
        changed = part.clone()
        for group, value in zip(found, new, strict=True):
            rows, positions = group.index
            if heads is None:
                changed[rows, positions] = value.to(part.dtype)
            else:
                changed[rows[..., None], positions[..., None], heads] = value.to(part.dtype)
        return changed

    def _refuse(self, found: list[Group], part: Tensor, call: Call) -> None:
        """Stop edits that would do something other than they say in this call."""
        if self.edit.mixes and not all(group.complete for group in found):
            raise InputError(
                f"{self.edit!r} works on its selected positions together, but this call holds only some of them: "
                "the prompt comes in several calls (chunks, a KV cache), or the site sees its end only "
                "(logits_to_keep). Run the prompt in one call, or select positions that it holds (at='last')"
            )
        ids = call.ids
        if self.image_token is None or self.edit.at is None or ids is None or ids.shape != part.shape[:2]:
            return
        if any(bool(((group.gather(ids) == self.image_token) & (group.ordinals >= 0)).any()) for group in found):
            raise SiteUnavailableError(
                f"{self.edit!r} selects tokens of an image, where it would change nothing: image features take the "
                "place of the placeholders' embeddings. Edit projector.hook_out or blocks.0.hook_resid_pre"
            )


def _grid(place: Place, shape: torch.Size) -> tuple[int, int] | None:
    """Height and width of a feature map; None for other tensors."""
    return None if place.layout == "tokens" or len(shape) != 4 else (shape[2], shape[3])


class Session(AbstractContextManager["Session"]):
    """Taps and edits that are live between enter and exit, in the thread that entered.

    Args:
        root: the module from which the places' paths lead on.
        clock: what follows the calls: `interp.clock.Clock` of a model with prompts, `interp.denoising.DenoiserClock`
            of a diffusion model.
        taps: what to capture. Captures see edited values.
        edits: what to change, in this order at each site.
        stop: end a forward, by raising `Stopped`, once every tap has caught in it; in a call in which one of them
            catches nothing, the whole forward runs.
        quiet: capture within `captures_of` this session only.

    Raises:
        NeverFiredError: at the end, unless by an error, for an edit that changed nothing or a site that never ran.
    """

    def __init__(
        self,
        root: nn.Module,
        clock: Clock | DenoiserClock,
        taps: Sequence[Tap] = (),
        edits: Sequence[Applied] = (),
        *,
        stop: bool = False,
        quiet: bool = False,
    ) -> None:
        self.root, self.clock, self.stop, self.quiet = root, clock, stop, quiet
        self.taps, self.edits = list(taps), list(edits)
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Session":
        """Put the hooks in place; if one cannot be, none stays."""
        try:
            if not hasattr(_live, "sessions"):
                _live.sessions = []
            self._undo.append(partial(_live.sessions.remove, self))
            _live.sessions.append(self)
            self._undo += self.clock.start()
            for (path, side, element), edits, listener in self._listeners():
                module = _submodule(self.root, path)
                self._undo.append(attach(module, side, listener, edits=edits, element=element))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks away, then say what never happened (unless an error is already on its way)."""
        self._remove()
        if kind is not None and not (self.stop and issubclass(kind, Stopped)):
            return
        idle = [applied.edit for applied in self.edits if not applied.times]
        if idle:
            raise NeverFiredError(
                f"{len(idle)} of {len(self.edits)} edits never applied, so the output is not what they ask for: "
                f"{idle[0]!r}. Either its module did not run, or no token of the call is in its selection"
                f"{', or its steps or guidance half never came' if idle[0].where.timed else ''}"
            )
        silent = [tap for tap in self.taps if not tap.times]
        if silent:
            sites = ", ".join(tap.place.site for tap in silent[:4])
            raise NeverFiredError(f"{len(silent)} captured sites never fired: {sites}. {_why_silent(silent[0])}")

    @property
    def _asleep(self) -> bool:
        awake: tuple[Session | None] | None = getattr(_live, "awake", None)
        return is_replay() or (self.quiet if awake is None else awake[0] is not self)

    def _remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _listeners(self) -> Iterator[tuple[tuple[str, Side, Element], bool, Listener]]:
        """One listener for the edits and one for the taps of every tensor that is touched."""
        edited: dict[tuple[str, Side, Element], list[Applied]] = {}
        tapped: dict[tuple[str, Side, Element], list[Tap]] = {}
        for applied in self.edits:
            edited.setdefault(applied.place.station, []).append(applied)
        for tap in self.taps:
            tapped.setdefault(tap.place.station, []).append(tap)
        for key, edits in edited.items():
            yield key, True, self._editor(edits)
        for key, taps in tapped.items():
            yield key, False, self._taker(taps)

    def _editor(self, edits: list[Applied]) -> Listener:
        def listen(x: Tensor) -> Tensor | None:
            if getattr(_live, "untouched", False):
                return None
            changed = False
            for applied in edits:
                part = applied.apply(view(x, applied.place), self.clock.call, x.shape)
                if part is not None:
                    x, changed = put_back(x, part, applied.place), True
            return x if changed else None

        return listen

    def _taker(self, taps: list[Tap]) -> Listener:
        def listen(x: Tensor) -> Tensor | None:
            if self._asleep:
                return None
            for tap in taps:
                if not tap.grad:
                    tap.take(view(x, tap.place), self.clock.call, x.shape)
                    continue
                # The captured tensor has to lie on the path to the output, or it has no gradient.
                part = view(x if x.requires_grad else x.detach().requires_grad_(), tap.place)
                tap.take(part, self.clock.call, x.shape)
                x = put_back(x, part, tap.place)
            if self.stop:
                self._stop_if_done()
            return x if any(tap.grad for tap in taps) else None

        return listen

    def _stop_if_done(self) -> None:
        call = self.clock.call
        if all(tap.last is call for tap in self.taps):
            raise Stopped(f"all {len(self.taps)} sites are captured")


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """`get_submodule` without its checks of every name, which take half of the time that a session needs to begin."""
    module = root
    for name in path.split("."):
        inner = module._modules.get(name)
        if inner is None:
            return root.get_submodule(path)
        module = inner
    return module


@contextmanager
def captures_of(session: Session | None) -> Iterator[None]:
    """Let only one session of this thread capture; edits apply, whoever made them.

    Args:
        session: which one; None: none captures.
    """
    before = getattr(_live, "awake", None)
    _live.awake = (session,)
    try:
        yield
    finally:
        _live.awake = before


@contextmanager
def untouched() -> Iterator[None]:
    """Neither captures nor edits of this thread's sessions: for forwards that are no part of the run."""
    before = getattr(_live, "untouched", False)
    _live.untouched = True
    try:
        with captures_of(None):
            yield
    finally:
        _live.untouched = before


def _why_silent(tap: Tap) -> str:
    """What most likely kept a tap from catching anything."""
    if tap.place.part == "model":
        return "A vision tower runs only when the inputs hold images"
    if tap.where.timed:
        return "Either the module did not run, or the run had no such steps or guidance half"
    return "The module did not run: pipelines call each of their models at its own time"


def gradients_of(metric: Float[Tensor, ""], taps: Sequence[Tap]) -> list[list[Tensor]]:
    """Gradients of a scalar with respect to what taps in ``grad`` mode caught, selected as the captures were.

    Returns:
        For every tap, one tensor per call.

    Raises:
        NeverFiredError: the metric does not depend on a captured site, or its gradient is zero everywhere.
    """
    wanted = [part for tap in taps for part, *_ in tap.whole]
    grads = iter(torch.autograd.grad(metric, wanted, allow_unused=True, retain_graph=True))
    selected = []
    for tap in taps:
        by_call = []
        for _, found, shape in tap.whole:
            grad = next(grads)
            if grad is None or not bool(grad.any()):
                raise NeverFiredError(
                    f"the gradient at {tap.place.site} is {'missing' if grad is None else 'zero everywhere'}: the "
                    "metric does not depend on this site"
                )
            by_call.append(tap.select(grad, found, shape).detach())
        selected.append(by_call)
    return selected
