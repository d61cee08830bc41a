import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from interp.errors import InputError, ShapeError
from interp.hyperfeatures import Accumulator, AggregationNetwork, shape_of, without_wrapper

CHANNELS = (12, 12, 8, 16)  # the last is as wide as the descriptor: no shortcut
STEPS = 3
SD_CHANNELS = (1280,) * 6 + (640,) * 3 + (320,) * 3
# Sums of float32 products in another order differ by a few units in the last of 7 digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def perturbed(seed=0, **options):
    net = AggregationNetwork(CHANNELS, STEPS, dim=16, width=8, n_groups=4, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in net.named_parameters():
        if "norm" in name or name == "mixing_weights":
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return net


def stack(seed=5, batch=2, height=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, STEPS, sum(CHANNELS), height, width, generator=generator)


def group_norm(x, gain, bias, groups=4):
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    normal = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    return normal * gain.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def closed_form(state, features, channels, n_steps):
    """Section 3 of the specification, written out in float64 from the state dict alone."""
    state = {key: tensor.double() for key, tensor in state.items()}
    shares = torch.exp(state["mixing_weights"]) / torch.exp(state["mixing_weights"]).sum()
    total = 0
    for s in range(n_steps):
        for n, width in enumerate(channels):
            x = features[:, s, sum(channels[:n]) : sum(channels[:n]) + width].double()

            def conv(x, part, n=n):
                key = f"bottleneck_layers.{n}.0.{part}"
                weight = state[f"{key}.weight"]
                out = F.conv2d(x, weight, padding=1 if weight.shape[-1] == 3 else 0)
                return group_norm(out, state[f"{key}.norm.weight"], state[f"{key}.norm.bias"])

            h = conv(conv(conv(x, "conv1").clamp(min=0), "conv2").clamp(min=0), "conv3")
            side = conv(x, "shortcut") if f"bottleneck_layers.{n}.0.shortcut.weight" in state else x
            total = total + shares[s * len(channels) + n] * (h + side).clamp(min=0)
    return total


def test_the_network_is_the_closed_form_with_perturbed_norms_and_mixing_weights():
    net, features = perturbed(), stack()
    out = net(features)
    assert out.shape == (2, 16, 5, 7)
    assert out.min() >= 0
    torch.testing.assert_close(out.double(), closed_form(net.state_dict(), features, CHANNELS, STEPS), **CLOSE)
    shuffled = dict(net.state_dict(), mixing_weights=net.mixing_weights.detach().flip(0))
    assert not torch.allclose(out.double(), closed_form(shuffled, features, CHANNELS, STEPS), **CLOSE)


SIZES = ((2, 3), (5, 7), (10, 4), (3, 3))


def layers_of_their_own_sizes(seed=5, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, STEPS, channels, *size, generator=generator)
        for channels, size in zip(CHANNELS, SIZES, strict=True)
    ]


def resized_stack(layers, size):
    flat = [rearrange(maps, "b s c h w -> (b s) c h w") for maps in layers]
    flat = [F.interpolate(maps, size=size, mode="bilinear", align_corners=False) for maps in flat]
    return rearrange(torch.cat(flat, dim=1), "(b s) c h w -> b s c h w", s=STEPS)


def test_layers_of_their_own_sizes_give_what_the_resized_stack_gives():
    net, layers = perturbed(), layers_of_their_own_sizes()
    # Larger, smaller and equal sizes; a pointwise convolution commutes with each.
    out = net(layers, size=(5, 7))
    features = resized_stack(layers, (5, 7))
    torch.testing.assert_close(out.double(), closed_form(net.state_dict(), features, CHANNELS, STEPS), **CLOSE)
    total = Accumulator(net, (5, 7))
    for step in range(STEPS):
        for layer, maps in enumerate(layers):
            total.add(step, layer, maps[:, step])
    torch.testing.assert_close(total.result(), out, **CLOSE)


