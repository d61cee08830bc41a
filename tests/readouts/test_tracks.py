import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from interp.errors import InputError
from interp.readouts import (
    FramePairs,
    Frames,
    Tracks,
    listed_frames,
    load_drag_example,
    load_prompts,
    paired_frames,
    read_tracks,
    video_tracks,
)

XY = np.array([[[1.5, 2.0], [10.0, 4.0]], [[3.5, 6.0], [2.0, 8.0]]])  # frame, point, (x, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_tracks_of_every_dtype_come_out_as_y_x(tmp_path, dtype):
    np.save(tmp_path / "tracks_a.npy", XY.astype(dtype)[None])
    tracks = read_tracks([tmp_path / "tracks_a.npy"])
    expected = torch.from_numpy(XY.astype(dtype).astype(np.float32))[..., [1, 0]]
    assert tracks.points.dtype == torch.float32
    assert torch.equal(tracks.points, expected)
    assert tracks.visible.all() and tracks.n_frames == 2


def test_several_files_are_joined_over_points_with_their_visibility(tmp_path):
    shown = np.array([[[1, 0], [1, 1]]])
    for name, shift in (("a", 0), ("b", 50)):
        np.save(tmp_path / f"tracks_{name}.npy", (XY + shift)[None])
        np.save(tmp_path / f"visibles_{name}.npy", shown.astype([np.float32, bool][name == "b"]))
    files = [tmp_path / f"tracks_{name}.npy" for name in "ab"]
    tracks = read_tracks(files, [tmp_path / f"visibles_{name}.npy" for name in "ab"])
    assert tracks.points.shape == (2, 4, 2)
    there, here = tracks.pair(0, 1)
    assert there.tolist() == [[2, 1.5], [52, 51.5]]
    assert here.tolist() == [[6, 3.5], [56, 53.5]]
    assert len(tracks.pair(1, 1)[0]) == 4


def test_two_frames_are_interpolated_and_others_are_cut():
    two = Tracks(torch.tensor([[[0.0, 4.0]], [[6.0, 1.0]]]), torch.tensor([[True], [True]]))
    expected = torch.tensor([[0.0, 4.0], [2.0, 3.0], [4.0, 2.0], [6.0, 1.0]])
    torch.testing.assert_close(two.frames(4).points[:, 0], expected, rtol=0, atol=1e-5)  # thirds in single precision
    assert two.frames(2).points.tolist() == two.points.tolist()
    hidden = replace(two, visible=torch.tensor([[True], [False]])).frames(3)
    assert not hidden.visible.any()
    many = Tracks(torch.arange(8.0).reshape(4, 1, 2), torch.ones(4, 1, dtype=torch.bool))
    assert many.frames(2).points.tolist() == many.points[:2].tolist()
    assert many.frames(9).n_frames == 4
    with pytest.raises(InputError, match="at least two frames"):
        two.frames(1)
    with pytest.raises(InputError, match="frame 4 is out of range"):
        many.pair(0, 4)


