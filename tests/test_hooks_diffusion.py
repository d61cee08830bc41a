"""Captures and edits in diffusers' models: every kind of site, against plain torch hooks."""

from contextlib import ExitStack

import pytest
import torch

from interp import Add, Function, Interpolate, MeanAblate, Project, Replace, Resample, Scale, Zero
from interp.errors import InputError, UnknownNameError
from interp.positions import PerRow
from interp.regions import Region
from interp.selection import Where
from tests import tiny_diffusion as tiny
from tests.denoisers import BRANCH, Bench, bench, by_hand

FAMILIES = tiny.FAMILIES


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def seen_by_hand(one: Bench, places, run) -> list[torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}

    def keep(index):
        def change(x):
            seen[index] = x.clone()

        return change

    with ExitStack() as stack:
        for index, place in enumerate(places):
            stack.enter_context(by_hand(one.root, place, keep(index)))
        run()
    return [seen[index] for index in range(len(places))]


def as_site(x: torch.Tensor, place) -> torch.Tensor:
    return x.unflatten(-1, (place.n_heads, -1)) if place.n_heads else x


def bend(x: torch.Tensor) -> torch.Tensor:
    """A change that survives a norm of queries and keys, the same in any order of axes."""
    return x + (3 * x).sin()


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_equal_plain_hooks_at_every_site(family) -> None:
    one = bench(family)
    places = [place for place in one.sites() if place.side != "pattern"]
    clean = one()
    wants = seen_by_hand(one, places, one)
    taps = one.taps([place.site for place in places])
    with one.session(taps):
        assert torch.equal(one(), clean)
    for place, tap, want in zip(places, taps, wants, strict=True):
        assert torch.equal(tap.caught[0], as_site(want, place)), place
        assert len(tap.caught) == 1 and tap.caught[0].ndim == len(place.axes), place
        channel = place.axes.index("channel") if "channel" in place.axes else -1
        assert tap.caught[0].shape[channel] == place.width, place
        assert tap.caught[0].is_contiguous() == want.is_contiguous(), place


@pytest.mark.parametrize("family", ["unet", "sdxl", "sd3", "flux"])
def test_captures_in_text_encoders_and_autoencoders(family) -> None:
    one = bench(family)
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 20, 4, 9], [5, 5, 6, 1]])

    def run() -> None:
        for name, model in one.root.named_children():
            if name.startswith("text_encoder"):
                model(ids)
        one.pipeline.vae.decode(one.pipeline.vae.encode(images).latent_dist.mode())

    places = [p for p in one.sites("text_encoder") + one.sites("vae") if p.side != "pattern"]
    assert len({place.path.split(".")[0] for place in places}) == {"unet": 2, "sdxl": 3, "sd3": 4, "flux": 3}[family]
    wants = seen_by_hand(one, places, run)
    taps = one.taps([place.site for place in places])
    with one.session(taps):
        run()
    for place, tap, want in zip(places, taps, wants, strict=True):
        assert torch.equal(tap.caught[0], as_site(want, place)), place
        channel = place.axes.index("channel") if "channel" in place.axes else -1
        assert tap.caught[0].shape[channel] == place.width, place


@pytest.mark.parametrize("family", ["unet", "sd3", "flux", "pixart"])
def test_an_edit_at_every_kind_of_site_equals_the_one_by_hand(family) -> None:
    one, clean = bench(family), bench(family)()
    for place in one.one_of_each_kind():
        if place.side == "pattern" or one.places.no_effect(place):
            continue
        with by_hand(one.root, place, bend):
            want = one()
        got = one.edited(Function(place.site, bend))
        assert torch.equal(got, want), place
        assert (got - clean).abs().max() > 1e-3, place


def test_an_identity_edit_changes_nothing() -> None:
    for family in FAMILIES:
        one = bench(family)
        edits = [Scale(place.site, 1.0) for place in one.one_of_each_kind() if place.side != "pattern"]
        # Maps come back in the same order in memory, so that the same kernels run.
        assert torch.equal(one.edited(*edits), one()), family


def test_each_edit_at_a_feature_map() -> None:
    one = bench("unet")
    place = one.places.place(BRANCH)
    x = one.capture(BRANCH)
    batch, channels, height, width = x.shape
    generator = torch.Generator().manual_seed(1)
    vector, one_map, maps = (
        torch.randn(shape, generator=generator)
        for shape in ((channels,), (channels, height, width), (batch, channels, height, width))
    )
    basis = torch.linalg.qr(torch.randn(channels, 2, generator=generator))[0]
    wide = vector[:, None, None]
    mean = x.mean(dim=(0, 2, 3), keepdim=True).expand_as(x)
    outside = x - torch.einsum("cd,bdhw->bchw", basis @ basis.T, x)
    cases = [
        (Replace(BRANCH, vector), wide.expand_as(x)),
        (Replace(BRANCH, one_map), one_map.expand_as(x)),
        (Replace(BRANCH, maps), maps),
        (Replace(BRANCH, maps[:1], rows=1), torch.stack([x[0], maps[0]])),
        (Replace(BRANCH, maps[:, :, :1, :1]), maps[:, :, :1, :1].expand_as(x)),
        (Add(BRANCH, one_map, scale=2.0), x + 2 * one_map),
        (Interpolate(BRANCH, maps, weight=0.25), 0.75 * x + 0.25 * maps),
        (Scale(BRANCH, 0.5, rows=[0]), torch.stack([x[0] / 2, x[1]])),
        (Zero(BRANCH), torch.zeros_like(x)),
        (MeanAblate(BRANCH), mean),
        (MeanAblate(BRANCH, vector), wide.expand_as(x)),
        (Resample(BRANCH), x.flip(0)),
        (Resample(BRANCH, maps[:1]), maps[:1].expand_as(x)),
        (Project(BRANCH, basis.T), outside),
        (Function(BRANCH, lambda cells: cells.sigmoid()), x.sigmoid()),
    ]
    clean = one()
    for edit, want in cases:
        taps = one.taps([BRANCH])
        with one.session(taps, [edit]):
            got = one()
        torch.testing.assert_close(taps[0].caught[0], want, atol=1e-5, rtol=1e-5, msg=lambda m, e=edit: f"{e}: {m}")
        with by_hand(one.root, place, lambda _, want=want: want.contiguous()):
            torch.testing.assert_close(got, one(), atol=1e-4, rtol=1e-4)
        assert (got - clean).abs().max() > 1e-3, edit