def test_layers_of_several_sizes_need_one_to_be_brought_to():
    net, layers = perturbed(), layers_of_their_own_sizes()
    with pytest.raises(ShapeError, match="several sizes"):
        net(layers)
    with pytest.raises(ShapeError, match="4 layers, not 3"):
        net(layers[:3], size=(5, 7))
    with pytest.raises(ShapeError, match="layer 1: expected maps of shape"):
        net([layers[0], layers[1][:, :2], *layers[2:]], size=(5, 7))
    with pytest.raises(ShapeError, match=r"batches of \[2, 1, 2, 2\]"):
        net([layers[0], layers[1][:1], *layers[2:]], size=(5, 7))
    with pytest.raises(ShapeError, match="layer 1 has 12 channels"):
        net([layers[0], layers[2], *layers[2:]], size=(5, 7))


def test_a_width_equal_to_the_descriptor_has_no_shortcut_and_others_have_one():
    keys = perturbed().state_dict()
    assert "bottleneck_layers.2.0.shortcut.norm.bias" in keys
    assert not [key for key in keys if key.startswith("bottleneck_layers.3.0.shortcut")]


@pytest.mark.parametrize(("steps", "parameters"), [(11, 6_529_668), (1, 6_529_548)])
def test_at_full_size_there_are_as_many_parameters_as_in_the_paper(steps, parameters):
    with torch.device("meta"):
        net = AggregationNetwork(SD_CHANNELS, steps)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net.width == 96
    assert tuple(net.state_dict()["bottleneck_layers.0.0.conv2.weight"].shape) == (96, 96, 3, 3)


def test_initial_weights_are_normal_with_the_deviation_of_fan_out_and_the_mixing_is_uniform():
    net = AggregationNetwork((64, 320), 2, dim=256, width=64)
    for name, weight in net.named_parameters():
        if name.endswith(("conv1.weight", "conv2.weight", "conv3.weight", "shortcut.weight")):
            expected = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
            # The deviation of n normal numbers is known to 1 / sqrt(2 n); 5 of that never fail.
            assert abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * weight.numel()), name
            assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name
    assert torch.equal(net.mixing(), torch.full((2, 2), 0.25))
    assert "logit_scale" not in net.state_dict()
    assert abs(math.exp(net.logit_scale) - 14.2857) < 1e-3


