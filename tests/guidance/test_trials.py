"""Trials of guidance: paired noise, comparisons, controls, films, and what the judges measure."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import interp
from interp.errors import InputError, UnknownNameError
from interp.guidance import Guide, Term
from interp.guidance.controls import reversed_guide, shuffled
from interp.guidance.creature_trials import COMMON, Pulls, creature_boxes, draw_goals, draw_pulls, errors_by
from interp.guidance.film import film
from interp.guidance.likeness import histogram, likeness
from interp.guidance.trial_figures import arm_films, pulled_grid, sample_grid
from interp.guidance.trials import Arm, compared, noise, run_trials
from interp.readouts import Readout, ReadoutHead
from interp.zoo.creatures import KEYPOINTS, render
from interp.zoo.readouts import Estimate, estimator

STEPS = 4
PROMPTS = ["a red dog", "a blue bird", "a green horse"]
SEEDS = [5, 6, 7]
SITE = "up.1.resnets.0.hook_branch"


@pytest.fixture(scope="module")
def sd() -> interp.Diffusion:
    return interp.Diffusion.from_pretrained("zoo:tiny-diffusion")


def bright(maps: Any, timestep: float) -> torch.Tensor:
    return maps[SITE].flatten(1).mean(dim=1)


def guide(part: Any) -> Guide:
    return Guide([Term.from_function(SITE, bright)], step_size=0.2, guidance_scale=3.0)


def depth_readout(sd: interp.Diffusion) -> Readout:
    head = ReadoutHead(sd.channels([SITE]), 16, 16, out_channels=1, n_groups=8)
    return Readout(head, (SITE,), (16, 16), name="depth", value_range=(-1.0, 1.0))


def test_arms_start_from_the_same_noise_whatever_the_batch(sd: interp.Diffusion) -> None:
    arms = [Arm("unguided"), Arm("guided", guide)]
    runs = [
        run_trials(sd, PROMPTS, arms, seeds=SEEDS, steps=STEPS, batch=batch, progress=False).images for batch in (3, 2)
    ]
    first = noise(sd, SEEDS)
    for index, seed in enumerate(SEEDS):
        drawn = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(first[index], drawn)
        alone = sd.generate(
            PROMPTS[index], latents=drawn[None], steps=STEPS, guidance_scale=3.0, convention="rg", progress=False
        )
        # Batches differ in rounding alone.
        torch.testing.assert_close(runs[0]["unguided"][index], alone.pixels[0], atol=1e-3, rtol=0)
    for arm in ("unguided", "guided"):
        torch.testing.assert_close(runs[0][arm], runs[1][arm], atol=1e-3, rtol=0)
    assert (runs[0]["guided"] - runs[0]["unguided"]).abs().amax(dim=(1, 2, 3)).min() > 0.02
    with pytest.raises(InputError, match="3 prompts with 2 seeds"):
        run_trials(sd, PROMPTS, arms, seeds=SEEDS[:2], steps=STEPS)
    with pytest.raises(InputError, match="different names"):
        run_trials(sd, PROMPTS, [arms[0], arms[0]], seeds=SEEDS, steps=STEPS)


def test_comparisons_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(10, 3, 40)
    better = base - rng.normal(1, 0.2, 40)
    table = compared({"unguided": base.tolist(), "guided": better.tolist(), "same": base.tolist()}).set_index("arm")
    assert table.loc["guided", "median"] == np.median(better)
    np.testing.assert_allclose(table.loc["guided", "difference"], (better - base).mean())
    # Pair by pair the gain is sure, although the arms themselves overlap.
    assert table.loc["guided", "difference_high"] < -0.9 and table.loc["guided", "high"] > table.loc["unguided", "low"]
    assert table.loc["guided", "p"] == stats.wilcoxon(better - base).pvalue < 1e-6
    assert table.loc["same", "p"] == 1 and np.isnan(table.loc["unguided", "p"])
    with pytest.raises(UnknownNameError, match="no arm 'plain'"):
        compared({"unguided": [1.0, 2.0]}, baseline="plain")
    with pytest.raises(InputError, match="different numbers of trials"):
        compared({"unguided": [1.0, 2.0], "guided": [1.0]})


def test_a_shuffled_head_has_the_same_numbers_and_reads_something_else(sd: interp.Diffusion) -> None:
    readout = depth_readout(sd)
    before = {name: weight.clone() for name, weight in readout.head.state_dict().items()}
    broken = shuffled(readout, 1)
    for name, weight in broken.head.named_parameters():
        assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)
    latents = noise(sd, [3])
    ours, theirs = (one.read(sd, latents, 300) for one in (readout, broken))
    assert (ours - theirs).abs().max() > 0.01
    assert all(torch.equal(weight, before[name]) for name, weight in readout.head.state_dict().items())
    assert torch.equal(shuffled(readout, 1).read(sd, latents, 300), theirs)


def test_a_reversed_guide_raises_what_the_guide_lowers(sd: interp.Diffusion) -> None:
    arms = [Arm("unguided"), Arm("guided", guide), Arm("reversed", lambda part: reversed_guide(guide(part)))]
    losses = {}
    for arm in arms[1:]:
        made = sd.generate(PROMPTS, latents=noise(sd, SEEDS), steps=STEPS, guidance=arm.guide(range(3)), progress=False)
        losses[arm.name] = made.guidance[made.guidance["step"] == 1]["weighted"].sum()
    assert losses["guided"] < losses["reversed"]
    assert reversed_guide(Guide(guide([0]).terms, step_size=[0.1, 0.2])).step_size == [-0.1, -0.2]


def test_films_show_what_each_step_was_heading_for(sd: interp.Diffusion) -> None:
    readout = depth_readout(sd)
    made = sd.generate(PROMPTS[:2], steps=STEPS, seed=1, progress=False, convention="rg")
    shown = film(sd, made, readout, n_frames=3)
    assert shown.steps == (0, 2, 3) and shown.timesteps == tuple(made.timesteps[step] for step in (0, 2, 3))
    for place, step in enumerate(shown.steps):
        torch.testing.assert_close(shown.images[:, place], sd.decode(made.predicted_x0[step]))
        read = readout.read(sd, made.latents[step], made.timesteps[step])
        torch.testing.assert_close(shown.readouts[:, place], read)
    assert film(sd, made, readout, [1]).steps == (1,)
    with pytest.raises(InputError, match="steps 0 to 3"):
        film(sd, made, readout, [4])
    bare = sd.generate(PROMPTS[:1], steps=STEPS, keep_latents=False, progress=False, convention="rg")
    with pytest.raises(InputError, match="keep_latents=True"):
        film(sd, bare, readout)


def test_figures_of_trials_have_a_row_for_each_arm(sd: interp.Diffusion) -> None:
    arms = [Arm("unguided"), Arm("guided", guide)]
    figure = arm_films(
        sd, arms, PROMPTS, SEEDS, depth_readout(sd), steps=STEPS, guidance_scale=3.0, trials=(1,), n_frames=2
    )
    frames = np.stack([ax.images[0].get_array() for ax in figure.axes]).reshape(2, 2, 64, 64, 3)
    assert np.abs(frames[0] - frames[1]).max() > 0.02
    images = {"unguided": torch.rand(3, 3, 64, 64), "guided": torch.rand(3, 3, 64, 64)}
    assert len(sample_grid(images, 2).axes) == 4
    pulls = Pulls([torch.tensor([[10.0, 20.0]])] * 3, [torch.tensor([[30.0, 20.0]])] * 3)
    assert [len(ax.texts) for ax in pulled_grid(images, pulls, 3).axes] == [1] * 6


def test_goals_share_the_species_alone_and_errors_are_measured_on_them() -> None:
    goals = draw_goals(12, 3)
    assert [scene.species for scene in goals.scenes] == [scene.species for scene in goals.goals]
    assert all(scene.pose != goal.pose for scene, goal in zip(goals.scenes, goals.goals, strict=True))
    assert all(scene.species in prompt for scene, prompt in zip(goals.scenes, goals.prompts, strict=True))
    images = {"prompt": render(goals.scenes).images, "goal": goals.rendered.images}
    judge = estimator()
    # A pixel; and a twentieth of what is there to be explained.
    limits = {"pose": 1.0, "keypoints": 1.0, "depth": 0.05, "edge": 0.1}
    for name, limit in limits.items():
        errors = errors_by(judge, images, goals, name)
        assert np.median(errors["goal"]) < limit < np.median(errors["prompt"])
    seen = judge.estimate(images["prompt"]).depth
    cells = torch.nn.functional.adaptive_avg_pool2d(goals.rendered.depth[:, None], 32)[:, 0]
    r = np.corrcoef(seen[3].flatten(), cells[3].flatten())[0, 1]
    assert errors_by(judge, images, goals, "depth")["prompt"][3] == pytest.approx(1 - r, abs=1e-4)
    with pytest.raises(UnknownNameError, match="no error of 'poze'"):
        errors_by(judge, images, goals, "poze")


def test_pulls_measure_the_way_and_the_rest() -> None:
    names = ("eye", "nose")
    columns = [KEYPOINTS.index(name) for name in names]
    points = torch.full((2, len(KEYPOINTS), 2), 32.0)
    points[1, columns] = torch.tensor([[4.0, 32.0], [5.0, 33.0]])  # at the top there is room below alone
    seen = Estimate(points, torch.zeros(2, 32, 32), torch.zeros(2, 32, 32))
    pulls = draw_pulls(seen, names, (8.0, 4.0), seed=0)
    ways = [target - source for source, target in zip(pulls.sources, pulls.targets, strict=True)]
    assert all(float(way[0, 0]) in (-8.0, 8.0) and abs(float(way[0, 1])) in (0.0, 4.0) for way in ways)
    assert float(ways[1][0, 0]) == 8.0
    assert pulls.shares == [1.0, 1.0] and pulls.n_cut == 0
    assert pulls.moved(seen, names) == [0.0, 0.0]
    gone = points.clone()
    gone[:, columns] += 0.75 * torch.stack(ways)
    assert pulls.moved(Estimate(gone, seen.depth, seen.edges), names) == pytest.approx([0.75, 0.75])
    before = torch.zeros(2, 3, 64, 64)
    near, far = before.clone(), before.clone()
    near[:, :, 32, 32] = 1.0
    near[1] = 0.0
    far[:, :, 60, 2] = 1.0
    assert pulls.elsewhere(near, before, 6.0) == [0.0, 0.0]
    assert min(pulls.elsewhere(far, before, 6.0)) > 0


def test_pulls_stay_in_the_picture_and_say_how_much_of_the_way_is_left() -> None:
    names, columns = ("eye", "nose"), [KEYPOINTS.index(name) for name in ("eye", "nose")]
    points = torch.full((4, len(KEYPOINTS), 2), 32.0)
    points[1, columns] = torch.tensor([[10.0, 32.0], [50.0, 32.0]])  # 7 pixels of room above, 11 below
    points[2, columns] = torch.tensor([[32.0, 1.0], [33.0, 62.0]])  # room up and down, but not to the sides
    points[3, columns] = torch.tensor([[63.0, 63.0], [63.0, 63.0]])
    seen = Estimate(points, torch.zeros(4, 32, 32), torch.zeros(4, 32, 32))
    for seed in range(20):
        pulls = draw_pulls(seen, names, (20.0, 8.0), seed)
        for source, target in zip(pulls.sources, pulls.targets, strict=True):
            assert ((target >= 0) & (target <= 63)).all()
            moves = target - source
            torch.testing.assert_close(moves, moves[:1].expand_as(moves))
        assert pulls.shares == pytest.approx([1.0, 0.55, 1.0, 1.0]) and pulls.n_cut == 1
        ways = [target - source for source, target in zip(pulls.sources, pulls.targets, strict=True)]
        assert [abs(float(way[0, 0])) for way in ways] == pytest.approx([20.0, 11.0, 20.0, 20.0])
        assert ways[1][0, 0] > 0 and ways[2][0, 1] == 0 and float(ways[3][0, 0]) == -20.0
        # What went as far as was asked for after the cut went all of it.
        there = points.clone()
        there[:, columns] += torch.stack(ways)
        assert pulls.moved(Estimate(there, seen.depth, seen.edges), names) == pytest.approx([1.0] * 4)
    for way in ((0.0, 4.0), (-8.0, 4.0), (float("nan"), 4.0), (8.0, float("inf"))):
        with pytest.raises(InputError, match="give pixels along y"):
            draw_pulls(seen, names, way, 0)


def test_boxes_hold_the_creature() -> None:
    goals = draw_goals(6, 9)
    boxes = creature_boxes(estimator().estimate(goals.rendered.images))
    columns = [KEYPOINTS.index(name) for name in COMMON]
    for (top, left, bottom, right), points in zip(boxes, goals.rendered.keypoints[:, columns] / 64, strict=True):
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
        inside = (points >= torch.tensor([top, left])) & (points <= torch.tensor([bottom, right]))
        assert inside.all()


def test_likeness_is_greatest_for_the_picture_itself() -> None:
    goals = draw_goals(8, 4)
    images, judge = render(goals.scenes).images, estimator()
    own = likeness(images, images, goals.scenes, judge)
    other = likeness(images.flip(0), images, goals.scenes, judge)
    assert own["colour histogram"] == pytest.approx([1.0] * 8) and own["embedding"] == pytest.approx([1.0] * 8)
    assert own["pose apart"] == [0.0] * 8 and np.mean(own["creature"]) > 0.9  # the classifier's own accuracy
    assert own["creature's colours"] == pytest.approx([1.0] * 8)
    for name in ("colour histogram", "creature's colours", "embedding", "creature"):
        assert np.mean(other[name]) < np.mean(own[name]) - 0.2
    assert np.median(other["pose apart"]) > 3
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1.0
    assert histogram(red)[0, 3 * 16] == 1.0
    half = red.clone()
    half[..., :2] = 0.0
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert histogram(half)[0, [0, 3 * 16]].tolist() == [0.5, 0.5]
    mask[..., 2:] = True
    assert histogram(half, mask)[0, 3 * 16] == 1.0 and histogram(half, ~mask)[0, 0] == 1.0
    assert histogram(half, mask & ~mask).abs().max() == 0
