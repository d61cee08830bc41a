"""Sessions on diffusers' models: steps and halves, taps, early stop, what is left behind, and what is refused."""

from threading import Thread

import pytest
import torch

from interp import Function, MeanAblate, Replace, Resample, Scale, Zero
from interp.denoising import running
from interp.errors import InputError, NeverFiredError, ShapeError, SiteUnavailableError, UnknownNameError
from interp.hooks import Session, Stopped, Tap, gradients_of
from interp.regions import Region
from interp.selection import Where
from tests.denoisers import BRANCH, Bench, bench, by_hand, state_of


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------- steps and halves

TIMES = (30.0, 20.0, 10.0)


def loop(one: Bench, calls: str, *, told: bool) -> list[torch.Tensor]:
    """A loop with guidance by hand, over three steps: per step the prediction for both halves, stacked."""
    predictions = []
    for step, time in enumerate(TIMES):
        given = one.inputs(batch=4, time=time, seed=step)  # two unconditional rows, then two conditional ones
        rows = {"batch": [slice(0, 4)], "two": [slice(0, 2), slice(2, 4)]}[calls]
        halves = {"batch": [("uncond", "cond")], "two": [("uncond",), ("cond",)]}[calls]
        parts = []
        for some, names in zip(rows, halves, strict=True):
            kept = {
                k: v[some] if isinstance(v, torch.Tensor) and v.ndim and len(v) == 4 else v for k, v in given.items()
            }
            if told:
                with running(step, names):
                    parts.append(one.denoiser(**kept).sample)
            else:
                parts.append(one.denoiser(**kept).sample)
        predictions.append(torch.cat(parts).unflatten(0, (2, 2)))
    return predictions


def alternating():
    names = iter([("uncond",), ("cond",)] * len(TIMES))
    return lambda batch: next(names)


@pytest.mark.parametrize(
    ("family", "calls", "told"),
    [("unet", "batch", False), *(("sd3", calls, told) for calls in ("batch", "two") for told in (True, False))],
)
def test_steps_and_halves(family, calls, told) -> None:
    one = bench(family)
    site = BRANCH if family == "unet" else "blocks.1.hook_resid_post"

    def halves():
        return alternating() if calls == "two" else lambda batch: ("uncond", "cond")

    clean = loop(one, calls, told=told)
    for steps, half, touched in (
        (None, "cond", {(0, 1), (1, 1), (2, 1)}),
        (1, None, {(1, 0), (1, 1)}),
        ([0, 2], "uncond", {(0, 0), (2, 0)}),
        (slice(1, None), "cond", {(1, 1), (2, 1)}),
        (slice(None, None, 2), None, {(0, 0), (0, 1), (2, 0), (2, 1)}),
    ):
        with one.session(edits=[Scale(site, 0.0, steps=steps, half=half)], halves=halves()):
            edited = loop(one, calls, told=told)
        moved = {(step, h) for step in range(3) for h in range(2) if not torch.equal(edited[step][h], clean[step][h])}
        assert moved == touched, (steps, half)
    taps = one.taps([site], Where(steps=slice(1, 3), half="cond"))
    everything = one.taps([site])
    with one.session([*taps, *everything], halves=halves()):
        loop(one, calls, told=told)
    n_calls = 1 if calls == "batch" else 2
    assert (len(taps[0].caught), len(everything[0].caught)) == (2, 3 * n_calls)
    for got, step in zip(taps[0].caught, (1, 2), strict=True):
        whole = torch.cat(everything[0].caught[step * n_calls : (step + 1) * n_calls])
        assert torch.equal(got, whole[2:])