def test_bad_tracks_are_named(tmp_path):
    bad = tmp_path / "tracks_bad.npy"
    for array, words in (
        (XY, "expected numbers with 4 axes"),
        (np.full((1, 2, 2, 3), 1.0), r"no array of finite \(x, y\)"),
        (np.full((1, 2, 2, 2), np.nan), r"no array of finite \(x, y\)"),
        (np.array([[[["a", "b"]]]]), "expected numbers"),
    ):
        np.save(bad, array)
        with pytest.raises(InputError, match=words):
            read_tracks([bad])
    bad.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"tracks_bad\.npy' cannot be read"):
        read_tracks([bad])
    np.save(bad, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_tracks([bad])
    np.save(bad, XY[None])
    np.save(tmp_path / "other.npy", XY[None, :1])
    with pytest.raises(InputError, match=r"other\.npy' has 1 frames"):
        read_tracks([bad, tmp_path / "other.npy"])
    np.save(tmp_path / "other.npy", np.ones((1, 2, 3)))
    with pytest.raises(InputError, match="but its tracks are"):
        read_tracks([bad], [tmp_path / "other.npy"])


def drag(tmp_path, points=XY, **changes):
    info = {"video_name": "lion", "prompt": "a lion", "seed": 3, "image_dim": [16, 12]} | changes
    (tmp_path / "info.json").write_text(json.dumps({key: value for key, value in info.items() if value is not None}))
    # A JPEG under the name of a PNG, as some of the shipped ones are.
    Image.new("RGB", (16, 12), (200, 10, 10)).save(tmp_path / "source.png", format="JPEG")
    np.save(tmp_path / "tracks_head-turn.npy", points[None])
    return tmp_path


def test_drag_examples_load_with_and_without_visibility(tmp_path):
    example = load_drag_example(drag(tmp_path))
    assert (example.size, example.prompt, example.seed, example.name) == ((12, 16), "a lion", 3, "lion")
    assert example.image.size == (16, 12) and example.image.getpixel((3, 3))[0] > 150
    assert example.tracks.pair(0, 1)[0].tolist() == [[2, 1.5], [4, 10]]
    np.save(tmp_path / "visibles_head-turn.npy", np.array([[[1, 1], [0, 1]]]))
    assert load_drag_example(tmp_path).tracks.pair(0, 1)[0].tolist() == [[4, 10]]
    # Four frames of one point, without a file of visibility.
    np.save(drag(tmp_path, XY.reshape(4, 1, 2)) / "visibles_head-turn.npy", np.ones((1, 4, 1)))
    (tmp_path / "visibles_head-turn.npy").unlink()
    assert load_drag_example(tmp_path).tracks.frames(2).n_frames == 2
    with pytest.raises(InputError, match=r"info\.json' lacks or garbles.*prompt"):
        load_drag_example(drag(tmp_path, prompt=None))
    with pytest.raises(InputError, match="image_dim"):
        load_drag_example(drag(tmp_path, image_dim=[1, 2, 3]))
    (drag(tmp_path) / "tracks_head-turn.npy").unlink()
    with pytest.raises(InputError, match=r"holds no tracks_\*\.npy"):
        load_drag_example(tmp_path)


def test_one_of_several_drags_is_named(tmp_path):
    folder = drag(tmp_path)
    assert load_drag_example(folder).drag == "head-turn"
    np.save(folder / "tracks_tail-up.npy", (XY + 1)[None])
    for name, shift in (("head-turn", 0), ("tail-up", 1)):
        assert load_drag_example(folder, name).tracks.pair(0, 1)[0].tolist() == [
            [2 + shift, 1.5 + shift],
            [4 + shift, 10 + shift],
        ]
    with pytest.raises(InputError, match=r"tracks_head-turn\.npy, tracks_tail-up\.npy: name one of several drags"):
        load_drag_example(folder)
    with pytest.raises(InputError, match=r"there is no tracks_tail-down\.npy\. Did you mean"):
        load_drag_example(folder, "tail-down")


def test_prompts_of_control_images(tmp_path):
    (tmp_path / "prompts.json").write_text('{"a": "a dog", "b": "a cat"}')
    assert load_prompts(tmp_path / "prompts.json") == {"a": "a dog", "b": "a cat"}
    (tmp_path / "prompts.json").write_text('["a"]')
    with pytest.raises(InputError, match="no JSON object of prompts"):
        load_prompts(tmp_path / "prompts.json")


def video(tmp_path, n=6, width=20, height=10):
    for frame in range(n):
        file = tmp_path / f"frames/bear/{frame:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(frame).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    points = np.zeros((1, n, 2, 2))
    points[0, :, 0] = [[4 + frame, 3] for frame in range(n)]  # (x, y)
    points[0, :, 1] = [[12, 2 + frame] for frame in range(n)]
    seen = np.ones((1, n, 2), dtype=bool)
    seen[0, 3, 0] = False
    (tmp_path / "tracks").mkdir(exist_ok=True)
    np.save(tmp_path / "tracks/tracks_bear.npy", points)
    np.save(tmp_path / "tracks/visibles_bear.npy", seen)
    return tmp_path / "frames", tmp_path / "tracks"


def frames(folder, source, target):
    return Frames(folder / f"bear/{source:05d}.png", folder / f"bear/{target:05d}.png", "bear")


def test_frame_pairs_carry_the_points_that_both_frames_of_the_pair_show(tmp_path):
    images, tracks = video(tmp_path)
    data = FramePairs([frames(images, 0, 5), frames(images, 3, 5)], tracks, size=10, crop="center")
    example = data(0, np.random.default_rng(0))
    assert example.images.shape == (2, 3, 10, 10)
    # The crop starts at column 5: (y 3, x 4) is outside it, (2, 12) is at column 7.
    torch.testing.assert_close(example.target.points_a, torch.tensor([[2.0, 7.0]]) / 9)
    torch.testing.assert_close(example.target.points_b, torch.tensor([[7.0, 7.0]]) / 9)
    cells = example.target.cells((5, 5))[0]
    torch.testing.assert_close(cells, torch.tensor([[2.0, 7.0]]) / 9 * 5)
    shown = np.asarray(Image.open(images / "bear/00005.png"), dtype=np.float32)[:, 5:15] / 127.5 - 1
    np.testing.assert_allclose(example.images[1].permute(1, 2, 0).numpy(), shown, atol=1e-5)
    assert data.shared[1][1].tolist() == [[5, 12]]  # point 0 is hidden in frame 3


def test_random_crops_always_show_a_shared_point_in_its_place(tmp_path):
    images, tracks = video(tmp_path)
    data = FramePairs([frames(images, 0, 5)], tracks, size=10)
    marked = {}
    for seed in range(30):
        target = data(0, np.random.default_rng(seed)).target
        assert 1 <= len(target.points_a) <= 2
        for a, b in zip(target.points_a * 9, target.points_b * 9, strict=True):
            assert a[0].item() in (pytest.approx(3), pytest.approx(2))
            shift = (b - a).tolist()
            marked[tuple(round(value) for value in shift)] = True
    assert set(marked) == {(0, 5), (5, 0)}  # every point moves as its track does, wherever the crop is


def test_masks_keep_the_points_inside_the_object(tmp_path):
    images, tracks = video(tmp_path)
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[3, 4] = 255
    (tmp_path / "masks/bear").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "masks/bear/00000.png")
    data = FramePairs([frames(images, 0, 5)], tracks, tmp_path / "masks", size=10)
    assert data.shared[0][1].tolist() == [[3, 4]]
    Image.fromarray(np.zeros_like(mask)).save(tmp_path / "masks/bear/00000.png")
    with pytest.raises(InputError, match="none of 1 pairs"):
        FramePairs([frames(images, 0, 5)], tracks, tmp_path / "masks", size=10)


