import pytest
import torch

from interp.errors import InputError, UnknownNameError
from interp.positions import Layout, PerRow, layouts_from_mask, resolve

# Two rows of 10: six real tokens with two outputs, and ten with an image; "gap" has no token.
SHORT = Layout(4, 6, {"output": (range(5, 7), range(8, 10)), "gap": (range(0),)})
LONG = Layout(0, 10, {"output": (range(9, 10),), "image": (range(1, 4), range(4, 7))}, n_images=2)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("last", [9]),
        ("output[0]", [5, 6]),
        ("output[-1]", [8, 9]),
        ("output", [5, 6, 8, 9]),
        ("output[0].first", [5]),
        ("output[0].last", [6]),
        ("output.last", [6, 9]),
        (0, [4]),
        (5, [9]),
        (-1, [9]),
        (-6, [4]),
        (torch.tensor(1), [5]),
        (slice(1, 3), [5, 6]),
        (slice(-2, None), [8, 9]),
        (range(2), [4, 5]),
        (["last", 0, "output[0]"], [9, 4, 5, 6]),
        (["last", -1], [9, 9]),
    ],
)
def test_positions_of_a_padded_row(at, expected: list[int]) -> None:
    assert resolve(at, [SHORT], 10) == [expected]


def test_rows_are_resolved_on_their_own() -> None:
    assert resolve("output[-1].first", [SHORT, LONG], 10) == [[8], [9]]
    assert resolve(0, [SHORT, LONG], 10) == [[4], [0]]
    assert resolve(PerRow(("output[1]", "image[1]")), [SHORT, LONG], 10) == [[8, 9], [4, 5, 6]]
    assert resolve("image", [LONG], 10) == [[1, 2, 3, 4, 5, 6]]


def test_a_token_shared_by_two_segments_is_given_once() -> None:
    merged = Layout(0, 5, {"image": (range(1, 3), range(2, 4))})
    assert resolve("image", [merged], 5) == [[1, 2, 3]]


@pytest.mark.parametrize("at", ["imag[0]", "image[2]", "image[-3]", "delimiter"])
def test_unknown_names_list_what_the_row_has(at: str) -> None:
    with pytest.raises(UnknownNameError, match=r"row 0 has no position.*image\[0\], image\[1\], last"):
        resolve(at, [LONG], 10)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'image\[0\]'"):
        resolve("imag[0]", [LONG], 10)


def test_the_row_that_lacks_the_name_is_the_one_named() -> None:
    with pytest.raises(UnknownNameError, match="row 1"):
        resolve("image[0]", [LONG, SHORT], 10)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (6, "Position 6 is outside row 0, whose 6 tokens are 0 to 5"),
        (-7, "Position -7 is outside row 0"),
        ("gap[0]", "no token covers 'gap\\[0\\]'"),
        ("gap", "no token covers 'gap\\[0\\]'"),
        ("output[0].middle", "only '.first' or '.last'"),
        ("output[x]", "is no position"),
        ("", "is no position"),
        (slice(3, 3), "selects no token"),
        ([], "selects no token"),
        (1.0, "is no position"),
        (None, "is no position"),
        (True, "is no position"),
        (PerRow(("last", "last")), "2 selectors for 1 rows"),
    ],
)
def test_mistakes_are_named(at, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(at, [SHORT], 10)


def test_layouts_of_another_batch_are_refused() -> None:
    with pytest.raises(InputError, match="belongs to other inputs"):
        resolve("last", [SHORT], 12)


def test_plain_inputs_know_integers_and_last_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    layouts = layouts_from_mask(mask)
    assert [(one.start, one.length) for one in layouts] == [(2, 2), (0, 4)]
    assert resolve(["last", 0], layouts, 4) == [[3, 2], [3, 0]]
    assert layouts_from_mask(mask.bool()) == layouts
    with pytest.raises(UnknownNameError, match=r"vlm\.prepare"):
        resolve("delimiter[0]", layouts, 4)


@pytest.mark.parametrize("row", [[1, 1, 0], [1, 0, 1]])
def test_padding_must_be_on_the_left(row: list[int]) -> None:
    with pytest.raises(InputError, match="left"):
        layouts_from_mask(torch.tensor([row]))


def test_a_row_of_padding_is_refused() -> None:
    with pytest.raises(InputError, match="no real token"):
        layouts_from_mask(torch.zeros(1, 3, dtype=torch.long))