def test_values_and_rows_are_those_of_one_half() -> None:
    one = bench("unet")
    x = one.capture(BRANCH, batch=4)
    value = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    for edit, want in (
        (Replace(BRANCH, value), torch.cat([value, value])),
        (Replace(BRANCH, value, half="uncond"), torch.cat([value, x[2:]])),
        (Replace(BRANCH, value[:1], rows=1, half="cond"), torch.cat([x[:3], value[:1]])),
        (Replace(BRANCH, value[:1], rows=1), torch.stack([x[0], value[0], x[2], value[0]])),
        (Resample(BRANCH), x[[1, 0, 3, 2]]),
        (Resample(BRANCH, half="cond"), x[[0, 1, 3, 2]]),
        (
            MeanAblate(BRANCH, half="uncond"),
            torch.cat([x[:2].mean((0, 2, 3))[None, :, None, None].expand_as(x[:2]), x[2:]]),
        ),
    ):
        taps = one.taps([BRANCH])
        with one.session(taps, [edit], halves=lambda batch: ("uncond", "cond")):
            one(batch=4)
        torch.testing.assert_close(taps[0].caught[0], want, atol=1e-5, rtol=0, msg=lambda m, e=edit: f"{e}: {m}")


def test_halves_of_a_text_encoder() -> None:
    one = bench("unet")
    encoder, ids = one.pipeline.text_encoder, torch.tensor([[3, 20, 4]])
    edit = Zero("text_encoder.blocks.1.hook_mlp_out", half="uncond")
    clean = encoder(ids).last_hidden_state
    with one.session(edits=[edit]):
        with running(None, ("cond",)):
            assert torch.equal(encoder(ids).last_hidden_state, clean)
        with running(None, ("uncond",)):
            assert (encoder(ids).last_hidden_state - clean).abs().max() > 1e-3
        with pytest.raises(InputError, match="nothing says which half"):
            encoder(ids)


# ---------------------------------------------------------------- taps


def test_consumed_captures_are_not_kept() -> None:
    one = bench("unet")
    heard = []
    taps = one.taps([BRANCH], Where(half="cond"), consume=lambda x, call: heard.append((x, call.step, call.timestep)))
    with one.session(taps, halves=lambda batch: ("uncond", "cond")):
        loop(one, "batch", told=True)
    assert [(step, time) for _, step, time in heard] == list(enumerate(TIMES))
    assert torch.equal(heard[1][0], one.capture(BRANCH, batch=4, time=TIMES[1], seed=1)[2:])
    assert taps[0].caught == [] and taps[0].times == 3
    with pytest.raises(InputError, match="no gradient"):
        Tap(one.places.place(BRANCH), grad=True, consume=lambda x, call: None)


def test_captures_are_copies_in_the_asked_dtype() -> None:
    one = bench("unet")
    taps = one.taps([BRANCH], dtype=torch.float16)
    with one.session(taps):
        one()
    assert taps[0].caught[0].dtype == torch.float16
    taps = one.taps(["hook_in", "hook_out"])
    with one.session(taps):
        out = one()
    out.zero_()
    assert taps[1].caught[0].any()


@pytest.mark.parametrize(
    ("family", "site"), [("unet", BRANCH), ("unet", "hook_time_embed"), ("sd3", "blocks.0.hook_resid_post")]
)
def test_gradients(family, site) -> None:
    one = bench(family)
    place, held = one.places.place(site), []
    with torch.enable_grad():

        def keep(x):
            held.append(x.detach().requires_grad_())
            return held[0]

        with by_hand(one.root, place, keep):
            want = torch.autograd.grad(one().square().sum(), held)[0]
        taps = one.taps([site], grad=True)
        with one.session(taps):
            metric = one().square().sum()
        (got,) = gradients_of(metric, taps)
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)
    assert want.abs().max() > 1e-3


# ---------------------------------------------------------------- early stop


