import re

import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.hyperfeatures import AggregationNetwork
from interp.readouts import ReadoutHead, head_of
from tests.readouts.heads import closed_form, perturbed

CHANNELS = (12, 16, 8)  # the second is as wide as the mixture: no shortcut
SD = (1280,) * 6 + (640,) * 3 + (320,) * 3
SDXL = (1280,) * 3 + (640,) * 3 + (320,) * 3
# Sums of float32 products in another order differ by a few units in the last of 7 digits.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(out_channels=3, time_dim=20, **options):
    widths = {"output_widths": (12, 10)}
    return perturbed(
        ReadoutHead(CHANNELS, 16, 8, out_channels=out_channels, time_dim=time_dim, n_groups=4, **widths, **options)
    )


def maps(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, 5, 6, generator=generator) for c in CHANNELS]


def embeddings(rows=3):
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("out_channels", [None, 1, 3, 5])
@pytest.mark.parametrize("conditioned", [True, False])
def test_the_head_is_the_closed_form(out_channels, conditioned):
    head = made(out_channels, use_time=conditioned)
    expected = closed_form(
        head.state_dict(), maps(), embeddings() if conditioned else None, squash=out_channels in (1, 3)
    )
    found = head(maps(), embeddings())
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    torch.testing.assert_close(head(torch.cat(maps(), dim=1), embeddings()), found)
    assert found.shape[1] == head.n_out


def test_every_row_has_its_own_embedding_and_only_a_conditioned_head_feels_it():
    head, without = made(), made(use_time=False)
    same = [one[:1].expand(3, -1, -1, -1) for one in maps()]
    found = head(same, embeddings())
    assert (found[0] - found[1]).abs().max() > 1e-3
    torch.testing.assert_close(head(same, embeddings()[1:2])[0], found[1])
    assert torch.equal(without(same, embeddings()), without(same))
    assert without.time_dim == 20 and not without.uses_time


def test_more_embeddings_than_maps_are_cut_and_fewer_are_refused():
    head = made()
    torch.testing.assert_close(head(maps(), embeddings(6)), head(maps(), embeddings(6)[:3]))
    with pytest.raises(ShapeError, match=r"shape \[2, 20\]"):
        head(maps(), embeddings(2))
    with pytest.raises(ShapeError, match=r"takes \[3, 20\]"):
        head(maps(), torch.zeros(3, 19))
    with pytest.raises(InputError, match="uses the timestep's embedding"):
        head(maps())


def test_maps_of_several_sizes_are_resized_as_if_before_the_head():
    head = made()
    several = [maps()[0], maps()[1][..., :3, :3], maps()[2][..., :2, :4]]
    resized = [torch.nn.functional.interpolate(one, size=(5, 6), mode="bilinear") for one in several]
    expected = closed_form(head.state_dict(), resized, embeddings(), squash=True)
    torch.testing.assert_close(head(several, embeddings(), (5, 6)).double(), expected, **CLOSE)
    with pytest.raises(ShapeError, match="all of one size"):
        head(several, embeddings())


@pytest.mark.parametrize(
    ("channels", "out_channels", "count"),
    [
        (SD, 3, 8_484_751),
        (SD, None, 8_005_260),
        (SD, 18, 8_485_246),
        (SDXL, 3, 5_907_436),
        (SDXL, None, 5_427_945),
        (SDXL, 18, 5_907_931),
    ],
)
def test_parameter_counts_are_the_published_ones(channels, out_channels, count):
    head = ReadoutHead(channels, out_channels=out_channels, time_dim=1280)
    assert sum(parameter.numel() for parameter in head.parameters()) == count
    assert head.squash == (out_channels == 3)


def test_the_state_dict_has_the_authors_keys():
    state = ReadoutHead((16, 8), 16, 8, out_channels=3, time_dim=20, n_groups=4).state_dict()
    parts = ("conv1", "conv2", "conv3")
    norms = ("weight", "norm.weight", "norm.bias")
    expected = {f"bottleneck_layers.{n}.{part}.{norm}" for n in range(2) for part in parts for norm in norms}
    expected |= {f"bottleneck_layers.1.shortcut.{norm}" for norm in norms}
    expected |= {f"bottleneck_layers.{n}.emb_layers.{kind}" for n in range(2) for kind in ("weight", "bias")}
    expected |= {f"output_head.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")} | {"mixing_weights"}
    assert set(state) == expected
    assert state["mixing_weights"].shape == (2,)
    assert [tuple(state[f"output_head.{n}.weight"].shape) for n in (0, 2, 4)] == [
        (128, 16, 3, 3), (32, 128, 3, 3), (3, 32, 1, 1)
    ]  # fmt: skip


