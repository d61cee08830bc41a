"""Every family's sites, and the ones that a model cannot offer."""

import pytest
import torch

from interp import VLM, Replace, Zero
from interp.errors import InputError, SiteUnavailableError, UnknownNameError
from interp.models.families import FAMILIES, family_of
from tests import tiny
from tests.plain import state_of

PER_BLOCK = 10  # resid_pre, q, k, v, pattern, z, attn_out, post, mlp_out, resid_post


@pytest.mark.parametrize("name", tiny.ALL)
def test_sites(name) -> None:
    vlm = tiny.vlm(name)
    sites = vlm.sites()
    assert len(sites) == len(set(sites)) == 3 + 4 * PER_BLOCK + (1 + 3 * PER_BLOCK + 2) * vlm.has_vision
    assert vlm.sites("blocks.*.hook_resid_post") == [f"blocks.{i}.hook_resid_post" for i in range(4)]
    assert (vlm.n_layers, vlm.d_model, vlm.n_heads) == (4, 32, 4)
    assert vlm.d_head == {"mistral": 8, "qwen2": 8, "gpt2": 8}.get(name, 12)
    key_heads = 4 if name == "gpt2" else 2
    assert vlm.place("blocks.0.attn.hook_k").n_heads == key_heads
    assert vlm.final_norm(torch.ones(1, 32)).shape == (1, 32) and vlm.unembed(torch.ones(1, 32)).shape == (
        1,
        97,
    )


def tiled_inputs():
    """One image in a whole view and two tiles: 4 + 8 tokens, and 4 ends of rows."""
    ids = torch.tensor([[5, 6, *[tiny.IMAGE_TOKEN] * 14, 7, 8, 9]])
    pixels = torch.randn(1, 3, 3, 16, 16)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[16, 32]]),
    }


