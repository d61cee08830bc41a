"""Activation patching, on transformers whose mechanism was planted, and against plain torch hooks."""

import pytest
import torch

from interp.errors import InputError, SiteUnavailableError, UnknownNameError
from interp.patching.activation import activation, image_map
from interp.patching.corruption import MeanOver, TokenNoise
from interp.patching.metric import logit_difference
from interp.patching.tokens import image_patches
from interp.prompts import few_shot, query
from tests import tiny, worded
from tests.patching import planted

# A B ... A: the answer is B (row 0: 4, row 1: 7); the corrupt prompts have another B, or another first A.
CLEAN = planted.prompts([7, 3, 4, 8, 6, 3], [6, 5, 7, 8, 9, 5])
OTHER_ANSWER = planted.prompts([7, 3, 5, 8, 6, 3], [6, 5, 2, 8, 9, 5])
OTHER_COPY = planted.prompts([7, 9, 4, 8, 6, 3], [6, 1, 7, 8, 9, 5])
LAST, PLACE = 6, 3


def metric(vlm):
    return logit_difference(vlm, [4, 7], [5, 2])


def expected(*sites: tuple[int, int, int]) -> torch.Tensor:
    """One at (site, layer, position), zero elsewhere."""
    values = torch.zeros(3, 2, 7)
    for site in sites:
        values[site] = 1
    return values


@pytest.mark.parametrize(("direction", "effect"), [("denoise", lambda x: x), ("noise", lambda x: 1 - x)])
def test_the_token_that_is_copied_is_found_and_nothing_else(direction, effect) -> None:
    vlm = planted.induction()
    result = activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), direction=direction)
    want = expected((0, 0, PLACE), (0, 1, LAST), (1, 1, LAST))
    torch.testing.assert_close(effect(result.normalised()), want[..., None].expand(-1, -1, -1, 2),
                               atol=planted.TOLERANCE, rtol=0)  # fmt: skip
    assert result.clean.min() > 7 and result.corrupt.max() < -7
    assert list(result.axes) == ["site", "layer", "position"] and result.about["direction"] == direction


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_place_behind_the_copy_is_found_and_nothing_else(direction) -> None:
    vlm = planted.induction()
    result = activation(vlm, CLEAN, OTHER_COPY, metric(vlm), direction=direction, control=False)
    want = expected((0, 0, PLACE), (1, 0, PLACE), (0, 1, LAST), (1, 1, LAST))
    want = want if direction == "denoise" else 1 - want
    torch.testing.assert_close(result.mean(), want, atol=planted.TOLERANCE, rtol=0)
    assert not result.controls


@pytest.mark.parametrize("position", [1, 4])
def test_the_position_that_carries_the_answer_is_found(position) -> None:
    vlm = planted.carrier(position)
    rows, others = ([[7, 3, 4, 8, 6, 3], [6, 5, 7, 8, 9, 5]] for _ in range(2))
    answers = [row[position - 1] for row in rows]
    wrong = [1, 2]
    for row, answer in zip(others, wrong, strict=True):
        row[position - 1] = answer
    measured = logit_difference(vlm, answers, wrong)
    result = activation(vlm, planted.prompts(*rows), planted.prompts(*others), measured)
    want = expected((0, 0, position), (0, 1, LAST), (1, 1, LAST))
    torch.testing.assert_close(result.mean(), want, atol=planted.TOLERANCE, rtol=0)


def test_random_vectors_of_matched_norm_do_less_than_the_patch() -> None:
    vlm = planted.induction()
    result = activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), seed=3)
    control = result.control("random vector")
    assert control.shape == result.mean().shape and control.abs().max() < 0.5 and control.abs().max() > 0
    again = activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), seed=3).controls["random vector"]
    other = activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), seed=4).controls["random vector"]
    assert torch.equal(again, result.controls["random vector"]) and not torch.equal(other, again)


