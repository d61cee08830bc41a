"""Attention probabilities in diffusers' models: under every processor, and only where they are touched."""

from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch.overrides import TorchFunctionMode

from interp import Add, Function, Replace, Scale, Zero
from interp.errors import SiteUnavailableError
from interp.regions import Region
from interp.selection import Where
from tests.denoisers import Bench, bench, by_hand, state_of

FAMILIES = ("unet", "sdxl", "sd3", "flux", "pixart")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Fused(TorchFunctionMode):
    """Sees the calls that reach torch's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.calls.append(given)
        return func(*args, **(kwargs or {}))


def probabilities(given) -> torch.Tensor:
    """The closed form, in double precision."""
    query, key = given["query"].double(), given["key"].double()
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return (scores if given.get("attn_mask") is None else scores + given["attn_mask"]).softmax(-1)


def patterns(one: Bench) -> list[str]:
    return [place.site for place in one.sites() if place.side == "pattern"]


@contextmanager
def processors(one: Bench, site: str, processor):
    module = one.root.get_submodule(one.places.place(site).path)
    own = module.processor
    module.set_processor(processor)
    try:
        yield module
    finally:
        module.set_processor(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_the_closed_form(family) -> None:
    one = bench(family)
    sites = patterns(one)
    with Fused() as fused:
        clean = one()
    wants = {tuple(call["query"].shape): None for call in fused.calls}
    assert len(fused.calls) == len(sites) and wants
    taps = one.taps(sites)
    with Fused() as left, one.session(taps):
        got = one()
    assert not left.calls
    # Explicit and fused attention round differently; many layers of large random weights amplify that.
    torch.testing.assert_close(got, clean, atol=1e-3, rtol=1e-3)
    for tap, call in zip(taps, fused.calls, strict=True):
        torch.testing.assert_close(tap.caught[0].double(), probabilities(call), atol=1e-4, rtol=0)
        assert tap.caught[0].ndim == 4 and tap.place.axes == ("batch", "head", "query", "key")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_touched_module_leaves_the_kernel(family) -> None:
    one = bench(family)
    sites = patterns(one)
    with Fused() as fused:
        clean = one()
    for site in (sites[0], sites[-1]):
        with Fused() as left, one.session(edits=[Scale(site, 1.0)]):
            got = one()
        assert len(left.calls) == len(fused.calls) - 1
        # One layer of explicit attention, whose rounding (about 1e-7) later layers amplify up to a hundredfold.
        torch.testing.assert_close(got, clean, atol=1e-5 * float(clean.abs().max()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_equal_those_of_the_heads_outputs(family) -> None:
    """What the heads put out is the edited probabilities times the values."""
    one = bench(family)
    clean = one()
    with Fused() as fused:
        one()
    sites = patterns(one)
    for index in sorted({0, len(sites) // 2, len(sites) - 1}):
        site, call = sites[index], fused.calls[index]
        pattern, value = probabilities(call), call["value"].double()
        n_query, n_key = pattern.shape[-2:]
        bias = torch.rand(n_query, n_key, generator=torch.Generator().manual_seed(0))
        halved = pattern.clone()
        halved[:, 1, [0, -1]] *= 0.5  # in joint attention one of the image's queries and one of the text's
        for edit, want in (
            (Scale(site, 0.5, heads=1, at=[0, -1]), halved),
            (Zero(site, rows=1), torch.stack([pattern[0], pattern[1] * 0])),
            (Replace(site, bias), bias.expand_as(pattern)),
            (Add(site, bias, renormalise=True), (pattern + bias) / (pattern + bias).sum(-1, keepdim=True)),
            (Function(site, lambda p: p.flip(-1)), pattern.flip(-1)),
        ):
            heads = []
            module = one.root.get_submodule(one.places.place(site).path)
            seen = one.places.place(site.replace("hook_pattern", "hook_z"))
            with by_hand(one.root, seen, lambda x, heads=heads: heads.append(x.clone())), one.session(edits=[edit]):
                got = one()
            whole = (want.double() @ value).transpose(1, 2).flatten(2).float()
            # In joint attention the text's queries go elsewhere: SD3 has them last, Flux's double blocks first.
            n = heads[0].shape[1]
            part = whole[:, -n:] if family == "flux" else whole[:, :n]
            torch.testing.assert_close(heads[0], part, atol=1e-4, rtol=1e-4, msg=lambda m, e=edit: f"{e}: {m}")
            assert (got - clean).abs().max() > 1e-3, edit
            assert type(module.processor).__name__ != "_Probing"


def test_regions_select_queries() -> None:
    for family, site, first in (
        ("unet", "up.3.attn.0.blocks.0.cross.hook_pattern", 0),
        ("sd3", "blocks.1.attn.hook_pattern", 0),
        ("flux", "blocks.1.attn.hook_pattern", 5),
        ("flux", "blocks.2.attn.hook_pattern", 5),
    ):
        one = bench(family)
        clean = one.capture(site)
        taps = one.taps([site])
        lower = Region.box(0.5, 0.0, 1.0, 1.0)
        with one.session(taps, [Zero(site, at=lower)]):
            one()
        zeroed = (taps[0].caught[0] == 0).all(-1).all(1)
        n_cells = clean.shape[2] - 5 if family != "unet" else clean.shape[2]
        want = torch.zeros_like(zeroed)
        want[:, first + n_cells // 2 : first + n_cells] = True
        assert torch.equal(zeroed, want), site
        torch.testing.assert_close(one.capture(site, Where(lower)), clean[:, :, want[0]], atol=1e-5, rtol=0)


def test_patterns_of_text_encoders() -> None:
    one = bench("unet")
    encoder, ids = one.pipeline.text_encoder, torch.tensor([[3, 20, 4, 9]])
    sites = [place.site for place in one.sites("text_encoder") if place.side == "pattern"]
    taps = one.taps([*sites, *(site.replace("pattern", leaf) for site in sites for leaf in ("v", "z"))])
    clean = encoder(ids).last_hidden_state
    with one.session(taps):
        torch.testing.assert_close(encoder(ids).last_hidden_state, clean, atol=1e-4, rtol=1e-4)
    caught = {tap.place.site: tap.caught[0] for tap in taps}
    for site in sites:
        assert not caught[site].triu(1).any()  # causal
        z = torch.einsum("bhqk,bkhd->bqhd", caught[site], caught[site.replace("pattern", "v")])
        torch.testing.assert_close(caught[site.replace("pattern", "z")], z, atol=1e-5, rtol=1e-5)
    with one.session(edits=[Zero(sites[0])]):
        assert (encoder(ids).last_hidden_state - clean).abs().max() > 1e-3


SITE = "up.3.attn.0.blocks.0.cross.hook_pattern"


def test_other_processors() -> None:
    one = bench("unet")
    want, clean = one.capture(SITE), one()
    scaled = one.edited(Scale(SITE, 0.5, heads=1))
    before = state_of(one.root)
    with processors(one, SITE, AttnProcessor()):
        torch.testing.assert_close(one.capture(SITE), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.edited(Scale(SITE, 0.5, heads=1)), scaled, atol=1e-3, rtol=1e-3)
    with processors(one, SITE, SlicedAttnProcessor(1)):
        with pytest.raises(SiteUnavailableError, match=r"SlicedAttnProcessor .* turn off attention slicing"):
            one.capture(SITE)
        torch.testing.assert_close(one(), clean, atol=1e-3, rtol=1e-3)

    class Twice(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) + super().__call__(*args, **kwargs)

    with processors(one, SITE, Twice()), pytest.raises(SiteUnavailableError, match="several times in one forward"):
        one.capture(SITE)
    assert {k: v[6] for k, v in state_of(one.root).items()} == {k: v[6] for k, v in before.items()}


class Weighted(torch.nn.Module):
    """A processor with weights of its own, and an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.heard = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, strength=1.0):
        self.heard.append(strength)
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask) * self.gain * strength


