"""Evaluation over pairs: sizes, the cache, and taking up where it stopped."""

import functools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from interp.correspondence import Pair, evaluate, match, match_soft, pck_interval, rescale
from interp.errors import InputError, ShapeError

POINTS = torch.tensor([[2.0, 3.0], [9.0, 17.0], [12.0, 30.0]])


class Describe:
    """A descriptor of its own for each place of the picture, the same in every picture; counts its calls."""

    def __init__(self, fail_after: int = 10**6) -> None:
        self.seen: list[float] = []
        self.fail_after = fail_after

    def __call__(self, image: torch.Tensor, category: str | None = None) -> torch.Tensor:
        if len(self.seen) == self.fail_after:
            raise KeyboardInterrupt
        self.seen.append(float(image[0, 0, 0]))
        y, x = torch.meshgrid(torch.linspace(0, 1.5, 16), torch.linspace(0, 1.5, 32), indexing="ij")
        return torch.stack([y.cos(), y.sin(), x.cos(), x.sin()])[None]


def pairs(n: int, shift: float = 0.0) -> list[Pair]:
    box = (0, 0, 10, 20)
    return [
        Pair(index, index + 1, "dog" if index % 2 else "cat", POINTS, POINTS + shift, box, box) for index in range(n)
    ]


IMAGES = [torch.full((3, 16, 32), float(index)) for index in range(9)]


def test_points_are_found_where_the_descriptors_say():
    found = evaluate(Describe(), pairs(3), size=(16, 32), images=IMAGES)
    for result in found.results:
        assert result.predicted.tolist() == POINTS.tolist()
        assert (result.size, result.image_size) == ((16, 32), (16, 32))
    shifted = evaluate(Describe(), pairs(3, shift=-2.0), size=(16, 32), images=IMAGES)
    # (2, 2) away is 2.83; 0.05 of 32 is 1.6, 0.1 of it is 3.2, and 0.1 of the box's 20 is 2.
    assert pck_interval(shifted, threshold=0.05).mean == 0.0
    assert pck_interval(shifted, threshold=0.1).mean == 1.0
    assert pck_interval(shifted, threshold=0.1, base="bbox").mean == 0.0


@pytest.mark.parametrize("size", [(64, 64), "original"])
def test_predictions_go_back_to_the_original_target(size: tuple[int, int] | str):
    images = {0: torch.zeros(3, 32, 64), 1: torch.ones(3, 80, 96)}
    true = rescale(POINTS, (32, 64), (80, 96))
    pair = Pair(0, 1, "cat", POINTS, true.float(), (0, 0, 9, 9), (0, 0, 9, 9))
    (result,) = evaluate(Describe(), [pair], size=size, images=images).results
    assert result.size == ((80, 96) if size == "original" else (64, 64))
    assert result.image_size == (80, 96)
    pred, _ = result.points()
    # A pixel of the coarser of the two grids is at most 80 / 16 rows and 96 / 32 columns.
    assert ((pred - true).abs() <= torch.tensor([5.0, 3.0])).all()
    if size != "original":  # the points are whole pixels of 64 x 64, so they come back exactly
        assert torch.equal(pred, true)


def test_files_are_opened_upright_and_as_they_are(tmp_path: Path):
    Image.new("RGB", (32, 16), (255, 0, 0)).save(tmp_path / "a.png")
    pair = Pair("a", "b", "cat", POINTS, POINTS, (0, 0, 9, 9), (0, 0, 9, 9), (), tmp_path / "a.png", tmp_path / "a.png")
    given = []

    def describe(image: Image.Image) -> torch.Tensor:
        given.append((image.size, image.getpixel((0, 0))))
        return Describe()(torch.zeros(3, 16, 32))

    found = evaluate(describe, [pair], size=(16, 32))
    assert given == [((32, 16), (255, 0, 0))] * 2
    assert found.results[0].predicted.tolist() == POINTS.tolist()


def test_each_image_is_described_once():
    describe = Describe()
    evaluate(describe, pairs(8), size=(16, 32), images=torch.stack(IMAGES))
    assert describe.seen == [float(index) for index in range(9)]
    forgetful = Describe()
    evaluate(forgetful, [*pairs(3), *pairs(1)], size=(16, 32), images=IMAGES, cache=2)
    assert forgetful.seen == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0]


