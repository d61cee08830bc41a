"""Patching between two runs of a diffusion model, against runs by hand; metrics of images."""

import pytest
import torch

from interp import Diffusion, Replace
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.patching.diffusion import diffusion
from interp.patching.image_metrics import Compared, foreground, layout_agreement, measured, option_difference
from tests import tiny_diffusion as tiny

SITES = {"up": "up.0.hook_out", "text": ["*.cross.hook_k", "*.cross.hook_v"]}
PAIR = ("a red dog", "a blue cat")


def brightness(images):
    return images[:, 0].mean(dim=(1, 2))


def contrast(images):
    """Pixels with random signs, added up: of order 10, and moved by any change of an image."""
    signs = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).sign()
    return (images * signs).sum(dim=(1, 2, 3))


def model(family="unet"):
    return Diffusion(tiny.pipeline(family))


def settings(**changes):
    return {"steps": 3, "guidance_scale": 3.0, "size": tiny.PIXELS, "progress": False} | changes


def noise(sd, seeds):
    shape = (sd.adapter.latent_channels, tiny.LATENT, tiny.LATENT)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.parametrize("half", ["both", "cond"])
def test_values_equal_a_run_with_the_edits_by_hand(half) -> None:
    sd = model()
    found = diffusion(sd, *PAIR, contrast, sites=SITES, seeds=[0, 1], corrupt_seeds=[2, 3], half=half,
                      **settings(), max_rows=6)  # fmt: skip
    assert found.axes == {"site": ("up", "text"), "step": ("0", "1", "2")} and found.n_examples == 2
    run = {"steps": 3, "guidance_scale": 3.0, "progress": False}
    from_, into = noise(sd, [0, 1]), noise(sd, [2, 3])
    donor = sd.generate([PAIR[0]] * 2, capture="up.0.hook_out", half="both", latents=from_, **run)
    torch.testing.assert_close(found.clean, contrast(donor.pixels), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        found.corrupt, contrast(sd.generate([PAIR[1]] * 2, latents=into, **run).pixels), atol=1e-3, rtol=0
    )
    for step in range(3):
        edits = [
            Replace("up.0.hook_out", acts["up.0.hook_out"][step], steps=[step], half=name)
            for name, acts in (("cond", donor.activations), ("uncond", donor.uncond))
            if half == "both" or name == "cond"
        ]
        want = contrast(sd.generate([PAIR[1]] * 2, edits=edits, latents=into, **run).pixels)
        # Rows of other batch sizes round differently; the last step moves the image least, by 3e-3.
        torch.testing.assert_close(found.values[0, step], want, atol=3e-4, rtol=0)
        assert (want - found.corrupt).abs().max() > 2e-3
    control = found.controls["random vector"]
    assert control.shape == (2, 3, 2) and (control - found.corrupt).abs().max() > 2e-3
    assert found.about["clean"] == [PAIR[0]] * 2 and len(found.about["timesteps"]) == 3


def test_all_text_at_all_steps_is_the_other_prompt() -> None:
    sd = model()
    found = diffusion(
        sd, *PAIR, brightness, sites={"text": SITES["text"]}, seeds=3, window=3, control=False, **settings()
    )
    assert found.axes["step"] == ("0-2",)
    # The pooled text goes nowhere in this family: keys and values are all that it reads of a prompt.
    torch.testing.assert_close(found.mean(), torch.ones(1, 1), atol=1e-2, rtol=0)


def test_two_seeds_and_the_denoisers_output() -> None:
    sd = model()
    latents = {"last": ["hook_out"]}
    found = diffusion(sd, PAIR[0], PAIR[0], brightness, sites=latents, seeds=0, corrupt_seeds=1, starts=[2],
                      **settings())  # fmt: skip
    assert found.axes["step"] == ("2",) and (found.values - found.corrupt).abs().max() > 1e-4


def test_other_families_without_guidance() -> None:
    sd = model("sd3")
    found = diffusion(
        sd, *PAIR, brightness, sites=["blocks.1.hook_resid_post"], **settings(guidance_scale=1.0, steps=2)
    )
    assert found.values.shape == (1, 2, 1) and (found.values - found.corrupt).abs().max() > 1e-4


def test_bad_patching() -> None:
    sd = model()
    for changes, error, match in (
        ({"sites": []}, InputError, "several sites"),
        ({"sites": "up.0.hook_out"}, InputError, "several sites"),
        ({"sites": ["up.9.hook_out"]}, UnknownNameError, "up.9.hook_out"),
        ({"starts": [3]}, InputError, "steps 0 to 2"),
        ({"starts": [1, 1]}, InputError, "each once"),
        ({"window": 0}, InputError, "window=0"),
        ({"seeds": [0, 1], "corrupt_seeds": [0, 1, 2]}, InputError, "number"),
        ({"seeds": [0, 1], "max_rows": 1}, InputError, "one variant has to fit"),
        ({"clean": PAIR[1]}, InputError, "same prompt and the same seed"),
        # Before the first text is read, both runs compute the same.
        ({"sites": ["hook_in"], "starts": [0]}, InputError, "both runs compute the same"),
        ({"metric": lambda images: images.mean()}, ShapeError, "for 1 images"),
        ({"metric": lambda images: brightness(images) * torch.nan}, InputError, "NaN"),
    ):
        given = settings(sites=SITES, clean=PAIR[0], corrupt=PAIR[1], metric=brightness) | changes
        with pytest.raises(error, match=match):
            diffusion(sd, **given)
    allowed = diffusion(sd, *PAIR, brightness, sites=["hook_in"], starts=[0], allow_no_effect=True, **settings())
    torch.testing.assert_close(allowed.values[0, 0], allowed.corrupt, atol=1e-5, rtol=0)