def wrapped(state):
    return {re.sub(r"^(bottleneck_layers\.\d+)\.", r"\1.0.", key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("out_channels", [None, 3])
def test_both_key_styles_load_and_the_wrapped_one_switches_the_embedding_off(out_channels):
    head = made(out_channels)
    again = head_of(head.state_dict(), n_groups=4)
    assert again.uses_time
    assert torch.equal(again(maps(), embeddings()), head(maps(), embeddings()))
    state = wrapped(head.state_dict())
    assert "bottleneck_layers.1.0.conv1.norm.weight" in state
    other = head_of(state, n_groups=4)
    assert not other.uses_time and other.time_dim == 20
    expected = closed_form(head.state_dict(), maps(), squash=out_channels == 3)
    torch.testing.assert_close(other(maps()).double(), expected, **CLOSE)
    with pytest.raises(InputError, match="sequential wrapper"):
        head_of(state, n_groups=4, use_time=True)
    with pytest.raises(InputError, match="use_time=False"):
        head.load_state_dict(state)
    doubled = head.state_dict() | {"bottleneck_layers.0.0.conv1.weight": head.state_dict()["mixing_weights"]}
    with pytest.raises(InputError, match="twice"):
        made(out_channels, use_time=False).load_state_dict(doubled)


def test_missing_embeddings_are_taken_only_where_they_are_off():
    state = {key: t for key, t in made().state_dict().items() if "emb_layers" not in key}
    assert not head_of(state, n_groups=4).uses_time
    with pytest.raises(InputError, match="weights of the embedding are missing"):
        head_of(state, n_groups=4, use_time=True)
    some = made().state_dict()
    del some["bottleneck_layers.1.emb_layers.bias"]
    with pytest.raises(InputError, match=r"bottleneck_layers.1.emb_layers.bias"):
        head_of(some, n_groups=4)


def test_wrong_state_dicts_are_refused():
    state = made().state_dict()
    for key in ("mixing_weights", "bottleneck_layers.2.conv2.weight", "output_head.2.weight", "output_head.4.bias"):
        with pytest.raises(InputError, match=key):
            head_of({name: t for name, t in state.items() if name != key}, n_groups=4)
    with pytest.raises(InputError, match="extra"):
        head_of(state | {"extra": torch.zeros(1)}, n_groups=4)
    with pytest.raises(InputError, match="aggregation network"):
        head_of(AggregationNetwork(CHANNELS, 2, 16, 8, n_groups=4).state_dict(), n_groups=4)


def test_settings_make_a_head_of_the_same_kind():
    for head in (made(), made(None), made(5, use_time=False, time_convention="generation_index"), made(3, None)):
        again = ReadoutHead(**head.settings())
        again.load_state_dict(head.state_dict())
        assert torch.equal(again(maps(), embeddings()), head(maps(), embeddings()))
        assert again.settings() == head.settings()
        assert again.time_convention == head.time_convention


def test_weights_come_from_the_seed_alone_and_are_spread_as_torch_spreads_them():
    before = torch.get_rng_state()
    head = ReadoutHead((64,), 256, 64, out_channels=3, time_dim=400, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, other = (ReadoutHead((64,), 256, 64, out_channels=3, time_dim=400, seed=seed) for seed in (1, 2))
    for key, tensor in head.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    assert not torch.equal(head.bottleneck_layers[0].emb_layers.weight, other.bottleneck_layers[0].emb_layers.weight)
    for layer, fan in ((head.bottleneck_layers[0].emb_layers, 400), (head.output_head[0], 256 * 9)):
        # Uniform within 1 / sqrt(fan-in): its largest of tens of thousands is close to the end.
        assert 0.99 / fan**0.5 < layer.weight.abs().max() <= 1 / fan**0.5
        assert 0 < layer.bias.abs().max() <= 1 / fan**0.5


def test_gradients_reach_the_maps_and_every_weight():
    head, inputs = made(), [one.requires_grad_() for one in maps()]
    head(inputs, embeddings()).square().sum().backward()
    assert all(one.grad.abs().max() > 0 for one in inputs)
    assert all(parameter.grad.abs().max() > 0 for parameter in head.parameters())


def test_bad_settings_and_maps_are_refused():
    with pytest.raises(InputError, match="no time convention 'true'"):
        made(time_convention="true")
    with pytest.raises(InputError, match="out_channels must be at least 1"):
        made(0)
    with pytest.raises(InputError, match="squash"):
        ReadoutHead(CHANNELS, 16, 8, squash=True, n_groups=4)
    with pytest.raises(InputError, match="n_groups=8 divides"):
        ReadoutHead(CHANNELS, 24, 16)
    with pytest.raises(ShapeError, match="3 layers, not 2"):
        made()(maps()[:2], embeddings())
    with pytest.raises(ShapeError, match=r"the map of layer 1 \(b\)"):
        made(sites=("a", "b", "c"))([maps()[0], maps()[0], maps()[2]], embeddings())
    with pytest.raises(ShapeError, match="36, height"):
        made()(torch.zeros(1, 35, 4, 4), embeddings(1))