def single_inputs(tokens: int, pixels: torch.Tensor, **more: torch.Tensor):
    ids = torch.tensor([[5, 6, *[tiny.IMAGE_TOKEN] * tokens, 7, 8, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}


RELATIVES = {
    "llava_next": (tiny.llava_next, tiled_inputs),
    "llava_onevision": (
        tiny.llava_onevision,
        lambda: single_inputs(10, torch.randn(1, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]])),
    ),
    "idefics2": (tiny.idefics2, lambda: single_inputs(4, torch.randn(1, 1, 3, 16, 16))),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_the_relatives_of_llava(name) -> None:
    make, inputs_of = RELATIVES[name]
    vlm, inputs = VLM(make()), inputs_of()
    acts = vlm.capture(inputs, "*")
    assert list(acts) == vlm.sites() and vlm.n_layers == 4
    assert acts["vision.blocks.0.attn.hook_pattern"].sum(-1).sub(1).abs().max() < 1e-5
    value = torch.randn(24)
    used = [
        s for s in ("vision.blocks.1.hook_resid_post", "projector.hook_out", "blocks.1.hook_resid_post") if s in acts
    ]
    used += ["vision.blocks.2.hook_mlp_out", "vision.ln_final.hook_out"] if name == "idefics2" else []
    with torch.no_grad():
        clean = vlm(inputs).logits
        for site in used:
            edit = Replace(site, value if site.startswith("vision") else torch.randn(32), at=1)
            with vlm.edit(edit):
                assert (vlm(inputs).logits[:, -1] - clean[:, -1]).abs().max() > 1e-3, site
    variants = [[Zero(f"blocks.{i}.hook_resid_post", at="last")] for i in range(4)]
    swept = vlm.sweep(inputs, variants)
    assert swept.plan.shared_prefix == inputs["input_ids"].shape[1] - 1 and swept.plan.images_shared
    for index, edits in enumerate(variants):
        with vlm.edit(*edits), torch.no_grad():
            torch.testing.assert_close(swept.logits[index], vlm(inputs).logits[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("feature_layer", [-2, 1, -1])
def test_the_features_that_the_language_model_reads_can_be_edited(feature_layer, warm) -> None:
    last = {-2: 1, 1: 0, -1: 2}[feature_layer]
    vlm, inputs = VLM(tiny.llava(feature_layer=feature_layer)), tiny.image_inputs()
    clean = VLM(tiny.llava(feature_layer=feature_layer))(inputs).logits
    if warm:
        vlm(inputs)
    with vlm.edit(Zero(f"vision.blocks.{last}.hook_resid_post", rows=0)), torch.no_grad():
        edited = vlm(inputs).logits
    assert (edited[0, -1] - clean[0, -1]).abs().max() > 0.1
    assert torch.equal(edited[1], clean[1])  # the first image belongs to the first row
    with torch.no_grad():
        assert torch.equal(vlm(inputs).logits, clean)
    late = vlm.sites("vision.blocks.*.hook_resid_post")[last + 1 :]
    assert all(vlm.capture(inputs, site)[site].any() for site in late)
    for site in late:
        with pytest.raises(SiteUnavailableError, match=f"after block {last}"), vlm.edit(Zero(site)):
            pass


def test_raw_paths_that_the_language_model_does_not_read() -> None:
    vlm, inputs = VLM(tiny.llava()), tiny.image_inputs()
    before = state_of(vlm.model)
    tower = "model.vision_tower"
    for site in (
        f"{tower}.encoder.layers.2:output",
        f"{tower}.encoder.layers.2:input",
        f"{tower}.encoder.layers.2.mlp.fc1:output",
        f"{tower}.post_layernorm:output",
    ):
        with pytest.raises(SiteUnavailableError, match="after block 1"), vlm.edit(Zero(site)):
            vlm(inputs)
        if not site.endswith("layernorm:output"):
            assert vlm.capture(inputs, site)[site].any()
    assert state_of(vlm.model) == before
    with torch.no_grad():
        clean = vlm(inputs).logits
        with vlm.edit(Zero(f"{tower}.encoder.layers.1.mlp:output")):
            assert not torch.equal(vlm(inputs).logits, clean)
    # Nothing of the kind where the last block's features are read.
    with VLM(tiny.llava(feature_layer=-1)).edit(Zero(f"{tower}.encoder.layers.2:output")) as last, torch.no_grad():
        last(inputs)


def test_sites_that_do_not_exist() -> None:
    vlm = tiny.vlm("llava")
    before = state_of(vlm.model)
    for site, error, match in (
        ("blocks.4.hook_resid_post", UnknownNameError, "layer 4 is out of range.*layers 0 to 3"),
        ("vision.blocks.3.hook_resid_post", UnknownNameError, "layers 0 to 2"),
        ("blocks.1.hook_resid_pots", UnknownNameError, "Did you mean 'blocks.1.hook_resid_post'"),
        ("blocks.1.hook_resid_mid", SiteUnavailableError, "hook_attn_out"),
        ("vision.ln_final.hook_out", SiteUnavailableError, "before the norm"),
        (
            "model.language_model.layer.1:output",
            UnknownNameError,
            "Did you mean 'model.language_model.layers.1",
        ),
        ("model:output", InputError, "not a tensor"),
    ):
        with pytest.raises(error, match=match):
            vlm.capture(tiny.image_inputs(), site)
        with pytest.raises(error, match=match), vlm.edit(Zero(site)):
            vlm(tiny.image_inputs())
    with pytest.raises(UnknownNameError, match="unknown site"):
        tiny.vlm("llama").place("vision.blocks.0.hook_resid_post")
    assert state_of(vlm.model) == before


def test_families() -> None:
    assert {name for family in FAMILIES for name in family.model_types} >= {
        "llava",
        "llama",
        "gpt2",
        "idefics2",
    }
    with pytest.raises(InputError, match="Did you mean 'mistral'"):
        family_of("mistrall")
    with pytest.raises(InputError, match="wraps a transformers model, not Linear"):
        VLM(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="load it with its head"):
        VLM(tiny.llama().model)
