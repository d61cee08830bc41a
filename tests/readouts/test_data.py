import json

import numpy as np
import pytest
import torch
from PIL import Image

from interp.errors import InputError
from interp.readouts import CocoKeypoints, ImagePairs, listed_pairs
from interp.readouts.keypoints import COCO, OPENPOSE


def picture(file, width=12, height=8, seed=0, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, **options)
    return values


def folders(tmp_path, n=2, size=(12, 8)):
    for index in range(n):
        picture(tmp_path / f"images/deep/{index}.png", *size, seed=index)
        picture(tmp_path / f"targets/deep/{index}.png", *size, seed=10 + index)
    return tmp_path / "images", tmp_path / "targets"


def generator(seed=0):
    return np.random.default_rng(seed)


def test_picture_and_target_are_cropped_alike_to_the_whole_shorter_side(tmp_path):
    images, targets = folders(tmp_path)
    pairs = ImagePairs(images, targets, size=8, value_range=(-0.5, 0.5))
    assert len(pairs) == 2
    source = np.asarray(Image.open(tmp_path / "images/deep/1.png"), dtype=float) / 255
    target = np.asarray(Image.open(tmp_path / "targets/deep/1.png"), dtype=float) / 255
    seen = set()
    for seed in range(60):
        example = pairs(1, generator(seed))
        assert example.images.shape == (1, 3, 8, 8) and example.target.shape == (3, 8, 8)
        shown = (example.images[0].permute(1, 2, 0).numpy() + 1) / 2
        offset = next(at for at in range(5) if np.allclose(source[:, at : at + 8], shown, atol=1e-6))
        wanted = target[:, offset : offset + 8] - 0.5
        np.testing.assert_allclose(example.target.permute(1, 2, 0).numpy(), wanted, atol=1e-6)
        seen.add(offset)
    assert seen == {0, 1, 2, 3, 4}
    middle = ImagePairs(images, targets, size=8, crop="center")(1, generator())
    np.testing.assert_allclose((middle.images[0].permute(1, 2, 0).numpy() + 1) / 2, source[:, 2:10], atol=1e-6)


def test_targets_keep_their_pixels_and_may_be_grey(tmp_path):
    images, targets = folders(tmp_path, n=1)
    Image.fromarray(np.full((8, 12), 0, dtype=np.uint8)).save(targets / "deep/0.png")
    example = ImagePairs(images, targets, size=4, value_range=(-0.5, 0.5), channels=1)(0, generator())
    assert example.images.shape == (1, 3, 4, 4)
    assert example.target.shape == (1, 8, 8)
    assert set(example.target.unique().tolist()) == {-0.5}


def test_lists_of_the_authors_name_files_in_their_data_sets(tmp_path):
    picture(tmp_path / "images/voc/a/1.jpg")
    picture(tmp_path / "targets/voc/a/1.png")
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"source": "a/1.jpg", "dataset_name": "voc"}]))
    files = listed_pairs(listed, tmp_path / "images", tmp_path / "targets")
    assert files == ([tmp_path / "images/voc/a/1.jpg"], [tmp_path / "targets/voc/a/1.png"])
    assert ImagePairs(*files, size=4)(0, generator()).images.shape == (1, 3, 4, 4)
    listed.write_text(json.dumps([{"source": "a/2.jpg", "dataset_name": "voc"}]))
    with pytest.raises(InputError, match=r"2\.jpg.*does not exist"):
        listed_pairs(listed, tmp_path / "images", tmp_path / "targets")
    listed.write_text(json.dumps([{"dataset_name": "voc"}]))
    with pytest.raises(InputError, match=r"entry 0 .*lacks 'source'"):
        listed_pairs(listed, tmp_path / "images", tmp_path / "targets")
    listed.write_text("{")
    with pytest.raises(InputError, match=r"list\.json' is no JSON"):
        listed_pairs(listed, tmp_path / "images", tmp_path / "targets")


