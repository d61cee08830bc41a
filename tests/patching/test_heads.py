"""Heads one by one, in sets, and by tower."""

import pytest
import torch

from interp import Replace
from interp.errors import InputError
from interp.patching.heads import by_tower, effect, head_sets, heads, top_heads
from interp.patching.metric import logit_difference
from interp.patching.result import PatchingResult
from tests import tiny, worded
from tests.patching import planted
from tests.patching.test_activation import CLEAN, LAST, OTHER_ANSWER, OTHER_COPY, PLACE, image_pair, metric


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_planted_heads_are_found_at_their_tokens_and_nothing_else(direction) -> None:
    vlm = planted.induction()
    result = heads(vlm, CLEAN, OTHER_COPY, metric(vlm), positions=None, direction=direction)
    want = torch.zeros(2, 2, 7)
    want[0, 0, PLACE] = want[1, 1, LAST] = 1
    torch.testing.assert_close(effect(result).mean(-1), want, atol=planted.TOLERANCE, rtol=0)
    # The head of the answer is needed and suffices for another answer too; the one that finds the place is not.
    result = heads(vlm, CLEAN, OTHER_ANSWER, metric(vlm), direction=direction)
    assert list(result.axes) == ["layer", "head"]
    torch.testing.assert_close(
        effect(result).mean(-1), torch.tensor([[0.0, 0], [0, 1]]), atol=planted.TOLERANCE, rtol=0
    )
    assert top_heads(result, 1) == [(1, 1)]
    assert result.control("random vector").sub(0 if direction == "denoise" else 1).abs().max() < 0.6


def test_a_head_is_patched_as_by_an_edit_of_its_own() -> None:
    vlm = tiny.vlm("llama")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    result = heads(vlm, clean, corrupt, measured, control=False)
    z = vlm.capture(clean, "blocks.1.attn.hook_z", at="last")["blocks.1.attn.hook_z"]
    with torch.no_grad(), vlm.edit(Replace("blocks.1.attn.hook_z", z[:, [2]], at="last", heads=[2])):
        want = measured(vlm(corrupt).logits[:, -1])
    torch.testing.assert_close(result.values[1, 2], want, atol=1e-4, rtol=0)  # logits of order 10
    assert (result.values - result.corrupt).abs().amax(-1).min() > 1e-3


def test_sets_of_heads_suffice_and_are_needed() -> None:
    vlm = planted.induction()
    result = head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 1), (0, 1), (1, 0)], draws=4)
    assert result.axes == {"test": ("sufficiency", "necessity"), "size": ("1", "2", "3")}
    want = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    torch.testing.assert_close(result.mean(), want, atol=planted.TOLERANCE, rtol=0)
    assert result.controls["random site"].shape == (4, 2, 3, 2)
    # Of random single heads only 1.1 does anything, and not all draws start with it.
    assert 0 <= result.control("random site")[0, 0] < 1 and 0 < result.control("random site")[1, 0] <= 1
    with pytest.raises(InputError, match=r"heads \(layer, head\)"):
        head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 2)])
    with pytest.raises(InputError, match=r"heads \(layer, head\)"):
        head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [])
    with pytest.raises(InputError, match="2 ranked heads"):
        head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 1), (0, 0)], sizes=[3])


def test_towers_are_patched_whole() -> None:
    vlm = worded.llava()
    clean, corrupt = image_pair(vlm)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    result = by_tower(vlm, clean, corrupt, measured)
    assert result.axes["group"] == ("text", "vision", "text 0", "text 1", "text 2", "text 3", "vision 0", "vision 1")
    sites = [f"vision.blocks.{layer}.attn.hook_z" for layer in range(2)]
    acts = vlm.capture(clean, sites)
    with torch.no_grad(), vlm.edit([Replace(site, acts[site]) for site in sites]):
        want = measured(vlm(corrupt).logits[:, -1])
    torch.testing.assert_close(result.values[1], want, atol=1e-4, rtol=0)
    assert (result.values[:2] - result.corrupt).abs().max() > 1e-2
    with pytest.raises(InputError, match="nothing is corrupt"):
        by_tower(vlm, clean, clean, measured)
    longer = vlm.prepare([("Q: AAAAAAAA<image>", [worded.image("fox")])] * 2)
    with pytest.raises(InputError, match="equally long"):
        by_tower(vlm, clean, longer, measured)
    texts = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    assert by_tower(tiny.vlm("llama"), *texts, measured, control=False).axes["group"][0] == "text"


