import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interp.errors import InputError, UnknownNameError
from interp.hyperfeatures import AggregationNetwork, Pair, concatenate, describe_stacks, train
from interp.hyperfeatures.fitting import fit

CHANNELS = (6, 6, 8)
STEPS = 2
SIDE = 6
N_POINTS = 8
INFORMATIVE = (1, 2)  # step and layer


def network(seed=0):
    return AggregationNetwork(CHANNELS, STEPS, dim=16, width=8, n_groups=2, seed=seed)


def world(n_pairs, seed):
    """Pairs of stacks in which one (step, layer) knows the point that a cell shows; all else is loud noise.

    Each point has a code of its own, hidden in a rotated half of the layer's channels.
    """
    codes = torch.randn(SIDE * SIDE, 4, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(n_pairs):
        stacks, places = [], []
        for _ in range(2):
            order = torch.randperm(SIDE * SIDE, generator=generator)
            stack = 2.0 * torch.randn(STEPS, sum(CHANNELS), SIDE, SIDE, generator=generator)
            step, layer = INFORMATIVE
            first = sum(CHANNELS[:layer])
            stack[step, first : first + 4] = codes[order].T.reshape(4, SIDE, SIDE)
            stacks.append(stack.half())
            cell_of_code = torch.argsort(order)[:N_POINTS]
            places.append(torch.stack([cell_of_code // SIDE, cell_of_code % SIDE], dim=1).float())
        pairs.append(Pair(*stacks, *places))
    return pairs


def hits(map_a, map_b, points_a, points_b):
    """Share of points whose nearest neighbour by cosine is the right cell."""
    flat_a, flat_b = (torch.nn.functional.normalize(m.flatten(1), dim=0) for m in (map_a, map_b))
    index_a, index_b = ((p[:, 0] * SIDE + p[:, 1]).long() for p in (points_a, points_b))
    return (flat_a[:, index_a].T @ flat_b).argmax(dim=1).eq(index_b).float().mean().item()


def accuracy(describe, pairs):
    return float(np.mean([hits(describe(p.features_a), describe(p.features_b), p.points_a, p.points_b) for p in pairs]))


def test_training_finds_the_informative_layer_and_beats_raw_concatenation_on_unseen_pairs():
    pairs, unseen = world(40, seed=1), world(15, seed=2)
    net = network()
    result = train(net, pairs.__getitem__, len(pairs), steps=120, lr=1e-2)
    losses = result.history["loss"]
    assert losses[-20:].mean() < 0.75 * losses[:10].mean()
    shares = net.mixing().detach()
    assert shares[INFORMATIVE] > 1.5 / (STEPS * len(CHANNELS))
    assert shares[INFORMATIVE] == shares.max()
    with torch.no_grad():
        trained = accuracy(lambda stack: describe_stacks(net, [stack])[0], unseen)
        raw = accuracy(lambda stack: concatenate(stack.float()[None])[0], unseen)
    assert trained > raw + 0.2, (trained, raw)


def test_the_first_step_is_that_of_adamw_on_the_loss_written_out():
    pair, net, copy = world(1, seed=3)[0], network(), network()
    result = train(net, lambda _: tuple(pair)[:4], 1, steps=1)
    maps = copy(torch.stack([pair.features_a, pair.features_b]))
    flat = torch.nn.functional.normalize(maps.flatten(2), dim=1)
    logits = flat[0].T @ flat[1] / 0.07
    index_a, index_b = ((p[:, 0] * SIDE + p[:, 1]).long() for p in (pair.points_a, pair.points_b))
    there = torch.nn.functional.cross_entropy(logits[index_a], index_b)
    back = torch.nn.functional.cross_entropy(logits.T[index_b], index_a)
    loss = (there + back) / 2
    # Sums in another order.
    assert result.history["loss"][0] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for (name, ours), theirs in zip(net.named_parameters(), copy.parameters(), strict=True):
        # Adam's first step is lr · sign(gradient) wherever the gradient is far from its epsilon.
        clear = theirs.grad.abs() > 1e-4
        assert clear.any(), name
        moved = (ours - theirs).detach()
        torch.testing.assert_close(moved[clear], -1e-3 * theirs.grad.sign()[clear], rtol=1e-2, atol=1e-6)


def test_mixing_weights_may_have_a_rate_of_their_own(tmp_path):
    pair, start = world(1, seed=4)[0], network()
    moved = {}
    for rate in (None, 0.25):
        net = network()
        train(net, lambda _: tuple(pair)[:4], 1, steps=1, mixing_lr=rate, folder=tmp_path / str(rate))
        moved[rate] = {name: (new - old).abs().max().item() for (name, new), old in each(net, start)}
    # The first step of AdamW moves every weight whose gradient is not tiny by its rate.
    assert moved[None]["mixing_weights"] == pytest.approx(1e-3, rel=1e-3)
    assert moved[0.25]["mixing_weights"] == pytest.approx(0.25, rel=1e-3)
    others = [{name: step for name, step in steps.items() if name != "mixing_weights"} for steps in moved.values()]
    assert others[0] == others[1]
    with pytest.raises(InputError, match="rates"):
        train(network(), lambda _: tuple(pair)[:4], 1, steps=2, mixing_lr=0.5, folder=tmp_path / "0.25")
    resumed, whole = network(), network()
    train(resumed, lambda _: tuple(pair)[:4], 1, steps=2, mixing_lr=0.25, folder=tmp_path / "0.25")
    train(whole, lambda _: tuple(pair)[:4], 1, steps=2, mixing_lr=0.25)
    assert all(torch.equal(new, old) for (_, new), old in each(resumed, whole))
    with pytest.raises(UnknownNameError, match="mixing_weights"):
        fit(network(), lambda *_: None, 1, steps=1, batch=1, lr=0.1, rates={"mixing_weight": 1.0})


def each(net, other):
    return zip(net.named_parameters(), other.parameters(), strict=True)


def test_a_batch_is_the_mean_of_its_pairs_and_every_epoch_sees_each_pair_once():
    pairs, seen = world(5, seed=4), []

    def source(index):
        seen.append(index)
        return pairs[index]

    result = train(network(), source, 5, steps=3, batch=5, lr=0.0 + 1e-12)
    assert [sorted(seen[start : start + 5]) for start in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert seen[:5] != seen[5:10]
    single = [train(network(), lambda _, p=p: p, 1, steps=1).history["loss"][0] for p in pairs]
    assert result.history["loss"][0] == pytest.approx(np.mean(single), rel=1e-5)


def test_pairs_of_unequal_sizes_and_absent_points_train():
    pair = world(1, seed=5)[0]
    cut = pair.features_b[:, :, :4]
    present = torch.tensor([False] + [True] * (N_POINTS - 1))
    mixed = Pair(pair.features_a, cut, pair.points_a, pair.points_b.clamp(max=3), present)
    result = train(network(), lambda _: mixed, 1, steps=2)
    everything = train(network(), lambda _: mixed._replace(present=None), 1, steps=2)
    assert np.isfinite(result.history["loss"]).all()
    assert result.history["loss"][0] != pytest.approx(everything.history["loss"][0], rel=1e-4)


def test_the_same_seed_gives_the_same_network_and_another_one_another():
    pairs = world(6, seed=6)
    states = []
    for seed in (0, 0, 1):
        net = network()
        train(net, pairs.__getitem__, 6, steps=5, seed=seed)
        states.append(net.mixing_weights.detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_training_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    pairs, held_out = world(6, seed=7), world(3, seed=8)

    def validate(net):
        return accuracy(lambda stack: describe_stacks(net, [stack])[0], held_out)

    settings = {"steps": 12, "lr": 1e-2, "validate": validate, "validate_every": 3, "save_every": 4}
    whole = network()
    expected = train(whole, pairs.__getitem__, 6, **settings)

    class Cut(Exception):
        pass

    calls = []

    def breaking(index):
        calls.append(index)
        if len(calls) == 7:
            raise Cut
        return pairs[index]

    with pytest.raises(Cut):
        train(network(), breaking, 6, **settings, folder=tmp_path / "run")
    assert json.loads((tmp_path / "run/history.json").read_text())["step"] == 4
    resumed, again = network(seed=5), []

    def counting(index):
        again.append(index)
        return pairs[index]

    result = train(resumed, counting, 6, **settings, folder=tmp_path / "run")
    assert len(again) == 8
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert result.history.equals(expected.history)
    assert (result.best_step, result.best_score) == (expected.best_step, expected.best_score)
    # What is done is not done again.
    before = len(again)
    finished = network(seed=6)
    assert train(finished, counting, 6, **settings, folder=tmp_path / "run").history.equals(expected.history)
    assert len(again) == before
    assert torch.equal(finished.mixing_weights, whole.mixing_weights)


def test_the_best_weights_are_kept_and_patience_ends_the_training(tmp_path):
    pairs = world(4, seed=9)
    scores, weights = iter([0.1, 0.5, 0.4, 0.5, 0.9]), []

    def validate(net):
        assert not torch.is_grad_enabled()
        weights.append(net.mixing_weights.detach().clone())
        return next(scores)

    net = network()
    settings = {"steps": 100, "validate": validate, "validate_every": 2, "patience": 2, "folder": tmp_path}
    result = train(net, pairs.__getitem__, 4, **settings)
    assert (result.steps, result.best_step, result.best_score, result.stopped_early) == (8, 4, 0.5, True)
    assert torch.equal(net.mixing_weights, weights[1])
    assert not torch.equal(weights[3], weights[1])
    assert result.history["score"].dropna().tolist() == [0.1, 0.5, 0.4, 0.5]
    assert len(result.history) == 8
    # Opened again, it is still over.
    assert train(network(), pairs.__getitem__, 4, **settings).steps == 8
    saved = load_file(tmp_path / "training.safetensors")
    assert torch.equal(saved["best.mixing_weights"], weights[1])
    assert torch.equal(saved["network.mixing_weights"], weights[3])
    assert saved["optimizer.0.step"] == 8


def test_features_may_be_anything_that_describe_understands():
    pairs = world(3, seed=10)
    looked_up = []

    def describe(net, names):
        looked_up.extend(names)
        stacks = [pairs[int(name[0])][0 if name[1] == "a" else 1] for name in names]
        return describe_stacks(net, stacks)

    def source(index):
        return f"{index}a", f"{index}b", pairs[index].points_a, pairs[index].points_b

    named, direct = network(), network()
    train(named, source, 3, steps=3, describe=describe)
    train(direct, pairs.__getitem__, 3, steps=3)
    assert torch.equal(named.mixing_weights, direct.mixing_weights)
    assert sorted(looked_up) == ["0a", "0b", "1a", "1b", "2a", "2b"]


def test_what_cannot_be_trained_is_refused(tmp_path):
    pairs = world(2, seed=11)
    with pytest.raises(InputError, match="steps must be at least 1"):
        train(network(), pairs.__getitem__, 2, steps=0)
    with pytest.raises(InputError, match="give validate as well"):
        train(network(), pairs.__getitem__, 2, steps=1, patience=3)
    with pytest.raises(InputError, match="validation score is nan after step 1"):
        train(network(), pairs.__getitem__, 2, steps=1, validate=lambda net: float("nan"))
    broken = pairs[0]._replace(features_a=pairs[0].features_a * float("inf"))
    with pytest.raises(InputError, match="loss is nan at step 1"):
        train(network(), lambda _: broken, 1, steps=1)
    train(network(), pairs.__getitem__, 2, steps=1, folder=tmp_path)
    with pytest.raises(InputError, match=r"lr 0\.001, not 0\.1"):
        train(network(), pairs.__getitem__, 2, steps=2, lr=0.1, folder=tmp_path)
    (tmp_path / "training.safetensors").write_bytes(b"no such thing")
    with pytest.raises(InputError, match="damaged"):
        train(network(), pairs.__getitem__, 2, steps=2, folder=tmp_path)
