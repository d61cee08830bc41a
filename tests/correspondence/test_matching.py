"""Matching against dense closed forms, and where the order of operations decides."""

import pytest
import torch
import torch.nn.functional as F

from interp.correspondence import match, match_patches, match_soft, mutual_nearest, nearest_neighbours
from interp.correspondence.resize import resized_at, resized_rows
from interp.errors import InputError, ShapeError


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def written_out(
    source: torch.Tensor,
    target: torch.Tensor,
    points: torch.Tensor,
    size: tuple[int, int],
    target_size: tuple[int, int],
) -> torch.Tensor:
    """The definition, with everything in memory: the cosine of each point with each target pixel."""
    source = F.normalize(enlarged(source, size), dim=0)
    target = F.normalize(enlarged(target, target_size), dim=0)
    scores = []
    for y, x in points.tolist():
        row, column = round(min(max(y, 0), size[0] - 1)), round(min(max(x, 0), size[1] - 1))
        scores.append(torch.einsum("c,chw->hw", source[:, row, column], target))
    return torch.stack(scores)


POINTS = torch.tensor([[0.0, 0.0], [19.0, 29.0], [4.5, 7.5], [5.5, 6.5], [-3.0, 40.0], [25.0, 12.2]])


@pytest.mark.parametrize("chunk", [None, 1, 45, 10_000])
def test_match_is_the_definition_on_unequal_non_square_maps(chunk: int | None):
    source, target = torch.randn(16, 5, 7), torch.randn(16, 9, 4)
    found = match(source, target, POINTS, (20, 30), target_size=(36, 18), chunk=chunk)
    assert found.dtype == torch.int64
    scores = written_out(source, target, POINTS, (20, 30), (36, 18))
    reached = scores[torch.arange(len(POINTS)), found[:, 0], found[:, 1]]
    highest, second = scores.flatten(1).topk(8).values[:, [0, 7]].T
    # The outermost rows of an enlarged map repeat, so the best pixel may have equals; the score tells.
    torch.testing.assert_close(reached, highest, atol=1e-6, rtol=0)
    assert (highest - second > 1e-3).all()


def test_chunks_do_not_change_the_result():
    source, target = torch.randn(16, 6, 6), torch.randn(16, 6, 6)
    points = torch.rand(40, 2) * 5
    results = {chunk: match(source, target, points, chunk=chunk).tolist() for chunk in (None, 1, 13, 36)}
    assert all(result == results[None] for result in results.values())


def test_points_outside_are_clipped_and_halves_go_to_even():
    marked = torch.eye(12).reshape(12, 3, 4)  # each cell has a descriptor of its own, so a match is the cell itself
    points = torch.tensor([[0.5, 0.5], [1.5, 1.5], [2.5, 2.5], [-9.0, 9.0], [9.0, -9.0]])
    assert match(marked, marked, points).tolist() == [[0, 0], [2, 2], [2, 2], [0, 3], [2, 0]]


def test_enlarging_comes_before_normalising():
    # Between a long and a short descriptor, the mean points along the long one; the mean of unit vectors does not.
    target = torch.tensor([[10.0, 0.0], [0.0, 1.0]])[:, None]
    query = torch.tensor([1.0, 1.0])[:, None, None]
    kept = F.normalize(enlarged(target, (1, 8)), dim=0)
    swapped = enlarged(F.normalize(target, dim=0), (1, 8))
    expected = int((kept.sum(dim=0)).argmax())
    other = int(F.normalize(swapped, dim=0).sum(dim=0).argmax())
    assert expected != other
    assert match(query, target, torch.zeros(1, 2), (1, 1), target_size=(1, 8)).tolist() == [[0, expected]]


def test_the_first_of_equals_wins_in_any_chunk():
    target = torch.ones(3, 4, 4)
    for chunk in (None, 1, 4):
        assert match(target, target, torch.tensor([[3, 3]]), chunk=chunk).tolist() == [[0, 0]]