def test_cells_and_regions() -> None:
    one = bench("unet")
    x = one.capture(BRANCH, size=(16, 24))
    batch, channels, height, width = x.shape
    assert (height, width) == (4, 6)
    left = Region.box(0.0, 0.0, 1.0, 0.5)
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[:, : width // 2] = True
    value = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    for at in (left, Region.mask(inside), inside.flatten().nonzero().flatten().tolist()):
        for given in (value, value[0], value[0, :, 0, 0]):
            wide = given if given.ndim > 1 else given[:, None, None]
            taps = one.taps([BRANCH])
            with one.session(taps, [Replace(BRANCH, given, at=at)]):
                one(size=(16, 24))
            assert torch.equal(taps[0].caught[0], torch.where(inside, wide, x))
    cells = one.capture(BRANCH, size=(16, 24), where=Where(left))
    assert torch.equal(cells, x.flatten(2).transpose(1, 2)[:, inside.flatten()])
    assert torch.equal(one.capture(BRANCH, size=(16, 24), where=Where(1)), x[:, :, 0, 1])
    assert torch.equal(one.capture(BRANCH, size=(16, 24), where=Where(rows=1)), x[1:])
    time = one.capture("hook_time_embed")
    assert time.shape == (2, 64) and torch.equal(one.capture("hook_time_embed", Where(rows=[1])), time[1:])
    assert torch.equal(one.capture(BRANCH, size=(16, 24), where=Where([0, 1], rows=1)), x[1:, :, 0, :2].transpose(1, 2))
    per_row = one.capture(BRANCH, size=(16, 24), where=Where(PerRow((0, -1))))
    assert torch.equal(per_row[:, 0] if per_row.ndim == 3 else per_row, torch.stack([x[0, :, 0, 0], x[1, :, -1, -1]]))


@pytest.mark.parametrize(
    ("family", "site", "first"),
    [
        ("unet", "up.3.attn.0.blocks.0.hook_resid_post", 0),
        ("unet", "up.2.attn.0.blocks.0.self.hook_q", 0),
        ("sd3", "blocks.1.hook_resid_post", 0),
        ("flux", "blocks.1.hook_resid_post", 0),
        ("flux", "blocks.3.attn.hook_v", 5),  # after the text
        ("pixart", "blocks.1.cross.hook_out", 0),
    ],
)
def test_regions_of_tokens(family, site, first) -> None:
    one = bench(family)
    x = one.capture(site)
    taps = one.taps([site])
    with one.session(taps, [Zero(site, at=Region.box(0.5, 0.0, 1.0, 1.0))]):
        one()
    n_cells = x.shape[1] - first
    want = x.clone()
    want[:, first + n_cells // 2 :] = 0  # cells come row by row
    assert torch.equal(taps[0].caught[0], want)
    assert not torch.equal(want, x)


def test_raw_paths_name_any_tensor() -> None:
    one = bench("sd3")
    block = "transformer.transformer_blocks.0"
    pairs = {
        f"{block}:output": "blocks.0.context.hook_resid_post",
        f"{block}:output.0": "blocks.0.context.hook_resid_post",
        f"{block}:output.1": "blocks.0.hook_resid_post",
        f"{block}:input": "blocks.0.hook_resid_pre",
        f"{block}:input.hidden_states": "blocks.0.hook_resid_pre",
        f"{block}:input.encoder_hidden_states": "blocks.0.context.hook_resid_pre",
        "transformer:output": "hook_out",
    }
    for raw, site in pairs.items():
        assert torch.equal(one.capture(raw), one.capture(site)), raw
        # All who touch a tensor see the edits, whatever name they have for it.
        taps = one.taps([raw])
        with one.session(taps, [Zero(site)]):
            one()
        assert not taps[0].caught[0].any(), raw
    unet = bench("unet")
    assert torch.equal(unet.capture("unet.up_blocks.1.resnets.2.conv2:output"), unet.capture(BRANCH))
    with pytest.raises(InputError, match="returns no tensor number 2"):
        one.capture(f"{block}:output.2")
    with pytest.raises(InputError, match="without a tensor 'context'; it takes hidden_states"):
        one.capture(f"{block}:input.context")
    with pytest.raises(UnknownNameError, match="have numbers"):
        one.capture(f"{block}:output.hidden_states")
