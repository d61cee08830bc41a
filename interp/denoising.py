"""Which step of a denoising run, and which halves of guidance, the forwards of a session belong to."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.replay import call_of
from interp.selection import Call
from interp.where import HALVES

_running: ContextVar[tuple[int | None, tuple[str, ...]] | None] = ContextVar("running", default=None)


@contextmanager
def running(step: int | None, halves: tuple[str, ...]) -> Iterator[None]:
    """Tell the sessions of this thread what the coming calls of the denoiser or a text encoder are.

    Args:
        step: which step of the run, 0 being its first call; None: outside the steps (a text encoder), or counted by
            the session.
        halves: the guidance halves that the rows hold, one after the other: ``("uncond", "cond")``, ``("cond",)``
            or ``("uncond",)``.

    Raises:
        InputError: halves that do not exist, or none.
    """
    if not halves or len(set(halves)) < len(halves) or not set(halves) <= set(HALVES):
        raise InputError(f"halves={halves!r}: give some of {HALVES}, in the order of the rows")
    token = _running.set((step, halves))
    try:
        yield
    finally:
        _running.reset(token)


class DenoiserClock:
    """Follows the denoiser's calls of one session, in the thread that starts it.

    Where `running` does not say which step a call is, the calls are counted. A call belongs to the step of the one
    before when it has the same timestep and brings a half that the step has not had. The timesteps of a run move one
    way: a call whose timestep moves back, or repeats the first one, begins a new run.

    Args:
        denoiser: a diffusers UNet or transformer.
        infer_halves: says which halves the rows of a call hold, given how many rows there are, where `running` does
            not say. None: they are all ``"cond"``.
        uncond_follows: whether guided runs call the denoiser twice in a step, first for the conditional half. A
            second call with the very same latents and timestep is then the unconditional one.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        infer_halves: Callable[[int], tuple[str, ...]] | None = None,
        *,
        uncond_follows: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self.infer_halves = infer_halves or _only_cond
        self.uncond_follows = uncond_follows
        self._latents: ReferenceType | None = None
        self._names = list(inspect.signature(denoiser.forward).parameters)
        self._patch = int(getattr(getattr(denoiser, "config", None), "patch_size", None) or 1)
        self._owner: int | None = None
        self._inside: Call | None = None
        self._outside = Call()
        self._memo: tuple[Any, dict[Any, Any]] = (None, {})
        self._ids: tuple[ReferenceType | None, tuple[int, int] | None] = (None, None)
        self._step = -1
        self._had: set[str] = set()
        self._time: float | None = None
        self._direction = 0.0

    @property
    def call(self) -> Call:
        """The denoiser's call at hand; outside the denoiser one that knows no more than the halves."""
        repeated = call_of(self)
        if repeated is not None:
            return repeated
        if self._inside is not None:
            return self._inside
        told = _running.get()
        halves = () if told is None else told[1]
        if self._outside.halves != halves:
            self._outside = Call(halves=halves)
        return self._outside

    def start(self) -> list[Callable[[], None]]:
        """Put the hooks in place; returns what takes them away."""
        self._owner = threading.get_ident()
        return [
            # Before hooks of sessions around this one, which also serve this one's taps and edits of the same tensor.
            self.denoiser.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True).remove,
            self.denoiser.register_forward_hook(self._after, always_call=True).remove,
        ]

    # Torch passes no kwargs while another thread is putting the hook in place or taking it away.
    def _before(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if threading.get_ident() != self._owner or kwargs is None:
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        latents = given.get("sample", given.get("hidden_states"))
        if not isinstance(latents, Tensor):
            raise InputError(f"{type(module).__name__} was called without latents")
        time = given.get("timestep")
        told = _running.get()
        halves = told[1] if told is not None else self._inferred(latents, time)
        grid = self._grid(latents, given.get("img_ids"))
        step = told[0] if told is not None else None
        call = Call(time=time, halves=halves, grid=grid, memo=self._shared_memo((halves, grid)))
        if step is None:
            self._count(call)
            step = self._step
        object.__setattr__(call, "step", step)
        self._inside = call

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self._owner:
            self._inside, self._outside = None, Call()

    def _inferred(self, latents: Tensor, time: Any) -> tuple[str, ...]:
        """Which halves a call holds of which nothing is told."""
        if not self.uncond_follows:
            return self.infer_halves(len(latents))
        repeated = self._latents is not None and self._latents() is latents and self._had == {"cond"}
        self._latents = ref(latents)
        same_time = repeated and Call(time=time).timestep == self._time
        return ("uncond",) if same_time else self.infer_halves(len(latents))

    def _count(self, call: Call) -> None:
        time, new = call.timestep, set(call.halves)
        if time is None:
            raise InputError(f"{type(self.denoiser).__name__} was called without a timestep")
        moved = 0.0 if self._time is None else time - self._time
        if moved == 0.0 and self._step >= 0 and not (self._had & new):
            self._had |= new
            return
        starts = self._step < 0 or moved * self._direction < 0 or (moved == 0.0 and self._step == 0)
        self._direction = 0.0 if starts else self._direction or moved
        self._step = 0 if starts else self._step + 1
        self._had, self._time = new, time

    def _shared_memo(self, key: Any) -> dict[Any, Any]:
        """Selections depend on the step in nothing but whether they apply, so that calls alike share them."""
        if self._memo[0] != key:
            self._memo = (key, {})
        return self._memo[1]

    def _grid(self, latents: Tensor, image_ids: Any) -> tuple[int, int] | None:
        """Height and width of the denoiser's cells."""
        if latents.ndim == 4:
            return int(latents.shape[2]) // self._patch, int(latents.shape[3]) // self._patch
        if not isinstance(image_ids, Tensor):
            return None
        known, grid = self._ids
        if known is None or known() is not image_ids:
            # Flux packs its latents: each token's row and column are in these ids, which stay the same all the run.
            own = image_ids.reshape(-1, image_ids.shape[-1])
            rows, columns = (torch.unique(own[own[:, 0] == 0][:, axis]) for axis in (1, 2))
            grid = (len(rows), len(columns))
            self._ids = (ref(image_ids), grid)
        return grid


def _only_cond(batch: int) -> tuple[str, ...]:
    return ("cond",)
