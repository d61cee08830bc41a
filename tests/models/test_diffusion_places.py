"""Where the sites of diffusers' pipelines are, and what is said about those that are not there."""

from contextlib import ExitStack
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from interp import Zero
from interp.denoising import DenoiserClock
from interp.errors import InputError, SiteUnavailableError, UnknownNameError
from interp.hooks import Session, Tap
from interp.models.checks import placed
from interp.models.diffusion_places import components, diffusion_places
from interp.sites import match, parse
from tests import tiny_diffusion as tiny
from tests.denoisers import by_hand

PATHS = {
    "unet": {
        "hook_in": ("unet", "input", None),
        "hook_out": ("unet", "output", None),
        "hook_time_embed": ("unet.time_embedding", "output", None),
        "down.1.resnets.0.hook_in": ("unet.down_blocks.1.resnets.0", "input", None),
        "mid.resnets.1.hook_branch": ("unet.mid_block.resnets.1.conv2", "output", None),
        "up.2.resnets.1.hook_out": ("unet.up_blocks.2.resnets.1", "output", None),
        "down.0.hook_out": ("unet.down_blocks.0", "output", None),
        "up.2.attn.1.hook_in": ("unet.up_blocks.2.attentions.1", "input", None),
        "mid.attn.0.blocks.0.hook_resid_pre": ("unet.mid_block.attentions.0.transformer_blocks.0", "input", None),
        "up.3.attn.2.blocks.0.cross.hook_k": (
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k",
            "output",
            None,
        ),
        "up.3.attn.2.blocks.0.self.hook_v_in": (
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_v",
            "input",
            None,
        ),
        "up.3.attn.2.blocks.0.self.hook_z": (
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0",
            "input",
            None,
        ),
        "up.3.attn.2.blocks.0.mlp.hook_post": (
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
            "input",
            None,
        ),
        "text_encoder.blocks.1.attn.hook_q": ("text_encoder.encoder.layers.1.self_attn.q_proj", "output", None),
        "text_encoder.ln_final.hook_out": ("text_encoder.final_layer_norm", "output", None),
        "vae.encoder.down.1.resnets.0.hook_branch": ("vae.encoder.down_blocks.1.resnets.0.conv2", "output", None),
        "vae.encoder.hook_out": ("vae.encoder", "output", None),
        "vae.decoder.hook_in": ("vae.decoder", "input", None),
        "vae.decoder.up.1.hook_out": ("vae.decoder.up_blocks.1", "output", None),
        "vae.decoder.mid.hook_out": ("vae.decoder.mid_block", "output", None),
    },
    "sd3": {
        "blocks.1.hook_resid_pre": ("transformer.transformer_blocks.1", "input", None),
        "blocks.1.hook_resid_post": ("transformer.transformer_blocks.1", "output", 1),
        "blocks.1.context.hook_resid_pre": ("transformer.transformer_blocks.1", "input", "encoder_hidden_states"),
        "blocks.1.context.hook_resid_post": ("transformer.transformer_blocks.1", "output", None),
        "blocks.2.context.hook_q": ("transformer.transformer_blocks.2.attn.add_q_proj", "output", None),
        "blocks.0.attn.hook_pattern": ("transformer.transformer_blocks.0.attn", "pattern", None),
        "blocks.0.hook_attn_out": ("transformer.transformer_blocks.0.attn", "output", None),
        "blocks.0.context.hook_attn_out": ("transformer.transformer_blocks.0.attn", "output", 1),
        "text_encoder_2.blocks.0.hook_resid_post": ("text_encoder_2.text_model.encoder.layers.0", "output", None),
        "text_encoder_3.blocks.1.hook_mlp_out": (
            "text_encoder_3.encoder.block.1.layer.1.DenseReluDense",
            "output",
            None,
        ),
    },
    "flux": {
        "blocks.1.attn.hook_k": ("transformer.transformer_blocks.1.attn.to_k", "output", None),
        "blocks.2.attn.hook_k": ("transformer.single_transformer_blocks.0.attn.to_k", "output", None),
        "blocks.3.hook_resid_post": ("transformer.single_transformer_blocks.1", "output", 1),
        "blocks.3.attn.hook_z": ("transformer.single_transformer_blocks.1.attn", "output", None),
    },
    "pixart": {
        "blocks.2.cross.hook_pattern": ("transformer.transformer_blocks.2.attn2", "pattern", None),
        "blocks.2.hook_attn_out": ("transformer.transformer_blocks.2.attn1", "output", None),
        "hook_time_embed": ("transformer.adaln_single.emb", "output", None),
    },
}