def test_a_seed_gives_the_same_network_and_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    one, same, other = (AggregationNetwork((8,), 1, dim=8, width=4, n_groups=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "bottleneck_layers.0.0.conv1.weight"
    assert torch.equal(one.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])


def test_both_styles_of_keys_are_loaded_strictly():
    source, features = perturbed(seed=1), stack()
    wrapped = source.state_dict()
    bare = without_wrapper(wrapped)
    assert "bottleneck_layers.0.conv1.norm.weight" in bare
    assert not [key for key in bare if ".0.conv" in key and not key.startswith("bottleneck_layers.0.conv")]
    for state in (wrapped, bare):
        net = AggregationNetwork(CHANNELS, STEPS, dim=16, width=8, n_groups=4, seed=9)
        assert not torch.allclose(net(features), source(features))
        keys = list(state)
        net.load_state_dict(state)
        assert list(state) == keys
        assert torch.equal(net(features), source(features))
    assert shape_of(bare) == shape_of(wrapped)
    assert shape_of(wrapped) == {"channels": list(CHANNELS), "n_steps": STEPS, "dim": 16, "width": 8}


def test_keys_that_are_missing_left_over_or_double_are_refused():
    state = perturbed().state_dict()
    net = perturbed(seed=2)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1\.weight"):
        net.load_state_dict(
            {key: tensor for key, tensor in state.items() if key != "bottleneck_layers.1.0.conv1.weight"}
        )
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict(dict(state, surplus=torch.ones(1)))
    with pytest.raises(InputError, match="twice"):
        net.load_state_dict(dict(state) | {"bottleneck_layers.1.conv1.weight": torch.ones(8, 12, 1, 1)})
    with pytest.raises(InputError, match=r"conv1\.weight' is missing"):
        shape_of({"mixing_weights": torch.ones(3)})
    with pytest.raises(InputError, match="whole timesteps"):
        shape_of(dict(state, mixing_weights=torch.ones(11)))


def test_the_running_sum_in_any_order_equals_the_stack():
    net, features = perturbed(), stack()
    pieces = [(s, n) for s in range(STEPS) for n in range(len(CHANNELS))]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    total = Accumulator(net)
    for index in order:
        step, layer = pieces[index]
        first = sum(CHANNELS[:layer])
        total.add(step, layer, features[:, step, first : first + CHANNELS[layer]])
    torch.testing.assert_close(total.result(), net(features), **CLOSE)


def test_the_running_sum_has_the_gradients_of_the_stack():
    net, features = perturbed(), stack()
    probe = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((net(features) * probe).sum(), list(net.parameters()))
    total = Accumulator(net)
    for step in range(STEPS):
        for layer, maps in enumerate(features[:, step].split(CHANNELS, dim=1)):
            total.add(step, layer, maps)
    found = torch.autograd.grad((total.result() * probe).sum(), list(net.parameters()))
    assert any(gradient.abs().max() > 0.1 for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        # Each gradient sums some hundred terms of size 1 in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_running_sum_refuses_maps_twice_missing_unknown_or_of_another_size():
    net = perturbed(sites=("a", "b", "c", "d"))
    total = Accumulator(net)
    with pytest.raises(InputError, match="12 of 12 maps are missing, the first is step 0 of layer 0"):
        total.result()
    total.add(0, 2, torch.ones(1, 8, 4, 4))
    with pytest.raises(InputError, match=r"step 0 of layer 2 \(c\) was added before"):
        total.add(0, 2, torch.ones(1, 8, 4, 4))
    with pytest.raises(InputError, match="step 3 of layer 0 is out of range"):
        total.add(3, 0, torch.ones(1, 12, 4, 4))
    with pytest.raises(ShapeError, match=r"is \(5, 4\), the ones before it were \(4, 4\)"):
        total.add(1, 2, torch.ones(1, 8, 5, 4))
    with pytest.raises(ShapeError, match=r"layer 1 \(b\) has 12 channels"):
        total.add(0, 1, torch.ones(1, 8, 4, 4))


def test_the_mixing_table_names_timesteps_and_layers_in_the_official_order():
    net = perturbed(sites=("a", "b", "c", "d"), timesteps=(-1.0, 60.0, 160.0))
    table = net.mixing_table()
    assert list(table.index) == [-1, 60, 160]
    assert list(table.columns) == ["a", "b", "c", "d"]
    shares = torch.softmax(net.mixing_weights.detach(), 0)
    assert table.loc[60.0, "c"] == pytest.approx(shares[1 * 4 + 2].item())
    assert table.to_numpy().sum() == pytest.approx(1, abs=1e-6)
    assert list(perturbed().mixing_table().index) == [0, 1, 2]


def test_half_precision_features_and_autocast_leave_the_computation_in_float32():
    net, features = perturbed(), stack()
    expected = net(features.half().float())
    assert torch.equal(net(features.half()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(features.half())
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_features_made_in_inference_mode_can_be_trained_on():
    net = perturbed()
    with torch.inference_mode():
        features = stack() * 1.0
    net(features).sum().backward()
    assert net.bottleneck_layers[0][0].conv1.weight.grad.abs().max() > 0


def test_stacks_of_another_shape_are_refused():
    net = perturbed()
    flat = rearrange(stack(), "b s c h w -> b (s c) 1 h w")
    with pytest.raises(ShapeError, match="3 steps, 48 channels"):
        net(flat)
    with pytest.raises(InputError, match="layer 4 is out of range"):
        net.bottleneck(4, torch.ones(1, 8, 2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ()}, "one positive number for each layer"),
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"dim": 48, "width": 12}, "dim 48 is not divisible by n_groups 32; n_groups=12 divides"),
        ({"dim": 64, "width": 24}, "width 24 is not divisible by n_groups 32; n_groups=8 divides"),
        ({"sites": ("a",)}, "1 sites are named for 2 layers"),
        ({"timesteps": (1.0,)}, "1 timesteps are named for 2 steps"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AggregationNetwork(**{"channels": (8, 8), "n_steps": 2, "dim": 64, "width": 32} | settings)
