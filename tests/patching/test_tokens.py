"""Token groups by meaning, and corruptions of them."""

import pytest
import torch

from interp.errors import InputError, UnknownNameError
from interp.patching.activation import activation
from interp.patching.corruption import ENTRY, MeanOver, TokenNoise, two_runs
from interp.patching.metric import logit_difference
from interp.patching.tokens import TokenGroup, align, as_groups, every_token, image_patches, segments
from interp.prompts import few_shot, query
from tests import tiny, worded


def prompts():
    vlm = worded.llava()
    return vlm, vlm.prepare([query(worded.image(name), question="which?") for name in ("fox", "owl")])


def test_every_token_has_the_name_of_its_segment() -> None:
    _, inputs = prompts()
    names = [group.name for group in every_token(inputs)]
    assert len(names) == inputs.seq_len and len(set(names)) == len(names)
    assert {"image[0].0", "image[0].3", "delimiter[0]"} <= set(names) and names[-1] == "delimiter[0]"
    for group in every_token(inputs):
        assert group.positions(inputs) == [[names.index(group.name)]] * 2
    plain = tiny.text_inputs((5, 5))
    assert [group.name for group in every_token(plain)] == ["0", "1", "2", "3", "4"]
    with pytest.raises(InputError, match="4 to 5 tokens"):
        every_token(tiny.text_inputs((5, 4)))


def test_segments_are_groups_in_their_order() -> None:
    _, inputs = prompts()
    names = [group.name for group in segments(inputs)]
    assert names.index("image[0]") < names.index("question[0]") < names.index("delimiter[0]")
    mixed = worded.llama().prepare([few_shot([("France", "Paris")], "Japan"), query("Japan")])
    with pytest.raises(InputError, match="no named segments in common"):
        segments(mixed)


def test_patches_of_an_image_are_a_grid_without_what_wraps_the_image() -> None:
    vlm, inputs = prompts()
    grid = image_patches(vlm, inputs)
    token = vlm.model.config.image_token_id
    want = (inputs["input_ids"][0] == token).nonzero().flatten().tolist()
    assert [group.positions(inputs)[0][0] for group in grid.groups] == want and (grid.rows, grid.columns) == (2, 2)
    block = image_patches(vlm, inputs, block=2)
    assert (block.rows, block.columns) == (1, 1) and block.groups[0].positions(inputs)[1] == want
    wide = image_patches(vlm, inputs, grid=(1, 4))
    assert [group.name for group in wide.groups] == [f"image[0] 0,{x}" for x in range(4)]
    with pytest.raises(InputError, match="grid of 3 × 2"):
        image_patches(vlm, inputs, grid=(3, 2))
    with pytest.raises(InputError, match="block=3"):
        image_patches(vlm, inputs, block=3)
    with pytest.raises(UnknownNameError, match=r"image\[1\]"):
        image_patches(vlm, inputs, 1)
    with pytest.raises(InputError, match="no image tokens"):
        image_patches(worded.llama(), inputs)


def test_groups_come_in_many_forms() -> None:
    _, inputs = prompts()
    assert [group.name for group in as_groups({"all": slice(None), "end": "last"}, inputs)] == ["all", "end"]
    assert as_groups("last", inputs) == (TokenGroup("last", "last"),)
    assert as_groups(["last", TokenGroup("x", -2)], inputs)[1].name == "x"
    with pytest.raises(InputError, match="each once"):
        as_groups(["last", "last"], inputs)
    with pytest.raises(InputError, match="only 1 such tokens"):
        TokenGroup("x", "last", of=(0, 1)).positions(inputs)


def test_groups_are_aligned_by_meaning_and_refused_by_length() -> None:
    vlm = worded.llama()
    long = vlm.prepare([few_shot([("France", "Paris")], "Japan"), few_shot([("France", "Paris")], "Peru")])
    short = vlm.prepare([query("Japan"), query("Peru")])
    (found,) = align([TokenGroup("end", "delimiter[-1]")], long, short)
    assert found.source == [[long.seq_len - 1]] * 2 and found.base == [[short.seq_len - 1]] * 2
    with pytest.raises(InputError, match="means different tokens"):
        align([TokenGroup("end", -1)], long, short)
    with pytest.raises(InputError, match="come in pairs"):
        align([TokenGroup("end", "last")], long, vlm.prepare([query("Japan")]))
    other = vlm.prepare([query("Japan"), query("Norway and more")])
    with pytest.raises(InputError, match=r"tokens in the prompts of row 1: give 'input\[-1\].first'"):
        align([TokenGroup("asked", "input[-1]")], short, other)
    with pytest.raises(UnknownNameError, match="output"):
        align([TokenGroup("answer", "output[0]")], long, short)


def test_noise_has_its_scale_its_seed_and_its_place() -> None:
    vlm, inputs = prompts()
    noise = TokenNoise("image[0]", scale=2.0, draws=40, seed=1)
    draws = noise.edits(vlm, inputs)
    clean = vlm.capture(inputs, ENTRY)[ENTRY]
    here = TokenGroup("image[0]", "image[0]").positions(inputs)[0]
    spread = float(clean[:, here].std())
    values = torch.stack([edits[0].value for edits in draws])
    # 40 × 2 × tokens × 32 normal numbers: their deviation is known to about one percent.
    assert abs(float(values.std()) / (2 * spread) - 1) < 0.03
    assert not torch.equal(values[0], values[1])
    assert torch.equal(noise.edits(vlm, inputs)[3][0].value, values[3])
    noisy = vlm.capture(inputs, ENTRY, edits=draws[0])[ENTRY]
    moved = (noisy - clean).abs().amax(-1) > 0
    assert moved[0].nonzero().flatten().tolist() == here
    for wrong in (TokenNoise(draws=0), TokenNoise(scale=0.0)):
        with pytest.raises(InputError, match="positive"):
            wrong.edits(vlm, inputs)


def test_tokens_enter_as_the_mean_over_the_data_set() -> None:
    vlm, inputs = prompts()
    data = vlm.prepare([query(worded.image(name), question="which?") for name in ("bee", "cat", "dog")])
    corruption = MeanOver(data, "image[0]")
    measured = logit_difference(vlm, [11, 12], [13, 14])
    _, (corrupt,) = two_runs(vlm, inputs, corruption, measured, [ENTRY])
    here = TokenGroup("image[0]", "image[0]").positions(inputs)[0]
    mean = vlm.capture(data, ENTRY)[ENTRY][:, here].mean(0)
    torch.testing.assert_close(corrupt.acts[ENTRY][1, here], mean)
    uneven = worded.llama().prepare([query("Japan"), query("Norway and more")])
    with pytest.raises(InputError, match="equally many"):
        MeanOver(uneven, "input[0]").edits(worded.llama(), worded.llama().prepare([query("Japan")]))


def test_inputs_that_are_none_are_refused() -> None:
    vlm, inputs = prompts()
    measured = logit_difference(vlm, [11, 12], [13, 14])
    nothing = {"attention_mask": inputs["attention_mask"]}
    for clean, corrupt in ((nothing, inputs), (inputs, nothing)):
        for positions in (None, ["last"]):
            with pytest.raises(InputError, match="input_ids"):
                activation(vlm, clean, corrupt, measured, positions=positions)
