import pytest
import torch

from interp.errors import InputError, ShapeError, UnknownNameError
from interp.positions import Layout, PerRow
from interp.selection import Call, Where, groups, position_ids
from interp.sites import RESIDUAL, Place

PLACE = Place("blocks.0.hook_resid_post", "x", "output", RESIDUAL, width=1)
IMAGES = Place("vision.blocks.0.hook_resid_post", "x", "output", RESIDUAL, positional=False)
LAYOUTS = (
    Layout(0, 6, {"word": (range(1, 3), range(4, 5))}),
    Layout(2, 4, {"word": (range(3, 4),)}),
)


def entries(where, call=None, shape=(2, 6, 1), place=PLACE, tap=False):
    """Selected (row, position, example, ordinal), whatever the grouping."""
    found = groups(where, place, torch.zeros(shape), call or Call(0, 6, LAYOUTS), tap=tap)
    return sorted(
        (int(row), int(position), int(example), int(ordinal))
        for group in found
        for row, example, positions, ordinals in zip(
            group.rows, group.examples, group.positions, group.ordinals, strict=True
        )
        for position, ordinal in zip(positions, ordinals, strict=True)
    )


def test_positions_by_meaning() -> None:
    assert entries(Where("last")) == [(0, 5, 0, 0), (1, 5, 1, 0)]
    assert entries(Where(0)) == [(0, 0, 0, 0), (1, 2, 1, 0)]
    assert entries(Where("word")) == [(0, 1, 0, 0), (0, 2, 0, 1), (0, 4, 0, 2), (1, 3, 1, 0)]
    assert entries(Where(PerRow(("last", [0, 1])))) == [(0, 5, 0, 0), (1, 2, 1, 0), (1, 3, 1, 1)]
    assert len(entries(Where())) == 12


def test_rows_that_are_not_chosen_need_not_have_the_position() -> None:
    assert entries(Where("word[1]", rows=(0,))) == [(0, 4, 0, 0)]
    assert entries(Where(PerRow(("word[1]", "word[5]")), rows=(-2,))) == [(0, 4, 0, 0)]
    with pytest.raises(UnknownNameError, match="row 1 has no position 'word\\[1\\]'"):
        entries(Where("word[1]"))
    with pytest.raises(UnknownNameError, match="row 1 has no position"):
        entries(Where("word[1]", rows=(1,)))
    with pytest.raises(InputError, match="PerRow has 1 selectors for 2 rows"):
        entries(Where(PerRow(("last",)), rows=(0,)))


def test_later_calls_are_moved_by_the_cache() -> None:
    half = Call(4, 2, LAYOUTS)
    assert entries(Where("last"), half, (2, 2, 1)) == [(0, 1, 0, 0), (1, 1, 1, 0)]
    assert entries(Where([1, "last"]), half, (2, 2, 1)) == [(0, 1, 0, 1), (1, 1, 1, 1)]
    assert entries(Where(0), half, (2, 2, 1)) == []
    decoding = [Call(6 + step, 1, LAYOUTS) for step in range(3)]
    for when, steps in (("prefill", 0), (1, 0), (2, 1), (3, 2), ("every", 3)):
        got = [len(entries(Where("last", when=when), call, (2, 1, 1))) for call in decoding]
        assert got == [2] * steps + [0] * (3 - steps), when
    assert all(len(entries(Where("last"), call, (2, 1, 1), tap=True)) == 2 for call in decoding)
    assert all(not entries(Where("word"), call, (2, 1, 1), tap=True) for call in decoding)
    # Drafted tokens: several in one call, of which a step rule may take some.
    assert entries(Where("last", when=2), Call(6, 3, LAYOUTS), (2, 3, 1)) == [(0, 0, 0, -1), (1, 0, 1, -1)]
    # A head that keeps the last position only.
    assert entries(Where("last"), shape=(2, 1, 1)) == [(0, 0, 0, 0), (1, 0, 1, 0)]
    assert entries(Where("word"), shape=(2, 1, 1)) == []


def test_copies_of_a_prompt_lie_side_by_side() -> None:
    assert [e[:3] for e in entries(Where("last"), shape=(6, 6, 1))] == [(r, 5, r // 3) for r in range(6)]
    assert [e[:3] for e in entries(Where("last", variant=1), shape=(6, 6, 1))] == [(1, 5, 0), (4, 5, 1)]
    assert [e[:3] for e in entries(Where("last", rows=(1,)), shape=(6, 6, 1))] == [(r, 5, 0) for r in (3, 4, 5)]
    with pytest.raises(ShapeError, match="3 rows, which is no multiple of the 2 prompts"):
        entries(Where("last"), shape=(3, 6, 1))


def test_the_last_token_of_a_call_that_holds_the_prompt_again() -> None:
    again = Call(0, 8, LAYOUTS)
    assert entries(Where("last"), again, (2, 8, 1), tap=True) == [(0, 7, 0, -1), (1, 7, 1, -1)]
    assert entries(Where("last"), again, (2, 8, 1)) == [(0, 5, 0, 0), (1, 5, 1, 0)]


@pytest.mark.parametrize(
    ("where", "call", "complete"),
    [
        (Where(), Call(0, 6, LAYOUTS), True),
        (Where(), Call(0, 4, LAYOUTS), False),
        (Where(), Call(4, 2, LAYOUTS), False),
        (Where("last"), Call(4, 2, LAYOUTS), True),
        (Where([0, "last"]), Call(4, 2, LAYOUTS), False),
        (Where(PerRow((0, -1))), Call(0, 4, LAYOUTS), False),
        (Where(when="every"), Call(6, 1, LAYOUTS), True),
    ],
)
def test_whether_a_call_holds_all_of_a_selection(where, call, complete) -> None:
    found = groups(where, PLACE, torch.zeros(2, call.length, 1), call)
    assert found and all(group.complete == complete for group in found)


@pytest.mark.parametrize("where", [Where(), Where(slice(None)), Where(rows=(1, 0))])
def test_padding_is_known(where) -> None:
    (group, *more) = groups(where, PLACE, torch.zeros(4, 6, 1), Call(0, 6, LAYOUTS))
    found = [group, *more]
    real = {
        (int(r), int(p)) for g in found for r, ps, ok in zip(g.rows, g.positions, g.real, strict=True) for p in ps[ok]
    }
    assert real == {(r, p) for r in range(4) for p in range(6) if r < 2 or p >= 2}
    assert all(int(g.n_examples) == 2 for g in found)


def test_images_have_positions_of_their_own() -> None:
    assert entries(Where(-1, rows=(2,)), shape=(3, 5, 1), place=IMAGES) == [(2, 4, 0, 0)]
    for at in ("last", ["image[0]"], PerRow(("last",))):
        with pytest.raises(InputError, match="those of an image"):
            Where(at).check(IMAGES)


def test_one_resolution_serves_all_layers() -> None:
    call, x = Call(0, 6, LAYOUTS), torch.zeros(2, 6, 1)
    first = groups(Where("word[0]", rows=(0,)), PLACE, x, call)
    assert groups(Where("word[0]", rows=(0,)), PLACE, x, call) is first
    assert groups(Where("word[0]", rows=(1,)), PLACE, x, call) is not first


def test_position_ids_leave_padding_out() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
