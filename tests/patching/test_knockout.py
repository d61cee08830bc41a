"""Attention knockout: exactly the planted edges in exactly the planted windows; masked logits as the reference."""

import pytest
import torch

from interp import Scale
from interp.errors import InputError, NeverFiredError, ShapeError, UnknownNameError
from interp.inputs import PerRow
from interp.patching.knockout import PATTERN, Cut, crossing, cut, drops, knockout, token_sets, windows_of
from interp.patching.metric import TokenMetric
from tests import tiny, worded
from tests.patching import planted_edges as planted

GROUPS = {
    "picture": PerRow((slice(1, 5), slice(1, 4))),
    "question": PerRow((slice(5, 8), slice(4, 6))),
}
EDGES = ("picture -> question", "question -> last", "picture -> last")


def right_answer():
    answers = torch.tensor([planted.ANSWER_A, planted.ANSWER_B])
    return TokenMetric("logit difference", answers, answers.flip(0))


def test_the_planted_edges_are_found_and_nothing_else() -> None:
    vlm = planted.vlm()
    found = knockout(vlm, planted.batch(), EDGES, right_answer(), groups=GROUPS, progress=False)
    assert found.axes == {"edge": EDGES, "layer": ("0", "1", "2", "3")}
    assert float(found.clean.min()) > 5
    share = drops(found) / found.clean
    for index, edge in enumerate(EDGES):
        for layer in range(4):
            wanted = 1.0 if planted.HOPS.get(edge, (None,))[0] == layer else 0.0
            # What is cut leaves a share of 1e-3 at most, which leaks through attention to the first token.
            assert (share[index, layer] - wanted).abs().max() < 5e-3, (edge, layer)
    assert crossing(found, "picture -> question") == "1" and crossing(found, "question -> last") == "2"
    # The control cuts as many tokens, drawn at random: some of the question's, so that it cannot stop it all.
    assert found.controls["random tokens"].shape == (1, 3, 4, 2)


def test_windows_hold_the_layers_around_their_centre() -> None:
    assert windows_of(5, 1) == {str(i): range(i, i + 1) for i in range(5)}
    assert windows_of(6, 3, [0, 2, 5]) == {"0": range(0, 2), "2": range(1, 4), "5": range(4, 6)}
    assert windows_of(6, 4, [3]) == {"3": range(2, 6)}
    found = knockout(
        planted.vlm(), planted.batch(), EDGES[:1], right_answer(), groups=GROUPS, window=2, n_controls=0, progress=False
    )
    assert [bool(x) for x in (drops(found) > 1).all(-1)[0]] == [True, True, False, False]
    spans = {"early": range(0, 2), "late": [2, 3]}
    named = knockout(planted.vlm(), planted.batch(), EDGES[:2], right_answer(), groups=GROUPS, windows=spans,
                     n_controls=0, progress=False)  # fmt: skip
    assert (drops(named) > 1).all(-1).tolist() == [[True, False], [False, True]]