def test_processors_with_weights_and_arguments_of_their_own(caplog) -> None:
    one = bench("unet")
    with processors(one, SITE, Weighted()) as module:
        before, names = state_of(module), list(module.state_dict())
        taps = one.taps([SITE])
        with one.session(taps):
            assert list(module.state_dict()) == names and "processor.gain" in names
            assert module.get_processor().gain is module._modules["processor"].gain
            given = one.inputs()
            kwargs = {"strength": 2.0}
            hidden = torch.zeros(2, 6, 16)
            module(hidden, given["encoder_hidden_states"], **kwargs)
        assert module._modules["processor"].heard == [2.0] and len(taps[0].caught) == 1
        assert not caplog.records  # nothing was said to be ignored
        assert state_of(module) == before
    # A processor that the user sets within the block is theirs.
    with processors(one, SITE, AttnProcessor2_0()) as module:
        with one.session(one.taps([SITE])):
            one()
            mine = AttnProcessor()
            module.set_processor(mine)
        assert module.processor is mine


def test_threads_that_touch_nothing_keep_the_kernel() -> None:
    one, clean, elsewhere = bench("unet"), bench("unet")(), []

    def run() -> None:
        with torch.no_grad(), Fused() as fused:
            elsewhere.append((one(), len(fused.calls)))

    with one.session(edits=[Zero(SITE)]):
        thread = Thread(target=run)
        thread.start()
        thread.join()
        assert not torch.equal(one(), clean)
    assert torch.equal(elsewhere[0][0], clean) and elsewhere[0][1] == len(patterns(one))


def test_nested_sessions_share_a_module() -> None:
    one = bench("unet")
    want = one.capture(SITE)
    outer, inner = one.taps([SITE]), one.taps([SITE])
    before = state_of(one.root)
    with one.session(outer, [Scale(SITE, 2.0)]):
        with one.session(inner, [Scale(SITE, 3.0)]):
            one()
        one()
    for got, factor in ((inner[0].caught[0], 6), (outer[0].caught[0], 6), (outer[0].caught[1], 2)):
        torch.testing.assert_close(got, want * factor)
    assert state_of(one.root) == before
