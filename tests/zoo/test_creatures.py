"""The world of creatures: pictures, captions, keypoints and maps agree with the scene and with each other."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import avg_pool2d, max_pool2d

from interp.errors import InputError, UnknownNameError
from interp.zoo import creatures
from interp.zoo.creatures import BACKGROUNDS, COLOURS, KEYPOINT_PARTS, KEYPOINTS, PARTS, SPECIES


@pytest.fixture(scope="module")
def scenes():
    return creatures.draw_scenes(60, seed=3)


@pytest.fixture(scope="module")
def rendered(scenes):
    return creatures.render(scenes)


def mirrored(scene):
    y, x = scene.position
    other = {"left": "right", "right": "left"}[scene.facing]
    return dataclasses.replace(scene, facing=other, position=(y, 1 - x))


def labels_at(parts, points):
    rows, columns = points.round().long().unbind(-1)
    return [PARTS[label] for label in parts[rows, columns].tolist()]


def test_a_visible_keypoint_lies_on_its_part_and_a_hidden_one_on_another(scenes):
    large = creatures.render(scenes, size=256)
    shown, hidden = [], []
    for index in range(len(scenes)):
        labels = labels_at(large.parts[index], large.keypoints[index])
        for name, label, visible, present in zip(
            KEYPOINTS, labels, large.visible[index], large.present[index], strict=True
        ):
            if visible:
                shown.append(label in KEYPOINT_PARTS[name])
            elif present:
                hidden.append(label not in KEYPOINT_PARTS[name])
    # A pixel's centre may be across a boundary from a point within the pixel.
    assert len(shown) > 600 and sum(shown) > 0.99 * len(shown)
    assert len(hidden) > 30 and sum(hidden) > 0.95 * len(hidden)


def test_a_visible_keypoint_is_on_or_next_to_its_part_in_a_small_picture(scenes, rendered):
    for index in range(len(scenes)):
        for name, (y, x) in zip(KEYPOINTS, rendered.keypoints[index].round().long().tolist(), strict=True):
            if rendered.visible[index, KEYPOINTS.index(name)]:
                around = rendered.parts[index, y - 1 : y + 2, x - 1 : x + 2]
                assert {PARTS[label] for label in around.flatten().tolist()} & set(KEYPOINT_PARTS[name])


def test_only_birds_lack_front_legs_and_only_birds_and_dragons_have_wings(scenes, rendered):
    for scene, present in zip(scenes, rendered.present.tolist(), strict=True):
        has = dict(zip(KEYPOINTS, present, strict=True))
        assert has["near_front_foot"] == has["far_front_foot"] == has["near_front_knee"] == (scene.species != "bird")
        assert has["wing_tip"] == (scene.species in {"bird", "dragon"})
        assert has["near_back_foot"] and has["eye"] and has["tail_tip"]


def test_the_mirror_image_of_a_scene_is_the_mirror_image_of_its_picture(scenes, rendered):
    flipped = creatures.render([mirrored(scene) for scene in scenes])
    torch.testing.assert_close(flipped.images, rendered.images.flip(-1), atol=1e-4, rtol=0)
    assert (flipped.parts == rendered.parts.flip(-1)).float().mean() > 0.9999
    torch.testing.assert_close(flipped.keypoints[..., 0], rendered.keypoints[..., 0])
    torch.testing.assert_close(flipped.keypoints[..., 1], 63 - rendered.keypoints[..., 1], atol=1e-4, rtol=0)
    assert torch.equal(flipped.visible, rendered.visible)


def test_a_seed_gives_the_same_scenes_and_pictures_however_many_are_drawn(scenes, rendered):
    assert creatures.draw_scenes(60, seed=3) == scenes
    assert creatures.draw_scenes(7, seed=3) == scenes[:7]
    assert creatures.draw_scenes(60, seed=4) != scenes
    again = creatures.render(scenes)
    assert torch.equal(again.images, rendered.images) and torch.equal(again.edges, rendered.edges)
    alone = creatures.render(scenes[5:6])
    torch.testing.assert_close(alone.images[0], rendered.images[5], atol=1e-5, rtol=0)
    other = creatures.render(creatures.draw_scenes(60, seed=4))
    assert (other.images - rendered.images).abs().flatten(1).mean(dim=1).min() > 0.01


def test_drawing_leaves_the_global_random_states_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    creatures.render(creatures.draw_scenes(3, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_whole_creature_is_inside_the_frame():
    many = creatures.draw_scenes(1200, seed=11)
    rendered = creatures.render(many, size=32)
    points = (rendered.keypoints + 0.5) * 2
    assert points[rendered.present].min() >= 2 and points[rendered.present].max() <= 62
    border = torch.ones(32, 32, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert not rendered.parts[:, border].any()
    assert {scene.species for scene in many} == set(SPECIES)
    for name in SPECIES:
        scales = torch.tensor([scene.scale for scene in many if scene.species == name])
        assert scales.min() >= 0.5 and scales.max() <= 1.15 and scales.std() > 0.04, name


@pytest.mark.parametrize("style", range(len(creatures.STYLES)))
def test_a_caption_names_what_is_drawn(scenes, style):
    for scene in scenes:
        words = creatures.caption(scene, style).split()
        assert set(words) <= set(creatures.VOCABULARY)
        for said in (scene.species, scene.body, scene.head, scene.legs, scene.background, scene.facing):
            assert said in words
        assert not any(first == "a" and second[0] in "aeiou" for first, second in pairwise(words))
    fixed = dataclasses.replace(
        scenes[0], species="dog", body="red", head="blue", legs="yellow", facing="left", background="pink"
    )
    assert creatures.caption(fixed) == "a red dog with a blue head and yellow legs facing left on a pink background"


def test_the_colours_of_a_picture_are_those_of_its_caption(scenes):
    large = creatures.render(scenes, size=256)
    for index, scene in enumerate(scenes):
        for parts, table, word in (
            (("body",), COLOURS, scene.body),
            (("head",) if scene.species == "bird" else ("head", "snout"), COLOURS, scene.head),
            (("near_back_leg",), COLOURS, scene.legs),
            (("background",), BACKGROUNDS, scene.background),
        ):
            beyond = ~torch.isin(large.parts[index], torch.tensor([PARTS.index(part) for part in parts]))
            without_outline = max_pool2d(beyond[None].float(), 7, stride=1, padding=3)[0] == 0
            colour = large.images[index][:, without_outline].median(dim=1).values
            named = {name: (colour - torch.tensor(rgb)).norm().item() for name, rgb in table.items()}
            assert min(named, key=named.get) == word, (scene, parts, named)


def test_a_changed_word_changes_only_its_parts(scenes, rendered):
    scene = next(scene for scene in scenes if scene.legs != "purple" and scene.background != "lavender")
    index = scenes.index(scene)
    changed = creatures.render([dataclasses.replace(scene, legs="purple")])
    assert torch.equal(changed.parts[0], rendered.parts[index])
    torch.testing.assert_close(changed.keypoints[0], rendered.keypoints[index])
    moved = (changed.images[0] - rendered.images[index]).abs().amax(dim=0) > 0.1
    legs = torch.tensor([name.endswith("leg") for name in PARTS])[rendered.parts[index]].float()
    near_legs = max_pool2d(legs[None], 3, stride=1, padding=1)[0] > 0
    assert moved.any() and not (moved & ~near_legs).any()


def test_depth_agrees_with_what_hides_what(rendered):
    depths = creatures.part_depths()
    assert torch.equal(rendered.depth, depths[rendered.parts])
    assert (rendered.depth[rendered.parts == 0] == 0).all() and depths[1] > 0 and depths[-1] == 1
    assert (depths.diff() > 0).all()
    for name in ("far_front_foot", "far_back_foot", "neck_base", "belly"):
        column = KEYPOINTS.index(name)
        hidden = rendered.present[:, column] & ~rendered.visible[:, column]
        own = depths[PARTS.index(KEYPOINT_PARTS[name][0])]
        for index in torch.nonzero(hidden)[:, 0].tolist():
            y, x = rendered.keypoints[index, column].round().long().tolist()
            assert rendered.depth[index, y - 1 : y + 2, x - 1 : x + 2].max() > own


def test_edges_are_where_parts_meet(rendered):
    parts = rendered.parts
    silhouette = (parts[:, :, 1:] == 0) != (parts[:, :, :-1] == 0)
    beside = torch.maximum(rendered.edges[:, :, 1:], rendered.edges[:, :, :-1])
    assert beside[silhouette].min() > 0.25
    assert 0.03 < rendered.edges.mean() < 0.2
    away = max_pool2d((parts > 0).float(), 7, stride=1, padding=3) == 0
    assert rendered.edges[away].max() == 0


def test_a_small_picture_is_the_average_of_a_large_one(scenes, rendered):
    large = creatures.render(scenes, size=256)
    pooled = avg_pool2d(large.images, 4)
    difference = (pooled - rendered.images).abs()
    assert difference.mean() < 0.01
    assert difference.flatten(1).quantile(0.99, dim=1).max() < 0.25
    area = (large.parts > 0).float().flatten(1).mean(dim=1)
    torch.testing.assert_close((rendered.parts > 0).float().flatten(1).mean(dim=1), area, rtol=0.06, atol=0.002)
    torch.testing.assert_close((large.keypoints + 0.5) / 4 - 0.5, rendered.keypoints, atol=1e-3, rtol=0)


def test_pairs_share_at_least_three_named_points():
    drawn = creatures.draw_pairs(24, seed=1)
    assert drawn.images.shape == (48, 3, 64, 64)
    assert [pair.category for pair in drawn.pairs] == list(SPECIES) * 4
    for pair in drawn.pairs:
        source, target = drawn.scenes[pair.source], drawn.scenes[pair.target]
        assert source.species == target.species == pair.category and source.pose != target.pose
        assert len(pair.names) == len(pair.source_points) == len(pair.target_points) >= 3
        columns = [KEYPOINTS.index(name) for name in pair.names]
        assert drawn.rendered.visible[[pair.source, pair.target]][:, columns].all()
        assert torch.equal(drawn.rendered.keypoints[pair.source, columns], pair.source_points)
        assert torch.equal(drawn.rendered.keypoints[pair.target, columns], pair.target_points)
        for index, (top, left, bottom, right) in ((pair.source, pair.source_box), (pair.target, pair.target_box)):
            mask = drawn.rendered.parts[index] > 0
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
    facings = {drawn.scenes[pair.source].facing == drawn.scenes[pair.target].facing for pair in drawn.pairs}
    assert facings == {True, False}
    again = creatures.draw_pairs(24, seed=1)
    assert again.scenes == drawn.scenes and [pair.names for pair in again.pairs] == [pair.names for pair in drawn.pairs]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: creatures.draw_scenes(1, 0, ["girafe"]), UnknownNameError, "Did you mean 'giraffe'"),
        (lambda: creatures.draw_scenes(1, 0, []), InputError, "species is empty"),
        (lambda: creatures.draw_scenes(1, 0, "dog"), InputError, r"expected a list of names, such as \['dog'\]"),
        (lambda: creatures.draw_scenes(1, 0, ["dog", "dog"]), InputError, "repeats a name"),
        (lambda: creatures.draw_scenes(0, 0), InputError, "n is 0"),
        (lambda: creatures.draw_scenes(1, -1), InputError, "seed is -1"),
        (lambda: creatures.render([]), InputError, "scenes is empty"),
        (lambda: creatures.render(creatures.draw_scenes(1, 0), size=4), InputError, "size is 4"),
        (lambda: creatures.caption(creatures.draw_scenes(1, 0)[0], style=9), InputError, "expected 0 to 2"),
        (lambda: creatures.draw_pairs(1, 0, min_points=9), InputError, "min_points is 9"),
    ],
)
def test_errors_name_what_was_wrong(call, error, said):
    with pytest.raises(error, match=said):
        call()
