"""The lens against the model's own logits, where a double norm would show."""

import pytest
import torch

from interp import lens
from interp.errors import InputError, ShapeError
from interp.prompts import few_shot
from tests.worded import image, llava, other_llama


def prompts():
    return [
        few_shot([("France", "Paris")], "Spain"),
        few_shot([(image("a"), "Oslo"), ("b", "c")], image("d")),
    ]


def test_the_last_layer_gives_the_models_logits():
    vlm = llava()
    inputs = vlm.prepare(prompts())
    with torch.no_grad():
        expected = vlm(inputs).logits[:, -1]
    found = lens.logit_lens(vlm, inputs)
    torch.testing.assert_close(found[-1], expected, rtol=1e-5, atol=1e-5)
    # The norm's gains are drawn in [0.5, 2], so that a second norm is far from a no-op.
    twice = vlm.unembed(
        vlm.final_norm(
            vlm.final_norm(vlm.capture(inputs, "blocks.3.hook_resid_post", at="last")["blocks.3.hook_resid_post"])
        )
    )
    assert (twice - expected).abs().max() > 0.1
    assert found.shape == (4, 2, expected.shape[-1])


def test_inner_layers_are_norm_and_unembedding_of_hidden_states():
    vlm = llava()
    inputs = vlm.prepare(prompts())
    with torch.no_grad():
        states = vlm(inputs, output_hidden_states=True).hidden_states
        expected = vlm.model.lm_head(vlm.model.model.language_model.norm(states[2][:, -1]))
    torch.testing.assert_close(lens.logit_lens(vlm, inputs)[1], expected, rtol=1e-5, atol=1e-5)


def test_logits_of_a_model_in_half_precision_are_float32():
    vlm = other_llama()
    vlm.model.bfloat16()
    residual = torch.randn(2, 3, vlm.d_model, generator=torch.Generator().manual_seed(0))
    found = lens.unembed(vlm, residual)
    with torch.no_grad():
        expected = vlm.model.lm_head(vlm.model.model.norm(residual.bfloat16()))
    assert expected.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert torch.equal(found, expected.float())


def test_phases_are_probabilities_of_the_given_tokens():
    logits = torch.randn(3, 2, 7)
    found = lens.phases(logits, {"answer": [4, 1], "task": torch.tensor([0, 6])})
    expected = logits.softmax(-1)
    torch.testing.assert_close(found["answer"], torch.stack([expected[:, 0, 4], expected[:, 1, 1]], dim=1))
    torch.testing.assert_close(found["task"][2, 1], expected[2, 1, 6])
    with pytest.raises(ShapeError, match="one per row"):
        lens.phases(logits, {"answer": [4]})


def test_decoding_names_the_likeliest_tokens():
    vlm = llava()
    direction = vlm.unembed.weight[40] / vlm.final_norm.weight
    text, probability = lens.decode(vlm, 50 * direction.detach(), k=3)[0]
    logits = lens.unembed(vlm, 50 * direction.detach())
    assert text == vlm.tokenizer.decode([int(logits.argmax())])
    assert probability == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)


def test_wrong_width_and_many_tokens_are_refused():
    vlm = llava()
    with pytest.raises(ShapeError, match="width 31"):
        lens.decode(vlm, torch.zeros(31))
    with pytest.raises(InputError, match="one token per row"):
        lens.logit_lens(vlm, vlm.prepare([prompts()[1]]), at="image[0]")