@pytest.mark.parametrize("family", list(PATHS))
def test_names_and_paths(family) -> None:
    places = diffusion_places(tiny.pipeline(family))
    for site, station in PATHS[family].items():
        assert places.place(site).station == station, site
    for place in places.places.values():
        assert place.path in places.modules and not place.positional
        first = place.site.split(".")[0]
        part = "vae" if first == "vae" else "text_encoder" if first.startswith("text_encoder") else "denoiser"
        assert place.part == part, place
    names = places.names()
    assert len(set(names)) == len(names)
    parts = [places.places[name].part for name in names]
    assert parts == sorted(parts, key=["text_encoder", "denoiser", "vae"].index)


def test_the_twelve_branches_of_stable_diffusion() -> None:
    places = diffusion_places(tiny.pipeline("unet"))
    sites = match("up.*.resnets.*.hook_branch", places.names(), places.reasons)
    assert sites == [f"up.{i}.resnets.{j}.hook_branch" for i in range(4) for j in range(3)]
    convs = [tiny.pipeline("unet").unet.up_blocks[i].resnets[j].conv2 for i in range(4) for j in range(3)]
    assert [places.place(site).width for site in sites] == [conv.out_channels for conv in convs]
    parsed = parse("up.3.attn.2.blocks.0.self.hook_q")
    assert parsed and (parsed.tower, parsed.layer, parsed.leaf) == ("up.3.attn.2", 0, "self.hook_q")


@pytest.mark.parametrize(
    ("family", "site", "match"),
    [
        ("unet", "down.3.attn.0.hook_in", "down.3 block of this UNet has no attention"),
        ("unet", "text_encoder.blocks.0.hook_resid_mid", "local variable"),
        ("sd3", "blocks.2.context.hook_resid_post", "the text stream ends in this block"),
        ("sd3", "text_encoder_3.blocks.0.attn.hook_pattern", "T5 adds a bias"),
        ("flux", "blocks.2.hook_mlp_out", "projects attention and feed-forward together"),
        ("flux", "blocks.3.context.hook_q", r"take blocks\.3\.attn\.hook_q"),
    ],
)
def test_sites_that_are_not_offered_say_why(family, site, match) -> None:
    with pytest.raises(SiteUnavailableError, match=match):
        diffusion_places(tiny.pipeline(family)).place(site)


@pytest.mark.parametrize(
    ("family", "site", "match"),
    [
        ("unet", "up.4.resnets.0.hook_branch", "Did you mean 'up."),
        ("unet", "up.1.resnets.0.hook_brunch", r"Did you mean 'up\.1\.resnets\.0\.hook_branch'"),
        ("sd3", "blocks.3.hook_resid_post", "layers 0 to 2"),
        ("flux", "blocks.4.attn.hook_q", "layers 0 to 3"),
        ("unet", "up.3.attn.0.blocks.1.self.hook_q", "layers 0 to 0"),
        ("unet", "unet.up_block.1:output", "Did you mean 'unet.up_blocks.1"),
        ("pixart", "up.1.resnets.0.hook_branch", "unknown site"),
    ],
)
def test_sites_that_do_not_exist(family, site, match) -> None:
    with pytest.raises(UnknownNameError, match=match):
        diffusion_places(tiny.pipeline(family)).place(site)


@torch.no_grad()
def test_edits_that_no_one_would_see() -> None:
    """The states that SDXL reads do not depend on what is refused, and do on what comes before."""
    pipeline = tiny.pipeline("sdxl")
    places = diffusion_places(pipeline)
    ids = torch.tensor([[3, 20, 4, 9]])
    encoder = pipeline.text_encoder

    def states(path: str, side: str) -> torch.Tensor:
        module = components(pipeline).get_submodule(path)
        if side == "output":
            handle = module.register_forward_hook(
                lambda m, args, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0, prepend=True
            )
        else:
            handle = module.register_forward_pre_hook(lambda m, args: (args[0] * 0, *args[1:]))
        try:
            return encoder(ids, output_hidden_states=True).hidden_states[-2]
        finally:
            handle.remove()

    clean = encoder(ids, output_hidden_states=True).hidden_states[-2]
    refused = 0
    for place in places.places.values():
        if not place.path.startswith("text_encoder.") or place.side == "pattern":
            continue
        moved = (states(place.path, place.side) - clean).abs().max() > 1e-3
        assert moved == (places.no_effect(place) is None), place
        if not moved:
            refused += 1
            with pytest.raises(SiteUnavailableError, match="would change nothing: SDXL reads"):
                placed(Zero(place.site), places)
    assert refused > 5
    flux = diffusion_places(tiny.pipeline("flux"))
    with pytest.raises(SiteUnavailableError, match="nothing reads the text stream"):
        placed(Zero("blocks.3.context.hook_resid_post"), flux)
    placed(Zero("blocks.2.context.hook_resid_post"), flux)