@pytest.mark.parametrize(
    ("family", "site", "later"),
    [
        ("unet", "up.1.resnets.0.hook_branch", ["unet.up_blocks.1.resnets.1", "unet.up_blocks.2", "unet.conv_out"]),
        ("sd3", "blocks.1.hook_resid_post", ["transformer.transformer_blocks.2", "transformer.proj_out"]),
        ("flux", "blocks.1.context.hook_q", ["transformer.single_transformer_blocks.0"]),
        ("pixart", "blocks.0.self.hook_pattern", ["transformer.transformer_blocks.0.attn2"]),
    ],
)
def test_nothing_runs_after_the_last_site(family, site, later) -> None:
    one = bench(family)
    before = state_of(one.root)
    want = one.capture(site)
    ran = []
    handles = [
        one.root.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: ran.append(path))
        for path in later
    ]
    early = one.taps(["hook_time_embed", site])
    try:
        for _ in range(2):
            with pytest.raises(Stopped), one.session(early, stop=True):
                one()
        assert not ran
        with one.session(one.taps([site])):
            one()
        assert ran == later
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(early[1].caught[1], want) and len(early[0].caught) == 2
    assert state_of(one.root) == before


def test_a_call_in_which_a_tap_catches_nothing_runs_whole() -> None:
    one, outputs = bench("unet"), []
    taps = one.taps([BRANCH], Where(steps=1))
    with one.session(taps, stop=True):
        outputs.append(one(time=30.0))
        with pytest.raises(Stopped):
            one(time=20.0)
        outputs.append(one(time=10.0))
    assert len(outputs) == 2 and len(taps[0].caught) == 1
    with (
        pytest.raises(NeverFiredError, match="never applied"),
        one.session(one.taps([BRANCH]), [Zero("hook_out")], stop=True),
    ):
        one()


# ---------------------------------------------------------------- what is left, and what is refused


class _Boom(Exception):
    pass


def _boom(x):
    raise _Boom


@pytest.mark.parametrize("family", ["unet", "sd3", "flux", "pixart"])
def test_nothing_is_left_behind(family) -> None:
    one = bench(family)
    before, clean = state_of(one.root), one()
    names = [place.site for place in one.one_of_each_kind()]
    with one.session(one.taps(names), [Scale(place.site, 0.9) for place in one.one_of_each_kind()]):
        assert state_of(one.root) != before
        assert not torch.equal(one(), clean)
    assert state_of(one.root) == before
    last = one.one_of_each_kind()[-1].site
    with pytest.raises(_Boom), one.session(one.taps(names), [Function(last, _boom)]):
        one()
    assert state_of(one.root) == before
    missing = Tap(one.places.place(last).__class__("gone", "gone.path", "output", ("batch", "pos")))
    with pytest.raises(AttributeError), one.session([*one.taps(names), missing]):
        pass
    assert state_of(one.root) == before
    assert torch.equal(one(), clean)


def test_nested_sessions_and_other_threads() -> None:
    one, clean = bench("unet"), bench("unet")()
    outer, inner = one.taps([BRANCH]), one.taps([BRANCH])
    elsewhere = []
    x = one.capture(BRANCH)
    with one.session(outer, [Scale(BRANCH, 2.0)]):
        with one.session(inner, [Scale(BRANCH, 3.0)]):
            one()
        thread = Thread(target=lambda: elsewhere.append(torch.no_grad()(one)()))
        thread.start()
        thread.join()
        one()
    assert torch.equal(inner[0].caught[0], x * 2 * 3) and torch.equal(outer[0].caught[0], x * 2 * 3)
    assert torch.equal(outer[0].caught[1], x * 2)
    assert torch.equal(elsewhere[0], clean)


