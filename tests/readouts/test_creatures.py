import pytest
import torch

from interp.errors import InputError, UnknownNameError
from interp.readouts import CREATURE_BONES, creatures, draw_pose
from interp.readouts.creatures import RANGES, creature_frames, creature_pictures, creature_triplets, triplet_scenes
from interp.zoo.creatures import KEYPOINTS, draw_scenes, render
from interp.zoo.creatures.colours import contrasting

N, SEED = 24, 5


@pytest.fixture(scope="module")
def rendered():
    return render(draw_scenes(N, SEED), 64)


@pytest.mark.parametrize("target", list(RANGES))
def test_targets_fill_their_range_and_their_background_is_exactly_its_least(rendered, target):
    data = creature_pictures(N, SEED, target)
    assert len(data) == N
    assert torch.equal(data.images[:, 0], 2 * rendered.images - 1)
    low, high = RANGES[target]
    assert data.targets.shape == (N, {"pose": 3, "keypoints": 17}.get(target, 1), 16, 16)
    assert data.targets.min() == low
    # Means over cells of thin lines and small parts stay below the greatest value.
    assert (low + high) / 2 < data.targets.max() <= high
    # A Gaussian is above zero nearly everywhere: only keypoints that a species lacks have no map.
    assert {"keypoints": 0.02}.get(target, 0.3) < (data.targets == low).float().mean() < 0.98
    moved_range = creature_pictures(N, SEED, target, value_range=(0.0, 10.0)).targets
    torch.testing.assert_close(moved_range, (data.targets - low) / (high - low) * 10, atol=1e-5, rtol=1e-5)


def test_depth_and_edges_are_the_renderers_means_over_cells(rendered):
    for name, truth in (("depth", rendered.depth), ("edge", rendered.edges)):
        low, high = RANGES[name]
        blocks = truth.reshape(N, 16, 4, 16, 4).mean(dim=(2, 4))
        found = creature_pictures(N, SEED, name).targets[:, 0]
        torch.testing.assert_close(found, low + (high - low) * blocks, atol=1e-5, rtol=0)