def by_hand(vlm, clean, corrupt, site, clean_tokens, corrupt_tokens, measured) -> torch.Tensor:
    """Denoising with plain hooks on the site's module: clean values into the corrupt run."""
    place = vlm.place(site)
    module, caught = vlm.model.get_submodule(place.path), {}

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def keep(module, args, output):
        caught["clean"] = first(output).clone()

    def put(module, args, output):
        new = first(output).clone()
        for row, (there, here) in enumerate(zip(clean_tokens, corrupt_tokens, strict=True)):
            new[row, here] = caught["clean"][row, there]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad():
        handle = module.register_forward_hook(keep)
        vlm(clean)
        handle.remove()
        handle = module.register_forward_hook(put)
        logits = vlm(corrupt).logits[:, -1]
        handle.remove()
    return measured(logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_every_cell_is_that_of_plain_hooks(name) -> None:
    vlm = tiny.vlm(name)
    clean, corrupt = ((tiny.image_inputs((1, 1), text=3, seed=s) if name == "llava" else tiny.text_inputs((7, 7), s))
                      for s in (1, 2))  # fmt: skip
    measured = logit_difference(vlm, [11, 12], [13, 14])
    result = activation(vlm, clean, corrupt, measured, layers=[0, 2], control=False, positions=[-1, -3, [1, 2]])
    length = clean["input_ids"].shape[1]
    for i, leaf in enumerate(result.axes["site"]):
        for j, layer in enumerate((0, 2)):
            for k, tokens in enumerate(([length - 1], [length - 3], [1, 2])):
                want = by_hand(vlm, clean, corrupt, f"blocks.{layer}.{leaf}", [tokens] * 2, [tokens] * 2, measured)
                # Logits of order 10; the sweep's sharing rounds differently.
                torch.testing.assert_close(result.values[i, j, k], want, atol=1e-4, rtol=0)
    assert (result.values - result.corrupt).abs().max() > 0.1


def test_prompts_of_different_lengths_are_aligned_by_their_segments() -> None:
    vlm = worded.llama()
    pairs = [("France", "Paris"), ("Spain", "Madrid")]
    clean = vlm.prepare([few_shot(pairs, "Japan"), few_shot(pairs, "Peru")])
    corrupt = vlm.prepare([few_shot(pairs[:1], "Norway"), few_shot(pairs[:1], "Chad")])
    measured = logit_difference(vlm, ["T", "L"], ["O", "N"])
    groups = ["delimiter[-1]", "input[-1].last"]
    result = activation(vlm, clean, corrupt, measured, sites=["hook_resid_post"], positions=groups, control=False)
    last = clean["input_ids"].shape[1] - 1, corrupt["input_ids"].shape[1] - 1
    assert last[0] != last[1]
    for layer in range(vlm.n_layers):
        want = by_hand(
            vlm, clean, corrupt, f"blocks.{layer}.hook_resid_post", [[last[0]]] * 2, [[last[1]]] * 2, measured
        )
        torch.testing.assert_close(result.values[0, layer, 0], want, atol=1e-4, rtol=0)
    # The last layer's last token is all that the logits see.
    torch.testing.assert_close(result.mean()[0, -1, 0], torch.tensor(1.0), atol=1e-4, rtol=0)


def test_a_window_of_layers_is_patched_together() -> None:
    vlm = tiny.vlm("llama")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    single, wide = (
        activation(
            vlm, clean, corrupt, measured, sites=["hook_mlp_out"], positions=["last"], window=window, control=False
        )
        for window in (1, 9)
    )
    torch.testing.assert_close(wide.values[:, 0], wide.values[:, 3], atol=1e-4, rtol=0)
    assert (wide.values - single.values).abs().max() > 0.1
    with pytest.raises(InputError, match="window=0"):
        activation(vlm, clean, corrupt, measured, window=0)


def image_pair(vlm):
    clean = vlm.prepare([query(worded.image("fox")), query(worded.image("owl"))])
    corrupt = vlm.prepare([query(worded.image("bee")), query(worded.image("cat"))])
    return clean, corrupt


def test_another_image_and_its_patch_grid() -> None:
    vlm = worded.llava()
    clean, corrupt = image_pair(vlm)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    grid = image_patches(vlm, clean)
    result = activation(vlm, clean, corrupt, measured, sites=["hook_resid_post"], positions=grid, control=False)
    assert result.axes["position"] == ("image[0] 0,0", "image[0] 0,1", "image[0] 1,0", "image[0] 1,1")
    assert image_map(result).shape == (1, 4, 2, 2)
    assert image_map(result)[0, 0, 1, 0] == result.select(position="image[0] 1,0").mean()[0, 0]
    start = clean["input_ids"][0].tolist().index(vlm.model.config.image_token_id)
    want = by_hand(vlm, clean, corrupt, "blocks.1.hook_resid_post", [[start + 2]] * 2, [[start + 2]] * 2, measured)
    torch.testing.assert_close(result.values[0, 1, 2], want, atol=1e-4, rtol=0)
    # All patches at the entry of the language model are all that differs between the two runs.
    whole = activation(vlm, clean, corrupt, measured, sites=["hook_resid_pre"], layers=[0], positions=["image[0]"])
    torch.testing.assert_close(whole.mean(), torch.ones(1, 1, 1), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="no grid"):
        image_map(whole)


def test_causal_tracing_restores_a_run_with_noise_on_the_image() -> None:
    vlm = worded.llava()
    clean, _ = image_pair(vlm)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    noise = TokenNoise("image[0]", scale=3.0, draws=2, seed=5)
    found = {
        direction: activation(vlm, clean, noise, measured, sites=["hook_resid_post"], direction=direction,
                              positions=["image[0]", "last"], control=False)
        for direction in ("denoise", "noise")
    }  # fmt: skip
    for result in found.values():
        assert result.about["draws"] == 2 and (result.clean - result.corrupt).abs().min() > 1e-3
    last = {direction: result.mean()[0, -1, 1] for direction, result in found.items()}
    # What the last token holds after the last layer is all that the logits see.
    torch.testing.assert_close(last["denoise"], torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(last["noise"], torch.tensor(0.0), atol=1e-4, rtol=0)
    again = activation(vlm, clean, noise, measured, sites=["hook_resid_post"], positions=["last"], control=False)
    other = activation(vlm, clean, TokenNoise("image[0]", draws=2, seed=6), measured, sites=["hook_resid_post"],
                       positions=["last"], control=False)  # fmt: skip
    assert torch.equal(again.corrupt, found["denoise"].corrupt) and not torch.equal(other.corrupt, again.corrupt)


def test_the_mean_over_a_data_set() -> None:
    vlm = planted.induction()
    data = planted.prompts([7, 3, 5, 8, 6, 3], [6, 5, 2, 8, 9, 5], [6, 5, 1, 8, 9, 5])
    corruption = MeanOver(data, slice(3, 4))
    result = activation(vlm, CLEAN, corruption, metric(vlm), direction="noise", control=False)
    found = result.mean()[0, 0]
    # Tokens 5, 2 and 1 are a third of the mean each, and 4 and 7 no part of it.
    assert found[PLACE] < 0.2 and (found[[1, 2, 4, 5]] - 1).abs().max() < planted.TOLERANCE
    mean = vlm.capture(data, "blocks.0.hook_resid_post")["blocks.0.hook_resid_post"][:, PLACE].mean(0)

    def put(module, args, output):
        new = output.clone()
        new[:, PLACE] = mean
        return new

    handle = vlm.model.transformer.h[0].register_forward_hook(put)
    with torch.no_grad():
        want = metric(vlm)(vlm(CLEAN).logits[:, -1])
    handle.remove()
    torch.testing.assert_close(result.values[0, 0, PLACE], want, atol=1e-5, rtol=0)
    restored = activation(vlm, CLEAN, corruption, metric(vlm), direction="denoise", control=False).mean()
    torch.testing.assert_close(restored[0, 0, PLACE], torch.tensor(1.0), atol=planted.TOLERANCE, rtol=0)


def test_what_changes_nothing_is_refused_unless_allowed() -> None:
    vlm = planted.induction()
    with pytest.raises(InputError, match="same activations at '1'"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), positions=[1, PLACE])
    with pytest.raises(InputError, match="same activations at every token"):
        activation(vlm, CLEAN, CLEAN, metric(vlm))
    with pytest.raises(InputError, match="does not reach the last token"):
        # Idle head 0.1 writes another token here, which nothing reads.
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), sites=["hook_mlp_out", "hook_resid_post"], layers=[1],
                   positions=[PLACE], control=False)  # fmt: skip
    result = activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), positions=[1, PLACE], allow_no_effect=True)
    assert result.mean()[:, :, 0].abs().max() == 0 and result.mean()[0, 0, 1] > 0.99


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_rounding_of_shared_work_is_no_effect(name) -> None:
    vlm = tiny.vlm(name)
    clean, corrupt = ((tiny.image_inputs((1, 1), text=3, seed=s) if name == "llava" else tiny.text_inputs((7, 7), s))
                      for s in (1, 2))  # fmt: skip
    measured = logit_difference(vlm, [11, 12], [13, 14])
    cells = {"sites": ["hook_resid_post"], "layers": [3]}
    with pytest.raises(InputError, match="does not reach the last token"):
        activation(vlm, clean, corrupt, measured, positions=[-3], **cells)
    # Small effects are effects: a millionth of the metric that the guard was given.
    activation(vlm, clean, corrupt, lambda logits: 1e-6 * measured(logits), positions=[-1], **cells)


