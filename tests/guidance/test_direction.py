"""Directions on the small model that ships, with the heads that ship: guided steps go where they are asked to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import interp
from interp.guidance import Appearance, Drag, Guide, Spatial, Twin
from interp.guidance.controls import reversed_guide
from interp.guidance.trials import noise
from interp.zoo.readouts import head

STEPS, GUIDED = 10, 2
PROMPTS = ["a red dog", "a blue bird", "a green horse"]
SIZES = {"signed_step": 0.05, "latent_gradient": 30.0, "epsilon": 30.0}


@pytest.fixture(scope="module")
def sd() -> interp.Diffusion:
    return interp.Diffusion.from_pretrained("zoo:tiny-diffusion")


def read(sd: interp.Diffusion, name: str, trajectory: Any, latents: Tensor | None = None) -> Tensor:
    """What a head sees after the guided steps, by a call of its own with the sample's prompt."""
    given = trajectory.latents[GUIDED] if latents is None else latents
    return head(name, sd).read(sd, given, trajectory.timesteps[GUIDED], PROMPTS)


def runs(sd: interp.Diffusion, guide: Guide) -> list[Any]:
    """Guided, unguided and reversed, from the same noise."""
    made = []
    for one in (guide, None, reversed_guide(guide)):
        given = replace(one, half="cond", end=GUIDED / STEPS) if one is not None else None
        made.append(
            sd.generate(
                PROMPTS, latents=noise(sd, [1, 2, 3]), steps=STEPS, guidance=given, convention="rg",
                guidance_scale=3.0, progress=False, capture="hook_in", save_steps=[GUIDED], stop=True,
            )
        )  # fmt: skip
    assert torch.equal(made[0].latents[0], made[1].latents[0])
    return made


def assert_between(distance: Callable[[Any], Tensor], made: list[Any]) -> None:
    """Every sample nearer than without guidance, and farther with the opposite sign."""
    near, plain, far = (distance(one) for one in made)
    assert (near < plain).all(), (near, plain)
    assert (far > plain).all(), (far, plain)


@pytest.mark.parametrize("rule", SIZES)
def test_pictures_come_nearer_to_their_targets_and_go_away_with_the_sign_reversed(
    sd: interp.Diffusion, rule: Any
) -> None:
    readout = head("depth", sd)
    generator = torch.Generator().manual_seed(0)
    blobs = F.interpolate(torch.rand(3, 1, 3, 3, generator=generator), size=readout.size, mode="bilinear")
    low, high = readout.value_range or (0.0, 1.0)
    target = low + (high - low) * blobs
    made = runs(sd, Guide([Spatial(readout, target)], rule=rule, step_size=SIZES[rule]))
    assert_between(lambda one: (read(sd, "depth", one) - target).square().mean(dim=(1, 2, 3)), made)


def test_looks_come_nearer_to_those_of_another_image(sd: interp.Diffusion) -> None:
    guide = Guide([Appearance(head("appearance", sd))], step_size=0.05, reference=Twin(seed=9))
    made = runs(sd, guide)
    others = made[0].reference.latents[GUIDED]

    def distance(one: Any) -> Tensor:
        seen, wanted = read(sd, "appearance", one), read(sd, "appearance", one, others)
        return (1 - torch.cosine_similarity(seen, wanted, dim=1)).mean(dim=(1, 2))

    assert_between(distance, made)


def test_what_was_at_a_point_is_found_at_its_target(sd: interp.Diffusion) -> None:
    readout = head("correspondence", sd)
    sources, targets = torch.tensor([[6.5, 6.5]]), torch.tensor([[6.5, 10.5]])
    # Without the other half of the loss: at the source the sample is as like the reference as can be.
    made = runs(sd, Guide([Drag(readout, sources, targets, (16, 16), anti_ghosting=False)], step_size=0.05))
    before = read(sd, "correspondence", made[1])[:, :, 6, 6]

    def distance(one: Any) -> Tensor:
        return 1 - torch.cosine_similarity(before, read(sd, "correspondence", one)[:, :, 6, 10], dim=1)

    near, plain, far = (distance(one) for one in made)
    assert (near < plain).all(), (near, plain)
    # One point at one cell is little to go by in a single sample: away from it is what they go on the average.
    assert far.mean() > plain.mean()
