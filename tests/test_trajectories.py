import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interp.activations import Activations
from interp.conventions import CONVENTIONS
from interp.errors import InputError
from interp.solvers import ddim
from interp.trajectories import Trajectory, chosen_steps, follow
from tests import tiny_diffusion

SOLVER = ddim(CONVENTIONS["dhf"], tiny_diffusion.ddim(), "epsilon", 4, invert=False)
LATENTS = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def made(
    direction: str = "generation", stopped: bool = False, decode: Callable[[Tensor], Tensor] | None = None
) -> Trajectory:
    latents = torch.randn(3, 2, 4, 2, 2)
    return Trajectory(
        latents=latents,
        latent_steps=(0, 1, 2),
        predicted_x0=None,
        timesteps=(10.0, 5.0),
        activations=Activations({}, {}),
        uncond=None,
        saved_steps=(1,),
        convention="dhf",
        direction=direction,
        stopped=stopped,
        decode=decode or (lambda x: x[:, :3].sigmoid()),
    )


def test_follow_keeps_what_is_asked_for() -> None:
    def predict(x: Tensor, step: int) -> Tensor:
        return 0.1 * x + step

    everything = follow(SOLVER, LATENTS, predict)
    ends = follow(SOLVER, LATENTS, predict, keep=False)
    assert (list(everything.latents), list(everything.clean)) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    assert (list(ends.latents), list(ends.clean)) == ([0, 4], [3])
    assert torch.equal(ends.latents[4], everything.latents[4])
    assert not everything.stopped


def test_follow_ends_where_there_is_no_prediction() -> None:
    path = follow(SOLVER, LATENTS, lambda x, step: None if step == 2 else x)
    latents, steps, clean = path.stacked()
    assert path.stopped
    assert (steps, len(latents), len(clean)) == ((0, 1, 2), 3, 2)


def test_images_are_decoded_once_and_only_when_asked_for() -> None:
    decoded: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(latents)
        return latents[:, :3].sigmoid()

    trajectory = made(decode=decode)
    assert not decoded
    images = trajectory.images
    assert trajectory.images is images
    assert len(decoded) == 1
    assert torch.equal(decoded[0], trajectory.latents[-1])
    value = trajectory.pixels[1, 2, 0, 1].item()
    assert images[1].getpixel((1, 0))[2] == round(value * 255)


def test_the_clean_end_of_an_inversion_is_its_start() -> None:
    trajectory = made("inversion")
    assert torch.equal(trajectory.clean, trajectory.latents[0])
    assert torch.equal(trajectory.final, trajectory.latents[-1])
    assert trajectory.saved_timesteps == (5.0,)
    assert trajectory.n_steps == 2


def test_a_stopped_run_has_no_end() -> None:
    for what in ("final", "images", "clean"):
        with pytest.raises(InputError, match="stopped"):
            getattr(made(stopped=True), what)
    assert made("inversion", stopped=True).clean.shape == (2, 4, 2, 2)


def test_a_trajectory_says_in_a_line_what_it_is() -> None:
    assert repr(made()) == (
        "Trajectory(generation by 'dhf', 2 steps from t = 10 to 5, latents (2, 4, 2, 2), 0 sites at 1 steps)"
    )


def test_a_trajectory_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().convention = "rg"


def test_chosen_steps() -> None:
    assert chosen_steps("save_steps", None, 3) == (0, 1, 2)
    assert chosen_steps("save_steps", [2, 0], 3) == (0, 2)
    assert chosen_steps("save_steps", slice(0, 10, 2), 3) == (0, 2)
    assert chosen_steps("save_steps", 1, 3) == (1,)
    for wrong, message in (([3], "0 to 2"), ([-1], "0 to 2"), ([], "selects no step"), ([1, 1], "twice")):
        with pytest.raises(InputError, match=message):
            chosen_steps("save_steps", wrong, 3)
    with pytest.raises(InputError, match="selects no step"):
        chosen_steps("save_steps", slice(5, 9), 3)