def test_bad_input_is_refused_with_the_reason() -> None:
    vlm, llava = planted.induction(), tiny.vlm("llava")
    longer = planted.prompts([7, 3, 4, 8, 6, 3, 2], [6, 5, 7, 8, 9, 5, 2])
    with pytest.raises(InputError, match=r"7 and 8 tokens.*named segments"):
        activation(vlm, CLEAN, longer, metric(vlm), positions=[PLACE])
    with pytest.raises(InputError, match=r"7 and 8 tokens.*named segments"):
        activation(vlm, CLEAN, longer, metric(vlm))
    assert activation(vlm, CLEAN, longer, metric(vlm), positions=["last"], control=False).n_examples == 2
    with pytest.raises(InputError, match="come in pairs"):
        activation(vlm, CLEAN, planted.prompts([7, 3, 5, 8, 6, 3]), metric(vlm))
    with pytest.raises(InputError, match="another tower"):
        activation(llava, tiny.image_inputs(), tiny.image_inputs(), metric(llava), sites=["vision.hook_resid_post"])
    with pytest.raises(InputError, match="names a layer"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), sites=["blocks.0.hook_resid_post"])
    with pytest.raises(InputError, match="knockout"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), sites=["attn.hook_pattern"])
    with pytest.raises(UnknownNameError, match="hook_resid_post"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), sites=["hook_resid_posts"])
    with pytest.raises(SiteUnavailableError, match="hook_resid_pre"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), sites=["hook_resid_mid"])
    with pytest.raises(InputError, match="at least one"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), sites=[])
    with pytest.raises(InputError, match="layers 0 to 1"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), layers=[2])
    with pytest.raises(InputError, match="direction='denoising'"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), direction="denoising")
    with pytest.raises(InputError, match="NaN"):
        activation(vlm, CLEAN, OTHER_ANSWER, lambda logits: logits[:, 0] * float("nan"))
    with pytest.raises(InputError, match="at least one group"):
        activation(vlm, CLEAN, OTHER_ANSWER, metric(vlm), positions=[])
