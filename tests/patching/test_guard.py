"""Whether anything moves the metric: rounding does not, and small effects do."""

import pytest
import torch

from interp import Replace
from interp.errors import InputError
from interp.patching.guard import moves
from interp.patching.head_vectors import head_outputs, put_heads
from interp.patching.knockout import knockout
from interp.patching.metric import TokenMetric
from tests import tiny


def metric():
    return TokenMetric("logit difference", torch.tensor([7, 8]), torch.tensor([9, 10]))


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_variants_that_reach_nothing_are_refused(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    outputs = {"x": torch.randn(head_outputs(vlm, inputs).shape, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(InputError, match="none of 1 variants"):
        put_heads(vlm, inputs, {"late": [(3, 0)]}, outputs, metric(), at=-2, n_controls=0, progress=False)
    put_heads(vlm, inputs, {"early": [(2, 0)]}, outputs, metric(), at=-2, n_controls=0, progress=False)
    # Patterns leave the fused kernel, which rounds in another way.
    with pytest.raises(InputError, match="none of 1 variants"):
        knockout(vlm, inputs, [(-3, -2)], metric(), layers=[3], n_controls=0, progress=False)
    knockout(vlm, inputs, [(-3, -1)], metric(), layers=[3], n_controls=0, progress=False)


def test_near_values_are_settled_by_plain_forwards() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.inputs_for("llama")
    with torch.no_grad():
        base = metric()(vlm(inputs).logits[:, -1])
    there = vlm.capture(inputs, "blocks.3.hook_resid_post", at="last")["blocks.3.hook_resid_post"]
    site = "blocks.3.hook_resid_post"
    idle, near = [Replace(site, there, at="last")], [Replace(site, there + 1e-3 * torch.arange(32), at="last")]
    runs = []
    handle = vlm.unembed.register_forward_hook(lambda *_: runs.append(1))
    # Differences as of rounding: what the values say is not taken for an effect, what the model says is.
    noise = base + 1e-6
    assert not moves(vlm, inputs, [idle, idle], torch.stack([noise, noise]), base.expand(2, -1), metric())
    assert len(runs) == 3
    assert moves(vlm, inputs, [idle, near], torch.stack([noise, noise]), base.expand(2, -1), metric())
    runs.clear()
    # What is far from rounding costs nothing.
    assert moves(vlm, inputs, [idle, idle], torch.stack([base, base + 1]), base.expand(2, -1), metric()) and not runs
    handle.remove()
