"""Every guided step against the run written out in `closed_form`: rules, halves, one and several terms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import interp
from interp.errors import InputError, NeverFiredError
from interp.guidance import Appearance, Drag, Guide, Identity, Reference, Spatial, Term, Twin
from tests.guidance.closed_form import (
    CLOSE,
    NEGATIVE,
    PROMPT,
    SITES,
    STEPS,
    Head,
    draw,
    guided,
    model,
    read,
    readout,
)

ROWS = 2
POSE = readout("pose", 3, 1)
LOOKS, PLACES = readout("appearance", 6, 2, kind="features"), readout("correspondence", 6, 3, kind="features")
TARGET = torch.rand(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
# In pixels of an image of 16 × 16, two to a cell; the last pair leaves the image.
FROM = torch.tensor([[3.0, 3.9], [12.0, 9.0], [5.0, 20.0]])
TO = torch.tensor([[9.9, 4.0], [12.0, 13.0], [5.0, 4.0]])
CELLS = (((1, 1), (4, 2)), ((6, 4), (6, 6)))


def spatial_loss(mine: list[Tensor], theirs: Any, time: int, step: int, spread: Tensor) -> Tensor:
    seen = read(POSE.head, mine, time)
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(ROWS):
        low, high = 0.0, spread[sample]
        ours = (seen[sample] + 1) / 2 * (high - low) + low
        wanted = (TARGET[sample].double() + 1) / 2 * (high - low) + low
        total = total + 0.5 * F.mse_loss(ours, wanted)
    return total


def looks_loss(mine: list[Tensor], theirs: list[Tensor], time: int, step: int, spread: Tensor) -> Tensor:
    seen, wanted = read(LOOKS.head, mine, time), read(LOOKS.head, theirs, time)
    return ((1 - F.cosine_similarity(seen, wanted, dim=1)).mean(dim=(1, 2)) * spread**2).sum()


def drag_loss(mine: list[Tensor], theirs: list[Tensor], time: int, step: int, spread: Tensor) -> Tensor:
    seen, wanted = read(PLACES.head, mine, time), read(PLACES.head, theirs, time)
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(ROWS):
        for (y, x), (to_y, to_x) in CELLS:
            there = wanted[sample, :, y, x]
            for sign, here in ((-0.5, seen[sample, :, to_y, to_x]), (0.5, seen[sample, :, y, x])):
                likeness = ((there * here).sum() / (there.norm() * here.norm()) + 1) / 2
                total = total + sign * likeness / len(CELLS)
    return total


def both_losses(*args: Any) -> Tensor:
    return looks_loss(*args) + drag_loss(*args)


TERMS = {
    "spatial": ([Spatial(POSE, TARGET)], spatial_loss),
    "drag": ([Drag(PLACES, FROM, TO, (16, 16))], drag_loss),
    "drag and appearance": ([Appearance(LOOKS), Drag(PLACES, FROM, TO, (16, 16))], both_losses),
    "all": (
        [Appearance(LOOKS), Drag(PLACES, FROM, TO, (16, 16)), Spatial(POSE, TARGET)],
        lambda *args: both_losses(*args) + spatial_loss(*args),
    ),
}
# Sizes that move the latents about as far under each rule.
SIZES = {"signed_step": 0.02, "latent_gradient": 5.0, "epsilon": 3.0}


def run(guide: Guide, start: Tensor, **changes: Any) -> Any:
    settings = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": 7.5, "progress": False} | changes
    return model().generate(PROMPT, latents=start, guidance=guide, **settings)


@pytest.mark.parametrize(
    ("name", "rule", "half"),
    [(name, "signed_step", "both") for name in TERMS]
    + [("all", rule, "both") for rule in ("latent_gradient", "epsilon")]
    + [("drag and appearance", rule, half) for rule in SIZES for half in ("cond", "uncond")],
)
def test_guided_steps_are_the_closed_form(name: str, rule: Any, half: Any) -> None:
    terms, loss = TERMS[name]
    start = draw(ROWS, 4, 8, 8)
    guide = Guide(terms, rule=rule, step_size=SIZES[rule], start=0.25, end=0.75, half=half)
    trajectory = run(guide, start)
    halves = {"both": (0, 1), "uncond": (0,), "cond": (1,)}[half]
    paired = any(term.compares for term in terms)
    wanted, reference, gradients = guided(start, loss, rule=rule, size=SIZES[rule], halves=halves, paired=paired)
    assert trajectory.timesteps == (751, 501, 251, 1)
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
    assert (wanted[-1] - reference[-1]).abs().max() > 1e-4  # guidance is felt, a thousand times the tolerance
    if paired:
        torch.testing.assert_close(trajectory.reference.latents, reference, **CLOSE)
    else:
        assert trajectory.reference is None
    log = trajectory.guidance
    norms = log[log.term == "total"].gradient_norm.to_numpy().reshape(2, ROWS)
    torch.testing.assert_close(torch.tensor(norms), torch.stack(gradients).flatten(2).norm(dim=2), **CLOSE)


def test_several_moves_go_on_with_adams_moments() -> None:
    start = draw(ROWS, 4, 8, 8, seed=1)
    for rule in ("signed_step", "latent_gradient"):
        guide = Guide(TERMS["all"][0], rule=rule, step_size=SIZES[rule], start=0.25, end=0.75, recurrence=2)
        trajectory = run(guide, start)
        wanted, _, _ = guided(start, TERMS["all"][1], rule=rule, size=SIZES[rule], recurrence=2)
        torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
        once, _, _ = guided(start, TERMS["all"][1], rule=rule, size=SIZES[rule])
        assert (once - wanted).abs().max() > 1e-3
        assert sorted(trajectory.guidance.move.unique()) == [0, 1]


def test_fresh_noise_is_shared_by_twins_and_comes_from_the_seed() -> None:
    start = draw(ROWS, 4, 8, 8, seed=2)
    guide = Guide(TERMS["drag"][0], start=0.25, end=0.75, eta=0.8)
    generator = torch.Generator().manual_seed(100)
    noise = [torch.randn(ROWS, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    wanted, reference, _ = guided(start, drag_loss, noise=noise, eta=0.8)
    trajectory = run(guide, start, seed=100)
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
    torch.testing.assert_close(trajectory.reference.latents, reference, **CLOSE)
    other = run(guide, start, seed=101)
    assert (other.latents[1] - wanted[1]).abs().max() > 0.1
    assert (run(guide, start, seed=100, eta=0.0).latents[1] - wanted[1]).abs().max() > 0.1


def test_a_scale_for_each_sample_and_for_the_twin() -> None:
    start = draw(ROWS, 4, 8, 8, seed=3)
    guide = Guide(TERMS["drag"][0], start=0.25, end=0.75, reference=Twin(guidance_scale=1.0))
    trajectory = run(guide, start, guidance_scale=(3.5, 6.0))
    scales = torch.tensor([3.5, 6.0], dtype=torch.float64)
    wanted, reference, _ = guided(start, drag_loss, scale=scales, reference_scale=1.0)
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
    torch.testing.assert_close(trajectory.reference.latents, reference, **CLOSE)


@pytest.mark.parametrize("half", ["both", "uncond"])
def test_the_unconditional_half_counts_without_classifier_free_guidance(half: Any) -> None:
    start = draw(ROWS, 4, 8, 8, seed=4)
    guide = Guide(TERMS["drag"][0], start=0.25, end=0.75, half=half)
    trajectory = run(guide, start, guidance_scale=1.0)
    wanted, _, _ = guided(start, drag_loss, scale=1.0, halves=(0, 1) if half == "both" else (0,))
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)


@pytest.mark.parametrize("calls", ["batch", "two"])
@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_the_half_of_the_empty_prompt_in_one_batch_or_in_calls_of_its_own(calls: str, scale: float) -> None:
    start = draw(ROWS, 4, 8, 8, seed=13)
    guide = Guide(TERMS["all"][0], start=0.25, end=0.75, half="uncond", rule="latent_gradient", step_size=0.5)
    wanted, reference, gradients = guided(
        start, TERMS["all"][1], rule="latent_gradient", size=0.5, halves=(0,), scale=scale, negative=""
    )
    for empty in ("", None):
        trajectory = run(guide, start, guidance_calls=calls, guidance_scale=scale, negative_prompt=empty)
        torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
        torch.testing.assert_close(trajectory.reference.latents, reference, **CLOSE)
    other, _, _ = guided(start, TERMS["all"][1], rule="latent_gradient", size=0.5, halves=(0,), scale=scale)
    assert (other - wanted).abs().max() > 1e-4 and len(gradients) == 2


@pytest.mark.parametrize("calls", ["batch", "two"])
@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("rule", ["latent_gradient", "epsilon"])
def test_the_empty_prompt_beside_a_negative_one(calls: str, scale: float, rule: Any) -> None:
    start = draw(ROWS, 4, 8, 8, seed=14)
    guide = Guide(TERMS["all"][0], start=0.25, end=0.75, half="empty", rule=rule, step_size=0.5)
    form = {"rule": rule, "size": 0.5, "halves": (0,), "scale": scale}
    wanted, reference, _ = guided(start, TERMS["all"][1], seen="", **form)
    # Without classifier-free guidance nothing has a negative prompt; the empty one is called all the same.
    prompts = {"negative_prompt": NEGATIVE if scale > 1 else None}
    trajectory = run(guide, start, guidance_calls=calls, guidance_scale=scale, **prompts)
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
    torch.testing.assert_close(trajectory.reference.latents, reference, **CLOSE)
    negative, _, _ = guided(start, TERMS["all"][1], **form)
    assert (negative - wanted).abs().max() > 1e-4


def test_a_recorded_reference_of_the_empty_prompt() -> None:
    start = draw(ROWS, 4, 8, 8, seed=15)
    guide = Guide(TERMS["drag and appearance"][0], start=0.25, end=0.75, half="empty")
    plain = model().generate(
        PROMPT, latents=start, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=7.5, convention="rg",
        progress=False,
    )  # fmt: skip
    recorded = Reference.record(model(), plain, guide, PROMPT)
    trajectory = run(replace(guide, reference=recorded), start)
    torch.testing.assert_close(trajectory.latents, run(guide, start).latents, **CLOSE)
    with pytest.raises(InputError, match="recorded with half='empty', and this guide has another half"):
        run(replace(guide, half="uncond", reference=recorded), start)
    other = Reference.record(model(), plain, replace(guide, half="uncond"), PROMPT, negative_prompt="")
    with pytest.raises(InputError, match="recorded with another half, and this guide has half='empty'"):
        run(replace(guide, reference=other), start)


def test_edits_of_text_encoders_leave_the_empty_prompt_as_it_is() -> None:
    start, prompts = draw(ROWS, 4, 8, 8, seed=16), [PROMPT, "a dog"]
    guide = Guide(TERMS["drag"][0], start=0.25, end=0.75, half="empty", rule="latent_gradient", step_size=0.5)
    site = "text_encoder.blocks.0.hook_resid_post"

    def sampled(*edits: Any, prompt: Any = prompts) -> Tensor:
        settings = {"steps": STEPS, "guidance_scale": 1.0, "latents": start, "progress": False}
        return model().generate(prompt, guidance=guide, edits=edits, **settings).latents

    # Of two prompts, the second is edited: the first one's sample does not notice, though both see the empty prompt.
    plain, edited = sampled(), sampled(interp.Scale(site, 0.0, rows=[1]))
    torch.testing.assert_close(edited[:, 0], plain[:, 0], **CLOSE)
    assert (edited[:, 1] - plain[:, 1]).abs().max() > 1e-4
    # Prompts that are encoded already leave an edit of the encoder nothing to change.
    with pytest.raises(NeverFiredError):
        sampled(interp.Scale(site, 0.0), prompt=model().prompt(prompts))


def test_the_halves_one_after_the_other_are_the_same() -> None:
    start = draw(ROWS, 4, 8, 8, seed=5)
    guide = Guide(TERMS["all"][0], start=0.25, end=0.75, rule="latent_gradient", step_size=0.5)
    together, apart = (run(guide, start, guidance_calls=calls) for calls in ("batch", "two"))
    torch.testing.assert_close(together.latents, apart.latents, **CLOSE)
    measured, again = (one.guidance.drop(columns="term").to_numpy(dtype=float) for one in (together, apart))
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(again), equal_nan=True, **CLOSE)


def test_weights_and_step_sizes_of_each_step() -> None:
    start = draw(ROWS, 4, 8, 8, seed=6)
    sizes, weights = (0.0, 0.3, 0.7, 0.0), (9.0, 2.0, -1.0, 9.0)
    guide = Guide(
        [replace(TERMS["drag"][0][0], weight=weights)],
        rule="latent_gradient", step_size=sizes, start=0.25, end=0.75,
    )  # fmt: skip

    def loss(mine: Any, theirs: Any, time: int, step: int, spread: Tensor) -> Tensor:
        return weights[step] * drag_loss(mine, theirs, time, step, spread)

    wanted, _, _ = guided(start, loss, rule="latent_gradient", size=sizes)
    torch.testing.assert_close(run(guide, start).latents, wanted, **CLOSE)


def test_a_function_of_activations_is_a_term() -> None:
    start = draw(ROWS, 4, 8, 8, seed=7)

    def alike(maps: Any, timestep: float, reference: Any) -> Tensor:
        return sum((maps[site] - reference[site]).square().flatten(1).mean(dim=1) for site in SITES)

    def bright(maps: Any, timestep: float) -> Tensor:
        return timestep / 1000 * maps[SITES[0]].flatten(1).mean(dim=1)

    terms = [
        Term.from_function(SITES, alike, compares=True, weight=-0.3),
        Term.from_function("up.1.resnets.?.hook_branch", bright, weight=2.0, rescale="latent_range"),
    ]

    def loss(mine: list[Tensor], theirs: list[Tensor], time: int, step: int, spread: Tensor) -> Tensor:
        apart = sum((a - b).square().flatten(1).mean(dim=1) for a, b in zip(mine, theirs, strict=True))
        return (-0.3 * apart + 2 * spread**2 * time / 1000 * mine[0].flatten(1).mean(dim=1)).sum()

    trajectory = run(Guide(terms, start=0.25, end=0.75, rule="latent_gradient", step_size=0.1), start)
    wanted, _, _ = guided(start, loss, rule="latent_gradient", size=0.1)
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
    assert set(trajectory.guidance.term) == {"alike", "bright", "total"}


def test_boxes_are_resized_before_they_are_compared() -> None:
    start, other = draw(ROWS, 4, 8, 8, seed=8), draw(ROWS, 4, 8, 8, seed=9)
    boxes = [((0.0, 0.25, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)), ((0.25, 0.25, 1.0, 1.0), (0.0, 0.0, 1.0, 0.375))]
    cells = [((0, 4, 2, 8), (4, 8, 0, 4)), ((2, 8, 2, 8), (0, 8, 0, 3))]
    guide = Guide(
        [Identity(LOOKS, boxes, rescale=None)],
        rule="latent_gradient", step_size=1.0, start=0.25, end=0.75, reference=Twin(latents=other),
    )  # fmt: skip

    def loss(mine: list[Tensor], theirs: list[Tensor], time: int, step: int, spread: Tensor) -> Tensor:
        seen, wanted = read(LOOKS.head, mine, time), read(LOOKS.head, theirs, time)
        total = torch.zeros((), dtype=torch.float64)
        for sample, pair in enumerate(cells):
            crops = [
                F.interpolate(maps[None, sample, :, a:b, c:d], size=(8, 8), mode="bilinear")
                for maps, (a, b, c, d) in zip((wanted, seen), pair, strict=True)
            ]
            total = total + (1 - F.cosine_similarity(*crops, dim=1)).mean()
        return total

    wanted, reference, _ = guided(start, loss, rule="latent_gradient", size=1.0, reference_start=other)
    trajectory = run(guide, start)
    torch.testing.assert_close(trajectory.latents, wanted, **CLOSE)
    torch.testing.assert_close(trajectory.reference.latents, reference, **CLOSE)


def test_scaling_a_loss_matters_as_the_rule_says() -> None:
    start = draw(ROWS, 4, 8, 8, seed=10)
    appearance, drag = TERMS["drag and appearance"][0]

    def end(terms: list[Term], rule: Any) -> Tensor:
        size = SIZES[rule] if rule == "signed_step" else SIZES[rule] / 1000
        return run(Guide(terms, rule=rule, step_size=size, start=0.25, end=0.75), start).final

    def heavier(term: Any, factor: float) -> Any:
        return replace(term, weight=factor * term.weight)

    # Adam's epsilon is all that tells scales apart under signed steps, and 1e-8 is little beside gradients a thousand
    # times as large as these losses'.
    appearance, drag = heavier(appearance, 1000.0), heavier(drag, 1000.0)
    alone = {rule: end([drag], rule) for rule in SIZES}
    torch.testing.assert_close(end([heavier(drag, 100.0)], "signed_step"), alone["signed_step"], rtol=0, atol=1e-4)
    assert (end([heavier(drag, -1.0)], "signed_step") - alone["signed_step"]).abs().max() > 1e-2
    together = end([appearance, drag], "signed_step")
    scaled = end([heavier(appearance, 100.0), heavier(drag, 100.0)], "signed_step")
    torch.testing.assert_close(scaled, together, rtol=0, atol=1e-4)
    assert (end([heavier(appearance, 0.01), drag], "signed_step") - together).abs().max() > 1e-2
    for rule in ("latent_gradient", "epsilon"):
        assert (end([heavier(drag, 3.0)], rule) - alone[rule]).abs().max() > 1e-3
        tripled = run(
            Guide([heavier(drag, 3.0)], rule=rule, step_size=SIZES[rule] / 3000, start=0.25, end=0.75), start
        ).final
        torch.testing.assert_close(tripled, alone[rule], **CLOSE)


def test_samples_do_not_see_each_other() -> None:
    start = draw(ROWS, 4, 8, 8, seed=11)
    settings: Any = {"rule": "latent_gradient", "step_size": 0.5, "start": 0.25, "end": 0.75}
    both = run(Guide(TERMS["all"][0], **settings), start)
    one = run(Guide([*TERMS["drag and appearance"][0], Spatial(POSE, TARGET[1])], **settings), start[1:])
    torch.testing.assert_close(both.latents[:, 1:], one.latents, **CLOSE)


def test_points_and_targets_of_each_sample() -> None:
    start = draw(ROWS, 4, 8, 8, seed=12)
    guide = Guide([Drag(PLACES, [FROM, TO[:1]], [TO, FROM[:1]], (16, 16))], start=0.25, end=0.75, rule="epsilon")
    second = Guide([Drag(PLACES, TO[:1], FROM[:1], (16, 16))], start=0.25, end=0.75, rule="epsilon")
    torch.testing.assert_close(run(guide, start).latents[:, 1:], run(second, start[1:]).latents, **CLOSE)


def test_the_head_is_given_the_time_embedding() -> None:
    # The closed form would agree with a head that ignores the timestep as well.
    maps = [draw(1, channels, 2, 2) for channels in Head(3, 0, model()).channels]
    assert (read(POSE.head, maps, 1) - read(POSE.head, maps, 751)).abs().max() > 0.1