def test_the_category_is_told_on_request():
    given = []

    def describe(image: torch.Tensor, category: str) -> torch.Tensor:
        given.append(category)
        return Describe()(image)

    evaluate(describe, pairs(2), size=(16, 32), images=IMAGES, with_category=True)
    assert given == ["cat", "cat", "dog", "dog"]  # image 1 is described for both


def test_other_matchers():
    soft = functools.partial(match_soft, window=2, temperature=0.001, upsample=True)
    found = evaluate(Describe(), pairs(2), size=(16, 32), images=IMAGES, matcher=soft)
    # Neighbours are 0.1 rad apart in each half of the descriptor: a small pull, symmetric inside the picture.
    assert (found.results[0].predicted - POINTS).abs().max() < 0.5
    assert (found.results[0].predicted != POINTS).any()
    assert found.settings["matcher"] == "match_soft(window=2, temperature=0.001, upsample=True)"


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path):
    file = tmp_path / "run" / "pairs.jsonl"
    whole = evaluate(Describe(), pairs(6), size=(16, 32), images=IMAGES)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Describe(fail_after=4), pairs(6), size=(16, 32), images=IMAGES, file=file)
    lines = file.read_text().splitlines()
    assert [json.loads(line).get("pair") for line in lines] == [None, 0, 1, 2]
    # The machine may stop in the middle of a line.
    with file.open("a") as opened:
        opened.write(lines[-1][: len(lines[-1]) // 2])
    describe = Describe()
    resumed = evaluate(describe, pairs(6), size=(16, 32), images=IMAGES, file=file)
    assert describe.seen == [3.0, 4.0, 5.0, 6.0]
    assert [json.loads(line).get("pair") for line in file.read_text().splitlines()] == [None, 0, 1, 2, 3, 4, 5]
    for one, other in zip(whole.results, resumed.results, strict=True):
        assert one.predicted.tolist() == other.predicted.tolist()
        assert (one.size, one.image_size) == (other.size, other.image_size)
    silent = Describe(fail_after=0)
    again = evaluate(silent, pairs(6), size=(16, 32), images=IMAGES, file=file)
    assert silent.seen == []
    assert again.table().equals(whole.table())


def test_a_file_of_another_evaluation_is_refused(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    run = functools.partial(evaluate, Describe(), size=(16, 32), images=IMAGES, file=file)
    run(pairs(2), settings={"step": 100})
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"its settings is .*'step': 100.* now .*'step': 200"):
        run(pairs(2), settings={"step": 200})
    with pytest.raises(InputError, match="its pairs is 2, and now 3"):
        run(pairs(3), settings={"step": 100})
    with pytest.raises(InputError, match="its fingerprint is"):
        run(pairs(2, shift=1.0), settings={"step": 100})
    with pytest.raises(InputError, match="its settings is"):
        run(pairs(2), settings={"step": 100}, size=(32, 32))
    assert file.read_bytes() == before
    file.write_text("not a file of results\n")
    with pytest.raises(InputError, match="no file of results"):
        run(pairs(2))


def test_bad_input():
    with pytest.raises(InputError, match="no pairs"):
        evaluate(Describe(), [], images=IMAGES)
    with pytest.raises(InputError, match=r"Point 2 of the source of Pair 0 -> 1 \(cat\).*outside the image of 16 rows"):
        evaluate(Describe(), pairs(1), images=[image[:, :, :20] for image in IMAGES])
    with pytest.raises(InputError, match="no image 1 among the 1"):
        evaluate(Describe(), pairs(1), images=IMAGES[:1])
    with pytest.raises(InputError, match="Image 0 has no file"):
        evaluate(Describe(), pairs(1))
    with pytest.raises(ShapeError, match=r"descriptor of image 0 .* \[16, 32\]"):
        evaluate(lambda image: image[0], pairs(1), images=IMAGES)
    with pytest.raises(InputError, match="size is 'orignal'"):
        evaluate(Describe(), pairs(1), images=IMAGES, size="orignal")
    with pytest.raises(InputError, match="cache is 1"):
        evaluate(Describe(), pairs(1), images=IMAGES, cache=1)
    assert evaluate(Describe(), pairs(1), images=IMAGES, matcher=match).settings["size"] == [224, 224]
