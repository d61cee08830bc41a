"""The clock of a denoising run, on a denoiser that does nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from interp.denoising import DenoiserClock, running
from interp.errors import InputError
from interp.selection import Call


class Denoiser(nn.Module):
    def __init__(self, patch: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=patch)
        self.clock: DenoiserClock | None = None
        self.calls: list[Call] = []
        self.fails = False

    def forward(self, sample: Tensor, timestep: object, img_ids: Tensor | None = None) -> Tensor:
        assert self.clock is not None
        self.calls.append(self.clock.call)
        if self.fails:
            raise ArithmeticError
        return sample


def followed(times, halves=None, batch: int = 2) -> list[tuple[int | None, float | None, tuple[str, ...]]]:
    denoiser = Denoiser()
    denoiser.clock = DenoiserClock(denoiser, halves)
    undo = denoiser.clock.start()
    for time in times:
        denoiser(torch.zeros(batch, 4, 2, 2), time)
    for one in undo:
        one()
    return [(call.step, call.timestep, call.halves) for call in denoiser.calls]


def steps(times, halves=None) -> list[int | None]:
    return [step for step, _, _ in followed(times, halves)]


def test_calls_are_counted() -> None:
    assert followed([torch.tensor(9), torch.tensor([7, 7])]) == [(0, 9.0, ("cond",)), (1, 7.0, ("cond",))]
    assert steps([-1, 0, 20, 40]) == [0, 1, 2, 3]  # an inversion
    # A scheduler that repeats a timestep makes two steps of it; two runs begin anew.
    assert steps([981.0, 961.0, 961.0, 941.0]) == [0, 1, 2, 3]
    assert steps([9.0, 5.0, 1.0, 9.0, 5.0, 1.0]) == [0, 1, 2, 0, 1, 2]
    assert steps([9.0, 5.0, 1.0, 4.0, 2.0]) == [0, 1, 2, 0, 1]
    assert steps([5.0, 5.0, 5.0]) == [0, 0, 0]


def test_halves_in_one_call_and_in_two() -> None:
    both = ("uncond", "cond")
    asked = []

    def doubled(batch):
        asked.append(batch)
        return both

    assert followed([9.0, 5.0], doubled) == [(0, 9.0, both), (1, 5.0, both)]
    assert asked == [2, 2]
    turns = iter([("cond",), ("uncond",)] * 3)
    assert steps([9.0, 9.0, 5.0, 5.0, 5.0, 5.0], lambda batch: next(turns)) == [0, 0, 1, 1, 2, 2]


def test_the_unconditional_half_follows_with_the_same_latents() -> None:
    denoiser = Denoiser()
    clock = denoiser.clock = DenoiserClock(denoiser, uncond_follows=True)
    undo = clock.start()
    first, second = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    for latents, time in ((first, 9.0), (first, 9.0), (second, 5.0), (second, 5.0), (first, 9.0), (second, 9.0)):
        denoiser(latents, time)
    seen = [(call.step, call.halves[0]) for call in denoiser.calls]
    assert seen == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (0, "cond"), (0, "cond")]
    for one in undo:
        one()


def test_what_is_told_comes_first() -> None:
    denoiser = Denoiser()
    clock = denoiser.clock = DenoiserClock(denoiser, lambda batch: ("cond",))
    undo = clock.start()
    latents = torch.zeros(2, 4, 2, 2)
    assert clock.call == Call()
    with running(7, ("uncond", "cond")):
        outside = clock.call
        assert outside.halves == ("uncond", "cond") and outside.step is None and clock.call is outside
        denoiser(latents, 3.0)
        with running(8, ("cond",)):
            denoiser(latents, 3.0)
        denoiser(latents, 3.0)
    with running(None, ("uncond",)):
        denoiser(latents, 3.0)
    told = [(call.step, call.halves) for call in denoiser.calls]
    both = ("uncond", "cond")
    assert told == [(7, both), (8, ("cond",)), (7, both), (0, ("uncond",))]
    assert clock.call == Call()
    denoiser.fails = True
    with pytest.raises(ArithmeticError):
        denoiser(latents, 2.0)
    assert clock.call == Call()  # also after an error
    for one in undo:
        one()
    assert not denoiser._forward_hooks and not denoiser._forward_pre_hooks


def test_the_grid() -> None:
    def grid(denoiser, *args):
        denoiser.clock = DenoiserClock(denoiser)
        undo = denoiser.clock.start()
        denoiser(*args)
        for one in undo:
            one()
        return denoiser.calls[-1].grid

    assert grid(Denoiser(), torch.zeros(1, 4, 6, 9), 1.0) == (6, 9)
    assert grid(Denoiser(2), torch.zeros(1, 4, 6, 8), 1.0) == (3, 4)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    assert grid(Denoiser(1), torch.zeros(1, 12, 16), 1.0, ids) == (3, 4)
    assert grid(Denoiser(1), torch.zeros(1, 12, 16), 1.0) is None


def test_calls_alike_share_resolved_selections() -> None:
    denoiser = Denoiser()
    denoiser.clock = DenoiserClock(denoiser)
    undo = denoiser.clock.start()
    for size, time in ((2, 9.0), (2, 5.0), (3, 1.0)):
        denoiser(torch.zeros(1, 4, size, size), time)
    first, second, third = (call.memo for call in denoiser.calls)
    assert first is second and third is not second
    for one in undo:
        one()


def test_errors() -> None:
    for halves in ((), ("cond", "cond"), ("both",)):
        with pytest.raises(InputError, match="in the order of the rows"), running(0, halves):
            pass
    with pytest.raises(InputError, match="without a timestep"):
        followed([None])
    denoiser = Denoiser()
    denoiser.clock = DenoiserClock(denoiser)
    denoiser.clock.start()
    with pytest.raises(InputError, match="without latents"):
        denoiser("noise", 1.0)
