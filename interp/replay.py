"""Forwards that run a second time in a backward pass, which hooks have to hear as they did the first time.

Gradient checkpointing forgets the activations inside a block and computes them again when gradients are asked for:
after the model's call has ended, and on an accelerator in a thread of its own. There edits have to apply exactly as
before, or the gradients are those of another forward; captures must not catch anything twice.
"""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

_state = threading.local()


class Replaying(AbstractContextManager[None]):
    """Within it, what runs in this thread is heard as the repetition of an earlier part of a call.

    It can be entered again, by several backward passes through one graph.

    Args:
        owner: the thread of the first time, whose sessions count.
        calls: the call that was at hand then, by the ``id`` of each session's clock.
    """

    def __init__(self, owner: int, calls: Mapping[int, Any]) -> None:
        self.owner, self.calls = owner, calls

    def __enter__(self) -> None:
        """Begin."""
        _state.replays = [*getattr(_state, "replays", ()), self]

    def __exit__(self, *error: Any) -> None:
        """End, and be back in what was around it."""
        _state.replays = _state.replays[:-1]


def _replay() -> Replaying | None:
    replays = getattr(_state, "replays", ())
    return replays[-1] if replays else None


def is_replay() -> bool:
    """Whether this thread repeats a part of an earlier call, so that captures have it already."""
    return _replay() is not None


def acting_thread() -> int:
    """The thread whose sessions count here: this one, or the one whose call is repeated."""
    replay = _replay()
    return threading.get_ident() if replay is None else replay.owner


def call_of(clock: Any) -> Any:
    """The call that a clock had when it ran the first time; None outside a repetition."""
    replay = _replay()
    return None if replay is None else replay.calls.get(id(clock))
