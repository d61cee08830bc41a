"""Attribution patching against exact patching, and where it must be exact."""

import pytest
import torch

from interp import VLM
from interp.errors import InputError
from interp.patching.activation import activation
from interp.patching.attribution import agreement, attribution
from interp.patching.heads import heads
from interp.patching.metric import log_probability, logit_difference
from tests import tiny
from tests.patching import planted
from tests.patching.test_activation import CLEAN, LAST, OTHER_ANSWER, PLACE, metric


def pair(vlm):
    """Two runs that differ little, so that a first-order estimate is nearly exact."""
    clean = tiny.text_inputs((7, 7), 1)
    near = {**clean, "input_ids": clean["input_ids"].clone()}
    near["input_ids"][:, 3] = torch.tensor([50, 60])
    embedding = vlm.model.get_input_embeddings().weight
    for row, token in enumerate((50, 60)):
        old = embedding.data[clean["input_ids"][row, 3]]
        embedding.data[token] = old + 1e-3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(row))
    return clean, near


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("integrated", [False, True])
def test_estimates_are_exact_for_small_changes(direction, integrated) -> None:
    vlm = VLM(tiny.llama())
    clean, corrupt = pair(vlm)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    options = {"direction": direction, "positions": [3, "last"]}
    exact = activation(vlm, clean, corrupt, measured, control=False, allow_no_effect=True, **options)
    estimate = attribution(vlm, clean, corrupt, measured, integrated=integrated, steps=2, check=8, **options)
    base = exact.corrupt if direction == "denoise" else exact.clean
    size = (exact.values - base).abs().max()
    assert size > 1e-3
    # Second-order terms of a change of a thousandth, and float32 of logits of order 10.
    assert (estimate.values - exact.values).abs().max() < 0.05 * size
    assert agreement(estimate, exact).rank_correlation > 0.97
    assert estimate.about["agreement"]["rank correlation"] > 0.9 and estimate.about["agreement"]["cells"] == 8


def test_estimates_of_heads_add_up_to_that_of_attention() -> None:
    vlm = tiny.vlm("gpt2")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    measured = log_probability(vlm, [11, 12])
    by_head = attribution(vlm, clean, corrupt, measured, sites=["attn.hook_z"], positions=["last", -2], check=0)
    assert list(by_head.axes) == ["layer", "head", "position"]
    whole = attribution(vlm, clean, corrupt, measured, sites=["hook_attn_out"], positions=["last", -2], check=0)
    # The output projection is linear, so that the heads' estimates sum to that of what they write together.
    torch.testing.assert_close((by_head.values - by_head.corrupt).sum(1), (whole.values - whole.corrupt)[0],
                               atol=2e-3, rtol=1e-4)  # fmt: skip
    exact = heads(vlm, clean, corrupt, measured, positions=["last", -2], control=False)
    assert agreement(by_head, exact).n_cells == 32
    assert (by_head.controls["random vector"] - by_head.values).abs().max() > 1e-3


def test_one_forward_each_and_one_backward() -> None:
    vlm = tiny.vlm("llama")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    counts = {"forward": 0, "backward": 0}

    def forward(module, args, output):
        counts["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda grad: counts.__setitem__("backward", counts["backward"] + 1))

    handle = vlm.unembed.register_forward_hook(forward)
    attribution(vlm, clean, corrupt, logit_difference(vlm, [11, 12], [13, 14]), check=0)
    handle.remove()
    assert counts == {"forward": 2, "backward": 1}


def test_the_planted_sites_have_the_largest_estimates() -> None:
    vlm = planted.induction()
    exact = activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), control=False)
    plain = attribution(vlm, CLEAN, OTHER_ANSWER, metric(vlm))
    integrated = attribution(vlm, CLEAN, OTHER_ANSWER, metric(vlm), integrated=True)
    for result, tolerance in ((plain, 0.31), (integrated, 0.06)):
        # The final norm bends the way from one answer to the other, which gradients at several points of it follow.
        assert (result.mean() - exact.mean()).abs().max() < tolerance
        strongest = result.mean().flatten().argsort(descending=True)[:3].tolist()
        want = [(0 * 2 + 0) * 7 + PLACE, (0 * 2 + 1) * 7 + LAST, (1 * 2 + 1) * 7 + LAST]
        assert sorted(strongest) == sorted(want)
    assert agreement(integrated, exact).rank_correlation > 0.8


def test_bad_input_is_refused() -> None:
    vlm = planted.induction()
    measured = metric(vlm)
    with pytest.raises(InputError, match="axis of heads"):
        attribution(vlm, CLEAN, OTHER_ANSWER, measured, sites=["attn.hook_z", "hook_mlp_out"])
    with pytest.raises(InputError, match="steps=0"):
        attribution(vlm, CLEAN, OTHER_ANSWER, measured, integrated=True, steps=0)
    with pytest.raises(InputError, match="no gradient"):
        attribution(vlm, CLEAN, OTHER_ANSWER, lambda logits: logits.detach()[:, 0])
    longer = planted.prompts([7, 3, 4, 8, 6, 3, 2], [6, 5, 7, 8, 9, 5, 2])
    with pytest.raises(InputError, match="equally long"):
        attribution(vlm, CLEAN, longer, measured, positions="last", integrated=True)
    exact = activation(vlm, CLEAN, OTHER_ANSWER, measured, control=False)
    with pytest.raises(InputError, match="axes"):
        agreement(attribution(vlm, CLEAN, OTHER_ANSWER, measured, positions="last", check=0), exact)
    with pytest.raises(InputError, match="do not vary"):
        agreement(exact.select(site="hook_mlp_out"), exact.select(site="hook_mlp_out"))


def test_one_cell_has_no_rank_correlation_but_an_estimate() -> None:
    vlm = planted.induction()
    given = {"sites": ["hook_resid_post"], "layers": [0], "positions": [PLACE]}
    for settings in (given, {"check": 1}):
        result = attribution(vlm, CLEAN, OTHER_ANSWER, metric(vlm), **settings)
        assert result.about["agreement"]["rank correlation"] is None and result.about["agreement"]["cells"] == 1
        assert (result.values - result.corrupt).abs().max() > 1


def test_runs_that_agree_are_refused_unless_allowed() -> None:
    vlm = planted.induction()
    with pytest.raises(InputError, match="allow_no_effect=True"):
        attribution(vlm, CLEAN, OTHER_ANSWER, metric(vlm), positions=[1])
    allowed = attribution(vlm, CLEAN, OTHER_ANSWER, metric(vlm), positions=[1], allow_no_effect=True)
    assert torch.equal(allowed.values[0, 0, 0], allowed.corrupt)