def test_l2_differs_from_cosine_and_is_the_nearest():
    source = torch.tensor([1.0, 0.0])[:, None, None]
    target = torch.tensor([[9.0, 0.8], [0.0, 0.3]])[:, None]
    assert match(source, target, torch.zeros(1, 2)).tolist() == [[0, 0]]
    assert match(source, target, torch.zeros(1, 2), metric="l2").tolist() == [[0, 1]]
    a, b = torch.randn(6, 4, 5), torch.randn(6, 3, 8)
    apart = torch.cdist(a.flatten(1).T, b.flatten(1).T)
    assert nearest_neighbours(a, b, metric="l2").flatten().tolist() == apart.argmin(dim=1).tolist()


def test_a_batch_is_its_rows():
    source, target = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    points = torch.tensor([[[0, 1], [3, 3]], [[2, 2], [1, 0]]])
    both = match(source, target, points, (16, 16))
    for row in range(2):
        assert both[row].tolist() == match(source[row], target[row], points[row], (16, 16)).tolist()
    alone = match(source[:1], target[:1], points[0], (16, 16))
    assert alone.tolist() == both[0].tolist()


def test_half_precision_is_compared_in_float32():
    source, target = torch.randn(8, 4, 4).half(), torch.randn(8, 4, 4).half()
    points = torch.tensor([[3, 3], [8, 12]])
    assert (
        match(source, target, points, (16, 16)).tolist()
        == match(source.float(), target.float(), points, (16, 16)).tolist()
    )


