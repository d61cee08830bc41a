from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.latents import decode, encode, pixels, size_of, to_pil
from tests.tiny_diffusion import autoencoder, redraw


@pytest.fixture
def photos() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pil_images_become_pixels_in_minus_one_to_one(photos: list[Image.Image], tmp_path: Path) -> None:
    got = pixels(photos, multiple=8)
    wanted = np.stack([np.asarray(photo, dtype=np.float64) for photo in photos]).transpose(0, 3, 1, 2) / 255 * 2 - 1
    assert got.shape == (2, 3, 16, 24)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)  # single precision
    photos[0].save(tmp_path / "one.png")
    assert torch.equal(pixels(tmp_path / "one.png"), got[:1])
    assert torch.equal(pixels(photos[1]), got[1:])


def test_size_resizes_bilinearly(photos: list[Image.Image]) -> None:
    got = pixels(photos[0], size=(8, 16), multiple=8)
    wanted = np.asarray(photos[0].resize((16, 8), Image.Resampling.BILINEAR), dtype=np.float32).transpose(2, 0, 1)
    np.testing.assert_allclose(got[0].numpy(), wanted / 127.5 - 1, atol=1e-6)  # single precision
    assert pixels(photos[0], size=32).shape == (1, 3, 32, 32)


def test_tensors_pass_through_checked() -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(pixels(images, multiple=8), images)
    with pytest.raises(InputError, match=r"-1\.\.1"):
        pixels(images * 100)
    with pytest.raises(InputError, match=r"-1\.\.1"):
        pixels(images * float("nan"))
    with pytest.raises(InputError, match="expected floats"):
        pixels((images * 127).to(torch.uint8))
    with pytest.raises(ShapeError, match="height, width"):
        pixels(images[0])
    with pytest.raises(ShapeError, match="height, width"):
        pixels(images[:, :1])
    with pytest.raises(InputError, match="resizes PIL"):
        pixels(images, size=16)
    with pytest.raises(InputError, match="multiples of 16"):
        pixels(images, multiple=16)
    with pytest.raises(InputError, match="no images"):
        pixels(images[:0])


def test_bad_images_are_refused(photos: list[Image.Image]) -> None:
    with pytest.raises(InputError, match="no images"):
        pixels([])
    with pytest.raises(InputError, match="different sizes"):
        pixels([photos[0], photos[1].resize((16, 16))])
    with pytest.raises(InputError, match=r"multiples of 16 here; size=\(16, 32\)"):
        pixels(photos[0], multiple=16)
    for size in ((8, 8, 8), (0, 8), True):
        with pytest.raises(InputError, match="one side in pixels"):
            size_of(size, 8)
    with pytest.raises(InputError, match="multiples of 8"):
        size_of(20, 8)
    assert size_of(None, 8) is None


@pytest.mark.parametrize("options", [{}, {"scaling_factor": 0.36, "shift_factor": 0.12}])
def test_encoding_is_the_posterior_shifted_and_scaled(options: dict[str, float]) -> None:
    vae, images = autoencoder(1, **options), torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = vae.encode(images).latent_dist
    factor, shift = options.get("scaling_factor", 0.18215), options.get("shift_factor", 0.0)
    with torch.no_grad():
        for mode in ("mode", "mean"):
            torch.testing.assert_close(encode(vae, images, mode), (posterior.mean - shift) * factor)
        sample = encode(vae, images, "sample", seeded(3))
        torch.testing.assert_close(sample, (posterior.sample(seeded(3)) - shift) * factor)
        assert torch.equal(sample, encode(vae, images, "sample", seeded(3)))
        assert not torch.equal(sample, encode(vae, images, "sample", seeded(4)))
        wanted = vae.decode(posterior.mean).sample / 2 + 0.5
        got = decode(vae, encode(vae, images))
    torch.testing.assert_close(got, wanted.clamp(0, 1), rtol=0, atol=1e-5)  # single precision, through the scale
    assert got.std() > 0.05


def test_statistics_by_channel() -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    vae, images = autoencoder(1, latents_mean=mean, latents_std=std), torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mean
        got = encode(vae, images)
    for channel in range(4):
        wanted = (raw[:, channel] - mean[channel]) / std[channel] * 0.18215
        torch.testing.assert_close(got[:, channel], wanted)


def test_samples_need_a_seed_and_modes_a_name() -> None:
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="give seed="):
        encode(autoencoder(1), images, "sample")
    with pytest.raises(InputError, match="'mode', 'mean' or 'sample'"):
        encode.__wrapped__(autoencoder(1), images, "modal")


def test_sampling_leaves_the_global_random_state_alone() -> None:
    vae, before = autoencoder(1), torch.get_rng_state()
    encode(vae, torch.zeros(1, 3, 8, 8), "sample", seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_float16_autoencoder_that_overflows_runs_in_float32() -> None:
    vae = autoencoder(1).half()
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    ran: list[torch.dtype] = []
    vae.encoder.conv_in.register_forward_hook(lambda module, args, output: ran.append(output.dtype))
    latents = encode(vae, torch.rand(1, 3, 8, 8) * 2 - 1)
    assert (ran, latents.dtype) == ([torch.float32], torch.float16)
    assert decode(vae, latents).dtype == torch.float32
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert vae.dtype == torch.float16


def test_an_autoencoder_without_a_posterior() -> None:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    redraw(vae, 0)
    images: Tensor = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, images, "sample", seeded(0))
        torch.testing.assert_close(latents, vae.encode(images).latents)
        wanted = vae.decode(latents).sample / 2 + 0.5
        torch.testing.assert_close(decode(vae, latents), wanted.clamp(0, 1))


def test_to_pil_rounds_to_bytes() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    (image,) = to_pil(images)
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (0, 128, 255)