def test_components_are_the_pipelines_own() -> None:
    pipeline = tiny.pipeline("unet")
    before = list(pipeline.unet._modules)
    root = components(pipeline)
    assert root.get_submodule("unet") is pipeline.unet and root.get_submodule("vae") is pipeline.vae
    assert set(dict(root.named_children())) == {"unet", "text_encoder", "vae"}
    assert list(pipeline.unet._modules) == before


def test_pipelines_without_a_table() -> None:
    with pytest.raises(InputError, match="no UNet and no transformer; its models are vae"):
        diffusion_places(SimpleNamespace(components={"vae": nn.Linear(1, 1), "scheduler": object()}))
    with pytest.raises(InputError, match="no table of sites for a Linear"):
        diffusion_places(SimpleNamespace(components={"transformer": nn.Linear(1, 1)}))


def test_the_levels_of_a_tiny_autoencoder() -> None:
    vae = tiny.tiny_autoencoder()
    places = diffusion_places(SimpleNamespace(components={"unet": tiny.pipeline("unet").unet, "vae": vae}))
    assert places.place("vae.decoder.hook_in").station == ("vae.decoder", "input", None)
    sites = [name for name in places.names() if name.startswith("vae.")]
    block = ("hook_in", "hook_branch", "hook_out")

    def level(name: str, n_blocks: int) -> list[str]:
        return [*(f"{name}.resnets.{j}.{leaf}" for j in range(n_blocks) for leaf in block), f"{name}.hook_out"]

    encoder = [level(f"vae.encoder.down.{i}", n) for i, n in enumerate((0, 1, 2))]
    decoder = [level(f"vae.decoder.up.{i}", n) for i, n in enumerate((2, 1, 1))]
    assert sites == [
        *chain(*encoder), "vae.encoder.hook_out", "vae.decoder.hook_in", *chain(*decoder), "vae.decoder.hook_out"
    ]  # fmt: skip
    caught: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            place = places.place(site)
            stack.enter_context(by_hand(places_root(vae), place, partial(caught.__setitem__, site)))
        images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        with torch.no_grad():
            vae.decode(vae.encode(images).latents)
    assert {site: x.shape[1] for site, x in caught.items()} == {site: places.place(site).width for site in sites}
    sides = [tuple(caught[f"vae.encoder.down.{i}.hook_out"].shape[2:]) for i in range(3)]
    assert sides == [(16, 24), (8, 12), (4, 6)]
    sides = [tuple(caught[f"vae.decoder.up.{i}.hook_out"].shape[2:]) for i in range(3)]
    assert sides == [(8, 12), (16, 24), (16, 24)]
    # The branch is what the skip is added to, before the activation.
    first = "vae.decoder.up.0.resnets.0"
    joined = (caught[f"{first}.hook_in"] + caught[f"{first}.hook_branch"]).relu()
    assert torch.equal(joined, caught[f"{first}.hook_out"])
    assert torch.equal(caught["vae.decoder.up.2.hook_out"] * 2 - 1, caught["vae.decoder.hook_out"])
    with pytest.raises(SiteUnavailableError, match="no middle block"):
        places.place("vae.encoder.mid.hook_out")


def places_root(vae: nn.Module) -> nn.Module:
    root = nn.Module()
    root.add_module("vae", vae)
    return root


def test_attention_without_a_block_around_it_gives_feature_maps() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=(16, 24),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    pipeline = SimpleNamespace(components={"unet": tiny.redraw(unet, 3)})
    places = diffusion_places(pipeline)
    names = match("down.0.attn.0.self.*", places.names(), places.reasons)
    taps = [Tap(places.place(name)) for name in names]
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Session(components(pipeline), DenoiserClock(unet), taps):
        unet(latents, 5, encoder_hidden_states=torch.zeros(2, 3, 32))
    for tap in taps:
        assert tap.caught[0].ndim == len(tap.place.axes), tap.place
    assert names[-1].endswith("hook_out") and taps[-1].caught[0].shape == (2, 16, 8, 6)
