"""Direct paths, on transformers whose paths were planted, and against runs in which all else is frozen by hooks."""

import pytest
import torch

from interp import Replace
from interp.errors import InputError
from interp.patching.metric import logit_difference
from interp.patching.path import path
from tests import tiny
from tests.patching import planted
from tests.patching.test_activation import CLEAN, OTHER_COPY, metric

# C A y A x: asked for the token before the last (queries, values), the answer is A; corrupt: C A y C x.
BEFORE, OTHER_BEFORE = planted.prompts([5, 4, 8, 4, 6]), planted.prompts([5, 4, 8, 5, 6])


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("through", ["q", "k", "v"])
def test_only_the_planted_path_carries_anything(through, direction, mlps) -> None:
    vlm = planted.induction(through)
    clean, corrupt = (CLEAN, OTHER_COPY) if through == "k" else (BEFORE, OTHER_BEFORE)
    measured = metric(vlm) if through == "k" else logit_difference(vlm, [4], [5])
    result = path(vlm, clean, corrupt, measured, receivers=[(1, 0), (1, 1)], direction=direction, mlps=mlps)
    assert result.axes == {"through": ("q", "k", "v"), "sender": ("0.0", "0.1"), "receiver": ("1.0", "1.1")}
    want = torch.zeros(3, 2, 2)
    want["qkv".index(through), 0, 1] = 1
    moved = result.mean() if direction == "denoise" else 1 - result.mean()
    torch.testing.assert_close(moved, want, atol=planted.TOLERANCE, rtol=0)


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
def test_only_the_head_that_answers_speaks_to_the_logits(mlps) -> None:
    vlm = planted.induction()
    result = path(vlm, CLEAN, OTHER_COPY, metric(vlm), receivers="logits", mlps=mlps)
    assert result.axes == {"sender": ("0.0", "0.1", "1.0", "1.1")}
    torch.testing.assert_close(result.mean(), torch.tensor([1.0, 1, 1, 0]), atol=planted.TOLERANCE, rtol=0)
    assert "random vector" in result.controls


def frozen(acts, layers, mlps):
    """Edits that keep what attention, and MLPs, write."""
    leaves = ["hook_attn_out", *(["hook_mlp_out"] if mlps == "frozen" else [])]
    sites = [f"blocks.{layer}.{leaf}" for layer in layers for leaf in leaves]
    return [Replace(site, acts[site]) for site in sites]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
def test_paths_are_those_of_runs_with_all_else_frozen(name, mlps) -> None:
    vlm = tiny.vlm(name)
    clean, corrupt = tiny.text_inputs((7, 5), 1), tiny.text_inputs((7, 5), 2)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    result = path(vlm, clean, corrupt, measured, receivers=[(2, 1), (3, 2)], senders=[(0, 3), (1, 0)], mlps=mlps,
                  control=False)  # fmt: skip
    acts = vlm.capture(clean, "blocks.*")
    source = vlm.capture(corrupt, "blocks.*.attn.hook_z")
    shared = vlm.n_heads // int(vlm.place("blocks.0.attn.hook_k").n_heads)
    for i, (layer, head) in enumerate([(0, 3), (1, 0)]):
        z = f"blocks.{layer}.attn.hook_z"
        said = Replace(z, source[z][:, :, [head]], heads=[head])
        for j, (to, receiver) in enumerate([(2, 1), (3, 2)]):
            own = [said, *frozen(acts, [layer], mlps)[1:]] if mlps == "frozen" else [said]
            edits = [*own, *frozen(acts, range(layer + 1, to), mlps)]
            for k, letter in enumerate("qkv"):
                site = f"blocks.{to}.attn.hook_{letter}"
                at = receiver if letter == "q" else receiver // shared
                heard = vlm.capture(clean, site, edits=edits)[site][:, :, [at]]
                with torch.no_grad(), vlm.edit(Replace(site, heard, heads=[at])):
                    want = measured(vlm(clean).logits[:, -1])
                # Logits of order 10, after two runs whose sums round differently.
                torch.testing.assert_close(result.values[k, i, j], want, atol=3e-4, rtol=0)
    assert (result.values - result.clean).abs().amax(-1).min() > 1e-4
    to_logits = path(vlm, clean, corrupt, measured, receivers="logits", senders=[(1, 2)], mlps=mlps, control=False)
    z = "blocks.1.attn.hook_z"
    own = frozen(acts, [1], mlps)[1:] if mlps == "frozen" else []
    edits = [Replace(z, source[z][:, :, [2]], heads=[2]), *own, *frozen(acts, range(2, 4), mlps)]
    with torch.no_grad(), vlm.edit(*edits):
        want = measured(vlm(clean).logits[:, -1])
    torch.testing.assert_close(to_logits.values[0], want, atol=3e-4, rtol=0)


def test_pairs_without_a_path_keep_the_base_run_and_bad_heads_are_refused() -> None:
    vlm = tiny.vlm("llama")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    result = path(vlm, clean, corrupt, measured, receivers=[(1, 0), (3, 0)], senders=[(2, 0)], through=["v"])
    assert torch.equal(result.values[0, 0, 0], result.clean) and not torch.equal(result.values[0, 0, 1], result.clean)
    for settings, words in (
        ({"receivers": []}, "receivers"),
        ({"receivers": "logit"}, "'logits'"),
        ({"receivers": [(4, 0)]}, "is no head"),
        ({"receivers": [(0, 0)]}, "first layer"),
        ({"receivers": [(1, 0)], "senders": [(2, 0)]}, "before the receivers"),
        ({"receivers": [(1, 0)], "through": ["z"]}, "through"),
        ({"receivers": [(1, 0)], "mlps": "no"}, "mlps"),
        ({"receivers": [(1, 0)], "positions": [1, 2]}, "one group"),
    ):
        with pytest.raises(InputError, match=words):
            path(vlm, clean, corrupt, measured, **settings)
    with pytest.raises(InputError, match="no sender differs"):
        path(vlm, clean, clean, measured, receivers=[(1, 0)])


def test_paths_that_reach_nothing_are_refused() -> None:
    vlm = tiny.vlm("llama")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    # Queries of the last layer at an earlier token: nothing that follows reads what they find.
    nowhere = {"receivers": [(3, 0)], "through": ["q"], "positions": -3}
    with pytest.raises(InputError, match="none of the 12 patches"):
        path(vlm, clean, corrupt, measured, **nowhere)
    kept = path(vlm, clean, corrupt, measured, allow_no_effect=True, **nowhere)
    torch.testing.assert_close(kept.values, kept.clean.expand_as(kept.values), atol=1e-4, rtol=0)
    named = path(vlm, clean, corrupt, measured, receivers=[[3, 0]], senders=[[2, 1]], control=False)
    assert named.axes["receiver"] == ("3.0",)
