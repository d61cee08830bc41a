"""Every edit against its closed form, and edits as values."""

import numpy as np
import pytest
import torch

from interp import Add, Edit, Function, Interpolate, MeanAblate, Project, Replace, Resample, Scale, Zero
from interp.edits import as_edits
from interp.errors import InputError, ShapeError
from interp.positions import PerRow
from interp.regions import Region
from tests import tiny

SITE = "blocks.1.hook_resid_post"
V = torch.linspace(-1, 1, 32)


@pytest.fixture(scope="module")
def vlm():
    return tiny.vlm("llama")


@pytest.fixture(scope="module")
def inputs():
    return tiny.text_inputs((9, 6, 9))


def before_and_after(vlm, inputs, edit):
    clean = vlm.capture(inputs, edit.site)[edit.site]
    acts = vlm.capture(inputs, edit.site, edits=edit)
    with torch.no_grad():
        assert not torch.equal(acts.output.logits, vlm(inputs).logits), edit  # it moved the output
    return clean, acts[edit.site]


@pytest.mark.parametrize(
    ("edit", "form"),
    [
        (Replace(SITE, V), lambda x: V.expand_as(x)),
        (Add(SITE, V, scale=-2.0), lambda x: x - 2 * V),
        (Interpolate(SITE, V, 0.25), lambda x: 0.75 * x + 0.25 * V),
        (Scale(SITE, 3.0), lambda x: 3 * x),
        (Zero(SITE), lambda x: 0 * x),
        (MeanAblate(SITE, V), lambda x: V.expand_as(x)),
        (Project(SITE, V), lambda x: x - (x @ V)[..., None] * V / V.dot(V)),
        (Project(SITE, V, onto=True), lambda x: (x @ V)[..., None] * V / V.dot(V)),
        (Function(SITE, torch.tanh), torch.tanh),
        (Function(SITE, lambda x: x.mul_(2)), lambda x: 2 * x),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Edit) else "",
)
def test_closed_forms(vlm, inputs, edit, form) -> None:
    clean, after = before_and_after(vlm, inputs, edit)
    torch.testing.assert_close(after, form(clean), atol=2e-5, rtol=1e-5)


def test_projections_with_a_basis_that_is_not_orthogonal(vlm, inputs) -> None:
    basis = torch.randn(3, 32)
    basis[1] = basis[0] + 0.1 * basis[1]
    center = torch.randn(32)
    clean, out_of = before_and_after(vlm, inputs, Project(SITE, basis, center=center))
    _, onto = before_and_after(vlm, inputs, Project(SITE, basis, onto=True, center=center))
    projector = torch.linalg.pinv(basis.double()) @ basis.double()
    inside = (clean.double() - center) @ projector
    torch.testing.assert_close(onto.double(), inside + center, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out_of.double(), clean - inside, atol=1e-4, rtol=1e-4)
    for bad in (torch.zeros(32), torch.stack([V, 2 * V]), torch.zeros(2, 3, 32)):
        with pytest.raises(ShapeError, match="linearly independent"):
            vlm.capture(inputs, SITE, edits=Project(SITE, bad))


def test_a_double_precision_model_keeps_its_precision(inputs) -> None:
    vlm = tiny.VLM(tiny.llama().double())
    clean, after = before_and_after(vlm, inputs, Project(SITE, V))
    v = V.double()
    torch.testing.assert_close(after, clean - (clean @ v)[..., None] * v / v.dot(v), atol=1e-12, rtol=1e-12)


