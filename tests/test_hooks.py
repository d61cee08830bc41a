"""Captures against hooks by hand, and the laws that patches of a decoder obey."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from interp import Add, Function, Replace, Zero
from interp.clock import Clock
from interp.errors import InputError, NeverFiredError, ShapeError
from interp.hooks import Session
from tests import tiny
from tests.plain import reading, state_of, writing

KERNELS = ["sdpa", "eager"]
MODELS = [(name, kernel) for name in tiny.ALL for kernel in KERNELS]
every_model = pytest.mark.parametrize(("name", "kernel"), MODELS)
RESID_POST = "blocks.{}.hook_resid_post"


def block(vlm, layer: int) -> str:
    return vlm.place(RESID_POST.format(layer)).path


def real(inputs) -> torch.Tensor:
    return inputs["attention_mask"].bool()


# --- reads


@every_model
def test_capture_equals_plain_hooks(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    sites = [site for site in vlm.sites() if not site.endswith("hook_pattern")]
    with ExitStack() as hooks:
        by_hand = {}
        for place in map(vlm.place, sites):
            by_hand[place.site] = hooks.enter_context(reading(vlm.model, place.path, place.side))
        with torch.no_grad():
            vlm(inputs)
    acts = vlm.capture(inputs, sites)
    for site, seen in by_hand.items():
        place, got = vlm.place(site), acts[site]
        want = seen[0] if place.columns is None else seen[0][..., slice(*place.columns)]
        assert torch.equal(got.flatten(2) if "head" in place.axes else got, want), site
        assert got.ndim == len(place.axes)


@every_model
def test_capture_equals_hidden_states_and_ends_before_the_final_norm(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    acts = vlm.capture(inputs, ["blocks.*.hook_resid_p*", "ln_final.hook_out"], output_hidden_states=True)
    states = acts.output.hidden_states
    assert len(states) == vlm.n_layers + 1
    for layer in range(vlm.n_layers):
        assert torch.equal(acts[f"blocks.{layer}.hook_resid_pre"], states[layer])
        if layer:
            assert torch.equal(acts[f"blocks.{layer - 1}.hook_resid_post"], states[layer])
    assert torch.equal(acts["ln_final.hook_out"], states[-1])
    assert not torch.allclose(acts[RESID_POST.format(vlm.n_layers - 1)], states[-1], atol=0.1)


@every_model
def test_heads_through_the_output_projection_sum_to_the_attention_output(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    towers = ["", "vision."] if vlm.has_vision else [""]
    for tower in towers:
        acts = vlm.capture(inputs, [f"{tower}blocks.1.attn.hook_z", f"{tower}blocks.1.hook_attn_out"])
        z = acts[f"{tower}blocks.1.attn.hook_z"]
        projection = vlm.model.get_submodule(vlm.place(f"{tower}blocks.1.attn.hook_z").path)
        weight = projection.weight.detach() if isinstance(projection, nn.Linear) else projection.weight.detach().T
        by_head = torch.einsum("bphd,mhd->bphm", z, weight.view(len(weight), *z.shape[2:]))
        total = by_head.sum(2)
        if projection.bias is not None:
            total = total + projection.bias.detach()
        # Sums in another order: float32 with entries of order 10.
        torch.testing.assert_close(total, acts[f"{tower}blocks.1.hook_attn_out"], atol=1e-4, rtol=1e-4)


@every_model
def test_attention_output_and_mlp_output_make_the_block(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    acts = vlm.capture(inputs, "blocks.2.hook_*")
    total = acts["blocks.2.hook_resid_pre"] + acts["blocks.2.hook_attn_out"] + acts["blocks.2.hook_mlp_out"]
    torch.testing.assert_close(total, acts["blocks.2.hook_resid_post"], atol=1e-4, rtol=1e-4)


def test_one_block_ends_where_the_next_begins() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.inputs_for("llava")
    acts = vlm.capture(inputs, ["*.hook_resid_p*", "blocks.*.hook_resid_p*"])
    for tower, n in (("", 4), ("vision.", 3)):
        for layer in range(n - 1):
            ends, begins = (
                f"{tower}blocks.{layer}.hook_resid_post",
                f"{tower}blocks.{layer + 1}.hook_resid_pre",
            )
            assert torch.equal(acts[ends], acts[begins])
            if tower and layer + 1 > 1:
                continue  # after the features are read
            value = torch.randn(acts[ends].shape[-1])
            outputs = []
            for site in (ends, begins):
                with vlm.edit(Add(site, value, at=[2])), torch.no_grad():
                    outputs.append(vlm(inputs).logits)
            assert torch.equal(*outputs), (ends, begins)


def test_raw_module_paths() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.inputs_for("llava")
    sites = ["model.language_model.layers.1.mlp.gate_proj:output", "model.language_model.layers.1.mlp:input"]
    acts = vlm.capture(inputs, sites)
    for site in sites:
        path, side = site.split(":")
        with torch.no_grad(), reading(vlm.model, path, side) as seen:
            vlm(inputs)
        assert torch.equal(acts[site], seen[0])
    with torch.no_grad():
        before = vlm(inputs).logits
        with vlm.edit(Zero("model.language_model.layers.1.mlp:output", at="last")):
            raw = vlm(inputs).logits
        with vlm.edit(Zero("blocks.1.hook_mlp_out", at="last")):
            named = vlm(inputs).logits
    assert torch.equal(raw, named)
    assert (raw - before).abs().max() > 0.1
    # A convolution's output has the patches of an image, not the prompt, and four axes.
    conv = "model.vision_tower.embeddings.patch_embedding:output"
    assert vlm.capture(inputs, conv)[conv].shape == (3, 24, 2, 2)


def test_selection_of_rows_heads_dtype_and_device() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs((9, 6, 4))
    site = "blocks.1.attn.hook_z"
    whole = vlm.capture(inputs, site)[site]
    some = vlm.capture(inputs, site, at=[-1, -3], heads=[2, 0], rows=[2, 0], dtype=torch.float64, device="cpu")[site]
    want = whole[[2, 0]][:, [8, 6]][:, :, [2, 0]].double()
    assert torch.equal(some, want)
    pattern = "blocks.1.attn.hook_pattern"
    whole = vlm.capture(inputs, pattern)[pattern]
    assert torch.equal(vlm.capture(inputs, pattern, at=[-2, -1], heads=3)[pattern], whole[:, 3:, 7:])
    assert torch.equal(vlm.capture(inputs, pattern, at="last", heads=3)[pattern], whole[:, [3], 8])
    # Integers count from each row's own first token.
    site = "blocks.0.hook_resid_post"
    whole = vlm.capture(inputs, site)[site]
    first = vlm.capture(inputs, site, at=0)[site]
    assert torch.equal(first, torch.stack([whole[0, 0], whole[1, 3], whole[2, 5]]))


# --- patches


@every_model
def test_self_patch_is_an_exact_no_op_at_every_layer(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    acts = vlm.capture(inputs, "blocks.?.hook_*")  # no attention patterns, which another kernel forms
    for layer in range(vlm.n_layers):
        for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
            site = f"blocks.{layer}.hook_{kind}"
            for at, value in ((None, acts[site]), ("last", acts[site][:, -1])):
                with vlm.edit(Replace(site, value, at=at)), torch.no_grad():
                    assert torch.equal(vlm(inputs).logits, acts.output.logits), site


@every_model
def test_patching_the_last_block_gives_the_sources_logits(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    site = RESID_POST.format(vlm.n_layers - 1)
    acts = vlm.capture(inputs, site, at="last")
    source = acts.output.logits[:, -1].flip(0)
    assert (source - acts.output.logits[:, -1]).abs().max() > 1
    with vlm.edit(Replace(site, acts[site].flip(0), at="last")), torch.no_grad():
        patched = vlm(inputs).logits
    torch.testing.assert_close(patched[:, -1], source, atol=1e-5, rtol=1e-5)  # one matrix product in float32
    assert torch.equal(patched[:, :-1], acts.output.logits[:, :-1])


@every_model
def test_positions_before_a_patch_and_other_rows_keep_every_bit(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    with torch.no_grad():
        clean = vlm(inputs).logits
        for layer in range(vlm.n_layers):
            with vlm.edit(Add(RESID_POST.format(layer), torch.linspace(-6, 6, vlm.d_model), at=-3, rows=0)):
                patched = vlm(inputs).logits
            assert torch.equal(patched[1], clean[1])
            assert torch.equal(patched[0, :-3], clean[0, :-3])
            assert ((patched - clean)[0, -3].abs().max() > 1e-3).all()
            # Later tokens hear of it through attention, in later layers only.
            assert torch.equal(patched[0, -2:], clean[0, -2:]) == (layer == vlm.n_layers - 1)


@every_model
def test_an_edit_equals_a_hook_by_hand(name, kernel) -> None:
    vlm, inputs = tiny.vlm(name, kernel), tiny.inputs_for(name)
    value = torch.randn(len(inputs["input_ids"]), vlm.d_model)

    def change(x):
        x[:, -2] = value
        return x

    for layer in range(vlm.n_layers):
        with torch.no_grad(), writing(vlm.model, block(vlm, layer), change):
            want = vlm(inputs).logits
        with torch.no_grad(), vlm.edit(Replace(RESID_POST.format(layer), value, at=-2)):
            assert torch.equal(vlm(inputs).logits, want)


def test_captures_see_edited_values_whoever_was_there_first() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    site = RESID_POST.format(1)
    edit = Zero(site, at="last")
    assert not vlm.capture(inputs, site, at="last", edits=edit)[site].any()
    with vlm.record(site, at="last") as acts, vlm.edit(edit), torch.no_grad():
        vlm(inputs)
    assert not acts[site].any()


def test_nested_edits_apply_in_the_order_given() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    site, one = RESID_POST.format(1), torch.ones(vlm.d_model)
    double = Function(site, lambda x: 2 * x, at="last")
    clean = vlm.capture(inputs, site, at="last")[site]
    for edits, want in (
        ([Add(site, one, at="last"), double], 2 * (clean + 1)),
        ([double, Add(site, one, at="last")], 2 * clean + 1),
    ):
        outer, inner = edits
        assert torch.equal(vlm.capture(inputs, site, at="last", edits=edits)[site], want)
        with vlm.edit(outer), vlm.edit(inner):
            assert torch.equal(vlm.capture(inputs, site, at="last")[site], want)
        with vlm.edit(outer, inner):
            assert torch.equal(vlm.capture(inputs, site, at="last")[site], want)


def test_captures_are_the_users_own() -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    acts = vlm.capture(inputs, "*")
    kept = {site: x.clone() for site, x in acts.items()}
    with torch.no_grad():
        clean = vlm(inputs).logits
        with vlm.edit(*(Zero(site) for site in vlm.sites("blocks.*.hook_*"))):
            vlm(inputs)
        assert all(torch.equal(acts[site], x) for site, x in kept.items())
        with vlm.record("blocks.?.hook_*") as acts:
            for x in vlm.capture(inputs, "blocks.?.hook_*").values():
                x.zero_()
            logits = vlm(inputs).logits
    assert torch.equal(logits, clean)
    value = torch.ones(vlm.d_model)
    with vlm.edit(Replace(RESID_POST.format(0), value)), torch.no_grad():
        vlm.model.model.layers[0](
            torch.zeros(1, 3, vlm.d_model),
            position_embeddings=vlm.model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None]),
        ).zero_()
    assert torch.equal(value, torch.ones(vlm.d_model))


def test_half_precision_model_takes_float32_values() -> None:
    vlm = tiny.VLM(tiny.llama().to(torch.bfloat16))
    inputs, site = tiny.text_inputs(), RESID_POST.format(1)
    value = torch.randn(vlm.d_model)
    acts = vlm.capture(inputs, site, at="last", edits=Replace(site, value, at="last"))
    assert acts[site].dtype == torch.bfloat16
    assert torch.equal(acts[site], value.to(torch.bfloat16).expand(2, -1))
    clean = vlm.capture(inputs, site, at="last")[site]
    added = vlm.capture(inputs, site, at="last", edits=Add(site, value, scale=0.1, at="last"))[site]
    assert torch.equal(added, clean + (0.1 * value).to(torch.bfloat16))
    assert vlm.capture(inputs, site, at="last", dtype=torch.float32)[site].dtype == torch.float32


# --- what never happens, and what goes wrong


class _Boom(Exception):
    pass


def _boom(x):
    raise _Boom


@pytest.mark.parametrize("name", tiny.ALL)
def test_nothing_is_left_behind(name) -> None:
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    with torch.no_grad():
        # Transformers installs recorders of its own, for good, at the first forward that asks for them.
        clean = vlm(inputs, output_hidden_states=True, output_attentions=False).logits
    before = state_of(vlm.model)
    bad = torch.zeros(5, vlm.d_model)
    attempts = [
        (_Boom, lambda: vlm.capture(inputs, "*", edits=Function("blocks.2.hook_resid_post", _boom))),
        (_Boom, lambda: vlm.capture(inputs, "*", edits=Function("blocks.2.attn.hook_pattern", _boom))),
        (
            ShapeError,
            lambda: vlm.capture(inputs, "*", edits=Replace("blocks.2.hook_resid_post", bad, at="last")),
        ),
        (
            NeverFiredError,
            lambda: vlm.capture({**inputs, "pixel_values": None}, "vision.*") if vlm.has_vision else _never(vlm),
        ),
    ]
    for error, attempt in attempts:
        with pytest.raises(error):
            attempt()
        assert state_of(vlm.model) == before
    with pytest.raises(_Boom), vlm.edit(Zero("blocks.1.attn.hook_pattern")), vlm.record("*"):
        assert state_of(vlm.model) != before
        raise _Boom
    assert state_of(vlm.model) == before
    with pytest.raises(_Boom), vlm.edit(Zero("blocks.1.hook_attn_out")):
        vlm.generate(inputs, edits=Function("blocks.2.hook_resid_post", _boom, when=2))
    assert state_of(vlm.model) == before
    with torch.no_grad():
        assert torch.equal(vlm(inputs).logits, clean)


def _never(vlm):
    with vlm.edit(Zero("blocks.1.hook_resid_post")):
        pass


def test_a_session_that_cannot_open_leaves_nothing() -> None:
    vlm = tiny.vlm("llama")
    before = state_of(vlm.model)
    place = vlm.place("blocks.0.hook_resid_post")
    missing = type(place)("gone", "model.layers.0.gone", "output", place.axes)
    from interp.hooks import Tap

    with pytest.raises(AttributeError), Session(vlm.model, Clock(vlm.model, vlm.decoder), [Tap(place), Tap(missing)]):
        pass
    assert state_of(vlm.model) == before


def test_edits_that_never_apply_and_sites_that_never_fire() -> None:
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs((0,))
    edit = Zero("blocks.1.hook_resid_post")
    with pytest.raises(NeverFiredError, match="never applied"), vlm.edit(edit):
        pass
    with pytest.raises(NeverFiredError, match="vision tower runs only"):
        vlm.capture(inputs, "vision.blocks.0.hook_resid_post")
    with pytest.raises(NeverFiredError, match="never applied"):
        vlm.capture(inputs, "hook_embed", edits=Zero("projector.hook_out"))
    with (
        pytest.raises(NeverFiredError, match="1 of 2 edits"),
        vlm.edit(edit, Zero("vision.blocks.0.hook_mlp_out")),
    ):
        vlm(inputs)


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        ({"value": torch.zeros(31)}, ShapeError, "width 31, the site has 32"),
        ({"value": torch.full((32,), torch.nan)}, InputError, "NaN"),
        ({"value": torch.zeros(3, 32), "at": "last"}, ShapeError, "3 examples, the edit selects 2"),
        ({"value": torch.zeros(2, 5, 32), "at": [0, 1]}, ShapeError, "5 positions, the edit selects 2"),
        ({"value": torch.zeros(1, 1, 1, 32), "at": "last"}, ShapeError, "more axes"),
        ({"value": torch.zeros(32), "at": 20}, InputError, "Position 20 is outside row 0"),
        ({"value": torch.zeros(32), "at": "delimiter[4]"}, KeyError, "carry no names"),
        ({"value": torch.zeros(32), "rows": 2}, InputError, "row 2 does not exist"),
        ({"value": torch.zeros(32), "rows": []}, InputError, "no row"),
        ({"value": torch.zeros(32), "heads": 1}, InputError, "no head axis"),
        ({"value": torch.zeros(32), "when": 0}, InputError, "when=0"),
        ({"value": torch.zeros(32), "at": 1.5}, InputError, "no position"),
    ],
)
def test_bad_edits_say_what_is_wrong_and_change_nothing(edit, error, match) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    before = state_of(vlm.model)
    with torch.no_grad():
        clean = vlm(inputs).logits
        with pytest.raises(error, match=match), vlm.edit(Replace("blocks.1.hook_resid_post", **edit)):
            vlm(inputs)
        assert state_of(vlm.model) == before
        assert torch.equal(vlm(inputs).logits, clean)
