"""Mean outputs of heads and sets of heads, against plain hooks; rankings and sets against chance."""

import math
from itertools import combinations

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.patching.head_overlap import overlap, rank_correlation
from interp.patching.head_vectors import head_outputs, put_heads, random_heads, replace_heads, strongest_heads
from interp.patching.heads import as_heads
from interp.patching.metric import TokenMetric
from tests import tiny, worded
from tests.patching import planted_edges as planted


def inputs_of_projections(vlm, inputs):
    """What enters every output projection at the last token, by plain hooks."""
    caught = []
    paths = [vlm.place(f"blocks.{layer}.attn.hook_z").path for layer in range(vlm.n_layers)]
    handles = [
        vlm.model.get_submodule(path).register_forward_pre_hook(lambda m, args: caught.append(args[0][:, -1].clone()))
        for path in paths
    ]
    try:
        with torch.no_grad():
            vlm(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(caught)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_mean_outputs_are_the_inputs_of_the_projection(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    want = inputs_of_projections(vlm, inputs).mean(1)
    torch.testing.assert_close(head_outputs(vlm, inputs).flatten(1), want, atol=1e-5, rtol=0)


def test_means_over_prompts_do_not_depend_on_batches() -> None:
    vlm = worded.llava()
    prompts = [("Q:<image>\nA:", [worded.image(name)]) for name in ("apple", "egg")] + ["Q:France\nA:"]
    whole = head_outputs(vlm, prompts)
    assert whole.shape == (4, 4, 12)
    torch.testing.assert_close(head_outputs(vlm, prompts, batch_size=2), whole, atol=1e-5, rtol=0)
    assert (head_outputs(vlm, prompts[2:]) - whole).abs().max() > 1e-2
    with pytest.raises(InputError, match="at one token"):
        head_outputs(vlm, prompts[:2], at="image")
    with pytest.raises(InputError, match="at least one prompt"):
        head_outputs(vlm, [])


def test_replaced_heads_hold_the_outputs_and_no_others_do() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    outputs = torch.randn(4, 4, 12, generator=torch.Generator().manual_seed(0))
    edits = replace_heads(outputs, [(2, 3), (1, 0), (2, 1)])
    assert [edit.site for edit in edits] == ["blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]
    plain = inputs_of_projections(vlm, inputs).reshape(4, 2, 4, 12)
    with vlm.edit(*edits):
        acts = vlm.capture(inputs, "blocks.*.attn.hook_z", at="last").stack("attn.hook_z")
    for row in range(2):
        assert torch.equal(acts[1, row, 0], outputs[1, 0]) and torch.equal(acts[2, row, [1, 3]], outputs[2, [1, 3]])
    torch.testing.assert_close(acts[1, :, 1:], plain[1, :, 1:], atol=1e-5, rtol=0)
    for heads, match in (([], "at least one"), ([(0, 4)], "does not exist"), ([(1, 1), (1, 1)], "twice")):
        with pytest.raises(InputError, match=match):
            replace_heads(outputs, heads)


def test_the_planted_head_carries_the_answer_into_another_prompt() -> None:
    vlm, inputs = planted.vlm(), planted.batch()
    answers = torch.tensor([planted.ANSWER_B, planted.ANSWER_B])
    metric = TokenMetric("logit difference", answers, torch.tensor([planted.ANSWER_A] * 2))
    only_b = {name: tensor[1:] for name, tensor in inputs.items()}
    sets = {"planted": [planted.HOPS["question -> last"]], "idle": [(0, 0), (3, 1)]}
    found = put_heads(vlm, inputs, sets, {"of b": head_outputs(vlm, only_b)}, metric, n_controls=3, progress=False)
    assert found.axes == {"heads": ("planted", "idle"), "outputs": ("of b",)}
    assert found.corrupt[0] < -5 and found.corrupt[1] > 5
    # The first example now answers as the second one does; layer norms see the same vectors up to what idle heads add.
    torch.testing.assert_close(found.values[0, 0, 0], found.corrupt[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.values[1, 0], found.corrupt, atol=1e-5, rtol=0)
    assert found.controls["random heads"].shape == (3, 2, 1, 2)
    with pytest.raises(InputError, match="none of 1 variants"):
        put_heads(vlm, inputs, {"idle": [(0, 0)]}, {"x": torch.ones(4, 2, 8)}, metric, n_controls=0, progress=False)
    with pytest.raises(ShapeError, match="outputs 'x'"):
        put_heads(vlm, inputs, sets, {"x": torch.ones(4, 2, 7)}, metric)


def test_strongest_and_random_heads() -> None:
    effects = torch.tensor([[0.1, 0.5], [0.5, -2.0]])
    assert strongest_heads(effects, 3) == ((0, 1), (1, 0), (0, 0))
    drawn = random_heads(3, 4, 5, torch.Generator().manual_seed(0))
    assert len(set(drawn)) == 5 and all(0 <= layer < 3 and 0 <= head < 4 for layer, head in drawn)
    for k in (0, 5):
        with pytest.raises(InputError, match="4 heads"):
            strongest_heads(effects, k)


def test_overlap_is_exact_by_enumeration() -> None:
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    a, b = heads[:3], [heads[0], heads[2], heads[5], heads[6]]
    found = overlap(a, b, 8)
    draws = [set(one) for one in combinations(heads, 4)]
    want = sum(len(one & set(a)) >= 2 for one in draws) / len(draws)
    assert found.shared == 2 and found.expected == 1.5 and found.jaccard == 2 / 5
    assert math.isclose(found.p, want, rel_tol=1e-12)
    assert overlap(heads, heads, 8).p == 1.0 and math.isclose(overlap(a, a, 8).p, 1 / math.comb(8, 3))
    for one, total, match in (([(0, 0), (0, 0)], 8, "twice"), (a, 2, "of 2"), ([], 8, "0 heads")):
        with pytest.raises(InputError, match=match):
            overlap(one, b if total == 8 else a[:1], total)


def test_rank_correlation() -> None:
    a = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    up = rank_correlation(a, a.exp(), n_permutations=2000)
    # 2 of 720 orders are as far from 0.
    assert up.rho == 1.0 and 0 < up.p < 0.01
    assert rank_correlation(a, -a, n_permutations=50).rho == -1.0
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    tied = rank_correlation(torch.tensor([0.0, 1, 1, 2]), torch.tensor([0.0, 1, 2, 3]), n_permutations=50)
    assert math.isclose(tied.rho, math.sqrt(0.9))
    with pytest.raises(InputError, match="no order"):
        rank_correlation(a, torch.ones(2, 3))
    with pytest.raises(ShapeError, match="same three or more"):
        rank_correlation(a, a[0])


def test_heads_may_be_lists_as_files_give_them() -> None:
    outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(replace_heads(outputs, [[1, 2]])[0].value, replace_heads(outputs, [(1, 2)])[0].value)
    assert overlap([[0, 1], [1, 1]], [(1, 1)], 6).shared == 1
    vlm, inputs = planted.vlm(), planted.batch()
    head, own = planted.HOPS["question -> last"], torch.ones(4, 2, 8)
    metric = TokenMetric("log-probability", torch.tensor([planted.ANSWER_A, planted.ANSWER_B]))
    found = [
        put_heads(vlm, inputs, {"a": [one]}, {"ones": own}, metric, n_controls=0, progress=False)
        for one in (head, list(head))
    ]
    assert torch.equal(found[0].values, found[1].values) and found[1].about["heads"] == {"a": [list(head)]}
    for wrong in ([1], (0, 1, 2), (0.5, 1), 3, "11"):
        with pytest.raises(InputError, match=r"give \(layer, head\)"):
            as_heads([wrong])