def test_top_heads_and_effects_need_their_axes() -> None:
    vlm = planted.induction()
    result = heads(vlm, CLEAN, OTHER_COPY, metric(vlm), positions=None, control=False)
    with pytest.raises(InputError, match="layer and head"):
        top_heads(result, 1)
    with pytest.raises(InputError, match="4 heads"):
        top_heads(result.select(position=LAST), 5)
    raw = effect(result, normalised=False)
    torch.testing.assert_close(raw, result.values - result.corrupt)


def test_towers_refuse_other_directions_and_images_on_one_side() -> None:
    vlm = worded.llava()
    clean, corrupt = image_pair(vlm)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    with pytest.raises(InputError, match="direction='denoising'"):
        by_tower(vlm, clean, corrupt, measured, direction="denoising")
    without = {name: value for name, value in corrupt.items() if name != "pixel_values"}
    with pytest.raises(InputError, match="corrupt= has no pixel_values"):
        by_tower(vlm, clean, without, measured)
    with pytest.raises(InputError, match="clean= has no pixel_values"):
        by_tower(vlm, without, corrupt, measured)


def test_heads_may_be_lists_as_files_give_them() -> None:
    vlm = planted.induction()
    pairs = head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 1), (0, 1)], draws=0)
    lists = head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), pairs.about["ranked"], draws=0)
    assert torch.equal(pairs.values, lists.values) and lists.about["ranked"] == [[1, 1], [0, 1]]
    with pytest.raises(InputError, match=r"\[1\].*\(layer, head\)"):
        head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [[1]])


def test_sets_are_refused_before_anything_runs() -> None:
    vlm = planted.induction()
    ran = []
    handle = vlm.unembed.register_forward_hook(lambda *_: ran.append(1))
    for changes, words in (
        ({"sizes": [1, 1]}, "each once"),
        ({"draws": -1}, "draws=-1"),
        ({"positions": [1, 2]}, "one"),
    ):
        with pytest.raises(InputError, match=words):
            head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 1), (0, 1)], **changes)
    handle.remove()
    assert not ran


def test_both_halves_of_sets_of_heads_go_on_in_one_folder(tmp_path) -> None:
    vlm = planted.induction()
    found = head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 1)], draws=0)
    kept = head_sets(vlm, CLEAN, OTHER_COPY, metric(vlm), [(1, 1)], draws=0, folder=tmp_path / "sets")
    torch.testing.assert_close(kept.values, found.values)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["necessity", "sufficiency"]


def test_heads_and_towers_that_move_nothing_are_refused() -> None:
    vlm = tiny.vlm("llama")
    clean, corrupt = tiny.text_inputs((7, 7), 1), tiny.text_inputs((7, 7), 2)
    measured = logit_difference(vlm, [11, 12], [13, 14])
    # The last layer's heads at an earlier token reach nothing.
    with pytest.raises(InputError, match="does not reach the last token"):
        heads(vlm, clean, corrupt, measured, layers=[3], positions=[-3])
    assert heads(vlm, clean, corrupt, measured, layers=[3], positions=[-3], allow_no_effect=True).n_examples == 2
    with pytest.raises(InputError, match="none of the 2 patches"):
        head_sets(vlm, clean, corrupt, measured, [(3, 1)], positions=[-3], draws=2)
    head_sets(vlm, clean, corrupt, measured, [(3, 1)], positions=[-3], draws=1, allow_no_effect=True)

    def constant(logits):
        return logits[:, 0] * 0 + 2

    with pytest.raises(InputError, match="moves constant"):
        by_tower(vlm, clean, corrupt, constant)
    assert by_tower(vlm, clean, corrupt, constant, allow_no_effect=True).values.eq(2).all()


def test_results_without_a_direction_say_how_their_heads_are_found() -> None:
    result = PatchingResult("mediation", "m", torch.zeros(1, 2, 3), {"layer": ("0",), "head": ("0", "1")})
    with pytest.raises(InputError, match=r"strongest_heads\(indirect_effects\(result\)"):
        top_heads(result, 1)