def test_pairs_come_from_lists_and_from_folders(tmp_path):
    images, tracks = video(tmp_path)
    listed = tmp_path / "pairs.json"
    entry = {"source": "bear/00000.png", "target": "bear/00004.png", "video_name": "bear", "dataset_name": "davis"}
    listed.write_text(json.dumps([entry]))
    assert listed_frames(listed, images) == [frames(images, 0, 4)]
    listed.write_text(json.dumps([entry | {"target": "bear/00099.png"}]))
    with pytest.raises(InputError, match=r"00099\.png"):
        listed_frames(listed, images)
    drawn = paired_frames(images, 12, 0)
    distances = [abs(int(one.source.stem) - int(one.target.stem)) for one in drawn]
    assert min(distances) >= 2 and len(set(drawn)) == 12
    assert drawn == paired_frames(images, 12, 0) != paired_frames(images, 12, 1)
    assert {int(one.source.stem) for one in paired_frames(images, 50, 0, last=4)} <= {0, 1, 2, 3}
    with pytest.raises(InputError, match="9 to 10 apart"):
        paired_frames(images, 1, 0, gap=(9, 10))
    with pytest.raises(InputError, match="no tracks of 'wolf'"):
        video_tracks(tracks, "wolf")
    with pytest.raises(InputError, match="frame 9 is out of range"):
        FramePairs([frames(images, 0, 9)], tracks)
    with pytest.raises(InputError, match="named by its number"):
        FramePairs([Frames(images / "a.png", images / "b.png", "bear")], tracks)


def test_videos_may_have_folders_of_track_files(tmp_path):
    (tmp_path / "bear").mkdir()
    for name in "ab":
        np.save(tmp_path / f"bear/tracks_{name}.npy", XY[None])
    assert video_tracks(tmp_path, "bear").points.shape == (2, 4, 2)
    np.save(tmp_path / "bear/visibles_a.npy", np.ones((1, 2, 2)))
    with pytest.raises(InputError, match=r"visibles_b\.npy' is missing"):
        video_tracks(tmp_path, "bear")