TOKENS = "up.3.attn.0.blocks.0.hook_resid_post"
CROSS_K = "up.3.attn.0.blocks.0.cross.hook_k"
SELF = "up.3.attn.0.blocks.0.self.hook_pattern"


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (Zero(BRANCH, at="last"), InputError, "diffusion models do not have"),
        (Zero(TOKENS, at="word[1]"), InputError, "give integers, or interp.Region"),
        (Zero(BRANCH, when="every"), InputError, "steps= counts denoiser calls"),
        (Zero(BRANCH, steps=-1), InputError, "0 being its first"),
        (Zero(BRANCH, steps=[]), InputError, "0 being its first"),
        (Zero(BRANCH, steps=slice(3, None, -1)), InputError, "0 being its first"),
        (Zero(BRANCH, half="both"), InputError, "None means both"),
        (Zero(BRANCH, heads=0), InputError, "no head axis"),
        (Zero(CROSS_K, at=Region.box(0.0, 0.0, 1.0, 0.5)), InputError, "not those of the image"),
        (Zero("hook_time_embed", at=0), InputError, "has no positions"),
        (Zero("hook_time_embed", at=Region.box(0.0, 0.0, 1.0, 0.5)), InputError, "not those of the image"),
        (Zero("vae.decoder.hook_in", steps=0), InputError, "outside the denoiser"),
        (Zero("vae.decoder.hook_in", half="cond"), InputError, "autoencoder"),
        (Zero("text_encoder.blocks.0.hook_mlp_out", steps=0), InputError, "outside the denoiser"),
        (Scale(BRANCH, 2.0, renormalise=True), InputError, "no attention pattern"),
        (Zero(SELF, renormalise=True), InputError, "zeros have no sum"),
        (Replace(BRANCH, torch.ones(3)), ShapeError, "width 3, the site has 32"),
        (Replace(BRANCH, torch.ones(3, 2, 2)), ShapeError, "width 3, the site has 32"),
        (Replace(BRANCH, torch.ones(32, 5, 5)), ShapeError, "must be \\[channel\\], \\[channel, 4, 6\\]"),
        (Replace(BRANCH, torch.ones(2, 32)), ShapeError, "must be \\[channel\\]"),
        (Replace(BRANCH, torch.ones(3, 32, 4, 6)), ShapeError, "3 examples, the edit selects 2"),
        (Zero(BRANCH, at=99), InputError, "outside row 0"),
        (Zero(BRANCH, at=[1, 1]), InputError, "selected twice"),
        (Zero(BRANCH, rows=2), InputError, "row 2 does not exist"),
        (Zero(BRANCH, at=Region.box(0.0, 0.0, 0.1, 0.1)), InputError, "too small here"),
        (Zero("text_encoder.blocks.0.hook_mlp_out"), NeverFiredError, "never applied"),
        (Zero(BRANCH, steps=5), NeverFiredError, "steps or guidance half never came"),
        (Zero(BRANCH, half="uncond"), NeverFiredError, "steps or guidance half never came"),
        (Zero("up.1.resnets.3.hook_branch"), UnknownNameError, "Did you mean 'up.1.resnets"),
        (Zero("down.3.attn.0.hook_out"), SiteUnavailableError, "has no attention"),
        (Scale(SELF, 0.0, renormalise=True), InputError, "sum to zero"),
    ],
)
def test_errors(edit, error, match) -> None:
    one = bench("unet")
    before = state_of(one.root)
    with pytest.raises(error, match=match):
        one.edited(edit, size=(16, 24))
    assert state_of(one.root) == before


def test_silent_taps_say_what_may_be_wrong() -> None:
    one = bench("unet")
    with (
        pytest.raises(NeverFiredError, match="call each of their models at its own time"),
        one.session(one.taps(["vae.decoder.hook_out"])),
    ):
        one()
    with (
        pytest.raises(NeverFiredError, match="no such steps or guidance half"),
        one.session(one.taps([BRANCH], Where(steps=4))),
    ):
        one()
    with (
        pytest.raises(ShapeError, match="do not divide into the halves"),
        one.session(one.taps([BRANCH], Where(half="cond")), halves=lambda n: ("uncond", "cond")),
    ):
        one(batch=3)


def test_a_module_run_alone_has_no_grid() -> None:
    one = bench("unet")
    block = one.denoiser.up_blocks[3].attentions[0].transformer_blocks[0]
    text = torch.zeros(1, 5, 32)
    with (
        pytest.raises(InputError, match="not known how the 6 positions"),
        one.session(edits=[Zero(TOKENS, at=Region.box(0.0, 0.0, 1.0, 0.5))]),
    ):
        block(torch.zeros(1, 6, 16), encoder_hidden_states=text)
    assert isinstance(one.session(), Session)
