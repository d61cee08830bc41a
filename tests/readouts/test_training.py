import copy
import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interp.errors import InputError, ShapeError
from interp.readouts import (
    InMemory,
    LinearProbe,
    PointPair,
    Readout,
    correspondence_loss,
    evaluate,
    frozen,
    train_readout,
)
from interp.readouts.examples import appearance_loss, loss_named
from tests.readouts.heads import SITES, SIZE, embedding_of, model, readout

# Single precision through a small UNet and one optimizer step.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def pictures(n=6, seed=0):
    """Latents whose left and right halves have signs, and pictures that say which."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2.0 - 1
    left = torch.cat([torch.ones(4), -torch.ones(4)])
    latents = 3 * signs * left + 0.1 * torch.randn(n, 4, *SIZE, generator=generator)
    targets = 0.4 * (signs * left).expand(n, 3, *SIZE)
    return InMemory(latents[:, None], targets.contiguous())


@contextmanager
def watched(sd):
    """What the UNet is called with, and which times are embedded beside its calls."""
    seen = {"calls": [], "times": []}

    def before(module, args, kwargs):
        names = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        seen["calls"].append((names["sample"].detach().clone(), float(torch.as_tensor(names["timestep"]).flatten()[0])))

    handle = sd.denoiser.register_forward_pre_hook(before, with_kwargs=True)
    plain = sd.denoiser.time_proj.forward
    sd.denoiser.time_proj.forward = lambda times: (seen["times"].append(times.detach().clone()), plain(times))[1]
    try:
        yield seen
    finally:
        handle.remove()
        del sd.denoiser.time_proj.forward


@pytest.mark.parametrize("convention", ["true_t", "generation_index"])
def test_noise_timestep_and_embedding_of_every_step_follow_the_convention(convention):
    sd = model()
    one, source = readout(sd, time_convention=convention), pictures(2)
    with watched(sd) as seen:
        result = train_readout(sd, one, source, steps=6, batch=2, latents=True, seed=3)
    assert len(seen["calls"]) == 6
    noted = result.history["timestep"].tolist()
    assert len(set(noted)) > 3
    alphas = sd.pipeline.scheduler.alphas_cumprod
    # Each step embeds twice: the model's call, then the head's.
    for step, ((sample, time), head_time) in enumerate(zip(seen["calls"], seen["times"][1::2], strict=True)):
        assert time == noted[step]
        level = time if convention == "true_t" else time - 1
        assert head_time.tolist() == [time if convention == "true_t" else 1000 - time] * 2
        alpha = alphas[int(level)]
        both = [sample - alpha.sqrt() * source.images[list(order), 0] for order in ((0, 1), (1, 0))]
        noise = min(both, key=lambda one: float(one.square().mean())) / (1 - alpha).sqrt()
        # 512 draws: mean and variance within five of their deviations.
        assert abs(float(noise.mean())) < 5 / 512**0.5
        assert abs(float(noise.var()) - 1) < 5 * (2 / 512) ** 0.5


def test_the_first_step_is_that_of_adamw_on_the_loss_written_out():
    sd = model()
    one = readout(sd)
    twin = copy.deepcopy(one.head)
    source = pictures(2)
    with watched(sd) as seen:
        result = train_readout(
            sd, one, source, "sparse_mse", steps=1, batch=2, lr=1e-2, latents=True, weight_decay=0.1, timesteps=[100]
        )
    sample, time = seen["calls"][0]
    acts = sd.capture(sample, int(time), "", list(SITES))
    maps = [
        torch.nn.functional.interpolate(acts[site], size=SIZE, mode="bilinear", align_corners=False) for site in SITES
    ]
    read = twin(maps, embedding_of(sd, torch.tensor([time, time])))
    far = [(sample - source.images[list(order), 0]).abs().mean() for order in ((0, 1), (1, 0))]
    order = [0, 1] if far[0] < far[1] else [1, 0]
    errors = (read - source.targets[order]).square()
    loss = errors.mean()  # no element is the least of the range: the plain mean
    assert result.history["loss"][0] == pytest.approx(loss.item(), rel=1e-4)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    loss.backward()
    optimizer.step()
    moved = 0
    for (name, ours), theirs in zip(one.head.named_parameters(), twin.parameters(), strict=True):
        # The first step of Adam is a sign; where a gradient is rounding noise its sign may differ.
        sure = theirs.grad.abs() > 1e-4
        torch.testing.assert_close(ours[sure], theirs[sure], **CLOSE, msg=name)
        moved += int(sure.sum())
    assert moved > 1000


def test_training_reads_the_property_at_low_noise_and_leaves_the_model_alone():
    sd = model()
    before = {key: tensor.clone() for key, tensor in sd.denoiser.state_dict().items()}
    one, held_out = readout(sd), pictures(8, seed=9)

    def error(maps, targets):
        return (maps[:, 0] - torch.stack(list(targets))).square().mean(dim=(1, 2, 3))

    start = evaluate(sd, one, held_out, error, [50, 999], latents=True, progress=False)
    result = train_readout(sd, one, pictures(16), steps=80, batch=4, lr=1e-2, latents=True, timesteps=[20, 50, 90])
    assert set(result.history["timestep"]) <= {20, 50, 90}
    end = evaluate(sd, one, held_out, error, [50, 999], latents=True, progress=False)
    assert list(end["timestep"]) == [50] * 8 + [999] * 8 and list(end["example"]) == [*range(8)] * 2
    by_time = [table.groupby("timestep")["value"].mean() for table in (start, end)]
    # The mean picture's error is 0.16; without signal nothing better is to be had.
    assert by_time[1][50] < 0.08 < by_time[0][50]
    assert by_time[1][50] < by_time[1][999]
    assert all(parameter.grad is None for parameter in sd.denoiser.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in sd.denoiser.state_dict().items())


def test_a_planted_property_that_can_be_read_exactly_is_learned_to_the_end():
    """What is asked for is a linear map of the very activations; then nothing but convergence keeps the error up."""
    sd, site = model(), SITES[2]
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(40, 4, *SIZE, generator=generator)
    (width,) = sd.channels([site])
    features = sd.capture(latents, 0, "", site)[site]
    assert tuple(features.shape[2:]) == SIZE
    head = LinearProbe(width, 2, seed=1)
    head.standardised.measure(features[:32])
    planted = LinearProbe(width, 2, seed=2)
    planted.standardised.measure(features[:32])
    targets = planted(features).detach()
    one = Readout(head, (site,), SIZE, "keypoints", "planted")
    train_readout(
        sd, one, InMemory(latents[:32, None], targets[:32]), steps=100, batch=8, lr=4e-2, latents=True, timesteps=[0]
    )
    read = one.read(sd, latents[32:], 0)
    error, variance = (read - targets[32:]).square().mean(), targets[32:].var()
    # At timestep 0 there is noise of a 34th of the latents' own deviation, which training cannot take away.
    assert error < 0.01 * variance
    matrices = [found.linear.weight.detach().flatten() for found in (head, planted)]
    assert torch.cosine_similarity(*matrices, dim=0) > 0.97
    before = LinearProbe(width, 2, seed=1)
    assert torch.cosine_similarity(before.linear.weight.detach().flatten(), matrices[1], dim=0) < 0.5


def test_evaluation_is_repeatable_and_does_not_depend_on_the_batch():
    sd = model()
    one, source = readout(sd), pictures(5)

    def first(maps, targets):
        return maps[:, 0].flatten(1).mean(dim=1)

    tables = [
        evaluate(sd, one, source, first, [400], latents=True, batch=batch, progress=False)["value"] for batch in (2, 5)
    ]
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-5)
    other = evaluate(sd, one, source, first, [400], latents=True, seed=1, progress=False)["value"]
    assert np.abs(other - tables[0]).max() > 1e-4


def test_a_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    sd = model()
    settings = {"batch": 2, "latents": True, "seed": 4, "lr": 3e-3, "save_every": 3}
    whole, parts = readout(sd), readout(sd)
    expected = train_readout(sd, whole, pictures(), steps=6, **settings)
    train_readout(sd, parts, pictures(), steps=3, folder=tmp_path, **settings)
    parts = readout(sd)  # everything comes from the folder
    result = train_readout(sd, parts, pictures(), steps=6, folder=tmp_path, **settings)
    np.testing.assert_allclose(result.history["loss"], expected.history["loss"], rtol=1e-4)
    assert result.history["timestep"].tolist() == expected.history["timestep"].tolist()
    for ours, theirs in zip(parts.head.parameters(), whole.head.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert "network.mixing_weights" in load_file(tmp_path / "training.safetensors")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="holds a training with latents True, not False"):
        train_readout(sd, parts, pictures(), steps=6, folder=tmp_path, **settings | {"latents": False})
    with pytest.raises(InputError, match="with data None, not 'others'"):
        train_readout(sd, parts, pictures(), steps=6, folder=tmp_path, settings={"data": "others"}, **settings)


def test_the_best_weights_are_kept_and_previews_are_drawn(tmp_path):
    sd = model()
    one, scores = readout(sd), iter([1.0, 3.0, 2.0])
    states = []

    def validate(found):
        assert found is one and not torch.is_grad_enabled()
        states.append({key: tensor.clone() for key, tensor in one.head.state_dict().items()})
        return next(scores)

    source = pictures()
    examples = [source(index, None) for index in range(2)]
    result = train_readout(
        sd, one, source, steps=3, batch=2, latents=True, validate=validate, validate_every=1, folder=tmp_path,
        previews=examples,
    )  # fmt: skip
    assert (result.best_step, result.best_score) == (2, 3.0)
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in one.head.state_dict().items())
    assert not all(torch.equal(tensor, states[2][key]) for key, tensor in one.head.state_dict().items())
    assert (tmp_path / "previews.png").read_bytes().startswith(b"\x89PNG")


def test_images_are_encoded_to_samples_of_the_posterior_by_the_seed():
    sd = model()
    images = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    source = InMemory(images, torch.zeros(2, 3, *SIZE))
    seen = []
    for vae in ("sample", "sample", "mode"):
        with watched(sd) as calls:
            train_readout(sd, readout(sd), source, steps=1, batch=2, vae=vae, timesteps=[0])
        seen.append(calls["calls"][0][0])
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] - seen[2]).abs().max() > 1e-3
    encoded = source.encoded(sd)
    assert torch.equal(encoded.images[:, 0], sd.encode(images[:, 0]))
    assert torch.equal(encoded.targets, source.targets)


def test_bfloat16_computes_the_model_in_it_and_keeps_weights_in_float32():
    sd = model()
    one, kinds = readout(sd), []
    handle = sd.denoiser.up_blocks[0].resnets[1].conv2.register_forward_hook(lambda m, a, out: kinds.append(out.dtype))
    result = train_readout(sd, one, pictures(2), steps=2, batch=2, latents=True, precision="bfloat16")
    handle.remove()
    assert set(kinds) == {torch.bfloat16}
    assert {parameter.dtype for parameter in one.head.parameters()} == {torch.float32}
    plain = train_readout(sd, readout(sd), pictures(2), steps=2, batch=2, latents=True)
    # Seven bits of mantissa: three digits at most.
    np.testing.assert_allclose(result.history["loss"], plain.history["loss"], rtol=0.1)
    with pytest.raises(InputError, match="precision='half'"):
        train_readout(sd, one, pictures(2), steps=2, precision="half")


def test_correspondence_and_appearance_heads_train():
    sd = model()
    generator = torch.Generator().manual_seed(2)
    codes = 3 * torch.randn(4, *SIZE, generator=generator)
    pairs = torch.stack([torch.stack([codes, codes.roll(shift, dims=-1)]) for shift in (0, 1, 2, 3)])
    points = torch.tensor([[1.0, 2.0], [4.0, 3.0], [6.0, 0.0]])
    targets = [PointPair(points / 8, (points + torch.tensor([0.0, shift])) / 8) for shift in (0, 1, 2, 3)]
    one = readout(sd, None, "features")
    options = {"latents": True, "timesteps": [10], "batch": 2, "lr": 5e-3}
    losses = train_readout(sd, one, InMemory(pairs, targets), "correspondence", steps=20, **options).history["loss"]
    assert losses.tail(4).mean() < 0.9 * losses.head(4).mean()
    other = 3 * torch.randn(4, *SIZE, generator=generator)
    triplets = torch.stack([codes, codes, other])[None].repeat(2, 1, 1, 1, 1)
    two = readout(sd, None, "features")
    hinge = train_readout(sd, two, InMemory(triplets), "appearance", steps=20, **options).history["loss"]
    assert hinge.tail(4).mean() < 0.9 * hinge.head(4).mean()


def test_pooled_triplets_by_hand():
    # The anchor's two descriptors change places in the positive; the negative has one of them everywhere.
    anchor = torch.tensor([[3.0, 0.0], [0.0, 4.0]])[:, None]
    positive, negative = anchor.flip(-1), anchor[..., :1].expand(-1, -1, 2)
    maps = torch.stack([anchor, positive, negative])[None]
    pooled = loss_named("pooled_appearance", readout(model(), None, "features"))
    # Means (1.5, 2) and (3, 0) have cosine 0.6; the anchor and the positive have one mean.
    assert pooled(maps, [None]).item() == pytest.approx(0.5 + 0.0 - 0.4)
    assert appearance_loss(maps, [None], 0.1).item() == pytest.approx(0.1 + 1.0 - 0.5)
    assert appearance_loss(maps, [None], 0.1, pooled=True).item() == 0.0
    with pytest.raises(ShapeError, match="3 images to an example"):
        pooled(maps[:, :2], [None])


def test_the_correspondence_loss_by_hand():
    # Four cells with codes; the second picture has them swapped in pairs.
    maps = torch.eye(4).reshape(4, 2, 2)
    swapped = maps[[1, 0, 3, 2]]
    pair = torch.stack([maps, swapped])[None]
    # Cells of 0.3 and 0.5 of two: 0.6 rounds to 1; 1.0 is 1. Beyond the map is clipped.
    target = PointPair(torch.tensor([[0.3, 0.0], [0.0, 5.0]]), torch.tensor([[0.5, 0.6], [0.0, -1.0]]))
    right = torch.tensor([14.285714, 0.0, 0.0, 0.0]).log_softmax(0)[0].neg()
    assert correspondence_loss(pair, [target]).item() == pytest.approx(right.item(), abs=1e-6)
    wrong = PointPair(target.points_a[:1], torch.tensor([[0.0, 0.0]]))
    assert correspondence_loss(pair, [wrong]).item() == pytest.approx(right.item() + 14.285714, rel=1e-4)


def test_a_model_that_does_not_stay_frozen_is_an_error():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    with frozen(layer):
        assert not layer[1].training
        layer(torch.zeros(1, 2))
    assert layer[1].training
    with pytest.raises(InputError, match=r"'0\.weight' got a gradient"), frozen(layer, "tiny"):
        layer(torch.ones(1, 2)).sum().backward()
    with (
        pytest.raises(InputError, match=r"tiny is not frozen: '0\.bias' changed"),
        frozen(layer, "tiny"),
        torch.no_grad(),
    ):
        layer[0].bias.add_(1)
    # Neither of these shows in the identity of a tensor, nor the second in how often it was written to.
    with pytest.raises(InputError, match=r"'0\.weight' got a gradient"), frozen(layer, "tiny"):
        layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(InputError, match=r"'0\.weight' changed"), frozen(layer, "tiny"):
        layer[0].weight.data[0, 0] += 0.5
    sd = model()

    def spoil(found):
        with torch.no_grad():
            sd.denoiser.conv_in.bias.add_(0)
        return 1.0

    with pytest.raises(InputError, match=r"'conv_in\.bias' changed while a head was trained on it"):
        train_readout(sd, readout(sd), pictures(2), steps=1, batch=2, latents=True, validate=spoil)


def test_bad_training_input_is_refused():
    sd = model()
    one = readout(sd)
    options = {"steps": 1, "batch": 2, "latents": True}
    with pytest.raises(InputError, match=r"no loss 'sparse': .*Did you mean 'sparse_mse'"):
        train_readout(sd, one, pictures(), "sparse", **options)
    with pytest.raises(InputError, match="give it one"):
        loss_named("sparse_mse", readout(sd, 18, "keypoints"))
    with pytest.raises(ShapeError, match="correspondence loss takes 2 images"):
        train_readout(sd, one, pictures(), "correspondence", **options)
    with pytest.raises(InputError, match="there are no timesteps"):
        train_readout(sd, one, pictures(), timesteps=[], **options)
    with pytest.raises(InputError, match="timestep 1000 is out of range"):
        train_readout(sd, one, pictures(), timesteps=[1000], **options)
    with pytest.raises(InputError, match="another model"):
        train_readout(model(seed=70), one, pictures(), **options)
    with pytest.raises(InputError, match="steps must be at least 1"):
        train_readout(sd, one, pictures(), **options | {"steps": 0})
    for wrong_number, words in (
        ({"lr": float("nan")}, "lr=nan"), ({"lr": -1e-3}, "lr=-0.001"), ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"seed": -1}, "seed=-1"), ({"batch": 0}, "batch must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            train_readout(sd, one, pictures(), **options | wrong_number)
    for loss in (lambda maps, targets: maps.mean(dim=(1, 2, 3, 4)), lambda maps, targets: maps[:0].sum(dim=(1, 2))):
        with pytest.raises(InputError, match="a loss is one number as a tensor"):
            train_readout(sd, one, pictures(), loss, **options)
    with pytest.raises(InputError, match="batch=0"):
        evaluate(sd, one, pictures(2), lambda maps, targets: maps.mean(dim=(1, 2, 3, 4)), [5], batch=0, latents=True)
    for span in ((float("nan"), 1.0), (1.0, 1.0), (0.0, float("inf"))):
        with pytest.raises(InputError, match="value_range must be"):
            dataclasses.replace(one, value_range=span)
    wrong = InMemory(pictures(2).images, torch.zeros(2, 5, *SIZE))
    with pytest.raises(ShapeError, match=r"the prediction is \[2, 3, 8, 8\], the target \[2, 5, 8, 8\]"):
        train_readout(sd, one, wrong, **options)
    broken = InMemory(pictures(2).images, torch.full((2, 3, *SIZE), torch.nan))
    with pytest.raises(InputError, match="NaN or infinity"):
        train_readout(sd, one, broken, **options)
    with pytest.raises(InputError, match="2 examples with 3 targets"):
        InMemory(pictures(2).images, torch.zeros(3))
    with pytest.raises(InputError, match="there are 2 examples"):
        pictures(2).first(3)
    assert len(pictures(6).first(4)) == 4
    assert torch.equal(pictures(6).first(4).targets, pictures(6).targets[:4])
