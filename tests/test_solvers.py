"""Loops with a plain function for a denoiser, against the schedulers of diffusers and closed forms."""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from interp.conventions import CONVENTIONS
from interp.solvers import FlowInversion, SchedulerSteps, Solver, ddim
from interp.trajectories import Path, follow
from tests import tiny_diffusion

# The schedulers of diffusers hand tensors to NumPy in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) / 2


def denoiser(latents: Tensor, time: float) -> Tensor:
    """Smooth in both arguments, and different at neighbouring timesteps."""
    return torch.tanh(torch.einsum("bchw,cd->bdhw", latents, MIX) + 0.003 * time)


def run(solver: Solver, latents: Tensor) -> tuple[Path, list[float]]:
    seen: list[float] = []

    def predict(x: Tensor, step: int) -> Tensor:
        seen.append(float(solver.times[step]))
        return denoiser(x, seen[-1])

    return follow(solver, solver.start(latents), predict), seen


@pytest.fixture
def start() -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(4))


def test_inversion_of_dhf_is_the_closed_form(start: Tensor) -> None:
    scheduler = tiny_diffusion.ddim()
    path, seen = run(ddim(CONVENTIONS["dhf"], scheduler, "epsilon", 50, invert=True), start)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = {-1: torch.tensor(1.0)} | dict(enumerate(torch.cumprod(1 - betas, 0)))
    x = start.double()
    times = [-1, *range(0, 981, 20)]
    for step, (here, there) in enumerate(pairwise(times)):
        assert seen[step] == here
        eps = torch.tanh(torch.einsum("bchw,cd->bdhw", x, MIX.double()) + 0.003 * here)
        x0 = (x - (1 - alphas[here]).sqrt() * eps) / alphas[here].sqrt()
        # 50 steps of single precision against double, numbers up to 10.
        torch.testing.assert_close(path.clean[step].double(), x0, rtol=0, atol=1e-4)
        x = alphas[there].sqrt() * x0 + (1 - alphas[there]).sqrt() * eps
        torch.testing.assert_close(path.latents[step + 1].double(), x, rtol=0, atol=1e-4)
    assert len(seen) == 50


def test_generation_of_dhf_is_the_closed_form(start: Tensor) -> None:
    scheduler = tiny_diffusion.ddim()
    path, seen = run(ddim(CONVENTIONS["dhf"], scheduler, "epsilon", 50, invert=False), start)
    alphas = {-20: 1.0} | {time: float(alpha) for time, alpha in enumerate(scheduler.alphas_cumprod)}
    x = start
    for step, time in enumerate(range(980, -1, -20)):
        assert seen[step] == time
        eps = denoiser(x, time)
        x0 = (x - (1 - alphas[time]) ** 0.5 * eps) / alphas[time] ** 0.5
        x = alphas[time - 20] ** 0.5 * x0 + (1 - alphas[time - 20]) ** 0.5 * eps
        # Single precision with numbers up to 15, the same operations.
        torch.testing.assert_close(path.latents[step + 1], x, rtol=0, atol=1e-4)
    torch.testing.assert_close(path.latents[50], path.clean[49], rtol=0, atol=1e-6)  # alpha 1: the image is the last x0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_inversion_of_diffusers_is_its_inverse_scheduler(kind: str, start: Tensor) -> None:
    scheduler = tiny_diffusion.ddim(kind, set_alpha_to_one=False)
    path, seen = run(ddim(CONVENTIONS["diffusers"], scheduler, kind, 20, invert=True), start)
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(20)
    assert seen == inverse.timesteps.tolist()
    x = start
    for step, time in enumerate(inverse.timesteps):
        x = inverse.step(denoiser(x, float(time)), int(time), x).prev_sample
        torch.testing.assert_close(path.latents[step + 1], x, rtol=1e-4, atol=1e-4)  # single precision, 20 steps


def test_conventions_give_visibly_different_noise(start: Tensor) -> None:
    scheduler = tiny_diffusion.ddim()
    ends = {
        name: run(ddim(CONVENTIONS[name], scheduler, "epsilon", 50, invert=True), start)[0].latents[50]
        for name in ("dhf", "rg", "null_text")
    }
    for one, two in (("dhf", "rg"), ("dhf", "null_text"), ("rg", "null_text")):
        # An offset of one timestep is the smallest difference; rounding is a hundred times smaller.
        assert (ends[one] - ends[two]).abs().max() > 0.002


def test_the_own_scheduler_is_stepped_as_its_pipeline_does_and_left_alone(start: Tensor) -> None:
    for scheduler in (tiny_diffusion.ddim(), EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)):
        solver = SchedulerSteps(scheduler, 10, CPU)
        path, seen = run(solver, start)
        assert scheduler.num_inference_steps is None
        scheduler.set_timesteps(10)
        x = start * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            x = scheduler.step(denoiser(scheduler.scale_model_input(x, time), float(time)), time, x).prev_sample
        assert torch.equal(path.latents[10], x)
        assert seen == scheduler.timesteps.tolist()
        assert sorted(path.clean) == list(range(10))


def test_noise_of_stochastic_schedulers_comes_from_the_generator(start: Tensor) -> None:
    def end(seed: int) -> Tensor:
        solver = SchedulerSteps(EulerAncestralDiscreteScheduler(), 5, CPU, torch.Generator().manual_seed(seed))
        return run(solver, start)[0].latents[5]

    before = torch.get_rng_state()
    assert torch.equal(end(0), end(0))
    assert not torch.equal(end(0), end(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_flows_are_inverted_by_euler_steps_from_the_source(start: Tensor) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    forward = SchedulerSteps(scheduler, 8, CPU)
    path, seen = run(FlowInversion(forward), start)
    sigmas = [0.0, *reversed(forward.timesteps)]
    assert seen == pytest.approx(sigmas[:-1])
    assert len(seen) == 8
    x = start
    for step, (here, there) in enumerate(pairwise(sigmas)):
        velocity = denoiser(x, here)
        torch.testing.assert_close(path.clean[step], x - here / 1000 * velocity, rtol=0, atol=1e-5)  # single precision
        x = x + (there - here) / 1000 * velocity
        torch.testing.assert_close(path.latents[step + 1], x, rtol=0, atol=1e-5)


def test_clean_latents_of_a_flow(start: Tensor) -> None:
    solver = SchedulerSteps(FlowMatchEulerDiscreteScheduler(), 4, CPU)
    path, seen = run(solver, start)
    for step, time in enumerate(seen):
        wanted = path.latents[step] - time / 1000 * denoiser(path.latents[step], time)
        torch.testing.assert_close(path.clean[step], wanted, rtol=0, atol=1e-5)  # single precision
    torch.testing.assert_close(path.clean[3], path.latents[4], rtol=0, atol=1e-6)


def test_generation_undoes_inversion_where_the_model_hardly_turns(start: Tensor) -> None:
    scheduler = tiny_diffusion.ddim()
    noisy = run(ddim(CONVENTIONS["null_text"], scheduler, "epsilon", 500, invert=True), start)[0].latents[500]
    back = run(ddim(CONVENTIONS["null_text"], scheduler, "epsilon", 500, invert=False), noisy)[0].latents[500]
    assert (noisy - start).abs().mean() > 0.5
    # What is left is the error of a step, a 500th of the way.
    assert (back - start).abs().max() < 0.1
