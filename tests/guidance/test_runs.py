"""Guided runs beside plain ones: outside the window, references, real images, captures, modes, other families."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.errors import InputError, NeverFiredError, ShapeError
from interp.guidance import Drag, Guide, Identity, Reference, Spatial, Term, Twin, edit_real, presets
from interp.hyperfeatures.presets import NEGATIVE_PROMPT
from interp.models.diffusion import Diffusion
from tests import tiny_diffusion
from tests.guidance.closed_form import CLOSE, NEGATIVE, PROMPT, SITES, STEPS, draw, model
from tests.guidance.test_steps import FROM, LOOKS, PLACES, POSE, ROWS, TARGET, TERMS, TO

SETTINGS: dict[str, Any] = {"negative_prompt": NEGATIVE, "steps": STEPS, "progress": False, "seed": 3, "n": ROWS}
TERM = TERMS["drag"][0]


def plain(**changes: Any) -> Any:
    return model().generate(PROMPT, **{"convention": "rg"} | SETTINGS | changes)


def run(guide: Guide | None, **changes: Any) -> Any:
    return model().generate(PROMPT, guidance=guide, **SETTINGS | changes)


def bright(maps: Any, timestep: float) -> Tensor:
    return sum(maps[site].flatten(1).mean(dim=1) for site in maps)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_terms_and_outside_the_window_a_run_is_plain_ddim(eta: float) -> None:
    wanted = plain(eta=eta)
    nothing = run(Guide([], eta=eta))
    assert torch.equal(nothing.latents, wanted.latents)
    assert len(nothing.guidance) == 0
    assert nothing.reference is None
    # Two of four steps: the first two latents are from before any guidance, and the last two steps are plain ones.
    late = run(Guide(TERM, eta=eta, start=0.5, end=0.75))
    assert torch.equal(late.latents[:3], wanted.latents[:3])
    assert not torch.equal(late.latents[3], wanted.latents[3])
    assert torch.equal(late.reference.latents, wanted.latents)
    early = run(Guide(TERM, start=0.0, end=0.25))
    rest = model().generate(PROMPT, **SETTINGS | {"n": 1, "latents": early.latents[1], "convention": "rg"})
    sampled = early.latents[1].clone()
    assert not torch.equal(sampled, wanted.latents[1])
    assert early.guidance.step.unique().tolist() == [0]
    assert rest.timesteps == early.timesteps


def test_steps_after_the_window_are_plain_ones() -> None:
    trajectory = run(Guide(TERM, start=0.0, end=0.25), save_steps=[2, 3], capture=["hook_out", "hook_in"], half="both")
    sd = model()
    alphas = sd.pipeline.scheduler.alphas_cumprod.double()
    for index, (step, time) in enumerate(((2, 251), (3, 1))):
        x = trajectory.latents[step]
        assert torch.equal(trajectory.activations["hook_in"][index], x)
        without, given = (half["hook_out"][index] for half in (trajectory.uncond, trajectory.activations))
        eps = without + 7.5 * (given - without)
        after = alphas[max(time - 250, 0)]
        clean = (x - (1 - alphas[time]).sqrt() * eps) / alphas[time].sqrt()
        torch.testing.assert_close(
            trajectory.latents[step + 1], after.sqrt() * clean + (1 - after).sqrt() * eps, **CLOSE
        )


def test_the_schedule_is_the_authors() -> None:
    guide = Guide(TERM)
    assert (guide.rule, guide.step_size, guide.recurrence, guide.half) == ("signed_step", 2e-2, 1, "both")
    assert list(guide.steps(100)) == list(range(50))
    assert list(replace(guide, start=0.1, end=0.35).steps(7)) == [0, 1]
    sd = model()
    trajectory = sd.generate(
        PROMPT, guidance=guide, convention=None, capture="hook_out", save_steps=[0], stop=True, progress=False
    )
    assert trajectory.timesteps[:2] == (991.0, 981.0)
    assert trajectory.timesteps[-1] == 1.0
    assert trajectory.n_steps == 100


def test_the_reference_is_the_unguided_run() -> None:
    trajectory = run(Guide(TERM, start=0.0, end=1.0))
    assert torch.equal(trajectory.reference.latents, plain().latents)
    assert trajectory.reference.predicted_x0.shape == trajectory.predicted_x0.shape
    assert torch.equal(trajectory.reference.pixels, plain().pixels)
    assert "hook_out" not in trajectory.reference.activations


def test_a_twin_of_another_seed_prompt_and_scale() -> None:
    twin = Twin(seed=9, prompt="two dogs", negative_prompt="ugly", guidance_scale=2.0)
    guide = Guide(TERMS["drag and appearance"][0][:1], reference=twin, start=0.0, end=0.5)
    wanted = model().generate(
        "two dogs", **SETTINGS | {"negative_prompt": "ugly", "seed": 9, "guidance_scale": 2.0, "convention": "rg"}
    )
    assert torch.equal(run(guide).reference.latents, wanted.latents)
    with pytest.raises(ShapeError, match="twin's latents"):
        run(replace(guide, reference=Twin(latents=draw(1, 4, 4, 4))))
    for wrong, message in (({"seed": 1, "latents": draw(1, 4, 8, 8)}, "not both"), ({"negative_prompt": "a"}, "both")):
        with pytest.raises(InputError, match=message):
            Twin(**wrong)


@pytest.mark.parametrize("half", ["both", "cond"])
def test_recorded_readings_replace_the_twin(half: Any) -> None:
    guide = Guide([*TERMS["all"][0]], start=0.25, end=0.75, half=half)
    wanted = run(guide)
    recorded = Reference.record(model(), plain(), guide, PROMPT, negative_prompt=NEGATIVE)
    trajectory = run(replace(guide, reference=recorded))
    torch.testing.assert_close(trajectory.latents, wanted.latents, **CLOSE)
    assert trajectory.reference is None
    assert "2 images at 2 steps" in repr(recorded)


def per_sample() -> tuple[list[Any], list[Any]]:
    """A drag, boxes and a target of each of two samples; and those of the second alone."""
    boxes = [((0.0, 0.25, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)), ((0.25, 0.25, 1.0, 1.0), (0.0, 0.0, 1.0, 0.375))]
    both = [Drag(PLACES, [FROM, TO], [TO, FROM], (16, 16)), Identity(LOOKS, boxes), Spatial(POSE, TARGET)]
    second = [Drag(PLACES, TO, FROM, (16, 16)), Identity(LOOKS, boxes[1:]), Spatial(POSE, TARGET[1])]
    return both, second


def test_recordings_hold_the_row_of_each_sample() -> None:
    sd, (both, second), prompts = model(), per_sample(), ["a red cat", "two dogs"]
    start = draw(ROWS, 4, 8, 8, seed=31)
    settings: dict[str, Any] = {"steps": STEPS, "progress": False, "negative_prompt": NEGATIVE, "convention": "rg"}
    seen = sd.generate(prompts, latents=start, **settings)
    guide = Guide(both, start=0.25, end=0.75)
    recorded = Reference.record(sd, seen, guide, prompts, negative_prompt=NEGATIVE)
    held = sd.generate(prompts, latents=start, guidance=replace(guide, reference=recorded), **settings)
    twins = sd.generate(prompts, latents=start, guidance=guide, **settings)
    torch.testing.assert_close(held.latents, twins.latents, **CLOSE)
    alone = sd.generate(prompts[1], latents=start[1:], guidance=replace(guide, terms=second), **settings)
    torch.testing.assert_close(held.latents[:, 1:], alone.latents, **CLOSE)
    assert (held.latents[-1] - seen.latents[-1]).flatten(1).abs().amax(dim=1).min() > 1e-3
    with pytest.raises(InputError, match="points of term 'drag': 2 for 3 samples"):
        Reference.record(sd, plain(n=3), guide, PROMPT)


def test_one_recorded_image_serves_samples_with_terms_of_their_own() -> None:
    sd, (both, second) = model(), per_sample()
    one = plain(n=1, seed=32)
    start = one.latents[0].expand(ROWS, -1, -1, -1).clone()
    guide = Guide(both, start=0.25, end=0.75)
    recorded = Reference.record(sd, one, guide, PROMPT, negative_prompt=NEGATIVE)
    assert recorded.rows == 1
    held = run(replace(guide, reference=recorded), latents=start, n=1)
    torch.testing.assert_close(held.latents, run(guide, latents=start, n=1).latents, **CLOSE)
    alone = run(replace(guide, terms=second), latents=start[1:], n=1)
    torch.testing.assert_close(held.latents[:, 1:], alone.latents, **CLOSE)
    assert (held.latents[-1, 0] - held.latents[-1, 1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="points of term 'drag': 2 for 3 samples"):
        run(replace(guide, reference=recorded), latents=start[:1].expand(3, -1, -1, -1).clone(), n=1)


def test_a_recording_of_an_inversion_guides_back() -> None:
    sd, image = model(), draw(1, 4, 8, 8, seed=30)
    inverted = sd.invert(image, PROMPT, convention="rg", steps=STEPS, progress=False)
    assert inverted.timesteps == (-1.0, 1.0, 251.0, 501.0)
    guide = Guide(TERM, start=0.0, end=0.5, guidance_scale=3.5)
    recorded = Reference.record(sd, inverted, guide, PROMPT, negative_prompt="", dtype=torch.float32)
    assert list(recorded.timesteps.values()) == [751.0, 501.0]
    latents = {0: inverted.latents[4], 1: inverted.latents[3]}
    text = sd.prompt(PROMPT, "")
    for step, time in ((0, 751), (1, 501)):
        for half in ("uncond", "cond"):
            acts = sd.capture(latents[step], time, getattr(text, half).states, list(SITES))
            wanted = PLACES(acts, time, sd).float()
            torch.testing.assert_close(recorded.readings[step, half, "readout correspondence"], wanted)
    steered = sd.generate(
        PROMPT, latents=inverted.final, guidance=replace(guide, reference=recorded), steps=STEPS, progress=False
    )
    unguided = sd.generate(
        PROMPT, latents=inverted.final, convention="rg", guidance_scale=3.5, steps=STEPS, progress=False
    )
    assert (steered.final - unguided.final).abs().max() > 1e-3


def test_recordings_that_do_not_fit() -> None:
    sd, guide = model(), Guide(TERM, start=0.25, end=0.5)
    recorded = Reference.record(sd, plain(), guide, PROMPT, negative_prompt=NEGATIVE)
    held = replace(guide, reference=recorded)
    for changed, settings, message in (
        (replace(held, end=0.75), {}, "not recorded at step 2"),
        (held, {"steps": 8, "convention": "rg"}, "not recorded at step 2"),
        (held, {"convention": "dhf"}, "timestep 501 of step 1, where this run has 500"),
        (held, {"n": 3}, "2 images for 3 samples"),
        (held, {"seed": 4}, "own noise"),
        (replace(held, terms=TERMS["drag and appearance"][0]), {}, "holds no 'readout appearance'"),
    ):
        with pytest.raises(InputError, match=message):
            run(changed, **settings)
    cond = Reference.record(sd, plain(), replace(guide, half="cond"), PROMPT)
    with pytest.raises(InputError, match="of the uncond half"):
        run(replace(guide, reference=cond))
    with pytest.raises(InputError, match="nothing to record"):
        Reference.record(sd, plain(), Guide([Spatial(POSE, TARGET)]))
    with pytest.raises(InputError, match="keep_latents"):
        Reference.record(sd, plain(keep_latents=False), guide)


def test_real_images_are_inverted_first() -> None:
    sd = model()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    guide = presets.drag_real(LOOKS, PLACES, FROM, FROM + torch.tensor([4.0, 0.0]), (16, 16))
    trajectory = edit_real(sd, image, PROMPT, guide, steps=STEPS, seed=5, progress=False)
    inverted = sd.invert(image, PROMPT, convention="rg", steps=STEPS, seed=5, progress=False, guidance_scale=1.0)
    assert torch.equal(trajectory.latents[0], inverted.final)
    settings: dict[str, Any] = {"convention": "rg", "steps": STEPS, "latents": inverted.final, "progress": False}
    back = sd.generate(PROMPT, guidance_scale=1.0, **settings)
    # The same numbers but for sums of two halves: 1 · (given - without) + without.
    torch.testing.assert_close(trajectory.reference.latents, back.latents, **CLOSE)
    unguided = sd.generate(PROMPT, guidance_scale=3.5, negative_prompt=NEGATIVE_PROMPT, **settings)
    assert (trajectory.final - unguided.final).abs().max() > 1e-3
    assert trajectory.guidance.step.unique().tolist() == [0, 1]


def test_presets_are_the_published_settings() -> None:
    move = FROM + torch.tensor([4.0, 0.0])
    spatial = presets.spatial(POSE, TARGET)
    generated = presets.drag_generated(LOOKS, PLACES, FROM, move, (16, 16))
    real = presets.drag_real(LOOKS, PLACES, FROM, move, (16, 16), end=0.4)
    assert (spatial.eta, generated.eta, real.eta) == (1.0, 0.0, 0.0)
    assert (spatial.guidance_scale, generated.guidance_scale, real.guidance_scale) == (7.5, 7.5, 3.5)
    assert (real.reference.guidance_scale, generated.reference.guidance_scale) == (1.0, None)
    assert [(term.name, term.weight, term.rescale) for term in spatial.terms] == [("pose", 0.5, "latent_range")]
    weights = [(term.name, term.weight, term.rescale) for term in generated.terms]
    assert weights == [("appearance", 1.0, "latent_range"), ("drag", 1.0, None)]
    for guide in (spatial, generated):
        assert (guide.rule, guide.step_size, guide.start, guide.end, guide.half) == (
            "signed_step",
            0.02,
            0,
            0.5,
            "both",
        )
        assert (guide.recurrence, guide.convention, guide.negative_prompt) == (1, "rg", NEGATIVE_PROMPT)
    assert real.end == 0.4


def test_what_a_guide_brings_and_what_is_given() -> None:
    sd = model()
    guide = Guide(TERM, guidance_scale=2.0, negative_prompt=NEGATIVE, eta=0.5, end=0.25, convention="null_text")
    brought = sd.generate(PROMPT, guidance=guide, steps=STEPS, progress=False)
    explicit = sd.generate(
        PROMPT, guidance=Guide(TERM, end=0.25), guidance_scale=2.0, negative_prompt=NEGATIVE, eta=0.5,
        convention="null_text", steps=STEPS, progress=False,
    )  # fmt: skip
    assert torch.equal(brought.latents, explicit.latents)
    assert brought.convention == "null_text"
    other = sd.generate(PROMPT, guidance=guide, guidance_scale=4.0, steps=STEPS, progress=False)
    assert not torch.equal(brought.latents, other.latents)


def test_the_log() -> None:
    guide = Guide(TERMS["drag and appearance"][0], start=0.25, end=0.75, recurrence=2)
    log = run(guide).guidance
    assert list(log.columns) == ["step", "timestep", "move", "sample", "term", "loss", "weighted", "gradient_norm"]
    assert len(log) == 2 * 2 * ROWS * 3
    assert log.groupby("step").timestep.first().tolist() == [751 - 250, 251]
    parts, totals = log[log.term != "total"], log[log.term == "total"]
    sums = parts.groupby(["step", "move", "sample"]).weighted.sum().to_numpy()
    torch.testing.assert_close(torch.tensor(sums), torch.tensor(totals.weighted.to_numpy()))
    assert parts.gradient_norm.isna().all()
    assert (totals.gradient_norm > 0).all()
    drags = log[log.term == "drag"]
    assert (drags.loss == drags.weighted).all()
    measured = run(replace(guide, term_gradients=True)).guidance
    assert not measured.gradient_norm.isna().any()
    alone = run(Guide(TERM, start=0.25, end=0.5)).guidance
    assert not alone.gradient_norm.isna().any()
    # The first move of both runs starts from the same latents.
    first = measured[(measured.term == "drag") & (measured.step == 1) & (measured.move == 0)].gradient_norm.tolist()
    assert first == pytest.approx(alone[alone.term == "drag"].gradient_norm.tolist(), rel=1e-9)


def test_captures_of_a_guided_run_end_it_where_they_should() -> None:
    trajectory = run(Guide(TERM, start=0.0, end=1.0), capture=SITES[0], save_steps=[1], stop=True)
    whole = run(Guide(TERM, start=0.0, end=1.0), capture=SITES[0])
    assert trajectory.stopped
    assert torch.equal(trajectory.activations[SITES[0]][0], whole.activations[SITES[0]][1])
    assert len(trajectory.reference.latents) == 3  # the twin went as far as the step that was ended
    before = run(Guide(TERM, start=0.5, end=1.0), capture=SITES[0], save_steps=[0], stop=True)
    assert before.stopped
    assert len(before.guidance) == 0


def test_text_encoders_are_captured_once() -> None:
    guide = Guide(TERMS["drag and appearance"][0][:1], reference=Twin(prompt="two dogs"), start=0.0, end=0.5)
    site = "text_encoder.blocks.1.hook_resid_post"
    trajectory = run(guide, capture=site)
    assert torch.equal(trajectory.activations[site], plain(capture=site).activations[site])


def test_grad_mode_and_inference_mode() -> None:
    wanted = run(Guide(TERM, start=0.0, end=0.5)).final
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            text = model().prompt(PROMPT, NEGATIVE)
            found = model().generate(
                text, guidance=Guide(TERM, start=0.0, end=0.5), **SETTINGS | {"negative_prompt": None}
            )
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert torch.equal(found.final, wanted)
        assert not found.latents.requires_grad
    with torch.inference_mode():
        latents, target = draw(ROWS, 4, 8, 8), TARGET.clone()
        guide = Guide([Spatial(POSE, target)], start=0.0, end=0.5)
        found = run(guide, latents=latents, n=1)
    assert torch.equal(found.final, run(Guide([Spatial(POSE, TARGET)], start=0.0, end=0.5), latents=latents, n=1).final)


def test_weights_get_no_gradient_and_do_not_change() -> None:
    sd = model()
    before = {name: weight.clone() for name, weight in sd.denoiser.state_dict().items()}
    run(Guide(TERM, start=0.0, end=1.0))
    assert all(weight.grad is None for module in (sd.denoiser, PLACES.head) for weight in module.parameters())
    assert all(weight.requires_grad for module in (sd.denoiser, PLACES.head) for weight in module.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in sd.denoiser.state_dict().items())


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, two = (run(Guide(TERM, eta=1.0), seed=8).final for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)


def test_edits_apply_to_samples_and_twins() -> None:
    edit = interp.Scale("mid.resnets.0.hook_branch", 3.0)
    edited = run(Guide(TERM, start=0.0, end=0.5), edits=[edit])
    assert torch.equal(edited.reference.latents, plain(edits=[edit]).latents)
    assert (edited.reference.final - plain().final).abs().max() > 1e-3


def test_guidance_that_does_nothing_is_an_error() -> None:
    def flat(maps: Any, timestep: float) -> Tensor:
        return 0 * bright(maps, timestep)

    def cut(maps: Any, timestep: float) -> Tensor:
        return bright(maps, timestep).detach()

    def infinite(maps: Any, timestep: float) -> Tensor:
        return bright(maps, timestep) * float("inf")

    for function, error, message in (
        (flat, NeverFiredError, "zero at all"),
        (cut, InputError, "without a graph"),
        (infinite, InputError, "not finite at step 0"),
        (lambda maps, timestep: bright(maps, timestep).sum(), ShapeError, "one loss for each of the 2"),
    ):
        with pytest.raises(error, match=message):
            run(Guide([Term.from_function(SITES[0], function)], start=0.0, end=0.5))
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    for timed, message in (
        (bright, "depend on the latents"),
        (lambda *given: factor * bright(*given), "do not depend"),
    ):
        with pytest.raises(InputError, match=message):
            run(Guide([Term.from_function("hook_time_embed", timed)], end=0.5))
    with pytest.raises(InputError, match=r"interp\.guidance\.Guide"):
        run(7.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a site of the denoiser"):
        run(Guide([Term.from_function("vae.decoder.hook_in", bright)]))


def test_runs_that_do_not_fit_their_terms() -> None:
    cases: list[tuple[Guide, dict[str, Any], type[Exception], str]] = [
        (Guide([Spatial(POSE, TARGET)]), {"n": 3}, ShapeError, "2 targets for 3 samples"),
        (Guide([Drag(PLACES, [FROM] * 3, [FROM + 2] * 3, (16, 16))]), {}, InputError, "3 for 2 samples"),
        (Guide([Spatial(POSE, TARGET)]), {"size": 32}, InputError, "latents of \\(8, 8\\) cells"),
        (Guide(TERM, end=0.2), {}, InputError, "no step of a run of 4"),
        (Guide([replace(TERM[0], weight=[1.0, 2.0])]), {}, InputError, "2 weights for a run of 4"),
        (Guide(TERM, step_size=[0.1] * 3), {}, InputError, "3 step sizes for a run of 4"),
        (Guide([Spatial(POSE, TARGET[:, :2])]), {}, ShapeError, "2 channels"),
    ]
    for guide, settings, error, message in cases:
        with pytest.raises(error, match=message):
            run(guide, **settings)
    other = Diffusion(tiny_diffusion.pipeline("sdxl"))
    with pytest.raises(interp.errors.InterpError):
        other.generate(PROMPT, guidance=Guide([Spatial(POSE, TARGET)]), steps=4, progress=False)
