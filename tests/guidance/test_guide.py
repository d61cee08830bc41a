"""What can be refused before any run: settings of guides and terms, and terms that cannot be had together."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.errors import InputError, ShapeError, UnknownNameError
from interp.guidance import Appearance, Drag, Guide, Identity, Spatial, Term, Twin
from interp.guidance.rules import SignedSteps
from tests.guidance.closed_form import PROMPT, SITES, draw, model, readout

POSE, EDGE = readout("pose", 3, 0), readout("edge", 3, 1)
LOOKS, PLACES = readout("looks", 3, 2, kind="features"), readout("places", 3, 3, kind="features")
TARGET = torch.zeros(3, 8, 8)
FROM, TO = torch.tensor([[2.0, 3.0], [9.0, 9.0]]), torch.tensor([[8.0, 3.0], [9.0, 4.0]])
BOXES = ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5))


def drag(**changes: Any) -> Drag:
    return Drag(**{"readout": PLACES, "sources": FROM, "targets": TO, "size": (16, 16)} | changes)


def revised(given: Any, **changes: Any) -> Any:
    """A copy with other fields, past the annotations, which would refuse some of them in tests."""
    changed = copy.copy(given)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    changed.__post_init__()
    return changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "sign"}, "signed_step, latent_gradient, epsilon"),
        ({"half": "cnd"}, "Did you mean 'cond'"),
        ({"start": 0.5, "end": 0.5}, "start < end"),
        ({"start": -0.1}, "start=-0.1"),
        ({"end": 1.2}, "end=1.2"),
        ({"step_size": 0.0}, "nothing moves"),
        ({"step_size": float("nan")}, "finite number"),
        ({"step_size": []}, "finite number"),
        ({"recurrence": 0}, "recurrence=0"),
        ({"recurrence": 2, "rule": "epsilon"}, "moves no latents"),
        ({"eta": -0.5}, "eta=-0.5"),
        ({"terms": [POSE]}, "hold a Readout"),
        ({"terms": None}, "terms are a NoneType: give a list"),
        ({"terms": drag()}, "terms are a Drag: give a list"),
        ({"start": "a"}, "start='a'"),
        ({"start": float("nan")}, "start=nan"),
        ({"end": None}, "end=None"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": -1.0}, "from 0 on"),
        ({"guidance_scale": "7.5"}, "guidance_scale='7.5'"),
        ({"guidance_scale": []}, r"guidance_scale=\[\]"),
        ({"guidance_scale": [2.0, float("inf")]}, "finite"),
        ({"step_size": [0.1, float("nan")]}, "finite number"),
        ({"step_size": "a"}, "finite number"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"checkpointing": "no"}, "checkpointing='no'"),
        ({"negative_prompt": 3}, "negative_prompt=3"),
        ({"reference": "twin"}, "reference is a str: give a Twin"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        revised(Guide([drag()]), **settings)


def test_an_unknown_convention() -> None:
    with pytest.raises(UnknownNameError, match="null_text"):
        Guide([drag()], convention="nulltext")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.zeros(3, 8, 7), ShapeError, "8, 8"),
        (torch.zeros(8, 8), ShapeError, "8, 8"),
        (torch.full((3, 8, 8), 1.2), InputError, "trained on -1 to 1"),
        (TARGET.long(), InputError, "floats, not torch.int64"),
        (torch.where(torch.arange(8) == 3, torch.nan, TARGET), InputError, "24 of 192 values that are NaN"),
    ],
)
def test_bad_targets(target: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        revised(Spatial(POSE, TARGET), target=target)


@pytest.mark.parametrize("target", [None, "a", [1.0], np.zeros((3, 8, 8))])
def test_targets_that_are_no_tensors(target: Any) -> None:
    with pytest.raises(InputError, match="has to be a tensor of floats"):
        revised(Spatial(POSE, TARGET), target=target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "a"}, "seed='a': give a whole number"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": -2.0}, "guidance_scale=-2.0"),
        ({"guidance_scale": "a"}, "one number for all"),
        ({"latents": 3}, "has to be a tensor of floats, not int"),
        ({"latents": torch.zeros(1, 4, 8, 8).long()}, r"not torch\.int64"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "256 of 256 values that are NaN"),
    ],
)
def test_bad_twins(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        revised(Twin(), **settings)
    with pytest.raises(ShapeError, match=r"is \(4,\)"):
        revised(Twin(), latents=torch.zeros(4))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -3.0, [2.0, float("nan")], []])
def test_bad_scales_of_a_run(scale: Any) -> None:
    for guide in (Guide([Appearance(LOOKS)]), None):
        with pytest.raises(InputError, match="guidance_scale="):
            model().generate(PROMPT, guidance=guide, guidance_scale=scale, steps=2, progress=False)


def test_readouts_of_other_kinds() -> None:
    points = readout("points", 3, 9, kind="keypoints")
    with pytest.raises(InputError, match="rescale=None"):
        Spatial(points, TARGET)
    assert Spatial(points, TARGET + 7, rescale=None).span == 1.0
    assert Spatial(POSE, TARGET).span == 2.0
    with pytest.raises(InputError, match=r"takes an interp\.readouts\.Readout"):
        Spatial(torch.nn.Linear(2, 2), TARGET)
    with pytest.raises(InputError, match="give boxes"):
        Identity(LOOKS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": FROM + 20}, InputError, "none lies inside"),
        ({"targets": FROM + 0.9}, InputError, "no point moves"),
        ({"targets": TO[:1]}, InputError, "2 sources and 1 targets"),
        ({"targets": [TO, TO]}, InputError, "sources of 1 samples, targets of 2"),
        ({"sources": torch.tensor([[2.0, float("nan")], [9.0, 9.0]])}, InputError, "NaN"),
        ({"sources": torch.zeros(2, 3)}, ShapeError, "point, 2"),
        ({"sources": FROM[[0, 0]], "targets": torch.tensor([[8.0, 3.0], [2.0, 12.0]])}, InputError, "asked to go to"),
        ({"size": (0, 16)}, InputError, "size=\\(0, 16\\)"),
        ({"size": 16}, InputError, "size=16"),
        ({"size": "ab"}, InputError, "size='ab'"),
        ({"size": (float("nan"), 16)}, InputError, "size="),
        ({"sources": "a"}, InputError, "sources of term 'drag' are no points"),
        ({"targets": None}, InputError, "targets of term 'drag' are no points"),
        ({"targets": [TO, "a"]}, InputError, "targets of term 'drag' are no points"),
        ({"sources": []}, ShapeError, "point, 2"),
        ({"sources": FROM[:0], "targets": TO[:0]}, InputError, "of 0 pairs"),
    ],
)
def test_bad_drags(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        revised(drag(), **changes)


def test_points_may_be_lists_or_arrays() -> None:
    wanted = drag().cells
    for kind in (Tensor.tolist, Tensor.numpy, lambda points: [points.numpy()]):
        found = revised(drag(), sources=kind(FROM), targets=kind(TO)).cells
        assert [[cells.tolist() for cells in pair] for pair in found] == [
            [cells.tolist() for cells in pair] for pair in wanted
        ]


def test_points_of_one_cell_may_go_to_cells_next_to_each_other() -> None:
    start, end = revised(drag(), sources=FROM[[0, 0]], targets=torch.tensor([[8.0, 3.0], [8.0, 4.0]])).cells[0]
    assert start.tolist() == [[1, 1], [1, 1]] and end.tolist() == [[4, 1], [4, 2]]


def test_points_are_truncated_and_pairs_out_of_frame_are_dropped() -> None:
    sources = torch.tensor([[1.9, 15.9], [3.0, 3.0], [-0.5, 3.0], [2, 2]])
    targets = torch.tensor([[7.99, 0.0], [16.0, 3.0], [8.0, 3.0], [4, 4]])
    (start, end), *more = drag(sources=sources, targets=targets).cells
    assert not more
    assert start.tolist() == [[0, 7], [1, 1]]
    assert end.tolist() == [[3, 0], [2, 2]]
    assert drag(sources=sources.long(), targets=targets.long()).cells[0][0].tolist()[-1] == [1, 1]


def test_anti_ghosting_is_half_of_the_loss() -> None:
    seen, reference = draw(1, 3, 8, 8), draw(1, 3, 8, 8, seed=1)
    one = drag(sources=torch.tensor([[2.0, 3.0]]), targets=torch.tensor([[8.0, 3.0]]))
    there = reference[0, :, 1, 1]
    at_target, at_source = ((torch.cosine_similarity(there, seen[0, :, y, 1], dim=0).item() + 1) / 2 for y in (4, 1))
    assert one.compare(seen, reference).item() == pytest.approx(-0.5 * at_target + 0.5 * at_source, abs=1e-12)
    alone = replace(one, anti_ghosting=False)
    assert alone.compare(seen, reference).item() == pytest.approx(-0.5 * at_target, abs=1e-12)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0.0, 0.5, 1.0), "top < bottom"),
        ((0.0, 0.0, 1.1, 1.0), "shares 0 to 1"),
        ((0.0, 0.0, 0.05, 1.0), "smaller than a cell"),
        ((0.0, 0.0, 1.0), "give"),
    ],
)
def test_bad_boxes(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        revised(Appearance(LOOKS, BOXES), boxes=(box, BOXES[0]))


@pytest.mark.parametrize("boxes", [3, "ab", [], [3, 4], [BOXES[:1]], (BOXES[0], None), [BOXES, BOXES[0]]])
def test_boxes_that_are_none(boxes: Any) -> None:
    with pytest.raises(InputError, match="boxes of term 'appearance': give pairs"):
        revised(Appearance(LOOKS, BOXES), boxes=boxes)
    with pytest.raises(InputError, match="shares 0 to 1"):
        revised(Appearance(LOOKS, BOXES), boxes=((0.0, 0.0, "a", 1.0), BOXES[0]))


def test_boxes_are_cells() -> None:
    term = Appearance(LOOKS, ((0.0, 0.0, 1.0, 1.0), (0.1, 0.3, 0.55, 1.0)))
    assert term.observed == [(slice(1, 4), slice(2, 8))]
    assert Appearance(LOOKS).observed == [(slice(0, 8), slice(0, 8))]


def test_steps_and_weights_that_are_zero_where_it_is_guided_are_refused() -> None:
    late = Guide([Appearance(LOOKS)], step_size=[0.0, 0.0, 0.1, 0.1], end=0.5)
    with pytest.raises(InputError, match="step_size is 0 at all guided steps, 0 to 1"):
        model().generate(PROMPT, guidance=late, steps=4, progress=False)
    never = Guide([Appearance(LOOKS, weight=[0.0, 0.0, 1.0, 1.0])], end=0.5)
    with pytest.raises(InputError, match="the weight of term 'appearance' is 0 at all guided steps"):
        model().generate(PROMPT, guidance=never, steps=4, progress=False)


def test_terms_take_readouts_of_their_kind() -> None:
    for term in (Appearance, lambda one: Drag(one, torch.ones(1, 2), torch.full((1, 2), 9.0), (16, 16))):
        with pytest.raises(InputError, match="compares descriptors, and the pose readout is of kind 'spatial'"):
            term(POSE)
    with pytest.raises(InputError, match="gives descriptors: use Appearance or Drag"):
        Spatial(LOOKS, TARGET, rescale=None)
    with pytest.raises(ShapeError, match="is empty"):
        Spatial(POSE, TARGET[:0])


def test_points_of_one_cell_may_end_in_cells_next_to_each_other() -> None:
    sources = torch.tensor([[2.1, 2.1], [3.9, 2.1]])
    moved = Drag(PLACES, sources, sources + torch.tensor([5.0, 0.0]), (16, 16))
    assert [cells.tolist() for cells in moved.cells[0]] == [[[1, 1], [1, 1]], [[3, 1], [4, 1]]]
    with pytest.raises(InputError, match="is asked to go to"):
        Drag(PLACES, sources, sources + torch.tensor([[4.0, 0.0], [9.0, 0.0]]), (16, 16))


def test_pooled_looks_have_no_places() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, other = (torch.randn(2, 6, 8, 8, generator=generator) for _ in range(2))
    term = Appearance(LOOKS, pooled=True)
    means = [maps.mean(dim=(2, 3)) for maps in (seen, other)]
    expected = 1 - (means[0] * means[1]).sum(dim=1) / (means[0].norm(dim=1) * means[1].norm(dim=1))
    torch.testing.assert_close(term.compare(seen, other), expected)
    elsewhere = seen.roll((3, 2), dims=(2, 3))
    assert term.compare(seen, elsewhere).abs().max() < 1e-5 < 0.5 < Appearance(LOOKS).compare(seen, elsewhere).min()
    boxes = ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))
    halves = Identity(LOOKS, boxes, pooled=True).compare(seen.roll(4, dims=3), seen)
    assert halves.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([Spatial(POSE, TARGET), Spatial(POSE, TARGET + 1, name="other")], "two targets at once"),
        ([Spatial(POSE, TARGET), Spatial(readout("pose", 3, 8), TARGET, name="b")], "different things of one name"),
        ([Spatial(POSE, TARGET), Spatial(EDGE, TARGET, name="pose")], "two terms are called 'pose'"),
        ([Spatial(POSE, TARGET, name="total")], "called 'total'"),
        ([drag(), drag(targets=TO + 4, name="again")], "asked to go to"),
        ([Appearance(LOOKS), Identity(LOOKS, BOXES)], "two parts of the reference"),
        ([Term.from_function(SITES, len), Term.from_function(SITES, max, name="len")], "two terms are called"),
    ],
)
def test_terms_that_fight(terms: list[Term], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Guide(terms)


def test_terms_that_fight_over_the_reference() -> None:
    with pytest.raises(InputError, match=r"'drag' moves parts .*seed=3.* 'identity' is to look like another image"):
        Guide([drag(), Identity(LOOKS, BOXES)], reference=Twin(seed=3))
    assert Guide([drag(), Identity(LOOKS, BOXES)]).compares
    assert Guide([Identity(LOOKS, BOXES)], reference=Twin(seed=3)).compares


def test_terms_that_get_along() -> None:
    apart = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    guide = Guide(
        [Spatial(POSE, TARGET), Spatial(EDGE, TARGET), drag(), drag(sources=TO, targets=FROM, name="back"),
         Identity(LOOKS, BOXES), Appearance(LOOKS, apart)]
    )  # fmt: skip
    assert len(guide.terms) == 6
    assert not Guide([Spatial(POSE, TARGET)]).compares
    assert Guide([Spatial(POSE, TARGET)]).steps(2) == range(1)


@pytest.mark.parametrize("weight", [float("inf"), 0.0, [], [0.0, 0.0], True])
def test_bad_weights(weight: Any) -> None:
    with pytest.raises(InputError, match="weight"):
        revised(Term.from_function(SITES, bool), weight=weight)


def test_signed_steps_are_adams() -> None:
    start, gradients = draw(1, 2, 3, 3).float(), [draw(1, 2, 3, 3, seed=seed).float() for seed in (1, 2, 3)]
    gradients[0][0, 0, 0, 0] = 0.0
    parameter = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([parameter], lr=0.02)
    steps, found, kept = SignedSteps(start, 0.02), start, start.clone()
    for gradient in gradients:
        found = steps(found, gradient)
        parameter.grad = gradient
        adam.step()
        # One rounding in single precision, of numbers up to 4.
        torch.testing.assert_close(found, parameter.detach(), rtol=0, atol=1e-6)
    assert torch.equal(start, kept)
    first = SignedSteps(start, 0.02)(start, gradients[0])
    torch.testing.assert_close(first, start - 0.02 * gradients[0].sign(), rtol=0, atol=1e-6)
    half = SignedSteps(start.half(), 0.02)(start.half(), gradients[0].half())
    assert half.dtype == torch.float16
    back = SignedSteps(start, -0.02)(start, gradients[0])
    torch.testing.assert_close(back, start + 0.02 * gradients[0].sign(), rtol=0, atol=1e-6)
