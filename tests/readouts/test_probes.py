import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.readouts import AttentionProbe, LinearProbe, ReadoutHead, fit_probe
from tests import tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def rows(n=60, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.1, 30, d) + 5


def test_a_linear_probe_is_linear_in_standardised_channels():
    x = rows()
    probe = LinearProbe(6, 2, seed=3)
    probe.standardised.measure(x)
    scaled = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    expected = scaled @ probe.linear.weight.T + probe.linear.bias
    torch.testing.assert_close(probe(x), expected, **CLOSE)
    tokens = x.reshape(10, 6, 6)
    torch.testing.assert_close(probe(tokens), expected.reshape(10, 6, 2), **CLOSE)
    maps = x.reshape(10, 2, 3, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(probe(maps), expected.reshape(10, 2, 3, 2).permute(0, 3, 1, 2), **CLOSE)
    torch.testing.assert_close(probe([x[:, :2], x[:, 2:]]), expected, **CLOSE)


def test_a_channel_that_never_changes_is_left_alone():
    x = rows()
    x[:, 2] = 7.0
    probe = LinearProbe(6, 1)
    probe.standardised.measure(x)
    assert torch.isfinite(probe(x)).all()
    assert probe.standardised.spread[2] == 1


def test_an_attention_probe_pools_by_softmax_and_its_mask():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 4, generator=generator)
    probe = AttentionProbe(4, 2, n_heads=3, seed=2)
    mask = torch.tensor([[True, True, False, True, False]] * 3)

    def by_hand(row, places):
        tokens = x[row, places]
        scores = tokens @ probe.scores.weight.T + probe.scores.bias
        weights = scores.exp() / scores.exp().sum(dim=0)
        return probe.linear((weights.T @ tokens).flatten())

    for row in range(3):
        torch.testing.assert_close(probe(x)[row], by_hand(row, [0, 1, 2, 3, 4]), **CLOSE)
        torch.testing.assert_close(probe(x, mask=mask)[row], by_hand(row, [0, 1, 3]), **CLOSE)
    maps = x[:, :4].reshape(3, 2, 2, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(probe(maps), probe(x[:, :4]), **CLOSE)
    with pytest.raises(InputError, match="row 1 has no token"):
        probe(x, mask=mask & torch.tensor([[True], [False], [True]]))
    with pytest.raises(ShapeError, match="have none"):
        probe(x[:, 0])
    with pytest.raises(ShapeError, match=r"the mask is \[3, 4\]"):
        probe(x, mask=mask[:, :4])


def test_a_regression_finds_the_least_squares_solution():
    x = rows()
    targets = (x @ torch.arange(12.0).reshape(6, 2)) / 100
    probe = LinearProbe(6, 2)
    result = fit_probe(probe, x, targets, steps=400, batch=60, lr=3e-2)
    assert result.history["loss"].iloc[-1] < 1e-4 < float(targets.var())
    torch.testing.assert_close(probe(x), targets, rtol=0, atol=0.05)


def test_activations_of_a_language_model_are_read_by_the_same_loop(tmp_path):
    vlm = tiny.vlm("llama")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (40, 6), generator=generator)
    labels = (ids[:, 2] > 20).long()
    acts = vlm.capture({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "blocks.0.hook_resid_post")
    features = acts["blocks.0.hook_resid_post"].detach()
    before = features.clone()
    probe = AttentionProbe(features.shape[-1], 2, seed=1)

    def accuracy(head):
        return float((head(features[30:]).argmax(dim=1) == labels[30:]).float().mean())

    options = {"steps": 60, "batch": 10, "lr": 1e-2, "folder": tmp_path}
    result = fit_probe(probe, features[:30], labels[:30], "cross_entropy", validate=accuracy, **options)
    assert result.best_score == accuracy(probe) > 0.5
    assert result.history["loss"].tail(5).mean() < 0.5 * result.history["loss"].head(5).mean()
    assert torch.equal(features, before)
    again = AttentionProbe(features.shape[-1], 2, seed=9)
    fit_probe(again, features[:30], labels[:30], "cross_entropy", validate=accuracy, **options)
    torch.testing.assert_close(again(features), probe(features))


def test_a_readout_head_reads_maps_that_are_there_and_pictures_are_resized():
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(12, 5, 4, 4, generator=generator)
    targets = maps[:, :1].tanh().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    head = ReadoutHead([5], 16, 8, out_channels=1, n_groups=4, squash=False)
    result = fit_probe(head, maps, targets, steps=80, batch=12, lr=1e-2)
    assert result.history["loss"].iloc[-1] < 0.3 * float(targets.var())
    untrained = ReadoutHead([5], 16, 8, out_channels=1, n_groups=4, squash=False)([maps]).detach()
    first = float((untrained - maps[:, :1].tanh()).square().mean())
    assert result.history["loss"][0] == pytest.approx(first, rel=1e-4)


def test_bad_probes_and_targets_are_refused():
    x = rows()
    probe = LinearProbe(6, 2)
    for features, targets, loss, words in (
        (x, torch.zeros(59, 2), "mse", "60 rows of activations for 59 targets"),
        (x * torch.nan, torch.zeros(60, 2), "mse", "the activations hold NaN"),
        (x, torch.full((60, 2), torch.inf), "mse", "the targets hold NaN"),
        (x, torch.zeros(60, 2), "msee", "Did you mean 'mse'"),
        ([], torch.zeros(0), "mse", "there are no activations"),
        (x, torch.full((60,), 2), "cross_entropy", "classes 2 to 2 for a head of 2"),
    ):
        with pytest.raises(InputError, match=words):
            fit_probe(probe, features, targets, loss, steps=1)
    with pytest.raises(ShapeError, match="whole numbers"):
        fit_probe(probe, x, torch.zeros(60), "cross_entropy", steps=1)
    with pytest.raises(ShapeError, match="takes 6 channels, not 5"):
        probe(x[:, :5])
    with pytest.raises(ShapeError, match="the same for all sites but for d"):
        probe([x, x[:5]])
    with pytest.raises(InputError, match="n_heads must be at least 1"):
        AttentionProbe(6, 2, n_heads=0)