def test_bad_folders_are_named(tmp_path):
    images, targets = folders(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        ImagePairs(tmp_path / "nowhere", targets)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in"):
        ImagePairs(tmp_path / "empty", targets)
    with pytest.raises(InputError, match="expected a positive size"):
        ImagePairs(images, targets, crop="middle")
    (targets / "deep/0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"deep/0\.png"):
        ImagePairs(images, targets)(0, generator())
    picture(targets / "deep/1.png", 7, 7)
    with pytest.raises(InputError, match=r"1\.png' is 7×7 pixels, but .*12×8"):
        ImagePairs(images, targets)(1, generator())
    (targets / "deep/1.png").unlink()
    with pytest.raises(InputError, match=r"images/deep/1\.png' has no target"):
        ImagePairs(images, targets)


def coco(tmp_path, people):
    values = picture(tmp_path / "photos/7.png", 40, 30)
    annotations = [
        {"id": 100 + index, "image_id": 7, "keypoints": [number for row in rows for number in row], "bbox": box}
        for index, (rows, box) in enumerate(people)
    ]
    file = tmp_path / "people.json"
    file.write_text(
        json.dumps({"images": [{"id": 7, "file_name": "7.png", "width": 40, "height": 30}], "annotations": annotations})
    )
    return file, values


def person(**where):
    return [list(where.get(name, (0, 0, 0))) for name in COCO]


def test_coco_boxes_become_squares_with_heat_maps_in_openpose_order(tmp_path):
    shoulders = person(left_shoulder=(30, 10, 2), right_shoulder=(20, 10, 1), nose=(25, 6, 2))
    file, values = coco(tmp_path, [(shoulders, [10, 5, 20, 20]), (person(), [0, 0, 5, 5])])
    data = CocoKeypoints(file, tmp_path / "photos", size=40, grid=10)
    assert len(data) == 1  # the other one has no labelled keypoint
    points, visible = data.keypoints(0)
    shown = {OPENPOSE[index] for index in range(18) if visible[index]}
    assert shown == {"nose", "neck", "left_shoulder", "right_shoulder"}
    # From the box's corner (10, 5), twice as large: x 25 -> 30, y 6 -> 2.
    assert points[OPENPOSE.index("nose")].tolist() == [2, 30]
    assert points[OPENPOSE.index("neck")].tolist() == [10, 30]
    example = data(0, generator())
    assert example.images.shape == (1, 3, 40, 40) and example.target.shape == (18, 10, 10)
    # A quarter of the pixels, truncated: (0.5, 7.5) -> (0, 7).
    assert (example.target[OPENPOSE.index("nose")] == 1).nonzero().tolist() == [[0, 7]]
    assert example.target[OPENPOSE.index("right_knee")].abs().max() == 0
    whole = CocoKeypoints(file, tmp_path / "photos", size=20, grid=10)(0, generator())
    exact = torch.from_numpy(values[5:25, 10:30].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(whole.images[0], exact, atol=1e-5, rtol=0)


def test_coco_takes_listed_ids_and_names_what_is_wrong(tmp_path):
    rows = person(nose=(3, 3, 2))
    file, _ = coco(tmp_path, [(rows, [0, 0, 5, 5]), (rows, [1, 1, 9, 9])])
    (tmp_path / "ids.json").write_text("[101]")
    assert CocoKeypoints(file, tmp_path, ids=tmp_path / "ids.json").people[0].box == (1, 1, 10, 10)
    beyond = coco(tmp_path, [(rows, [20, 10, 20.4, 20.3])])[0]
    over = CocoKeypoints(beyond, tmp_path / "photos", size=20, grid=5)
    assert over.people[0].box == (20, 10, 40, 30)
    assert over(0, generator()).images.shape == (1, 3, 20, 20)
    file, _ = coco(tmp_path, [(rows, [0, 0, 5, 5]), (rows, [1, 1, 9, 9])])
    with pytest.raises(InputError, match="no annotation 5"):
        CocoKeypoints(file, tmp_path, ids=[5])
    (tmp_path / "words.json").write_text('{"one": 1}')
    with pytest.raises(InputError, match=r"a list of whole numbers, not .*one"):
        CocoKeypoints(file, tmp_path, ids=tmp_path / "words.json")
    with pytest.raises(InputError, match=r"nobody in .* a box with an area"):
        CocoKeypoints(coco(tmp_path, [(rows, [0, 0, 0, 5])])[0], tmp_path)
    with pytest.raises(InputError, match="nobody"):
        CocoKeypoints(coco(tmp_path, [(person(), [0, 0, 5, 5])])[0], tmp_path)
    file.write_text('{"images": []}')
    with pytest.raises(InputError, match="no person-keypoints file"):
        CocoKeypoints(file, tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        CocoKeypoints(tmp_path / "none.json", tmp_path)


NOWHERE = {
    "no width": [3, 3, 0, 5],
    "no height": [3, 3, 5, 0],
    "negative": [3, 3, -4, 5],
    "right of it": [41, 3, 5, 5],
    "below it": [3, 30, 5, 5],
    "left of it": [-9, 3, 8, 5],
    "not a number": [float("nan"), 3, 5, 5],
}


@pytest.mark.parametrize("box", NOWHERE.values(), ids=NOWHERE)
def test_boxes_without_an_area_in_the_picture_are_left_out_with_one_warning(tmp_path, caplog, box):
    rows = person(nose=(4, 4, 2))
    file, _ = coco(tmp_path, [(rows, box), (rows, [0, 0, 9, 9]), (rows, box)])
    data = CocoKeypoints(file, tmp_path / "photos", size=8, grid=4)
    assert [one.box for one in data.people] == [(0, 0, 9, 9)]
    assert data(0, generator()).images.shape == (1, 3, 8, 8)
    (record,) = caplog.records
    assert "2 of 3 people are left out" in record.getMessage() and "such as annotation 100" in record.getMessage()


def test_crowds_and_keypoints_outside_the_picture_do_not_count(tmp_path, caplog):
    beyond = person(nose=(40, 4, 2), left_eye=(4, 30, 2), right_eye=(-1, 4, 2), left_ear=(4, 4, 1))
    file, _ = coco(tmp_path, [(beyond, [0, 0, 40, 30]), (person(nose=(99, 4, 2)), [0, 0, 9, 9])])
    data = CocoKeypoints(file, tmp_path / "photos", size=40, grid=10)
    assert len(data) == 1  # of the second nothing is left
    _, visible = data.keypoints(0)
    assert [OPENPOSE[index] for index in range(18) if visible[index]] == ["left_ear"]
    maps = data(0, generator()).target
    assert [OPENPOSE[index] for index in range(18) if maps[index].any()] == ["left_ear"]
    content = json.loads(file.read_text())
    content["annotations"] += [
        {"id": 7, "image_id": 7, "iscrowd": 1, "bbox": [0, 0, 9, 9], "segmentation": {"counts": [], "size": [30, 40]}},
        {"id": 8, "image_id": 7, "iscrowd": 1, "keypoints": [4, 4, 2] * 17, "bbox": [0, 0, 0, 0]},
    ]
    content["images"].append({"id": 9, "file_name": "nobody.png", "width": 40, "height": 30})
    file.write_text(json.dumps(content))
    assert len(CocoKeypoints(file, tmp_path / "photos")) == 1  # nor crowds, nor pictures without anybody
    assert not caplog.records
    assert len(CocoKeypoints(file, tmp_path / "photos", ids=[100, 7, 100])) == 2
    with pytest.raises(InputError, match="nobody"):
        CocoKeypoints(file, tmp_path / "photos", ids=[7, 8])


def test_annotations_of_pictures_that_are_not_there(tmp_path):
    rows = person(nose=(4, 4, 2))
    file, _ = coco(tmp_path, [(rows, [0, 0, 40, 30])])
    content = json.loads(file.read_text())
    content["annotations"][0]["image_id"] = 8
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="annotation 100 is of picture 8, which the file does not list"):
        CocoKeypoints(file, tmp_path / "photos")
    file, _ = coco(tmp_path, [(rows, [0, 0, 40, 30])])
    picture(tmp_path / "photos/7.png", 20, 30)
    with pytest.raises(InputError, match=r"7\.png' is 20×30 pixels, and .* up to 40×30"):
        CocoKeypoints(file, tmp_path / "photos")(0, generator())
    content["annotations"][0] |= {"image_id": 7, "keypoints": [1, 2]}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="no person-keypoints file"):
        CocoKeypoints(file, tmp_path / "photos")
    file.write_text("[1, 2]")
    with pytest.raises(InputError, match="no person-keypoints file"):
        CocoKeypoints(file, tmp_path / "photos")
