"""The engine: taps and edits on the touched modules while a session is open, and nothing left behind."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.clock import Clock
from interp.edits import Edit
from interp.errors import InputError, NeverFiredError, ShapeError, SiteUnavailableError
from interp.selection import Call, Group, Where, groups
from interp.sites import Place, Side
from interp.stations import Listener, attach, axes_back, put_back, view

_live = threading.local()


def live_edits(model: nn.Module) -> "list[Applied]":
    """The edits of a model's sessions that are open in this thread, outermost first."""
    sessions: list[Session] = getattr(_live, "sessions", [])
    return [applied for session in sessions if session.model is model for applied in session.edits]


@dataclass
class Tap:
    """One captured site and what it has caught so far.

    Args:
        place: the site.
        where: what to keep.
        dtype, device: of what is kept; None: as it comes.
        grad: keep the graph, and remember the whole activation for `torch.autograd.grad`.
    """

    place: Place
    where: Where = field(default_factory=Where)
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    grad: bool = False
    caught: list[Tensor] = field(default_factory=list)
    whole: list[tuple[Tensor, list[Group] | None]] = field(default_factory=list)

    def take(self, part: Tensor, call: Call) -> None:
        """Keep what is selected of one activation."""
        found = None
        if not self.where.everything:
            found = groups(self.where, self.place, part, call, tap=True)
            if not found:
                return
        if self.grad:
            self.whole.append((part, found))
        self.caught.append(self.select(part, found))

    def select(self, part: Tensor, found: list[Group] | None) -> Tensor:
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
        single = isinstance(self.where.at, int | str) and kept.shape[1] == 1
        kept = kept[:, 0] if single else axes_back(kept, self.place)
        # A copy: models and users may write into the tensor afterwards, and a slice would keep all of it alive.
        moved = kept.to(device=self.device or kept.device, dtype=self.dtype or kept.dtype)
        if self.grad:
            return moved
        return moved.detach().clone() if moved.data_ptr() == part.data_ptr() else moved.detach()


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

    def apply(self, part: Tensor, call: Call) -> Tensor | None:
        """The activation with the edit in it, or None where the call holds nothing of its selection."""
        found = groups(self.where, self.place, part, call)
        if not found:
            return None
        self._refuse(found, part, call)
        heads = None if self.where.heads is None else torch.tensor(self.where.heads, device=part.device)
        chosen = [group.gather(part) if heads is None else group.gather(part)[:, :, heads] for group in found]
        new = self.edit.transform_all(chosen, found, self.place)
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


class Session(AbstractContextManager["Session"]):
    """Taps and edits that are live between enter and exit, in the thread that entered.

    Args:
        model: the model; its module paths are those of the places.
        decoder: the module that runs the decoder; its calls carry the KV cache and mask that positions need.
        taps: what to capture. Captures see edited values.
        edits: what to change, in this order at each site.

    Raises:
        NeverFiredError: on a clean exit, for an edit that changed nothing or a site that never ran.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        taps: Sequence[Tap] = (),
        edits: Sequence[Applied] = (),
    ) -> None:
        self.model, self.decoder = model, decoder
        self.taps, self.edits = list(taps), list(edits)
        self.clock = Clock(model, decoder)
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Session":
        """Put the hooks in place; if one cannot be, none stays."""
        try:
            if not hasattr(_live, "sessions"):
                _live.sessions = []
            self._undo.append(partial(_live.sessions.remove, self))
            _live.sessions.append(self)
            self._undo += self.clock.start()
            for (path, side), edits, listener in self._listeners():
                self._undo.append(attach(self.model.get_submodule(path), side, listener, edits=edits))
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
        if kind is not None:
            return
        idle = [applied.edit for applied in self.edits if not applied.times]
        if idle:
            raise NeverFiredError(
                f"{len(idle)} of {len(self.edits)} edits never applied, so the output is not what they ask for: "
                f"{idle[0]!r}. Either its module did not run, or no token of the call is in its selection"
            )
        silent = [tap.place.site for tap in self.taps if not tap.caught]
        if silent:
            raise NeverFiredError(
                f"{len(silent)} captured sites never fired: {', '.join(silent[:4])}. "
                "A vision tower runs only when the inputs hold images"
            )

    def _remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _listeners(self) -> Iterator[tuple[tuple[str, Side], bool, Listener]]:
        """One listener for the edits and one for the taps of every module and side that is touched."""
        edited: dict[tuple[str, Side], list[Applied]] = {}
        tapped: dict[tuple[str, Side], list[Tap]] = {}
        for applied in self.edits:
            edited.setdefault((applied.place.path, applied.place.side), []).append(applied)
        for tap in self.taps:
            tapped.setdefault((tap.place.path, tap.place.side), []).append(tap)
        for key, edits in edited.items():
            yield key, True, self._editor(edits)
        for key, taps in tapped.items():
            yield key, False, self._taker(taps)

    def _editor(self, edits: list[Applied]) -> Listener:
        def listen(x: Tensor) -> Tensor | None:
            changed = False
            for applied in edits:
                part = applied.apply(view(x, applied.place), self.clock.call)
                if part is not None:
                    x, changed = put_back(x, part, applied.place), True
            return x if changed else None

        return listen

    def _taker(self, taps: list[Tap]) -> Listener:
        def listen(x: Tensor) -> Tensor | None:
            for tap in taps:
                if not tap.grad:
                    tap.take(view(x, tap.place), self.clock.call)
                    continue
                # The captured tensor has to lie on the path to the output, or it has no gradient.
                part = view(x if x.requires_grad else x.detach().requires_grad_(), tap.place)
                tap.take(part, self.clock.call)
                x = put_back(x, part, tap.place)
            return x if any(tap.grad for tap in taps) else None

        return listen


def gradients_of(metric: Float[Tensor, ""], taps: Sequence[Tap]) -> list[list[Tensor]]:
    """Gradients of a scalar with respect to what taps in ``grad`` mode caught, selected as the captures were.

    Returns:
        For every tap, one tensor per call.

    Raises:
        NeverFiredError: the metric does not depend on a captured site, or its gradient is zero everywhere.
    """
    wanted = [part for tap in taps for part, _ in tap.whole]
    grads = iter(torch.autograd.grad(metric, wanted, allow_unused=True, retain_graph=True))
    selected = []
    for tap in taps:
        by_call = []
        for _, found in tap.whole:
            grad = next(grads)
            if grad is None or not bool(grad.any()):
                raise NeverFiredError(
                    f"the gradient at {tap.place.site} is {'missing' if grad is None else 'zero everywhere'}: the "
                    "metric does not depend on this site"
                )
            by_call.append(tap.select(grad, found).detach())
        selected.append(by_call)
    return selected