def masked(vlm, inputs, layers, row_edges):
    """Logits with additive masks put into the attention of some layers by plain hooks."""

    def mask_too(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        for row, (queries, keys) in enumerate(row_edges):
            for query in queries:
                for key in keys:
                    if key < query:
                        mask[row, :, query, key] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    attentions = [vlm.model.get_submodule(vlm.place(PATTERN.format(layer=layer)).path) for layer in layers]
    handles = [module.register_forward_pre_hook(mask_too, with_kwargs=True) for module in attentions]
    try:
        with torch.no_grad():
            return vlm(inputs).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_cut_edges_are_masked_logits(name) -> None:
    vlm, inputs = tiny.vlm(name, "eager"), tiny.inputs_for(name)
    length = inputs["input_ids"].shape[1]
    source, target = [[length - 5, length - 3], [length - 4]], [[length - 2, length - 3], [length - 1]]
    edits = cut(vlm, inputs, source, target, [1, 2])
    want = masked(vlm, inputs, [1, 2], list(zip(target, source, strict=True)))
    with torch.no_grad():
        base = vlm(inputs).logits[:, -1]
    with vlm.edit(*edits), torch.no_grad():
        edited = vlm(inputs).logits[:, -1]
    assert (want - base).abs().amax(-1).min() > 3e-3
    # Logits of order 10; the masked softmax and the renormalised one differ in rounding only.
    torch.testing.assert_close(edited, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(vlm.sweep(inputs, [edits]).logits[0], want, atol=1e-4, rtol=0)
    with vlm.edit(*edits):
        pattern = vlm.capture(inputs, "blocks.1.attn.hook_pattern")["blocks.1.attn.hook_pattern"]
    assert float(pattern[0, :, length - 2, length - 5].abs().max()) == 0
    torch.testing.assert_close(pattern[0, :, length - 2].sum(-1), torch.ones(4))


def test_groups_by_meaning_on_prompts_with_images() -> None:
    vlm = worded.llava()
    prompts = [("Q:<image> what is it?\nA:", [worded.image(name)]) for name in ("apple", "egg")]
    inputs = vlm.prepare(prompts)
    pictures = token_sets(inputs, "image")
    ids = inputs["input_ids"]
    assert all(len(row) == 4 and (ids[i, list(row)] == vlm.model.config.image_token_id).all() for i, row in
               enumerate(pictures))  # fmt: skip
    rest = token_sets(inputs, "not image")
    for row, layout in enumerate(inputs.layout):
        assert sorted([*pictures[row], *rest[row]]) == list(range(layout.start, layout.start + layout.length))
    assert token_sets(inputs, "all")[0] == tuple(range(inputs.layout[0].start, inputs.seq_len))
    metric = TokenMetric("log-probability", torch.tensor([40, 50]))
    found = knockout(vlm, inputs, ["image -> last", "image -> not image", ("not image", "last")], metric, window=2)
    assert found.axes["edge"] == ("image -> last", "image -> not image", "not image -> last")
    assert drops(found).abs().amax((1, 2)).min() > 1e-3
    again = knockout(vlm, inputs, ["image -> last"], metric, window=2)
    torch.testing.assert_close(again.values, found.values[:1], atol=1e-5, rtol=0)
    assert found.about["windows"]["3"] == [3]


def test_random_tokens_are_as_many_and_seeded() -> None:
    vlm, metric = planted.vlm(), right_answer()
    settings = {"groups": GROUPS, "n_controls": 2, "progress": False}
    first, second, other = (
        knockout(vlm, planted.batch(), EDGES[1:2], metric, seed=seed, **settings).controls["random tokens"]
        for seed in (0, 0, 3)
    )
    assert first.shape == (2, 1, 4, 2) and torch.equal(first, second) and not torch.equal(first, other)


def test_bad_knockouts() -> None:
    vlm, inputs, metric = planted.vlm(), planted.batch(), right_answer()
    for edges, settings, error, match in (
        ([], {}, InputError, "at least one edge"),
        (["picture"], {}, InputError, "is no edge"),
        (["last -> picture"], {}, InputError, "row 0: no target token comes after"),
        (["picture -> nothing"], {}, UnknownNameError, "carry no names"),
        (["picture -> last"], {"window": 0}, InputError, "windows of 0 layers"),
        (["picture -> last"], {"layers": [4]}, InputError, "layers 0 to 3"),
        (["picture -> last"], {"windows": {"late": [3, 4]}}, InputError, "layers 0 to 3"),
        (["not all -> last"], {}, InputError, "has no token in row 0"),
    ):
        with pytest.raises(error, match=match):
            knockout(vlm, inputs, edges, metric, groups=GROUPS, progress=False, **settings)
    with pytest.raises(InputError, match="NaN"):
        knockout(vlm, inputs, EDGES, lambda logits: logits[:, 0] * torch.nan, groups=GROUPS, progress=False)
    with pytest.raises(InputError, match="none of 1 variants changes"):
        knockout(vlm, inputs, EDGES[:1], lambda logits: torch.ones(2), groups=GROUPS, layers=[1], n_controls=0)
    with pytest.raises(InputError, match="no input_ids"):
        token_sets({}, "last")


def test_a_cut_says_what_it_cannot_do() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    edges = torch.zeros(2, 1, 9, dtype=torch.bool)
    for edit, error, match in (
        (Cut("blocks.0.hook_mlp_out", edges, at="last"), InputError, "no attention pattern"),
        (Cut(PATTERN.format(layer=0), edges, at="last", when="every"), InputError, "prefill"),
        (Cut(PATTERN.format(layer=0), edges.float(), at="last"), ShapeError, "booleans"),
        (Cut(PATTERN.format(layer=0), edges[0], at="last"), ShapeError, "booleans"),
        (Cut(PATTERN.format(layer=0), edges[:1], at="last"), ShapeError, "selects 2 rows"),
        (Cut(PATTERN.format(layer=0), edges, at=[-1, -2]), ShapeError, "× 2 queries"),
    ):
        with pytest.raises(error, match=match), vlm.edit(edit):
            vlm(inputs)
    assert Cut(PATTERN.format(layer=0), edges) == Cut(PATTERN.format(layer=0), edges.clone())
    assert Cut(PATTERN.format(layer=0), edges) != Scale(PATTERN.format(layer=0), 0.0)
    with pytest.raises(NeverFiredError), vlm.edit(Cut(PATTERN.format(layer=0), edges, at="last")):
        pass