def test_means_leave_padding_out(vlm, inputs) -> None:
    clean, after = before_and_after(vlm, inputs, MeanAblate(SITE))
    mean = clean[inputs["attention_mask"].bool()].mean(0)
    torch.testing.assert_close(after, mean.expand_as(after), atol=1e-5, rtol=1e-5)
    # Rows with different numbers of positions share one mean.
    edit = MeanAblate(SITE, at=slice(0, 8))
    clean, after = before_and_after(vlm, inputs, edit)
    chosen = torch.zeros(3, 9, dtype=torch.bool)
    chosen[[0, 2], :8] = True
    chosen[1, 3:] = True
    torch.testing.assert_close(after[chosen], clean[chosen].mean(0).expand(22, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(after[~chosen], clean[~chosen])


def test_no_row_keeps_its_own(vlm, inputs) -> None:
    results = []
    for seed in range(6):
        clean, after = before_and_after(vlm, inputs, Resample(SITE, at="last", seed=seed))
        from_row = [[torch.equal(after[i, -1], clean[j, -1]) for j in range(3)] for i in range(3)]
        assert all(sum(row) == 1 for row in from_row) and not any(from_row[i][i] for i in range(3))
        results.append(tuple(row.index(True) for row in from_row))
    assert len(set(results)) == 2  # there are two ways to move three rows round
    again = vlm.capture(inputs, SITE, edits=Resample(SITE, at="last", seed=5))[SITE]
    assert torch.equal(again, after)
    for bad in (
        Resample(SITE),
        Resample(SITE, at="last", rows=1),
        Resample(SITE, at=slice(0, 8), rows=[0, 1]),
    ):
        with pytest.raises(InputError, match="at least two"):
            vlm.capture(inputs, SITE, edits=bad)


def test_resampling_from_a_bank_and_among_beams(vlm, inputs) -> None:
    bank = torch.randn(50, 32)
    _, after = before_and_after(vlm, inputs, Resample(SITE, bank, at="last", seed=3))
    drawn = [int((bank == row).all(-1).nonzero()) for row in after[:, -1]]
    assert drawn == torch.randint(50, (3,), generator=torch.Generator().manual_seed(3)).tolist()
    # Beams of one prompt are one example: each prompt receives another prompt's activation.
    clean = vlm.capture(inputs, SITE, at="last")[SITE]
    with vlm.record(SITE, at="last") as acts:
        vlm.generate(inputs, edits=Resample(SITE, at="last"), num_beams=2, max_new_tokens=1)
    got = acts.calls(SITE)[0].view(3, 2, 32)
    for prompt in range(3):
        torch.testing.assert_close(got[prompt, 0], got[prompt, 1], atol=1e-5, rtol=1e-5)
        assert (got[prompt, 0] - clean[prompt]).abs().max() > 0.1


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_heads_and_fused_projections(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.text_inputs()
    for leaf in ("q", "k", "v", "z"):
        site = f"blocks.1.attn.hook_{leaf}"
        d = vlm.place(site).width
        value = torch.randn(2, 1, d)
        clean, after = before_and_after(vlm, inputs, Replace(site, value, at=-2, heads=1))
        assert torch.equal(after[:, -2, 1], value[:, 0])
        after[:, -2, 1] = clean[:, -2, 1]
        assert torch.equal(after, clean)
        others = [f"blocks.1.attn.hook_{other}" for other in "qkv" if other != leaf]
        clean = vlm.capture(inputs, others)
        after = vlm.capture(inputs, others, edits=Zero(site, heads=[0, -1]))
        assert all(torch.equal(clean[other], after[other]) for other in others)


def test_values_by_row_and_position(vlm, inputs) -> None:
    values = torch.randn(2, 2, 32)
    edit = Replace(SITE, values, at=[-1, 0], rows=[2, 1])
    clean, after = before_and_after(vlm, inputs, edit)
    want = clean.clone()
    want[2, 8], want[2, 0], want[1, 8], want[1, 3] = values[0, 0], values[0, 1], values[1, 0], values[1, 1]
    assert torch.equal(after, want)


def test_functions_must_return_what_they_were_given(vlm, inputs) -> None:
    for function in (lambda x: x[:1], lambda x: None, lambda x: 3.0):
        with pytest.raises(ShapeError, match=r"expected a tensor of shape \(3, 1, 32\)"):
            vlm.capture(inputs, SITE, edits=Function(SITE, function, at="last"))


def test_gradients_flow_through_a_value(vlm, inputs) -> None:
    value = torch.randn(32, requires_grad=True)
    with vlm.edit(Replace(SITE, value, at="last")):
        metric = vlm(inputs).logits[:, -1, 7].sum()
    (grad,) = torch.autograd.grad(metric, value)
    by_hand = torch.zeros(32, requires_grad=True)

    def change(module, args, out):
        out = out.clone()
        out[:, -1] = value.detach() + by_hand
        return out

    handle = vlm.model.model.layers[1].register_forward_hook(change)
    (want,) = torch.autograd.grad(vlm(inputs).logits[:, -1, 7].sum(), by_hand)
    handle.remove()
    assert want.abs().max() > 0.01
    torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-4)


def test_edits_are_values() -> None:
    edits = [
        Replace(SITE, V),
        Replace(SITE, V.clone()),
        Replace(SITE, 2 * V),
        Replace(SITE, V, at="last"),
        Add(SITE, V),
    ]
    assert edits[0] == edits[1] and hash(edits[0]) == hash(edits[1])
    assert edits[0] != edits[2] and edits[0] != edits[3] and edits[0] != edits[4]
    assert len(set(edits)) == 4
    assert repr(Add(SITE, V, scale=2.0, at="last", rows=[1])) == (
        f"Add('{SITE}', at='last', rows=[1], value=<32, norm {V.norm():.4g}>, scale=2.0)"
    )
    assert repr(Zero(SITE)) == f"Zero('{SITE}')"
    assert as_edits(edits[0]) == [edits[0]] and as_edits(edits) == edits
    with pytest.raises(InputError, match="expected an edit"):
        as_edits([edits[0], "blocks"])
    with pytest.raises(InputError, match="expected an edit"):
        as_edits(3)


def test_the_users_tensors_stay_as_they_are(vlm, inputs) -> None:
    value, kept = V.clone(), V.clone()
    vlm.capture(inputs, SITE, edits=[Replace(SITE, value), Function(SITE, lambda x: x.add_(1))])
    assert torch.equal(value, kept)


def given(edit, **fields):
    """An edit as it is without the checks of types that tests run under."""
    for name, value in fields.items():
        object.__setattr__(edit, name, value)
    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (given(Replace(SITE, V), value=[1.0] * 32), "value is list, expected a tensor"),
        (given(Add(SITE, V), value=np.ones(32)), "value is ndarray, expected a tensor"),
        (given(MeanAblate(SITE), mean=[1.0] * 32), "mean is list"),
        (given(Scale(SITE, 1.0), factor=None), "factor is None, expected a number"),
        (given(Scale(SITE, 1.0), factor="2"), "factor is '2'"),
        (given(Scale(SITE, 1.0), factor=True), "factor is True"),
        (Scale(SITE, float("nan")), "finite"),
        (Add(SITE, V, scale=float("inf")), "scale is inf"),
        (Interpolate(SITE, V, float("nan")), "weight is nan"),
        (given(Function(SITE, torch.tanh), function=3), "cannot be called"),
        (given(Zero(SITE), rows="all"), "rows='all'"),
        (given(Zero(SITE), rows=True), "rows=True"),
        (given(Zero("blocks.1.attn.hook_z"), heads="all"), "heads='all'"),
        (given(Zero("blocks.1.attn.hook_z"), heads=[1.5]), "heads="),
        (Zero("blocks.1.attn.hook_z", heads=[0, -4]), "a head is selected twice"),
        (Zero(SITE, rows=[0, -3]), "a row is selected twice"),
        (Zero(SITE, at=["last", -1]), "selected twice in row 0"),
        (Zero(SITE, at=PerRow(([0], [1, 1], [2]))), "selected twice in row 1"),
        (Zero(SITE, steps=0), "steps=.* are those of a diffusion model"),
        (Zero(SITE, half="cond"), "half='cond' .* are those of a diffusion model"),
        (Zero(SITE, at=Region.box(0.0, 0.0, 0.5, 1.0)), r"at=Region\.box.* are those of a diffusion model"),
        (Scale(SITE, 0.5, renormalise=True), "the site is no attention pattern"),
        (Zero("blocks.1.attn.hook_pattern", renormalise=True), "zeros have no sum"),
    ],
)
def test_what_no_edit_can_mean(vlm, inputs, edit, match) -> None:
    with pytest.raises(InputError, match=match):
        vlm.capture(inputs, SITE, edits=edit)