# ------------------------------------------------------------ metrics of images


def square(top, left, colour=(0.9, 0.1, 0.1), behind=(0.6, 0.7, 0.7)):
    image = torch.tensor(behind)[:, None, None].repeat(1, 16, 16)
    image[:, top : top + 4, left : left + 4] = torch.tensor(colour)[:, None, None]
    return image


def test_the_foreground_is_what_differs_from_the_border() -> None:
    found = foreground(torch.stack([square(2, 3), square(8, 8, (0.1, 0.1, 0.9), (0.9, 0.9, 0.8))]))
    assert found.sum(dim=(1, 2)).tolist() == [16, 16] and found[0, 2:6, 3:7].all() and found[1, 8:12, 8:12].all()


def test_layout_agreement_sees_places_and_not_colours() -> None:
    clean, corrupt = square(2, 2)[None], square(10, 10)[None]
    blue, half = square(2, 2, (0.1, 0.1, 0.9))[None], square(2, 4)[None]
    measure = measured(layout_agreement(), clean, corrupt)
    for images, want in ((clean, 1.0), (blue, 1.0), (corrupt, -1.0), (half, 8 / 24), (square(2, 10)[None], 0.0)):
        assert float(measure(images)) == pytest.approx(want)
    plain = torch.full((1, 3, 16, 16), 0.5)
    assert float(measured(layout_agreement(), plain, clean)(plain)) == 1.0


def test_option_difference_reads_the_classifiers_field() -> None:
    fields = {"species": ("dog", "cat"), "body": ("red", "green", "blue")}

    def classifier(images):
        return [images.new_zeros(len(images), 2), images.mean(dim=(2, 3))]

    images = torch.stack([square(2, 2), square(2, 2, (0.1, 0.1, 0.9))])
    metric = option_difference(classifier, fields, "body", "red", ("blue", "green"))
    means = images.mean(dim=(2, 3))
    want = torch.stack([means[0, 0] - means[0, 2], means[1, 0] - means[1, 1]])
    torch.testing.assert_close(metric(images), want)
    assert metric.name == "logit difference of body"
    for field, clean, corrupt, match in (
        ("head", "red", "blue", "no field 'head'"),
        ("body", "red", "pink", "no option"),
        ("body", ["red", "blue"], "blue", "same option"),
    ):
        with pytest.raises(InputError, match=match):
            option_difference(classifier, fields, field, clean, corrupt)
    with pytest.raises(ShapeError, match="2 options for 1 images"):
        metric(images[:1])


def test_compared_metrics_see_both_runs() -> None:
    metric = Compared("difference", lambda images, clean, corrupt: brightness(images - clean) + brightness(corrupt))
    first, second = square(2, 2)[None], square(3, 3)[None]
    torch.testing.assert_close(measured(metric, first, second)(second), brightness(2 * second - first))


def test_sites_that_do_not_run_at_every_step_are_refused() -> None:
    with pytest.raises(InputError, match="is in the text_encoder, which does not run at every step"):
        diffusion(model(), *PAIR, contrast, sites=["text_encoder.*.hook_mlp_out"], **settings())


def test_the_unconditional_half_by_itself_and_typos() -> None:
    sd = model()
    sites = {"up": "up.0.hook_out"}
    found = diffusion(
        sd, *PAIR, contrast, sites=sites, seeds=0, corrupt_seeds=1, starts=[0], half="uncond", **settings()
    )
    run = {"steps": 3, "guidance_scale": 3.0, "progress": False}
    donor = sd.generate([PAIR[0]], capture="up.0.hook_out", half="both", latents=noise(sd, [0]), **run)
    edit = Replace("up.0.hook_out", donor.uncond["up.0.hook_out"][0], steps=[0], half="uncond")
    want = contrast(sd.generate([PAIR[1]], edits=[edit], latents=noise(sd, [1]), **run).pixels)
    torch.testing.assert_close(found.values[0, 0], want, atol=3e-4, rtol=0)
    assert found.about["half"] == "uncond" and (want - found.corrupt).abs().max() > 2e-3
    with pytest.raises(InputError, match=r"half='uncnd'.*'both', 'cond' or 'uncond'"):
        diffusion(sd, *PAIR, contrast, sites=sites, half="uncnd", **settings())
    with pytest.raises(InputError, match="without guidance"):
        diffusion(sd, *PAIR, contrast, sites=sites, half="uncond", **settings(guidance_scale=1.0))


def test_a_metric_that_nothing_moves_is_refused() -> None:
    sd = model()

    def constant(images):
        return images.new_ones(len(images))

    given = settings(sites=["up.0.hook_out"], starts=[0])
    with pytest.raises(InputError, match="same constant for the images of both runs"):
        diffusion(sd, *PAIR, constant, **given)
    kept = diffusion(sd, *PAIR, constant, allow_no_effect=True, **given)
    assert kept.to_dataframe(normalised=False)["value"].tolist() == [1.0]

    def of_clean(images, clean, corrupt):
        return (images == clean).flatten(1).all(dim=1).float()

    with pytest.raises(InputError, match="none of the 1 patches moves exactly clean"):
        diffusion(sd, *PAIR, Compared("exactly clean", of_clean), **given)