@pytest.mark.parametrize("size", [(20, 30), (5, 7), (3, 2), (1, 1)])
def test_rows_and_pixels_are_those_of_interpolate(size: tuple[int, int]):
    maps = torch.randn(3, 5, 7)
    whole = enlarged(maps, size)
    parts = [resized_rows(maps, size, row, row + 1) for row in range(size[0])]
    # Weights of the two neighbours are computed in another order: rounding of float32.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-6, rtol=0)
    pixels = torch.tensor([[0, 0], [size[0] - 1, size[1] - 1], [size[0] // 2, size[1] // 3]])
    torch.testing.assert_close(
        resized_at(maps, size, pixels), whole[:, pixels[:, 0], pixels[:, 1]].T, atol=2e-6, rtol=0
    )


def test_patches_are_found_by_the_cell_that_holds_the_point():
    marked = torch.eye(8).reshape(8, 2, 4)
    # Cells of 10 x 10 pixels; 9.4 rounds to pixel 9 of the first cell, 10 is in the second.
    points = torch.tensor([[9.4, 10.0], [19.0, 39.0]])
    assert match_patches(marked, marked, points, (20, 40)).tolist() == [[4.5, 14.5], [14.5, 34.5]]
    moved = match_patches(marked, marked.flip(2), points, (20, 40), target_size=(40, 40))
    assert moved.tolist() == [[9.5, 24.5], [29.5, 4.5]]


def soft_written_out(scores: torch.Tensor, window: int, temperature: float) -> tuple[float, float]:
    height, width = scores.shape
    row, column = divmod(int(scores.argmax()), width)
    total, y, x = 0.0, 0.0, 0.0
    for r in range(max(0, row - window), min(height, row + window + 1)):
        for c in range(max(0, column - window), min(width, column + window + 1)):
            weight = torch.exp(scores[r, c].double() / temperature).item()
            total, y, x = total + weight, y + weight * r, x + weight * c
    return y / total, x / total


@pytest.mark.parametrize("upsample", [False, True])
def test_window_soft_argmax_is_the_weighted_mean(upsample: bool):
    source, target = torch.randn(6, 5, 6), torch.randn(6, 7, 9)
    points = torch.tensor([[3.0, 4.0], [39.0, 47.0], [0.0, 0.0]])
    size, to = (40, 48), (70, 63)
    found = match_soft(source, target, points, size, target_size=to, window=2, temperature=0.1, upsample=upsample)
    keys = F.normalize(enlarged(target, to) if upsample else target, dim=0)
    for (y, x), point in zip(points.long().tolist(), found.tolist(), strict=True):
        query = enlarged(source, size)[:, y, x] if upsample else source[:, y * 5 // 40, x * 6 // 48]
        row, column = soft_written_out(torch.einsum("c,chw->hw", F.normalize(query, dim=0), keys), 2, 0.1)
        if not upsample:
            row, column = (row + 0.5) * 10 - 0.5, (column + 0.5) * 7 - 0.5
        # Cosines in float32 over a temperature of 0.1.
        assert point == pytest.approx([row, column], abs=1e-4)


def test_soft_argmax_finds_what_lies_between_cells():
    # Two equal neighbours: the place is half way between their centres, at the edge they share.
    source = torch.tensor([1.0, 0.0])[:, None, None]
    target = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])[:, None]
    found = match_soft(source, target, torch.zeros(1, 2), (8, 8), target_size=(8, 32), window=3, temperature=0.01)
    torch.testing.assert_close(found, torch.tensor([[3.5, 15.5]], dtype=torch.float64), atol=1e-6, rtol=0)
    hard = match_soft(source, target, torch.zeros(1, 2), (8, 8), target_size=(8, 32), window=0)
    assert hard.tolist() == [[3.5, 11.5]]


def test_mutual_neighbours_and_masks():
    a, b = torch.randn(4, 5, 6), torch.randn(4, 4, 7)
    scores = F.normalize(a.flatten(1), dim=0).T @ F.normalize(b.flatten(1), dim=0)
    there, back = scores.argmax(dim=1).tolist(), scores.argmax(dim=0).tolist()
    expected = [(list(divmod(i, 6)), list(divmod(there[i], 7))) for i in range(30) if back[there[i]] == i]
    found = mutual_nearest(a, b)
    assert len(expected) > 2
    assert [tuple(pair) for pair in zip(found[0].tolist(), found[1].tolist(), strict=True)] == expected
    source_mask, target_mask = torch.ones(5, 6).bool(), torch.ones(4, 7).bool()
    source_mask[tuple(expected[0][0])] = False
    target_mask[tuple(expected[1][1])] = False
    kept = mutual_nearest(a, b, source_mask=source_mask, target_mask=target_mask)
    assert kept[0].tolist() == [cell for cell, _ in expected[2:]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: match(m, torch.randn(7, 4, 4), p), ShapeError, "8 channels and the target map 7"),
        (lambda m, p: match(m, m * torch.nan, p), InputError, "target descriptors hold values that are not finite"),
        (lambda m, p: match(m, m, p[None]), ShapeError, r"\[point, 2\]; they are \[1, 1, 2\]"),
        (lambda m, p: match(torch.stack([m, m]), torch.stack([m, m]), p), ShapeError, r"expected \[2, point, 2\]"),
        (lambda m, p: match(m, m, p, chunk=0), InputError, "chunk is 0"),
        (lambda m, p: match(m, m, p, metric="dot"), InputError, "metric is 'dot'; expected one of 'cosine', 'l2'"),
        (lambda m, p: match(m, m, p * torch.inf), InputError, "finite"),
        (lambda m, p: match_soft(m, m, p, (4, 4), temperature=0.0), InputError, "temperature 0.0"),
        (lambda m, p: match(m, m, p, (0, 4)), ShapeError, r"\(0, 4\)"),
    ],
)
def test_what_cannot_be_matched_is_refused(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(torch.randn(8, 4, 4), torch.ones(1, 2))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    from interp.correspondence import nearest

    largest = []
    plain = nearest.similarity

    def watched(queries: torch.Tensor, keys: torch.Tensor, metric: str) -> torch.Tensor:
        largest.append(max(len(queries) * len(keys), keys.numel()))
        return plain(queries, keys, metric)

    monkeypatch.setattr(nearest, "similarity", watched)
    monkeypatch.setattr(nearest, "BLOCK", 5000)
    source, target = torch.randn(8, 16, 16), torch.randn(8, 16, 16)
    found = match(source, target, torch.rand(300, 2) * 63, (64, 64))
    assert max(largest) <= 5000
    monkeypatch.undo()
    assert len(largest) > 8
    assert found.shape == (300, 2)