def test_renormalised_patterns(vlm, inputs) -> None:
    site = "blocks.1.attn.hook_pattern"
    clean = vlm.capture(inputs, site)[site]
    bias = torch.rand(clean.shape[-1], generator=torch.Generator().manual_seed(0))
    edited = vlm.capture(inputs, site, edits=Add(site, bias, renormalise=True))[site]
    torch.testing.assert_close(edited, (clean + bias) / (clean + bias).sum(-1, keepdim=True))
    # Without it the sum says what was added.
    plain = vlm.capture(inputs, site, edits=Add(site, bias))[site]
    torch.testing.assert_close(plain.sum(-1), torch.full_like(plain[..., 0], float(1 + bias.sum())))
    with pytest.raises(InputError, match="sum to zero or less"):
        vlm.capture(inputs, site, edits=Scale(site, -1.0, renormalise=True))


@pytest.mark.parametrize("array", [np.array([0, -1]), torch.tensor([0, -1])])
def test_integers_of_other_libraries(vlm, inputs, array) -> None:
    clean, after = before_and_after(vlm, inputs, Zero(SITE, at=array, rows=array[:1]))
    want = clean.clone()
    want[0, [0, -1]] = 0
    assert torch.equal(after, want)
    assert torch.equal(vlm.capture(inputs, SITE, at=array)[SITE], vlm.capture(inputs, SITE, at=[0, -1])[SITE])
    assert vlm.capture(inputs, SITE, at=array[0])[SITE].shape == (3, 32)
    z = "blocks.1.attn.hook_z"
    assert torch.equal(vlm.capture(inputs, z, heads=array[0])[z], vlm.capture(inputs, z, heads=0)[z])
    assert Zero(SITE, at=array) == Zero(SITE, at=[0, -1]) and "at=[0, -1]" in repr(Zero(SITE, at=array))
    for bad in (array > 0, array * 0.5, array[None]):
        with pytest.raises(InputError, match="integers along one axis"):
            Zero(SITE, at=bad)
