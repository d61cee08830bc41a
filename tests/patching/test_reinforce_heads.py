"""REINFORCE finds the planted head; its losses are those of plain edited forwards."""

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.patching.head_vectors import head_outputs, replace_heads
from interp.patching.reinforce_heads import reinforce_heads, rows_of, standardised
from tests import tiny, worded
from tests.patching import planted_edges as planted


def planted_case():
    vlm, inputs = planted.vlm(), planted.batch()
    both_a = {name: tensor[[0, 0]] for name, tensor in inputs.items()}
    only_b = {name: tensor[1:] for name, tensor in inputs.items()}
    return vlm, both_a, head_outputs(vlm, only_b)


def test_the_planted_head_is_chosen() -> None:
    vlm, inputs, outputs = planted_case()
    found = reinforce_heads(vlm, inputs, [planted.ANSWER_B] * 2, outputs, steps=40, samples=16, seed=0, progress=False)
    layer, head = planted.HOPS["question -> last"]
    assert (layer, head) in found.heads
    others = found.probabilities.flatten().tolist()
    chosen = others.pop(layer * 2 + head)
    # It starts at 0.27; the others do nothing, so that chance alone moves them.
    assert chosen > 0.85 and max(others) < chosen - 0.2
    assert found.losses[-10:].mean() < found.losses[:10].mean() / 2
    assert float(found.result.values.max()) < 0.2 and float(found.result.corrupt.min()) > 5
    assert found.result.controls["random heads"].shape == (5, 1, 2)
    assert found.candidates.min() == found.result.values.mean()
    edits = found.edits()
    assert all(edit.when == "every" for edit in edits)
    with vlm.edit(*edits), torch.no_grad():
        assert (vlm(inputs).logits[:, -1].argmax(-1) == planted.ANSWER_B).all()


def test_draws_are_seeded_and_leave_the_global_state_alone() -> None:
    vlm, inputs, outputs = planted_case()
    before = torch.get_rng_state()
    runs = [
        reinforce_heads(vlm, inputs, [planted.ANSWER_B] * 2, outputs, steps=3, samples=4, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].probabilities, runs[1].probabilities) and runs[0].heads == runs[1].heads
    assert not torch.equal(runs[0].probabilities, runs[2].probabilities)


def test_the_loss_is_the_cross_entropy_of_the_first_token() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    outputs = 3 * torch.randn(4, 4, 12, generator=torch.Generator().manual_seed(1))
    found = reinforce_heads(vlm, inputs, [7, 8], outputs, steps=1, samples=2, queries_per_step=2, progress=False)
    for edits, values in ((replace_heads(outputs, found.heads), found.result.values[0]), ([], found.result.corrupt)):
        with torch.no_grad():
            if edits:
                with vlm.edit(*edits):
                    logits = vlm(inputs).logits[:, -1]
            else:
                logits = vlm(inputs).logits[:, -1]
        want = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8]), reduction="none")
        torch.testing.assert_close(values, want, atol=1e-4, rtol=0)


def test_images_go_with_their_queries() -> None:
    vlm = worded.llava()
    inputs = vlm.prepare([("Q:<image>\nA:", [worded.image(name)]) for name in ("apple", "egg", "bean")])
    taken = rows_of(vlm, inputs, [2])
    assert torch.equal(taken["pixel_values"], inputs["pixel_values"][2:]) and taken["input_ids"].shape[0] == 1
    assert rows_of(vlm, inputs, [0, 1, 2]) is inputs
    plain = rows_of(tiny.vlm("llama"), tiny.text_inputs(), [1])
    assert plain["input_ids"].shape == (1, 9)
    with pytest.raises(InputError, match="pixel_values cannot be taken row by row"):
        rows_of(tiny.vlm("llava"), tiny.image_inputs(), [1])
    outputs = head_outputs(vlm, ["Q:egg\nA:white"])
    found = reinforce_heads(vlm, inputs, ["red", "white", "green"], outputs, steps=2, samples=3, progress=False)
    assert found.result.values.shape == (1, 3)


def test_standardised_losses() -> None:
    torch.testing.assert_close(standardised(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0]))
    assert not standardised(torch.ones(3)).any()


def test_bad_settings() -> None:
    vlm, inputs, outputs = planted_case()
    for answers, settings, error, match in (
        ([4], {}, InputError, "1 answers for 2 queries"),
        ([4, 4], {"samples": 1}, InputError, "2 or more"),
        ([4, 4], {"steps": 0}, InputError, "steps=0"),
        ([4, 4], {"queries_per_step": 3}, InputError, "3 of 2"),
        ([4, 4], {"steps": 1, "samples": 2, "threshold": 0.99}, InputError, "threshold=0.99"),
    ):
        with pytest.raises(error, match=match):
            reinforce_heads(vlm, inputs, answers, outputs, progress=False, **settings)
    with pytest.raises(ShapeError, match="outputs of shape"):
        reinforce_heads(vlm, inputs, [4, 4], outputs[:2])
