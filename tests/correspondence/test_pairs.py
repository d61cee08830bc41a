"""The authors' pair lists, the full layout of SPair-71k, and CUB: small files of the same forms."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from interp.correspondence import Pair, read_cub, read_pairs, read_prompts, read_spair, summary
from interp.errors import InputError, ShapeError, UnknownNameError

ENTRY: dict[str, Any] = {
    "source_path": "dog/a.jpg",
    "target_path": "dog/b.jpg",
    "source_points": [[30, 5], [0, 19]],
    "target_points": [[7, 39], [1, 2]],
    "category": "dog",
    "source_bounding_box": [1, 2, 33, 14],
    "target_bounding_box": [3, 4, 15, 26],
}


def listed(folder: Path, *entries: Any) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return path


def save_images(folder: Path, *names: str, sizes: tuple[tuple[int, int], ...] = ((40, 20), (20, 40))) -> Path:
    for name, size in zip(names, sizes, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
    return folder


def test_xy_on_disk_become_yx_and_boxes_top_left(tmp_path: Path):
    pose = {"source_pose": "Left", "mirror": 0, "viewpoint_variation": 1}
    (pair,) = read_pairs(listed(tmp_path, ENTRY | pose), n_pairs=1, n_points=2)
    assert pair.source_points.tolist() == [[5, 30], [19, 0]]
    assert pair.target_points.tolist() == [[39, 7], [2, 1]]
    assert pair.source_box == (2, 1, 14, 33)
    assert pair.target_box == (4, 3, 26, 15)
    assert (pair.source, pair.target, pair.category, pair.source_file) == ("dog/a.jpg", "dog/b.jpg", "dog", None)


@pytest.mark.parametrize("names", [("dog/a.jpg", "dog/b.jpg"), ("a.jpg", "b.jpg")])
@pytest.mark.parametrize("in_list", ["dog/", ""])
def test_images_are_found_by_path_or_bare_name(tmp_path: Path, names: tuple[str, str], in_list: str):
    images = save_images(tmp_path / "images", *names)
    entry = ENTRY | {"source_path": f"{in_list}a.jpg", "target_path": f"{in_list}b.jpg"}
    (pair,) = read_pairs(listed(tmp_path, entry), images=images)
    assert pair.source_file == images / names[0]
    assert pair.target_file == images / names[1]


def test_missing_images_and_points_outside_are_errors(tmp_path: Path):
    path = listed(tmp_path, ENTRY)
    with pytest.raises(InputError, match=r"'dog/a\.jpg' is not in .*looked for"):
        read_pairs(path, images=tmp_path)
    # The two images swapped: (x=30, y=5) does not fit 20 columns.
    images = save_images(tmp_path / "images", "dog/a.jpg", "dog/b.jpg", sizes=((20, 40), (40, 20)))
    with pytest.raises(InputError, match=r"Point 0 of the source of Pair 'dog/a.jpg'.*\(y=5, x=30\), outside"):
        read_pairs(path, images=images)
    (images / "dog" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(path, images=images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source_points": [[1, 2]]}, ShapeError, "has 1 source points, but 2 target points"),
        ({"source_points": [], "target_points": []}, InputError, "no points"),
        ({"source_points": [[1, 2], [3]]}, InputError, r"source_points of .*\[0\] must be a list of \[x, y\]"),
        ({"source_points": [[1, "2"], [3, 4]]}, InputError, r"list of \[x, y\]"),
        ({"target_bounding_box": [9, 4, 3, 26]}, InputError, "target box top 4, left 9, bottom 26, right 3"),
        ({"target_bounding_box": [9, 4, 3]}, InputError, r"\[left, top, right, bottom\]"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        read_pairs(listed(tmp_path, ENTRY | change))
    with pytest.raises(error, match=r"pairs.json\[1\]"):
        read_pairs(listed(tmp_path, ENTRY, ENTRY | change))


def test_bad_lists_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no pairs"):
        read_pairs(listed(tmp_path))
    with pytest.raises(InputError, match="There is no file"):
        read_pairs(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(InputError, match="no JSON file"):
        read_pairs(tmp_path / "broken.json")
    with pytest.raises(InputError, match=r"has no 'target_points'. Did you mean 'targets_points'"):
        read_pairs(listed(tmp_path, {("targets_points" if k == "target_points" else k): v for k, v in ENTRY.items()}))
    with pytest.raises(InputError, match="must be an object"):
        read_pairs(listed(tmp_path, "a prompt"))
    with pytest.raises(InputError, match="holds 1 pairs; expected 360"):
        read_pairs(listed(tmp_path, ENTRY), n_pairs=360)
    with pytest.raises(InputError, match="holds 2 points; expected 2529"):
        read_pairs(listed(tmp_path, ENTRY), n_points=2529)


def test_prompts(tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text('["A raccoon playing chess.", "A cat"]')
    assert read_prompts(path) == ["A raccoon playing chess.", "A cat"]
    with pytest.raises(InputError, match="no list of prompts"):
        read_prompts(listed(tmp_path, ENTRY))


def test_pairs_hold_what_others_made():
    points = torch.tensor([[1.0, 2.0]])
    pair = Pair(3, 4, "cat", points, points + 1, (0, 0, 8, 8), (0.5, 0.5, 8.0, 8.0), ("nose",))
    assert summary([pair, pair]) == {"pairs": 2, "points": 2, "categories": {"cat": 2}}
    assert pair.key == (3, 4, "cat", ((1.0, 2.0),), ((2.0, 3.0),), (0, 0, 8, 8), (0.5, 0.5, 8.0, 8.0))
    with pytest.raises(ShapeError, match="1 points, but 2 names"):
        Pair(3, 4, "cat", points, points, (0, 0, 8, 8), (0, 0, 8, 8), ("nose", "tail"))
    with pytest.raises(InputError, match="source points that are not finite"):
        Pair(3, 4, "cat", points * torch.nan, points, (0, 0, 8, 8), (0, 0, 8, 8))


def spair(root: Path, **change: Any) -> Path:
    lines = ["000001-a-b:dog", "000002-b-a:dog", "000003-c-c:cat"]
    (root / "Layout" / "large").mkdir(parents=True)
    (root / "Layout" / "large" / "test.txt").write_text("\n".join(lines) + "\n")
    (root / "PairAnnotation" / "test").mkdir(parents=True)
    for line in lines:
        source, target = line.split(":")[0].split("-")[1:]
        category = line.split(":")[1]
        entry = {
            "filename": line, "src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg",
            "src_imsize": [40, 20, 3], "trg_imsize": [20, 40, 3], "src_bndbox": [1, 2, 33, 14],
            "trg_bndbox": [3, 4, 15, 26], "category": category, "src_kps": [[30, 5], [0, 19]],
            "trg_kps": [[7, 39], [1, 2]], "kps_ids": ["4", "11"], "mirror": 0,
        }  # fmt: skip
        (root / "PairAnnotation" / "test" / f"{line}.json").write_text(json.dumps(entry | change))
        for name in (source, target):
            (root / "JPEGImages" / category).mkdir(parents=True, exist_ok=True)
            (root / "JPEGImages" / category / f"{name}.jpg").touch()
    return root


def test_spair_layout(tmp_path: Path):
    root = spair(tmp_path)
    pairs = read_spair(root, n_pairs=3)
    assert [pair.category for pair in pairs] == ["dog", "dog", "cat"]
    first = pairs[0]
    assert (first.source, first.target, first.names) == ("dog/a.jpg", "dog/b.jpg", ("4", "11"))
    assert first.source_points.tolist() == [[5, 30], [19, 0]]
    assert first.target_box == (4, 3, 26, 15)
    assert first.target_file == root / "JPEGImages" / "dog" / "b.jpg"
    assert len(read_spair(root, category="cat")) == 1
    (root / "JPEGImages" / "dog" / "b.jpg").unlink()
    assert len(read_spair(root, images=False)) == 3
    with pytest.raises(InputError, match=r"b\.jpg' of .*000001-a-b:dog\.json' is not there"):
        read_spair(root)


def test_spair_refusals(tmp_path: Path):
    with pytest.raises(InputError, match="is this a folder of SPair-71k"):
        read_spair(tmp_path)
    root = spair(tmp_path / "a")
    with pytest.raises(InputError, match="lists 3 pairs; expected 12234"):
        read_spair(root, n_pairs=12_234)
    with pytest.raises(UnknownNameError, match="no split 'validation'; expected one of 'trn', 'val', 'test'"):
        read_spair(root, "validation")
    with pytest.raises(UnknownNameError, match="category 'bird'; there are"):
        read_spair(root, category="bird")
    with pytest.raises(InputError, match=r"000001-a-b:dog.*Point 0 of the source.*outside the image of 20 rows and 25"):
        read_spair(spair(tmp_path / "b", src_imsize=[25, 20, 3]))
    with pytest.raises(ShapeError, match=r"000001-a-b:dog.*2 points, but 1 names"):
        read_spair(spair(tmp_path / "c", kps_ids=["1"]))


def cub(root: Path) -> Path:
    (root / "parts").mkdir(parents=True)
    (root / "images.txt").write_text("1 001.Wren/a.jpg\n2 001.Wren/b.jpg\n3 001.Wren/c.jpg\n4 002.Owl/d.jpg\n")
    (root / "bounding_boxes.txt").write_text("".join(f"{i} 10.0 20.0 30.0 40.0\n" for i in range(1, 5)))
    (root / "train_test_split.txt").write_text("1 0\n2 0\n3 1\n4 0\n")
    (root / "parts" / "parts.txt").write_text("1 back\n2 left eye\n3 tail\n")
    rows = [(i, part, 10 * i + part, part, 0 if (i, part) == (2, 3) else 1) for i in range(1, 5) for part in (1, 2, 3)]
    (root / "parts" / "part_locs.txt").write_text("".join("{} {} {}.0 {}.5 {}\n".format(*row) for row in rows))
    return root


def test_cub_pairs_images_of_a_class_by_shared_parts(tmp_path: Path):
    root = cub(tmp_path)
    (pair,) = read_cub(root, min_points=2)
    assert {pair.source, pair.target} == {"001.Wren/a.jpg", "001.Wren/b.jpg"}
    assert pair.names == ("back", "left eye")  # image 2 hides its tail
    points = {pair.source: pair.source_points.tolist(), pair.target: pair.target_points.tolist()}
    assert points["001.Wren/a.jpg"] == [[1.5, 11.0], [2.5, 12.0]]
    assert points["001.Wren/b.jpg"] == [[1.5, 21.0], [2.5, 22.0]]
    assert pair.source_box == (20.0, 10.0, 60.0, 40.0)
    assert pair.source_file == root / "images" / pair.source
    assert len(read_cub(root, split=None, min_points=2)) == 3
    assert len(read_cub(root, split=None, min_points=2, pairs_per_class=2)) == 2
    assert [p.key for p in read_cub(root, split=None, min_points=1, seed=5)] == [
        p.key for p in read_cub(root, split=None, min_points=1, seed=5)
    ]


def test_cub_refusals(tmp_path: Path):
    with pytest.raises(InputError, match="is this a folder of CUB"):
        read_cub(tmp_path)
    root = cub(tmp_path / "cub")
    with pytest.raises(InputError, match="No two images of one class"):
        read_cub(root)
    with pytest.raises(InputError, match="min_points=0"):
        read_cub(root, min_points=0)
    (root / "bounding_boxes.txt").write_text("1 10.0 20.0 30.0\n")
    with pytest.raises(InputError, match=r"Line 1 of .*bounding_boxes.txt' has 4 fields; expected 5"):
        read_cub(root)