def test_heat_maps_peak_in_the_cells_that_the_keypoints_are_in(rendered):
    maps = creature_pictures(N, SEED, "keypoints").targets
    peaks = maps.flatten(2).argmax(dim=-1)
    for scene in range(N):
        for point in range(len(KEYPOINTS)):
            if rendered.present[scene, point]:
                # A pixel's centre is half a pixel from its edge.
                row, column = ((rendered.keypoints[scene, point] + 0.5) // 4).int().tolist()
                assert peaks[scene, point] == 16 * row + column
                assert maps[scene, point].max() == 1
            else:
                assert maps[scene, point].abs().max() == 0


def test_poses_are_lines_between_keypoints_in_the_colour_of_their_bone(rendered):
    wide = creatures.creature_targets(rendered, "pose", 64)
    for scene in range(6):
        points, present = rendered.keypoints[scene], rendered.present[scene]
        start, end = CREATURE_BONES[-1] if present[CREATURE_BONES[-1][1]] else CREATURE_BONES[6]
        row, column = ((points[start] + points[end]) / 2).round().int().tolist()
        alone = draw_pose(points, present, [(start, end)], (64, 64))
        assert wide[scene, :, row, column].max() > -0.5
        assert alone[:, row, column].max() > -0.5
        far = (points[present].min(dim=0).values - 4).clamp(min=0).int().tolist()
        assert wide[scene, :, : far[0], :].eq(-0.5).all() and wide[scene, :, :, : far[1]].eq(-0.5).all()


def test_one_bone_by_hand():
    points = torch.tensor([[2.0, 1.0], [2.0, 4.0], [7.0, 7.0]])
    drawn = draw_pose(points, torch.ones(3, dtype=torch.bool), [(0, 1)], (6, 8), width=1.0, value_range=(-1.0, 1.0))
    red = torch.full((6, 8), -1.0)
    red[2, 1:5] = 1.0  # a line one cell wide covers its own row and nothing else
    assert torch.equal(drawn[0], red)
    assert torch.equal(drawn[1:], torch.full((2, 6, 8), -1.0))
    gone = draw_pose(points, torch.tensor([True, False, True]), [(0, 1)], (6, 8))
    assert torch.equal(gone, torch.full((3, 6, 8), -0.5))
    two = draw_pose(points, torch.ones(3, dtype=torch.bool), [(0, 1), (1, 2)], (8, 8))
    assert two[:, 2, 2].tolist() == [0.5, -0.5, -0.5]
    assert two[:, 7, 7].tolist() == pytest.approx([-0.5, 0.5, 0.5])  # the second of two hues
    batch = draw_pose(
        torch.stack([points, points + 1]), torch.ones(2, 3, dtype=torch.bool), [(0, 1)], (6, 8), width=1.0
    )
    assert torch.equal(batch[1, :, 3, 2:6], batch[0, :, 2, 1:5])
    with pytest.raises(InputError, match="a bone joins points beyond"):
        draw_pose(points, torch.ones(3, dtype=torch.bool), [(0, 3)], (6, 8))
    with pytest.raises(InputError, match="not finite"):
        draw_pose(points * torch.nan, torch.ones(3, dtype=torch.bool), [(0, 1)], (6, 8))


def test_frames_show_one_creature_twice_with_the_same_keypoints():
    data = creature_frames(N, SEED)
    scenes = draw_scenes(N, SEED)
    later = creatures.moved(scenes, SEED)
    pictures = [2 * render(part, 64).images - 1 for part in (scenes, later)]
    both = render(scenes, 64).visible & render(later, 64).visible
    kept = [index for index in range(N) if both[index].any()]
    assert len(data) == len(kept) > N / 2
    for place, index in enumerate(kept):
        example = data(place, None)
        assert torch.equal(example.images, torch.stack([pictures[0][index], pictures[1][index]]))
        for part, points in ((scenes, example.target.points_a), (later, example.target.points_b)):
            truth = render([part[index]], 64).keypoints[0][both[index]]
            # Cells of the map, rounded, are the cells that the pixels are in.
            assert torch.equal((points * 16).round(), ((truth + 0.5) // 4).clamp(max=15))
    for before, after in zip(scenes, later, strict=True):
        assert before.pose != after.pose and before.position != after.position
        for name in ("species", "body", "head", "legs", "background", "facing", "jitter"):
            assert getattr(before, name) == getattr(after, name)
    still = creatures.moved(scenes, SEED, (0.0, 0.0))
    assert [one.pose for one in still] == [one.pose for one in scenes]


@pytest.mark.parametrize("kind", ["appearance", "identity"])
def test_triplets_differ_in_what_they_should_and_in_nothing_else(kind):
    anchors, positives, negatives = triplet_scenes(N, SEED, kind)
    behind = 0
    for index, (anchor, positive, negative) in enumerate(zip(anchors, positives, negatives, strict=True)):
        for name in ("species", "body", "head", "legs", "jitter"):
            assert getattr(anchor, name) == getattr(positive, name)
        assert positive.pose != anchor.pose
        assert {positive.body, positive.head, positive.legs} <= set(contrasting(positive.background))
        behind += positive.background != anchor.background
        recoloured, elsewhere = index % 2 == 0, kind == "appearance" and index % 4 == 3
        assert (negative.species == anchor.species) == (recoloured or elsewhere)
        for part in ("body", "head", "legs"):
            assert (getattr(negative, part) != getattr(anchor, part)) == recoloured
        assert (negative.background == anchor.background) == (not elsewhere)
        assert {negative.body, negative.head, negative.legs} <= set(contrasting(negative.background))
        if recoloured or elsewhere:
            assert negative.pose != anchor.pose  # as far away as the positive: only its looks tell the two apart
    assert (behind == 0) == (kind == "appearance")
    images = creature_triplets(N, SEED, kind).images
    for place, part in enumerate((anchors, positives, negatives)):
        assert torch.equal(images[:, place], 2 * render(part, 64).images - 1)


def test_everything_follows_from_the_seed_and_creatures_stay_in_the_frame():
    for kind in ("appearance", "identity"):
        assert triplet_scenes(6, 1, kind) == triplet_scenes(6, 1, kind) != triplet_scenes(6, 2, kind)
        for scenes in triplet_scenes(N, 3, kind):
            parts = render(scenes, 64).parts
            border = torch.cat([parts[:, 0], parts[:, -1], parts[:, :, 0], parts[:, :, -1]], dim=1)
            # Between two poses that fit the frame, one seldom leaves it.
            assert (border > 0).any(dim=1).float().mean() < 0.1


def test_bad_settings_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'depth'"):
        creature_pictures(2, 0, "depths")
    with pytest.raises(InputError, match="value_range"):
        creature_pictures(2, 0, "depth", value_range=(1.0, 0.0))
    with pytest.raises(InputError, match="n is 0"):
        creature_triplets(0, 0)
    with pytest.raises(InputError, match="rising shares"):
        creatures.moved(draw_scenes(1, 0), 0, (0.5, 0.2))
