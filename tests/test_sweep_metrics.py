"""Metrics of sweeps: what they are given, what is kept of them, and what is refused as one."""

import inspect

import pytest
import torch

from interp import VLM, Add, Scale, Zero
from interp import sweep as sweeps
from interp.errors import InputError
from tests import tiny

RESID = "blocks.{}.hook_resid_pre"
SITES = pytest.mark.parametrize("site", [RESID.format(1), "hook_embed"])  # shared, and one by one

# As called without the checks of types that tests run under.
sweep = inspect.unwrap(VLM.sweep)


def layers(at="last", value=3.0):
    return [[Add(RESID.format(i), torch.full((32,), value), at=at)] for i in range(4)]


def difference(logits):
    return logits[..., 5] - logits[..., 7]


def test_a_metric_is_what_is_kept():
    vlm, inputs = tiny.vlm("llava"), tiny.image_inputs()
    full = vlm.sweep(inputs, [*layers(), []])
    swept = vlm.sweep(inputs, [*layers(), []], metric=difference)
    torch.testing.assert_close(swept.values, difference(full.logits), atol=1e-5, rtol=0)
    torch.testing.assert_close(swept.unedited, swept.values[-1], atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(swept.unedited, difference(vlm(inputs).logits[:, -1]), atol=1e-5, rtol=0)
    several = vlm.sweep(inputs, layers(), metric=difference, positions=[-1, -2])
    assert several.values.shape == (4, 2, 2)
    torch.testing.assert_close(several.values[..., 0], swept.values[:4], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"in \.values"):
        _ = swept.logits
    with pytest.raises(InputError, match=r"in \.logits"):
        _ = full.values


class Growing:
    """A metric that returns one number more each time."""

    def __init__(self):
        self.size = 0

    def __call__(self, logits):
        self.size = self.size % 2 + 1
        return logits[:, : self.size]


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (lambda logits: logits[:, 0] * float("nan"), "NaN"),
        (lambda logits: logits.mean(), "one entry for each of the 2 prompts"),
        (lambda logits: 3.0, "returned float"),
        (lambda logits: logits[:, 0].numpy(), "returned ndarray"),
        (Growing(), r"returned \(2, 2\) for variant 0, but \(2, 1\) for the unedited run"),
        ("x", "metric='x'"),
    ],
)
@pytest.mark.parametrize("site", [RESID.format(1), "hook_embed"])
def test_metrics_that_are_none(metric, match, site):
    vlm = tiny.vlm("llama")
    with pytest.raises(InputError, match=match):
        sweep(vlm, tiny.text_inputs(), [Zero(site, at="last")], metric=metric)


@SITES
@pytest.mark.parametrize("positions", ["last", [0, -1]])
def test_metrics_may_write_into_the_logits(site, positions):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = [[Scale(site, 2.0)], [], [Scale(site, 3.0)], [], []]

    def writes(logits):
        logits[..., 5] = -1e4
        logits *= 2
        return logits[..., 7]

    swept = vlm.sweep(inputs, variants, metric=writes, positions=positions)
    plain = vlm.sweep(inputs, variants, metric=lambda logits: 2 * logits[..., 7], positions=positions)
    torch.testing.assert_close(swept.values, plain.values, atol=0, rtol=0)
    torch.testing.assert_close(swept.unedited, plain.unedited, atol=0, rtol=0)
    for empty in (1, 3, 4):
        assert torch.equal(swept.values[empty], swept.unedited)


@SITES
def test_a_metric_sees_the_unedited_run_once(site):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    seen = []

    def metric(logits):
        seen.append(logits[:, 5])
        return logits[:, 5]

    swept = vlm.sweep(inputs, [[Scale(site, 2.0)], [], []], metric=metric)
    assert sum(torch.equal(one, swept.unedited) for one in seen) == 1 and len(seen) == 2


@SITES
def test_what_a_metric_returns_is_kept_and_not_what_it_is_a_part_of(site, monkeypatch):
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    kept, original = [], sweeps.as_values

    def spy(*given):
        kept.append(original(*given))
        return kept[-1]

    monkeypatch.setattr(sweeps, "as_values", spy)
    buffer = torch.zeros(2)

    def reused(logits):
        return buffer.copy_(logits[:, 5])

    for metric in (lambda logits: logits[:, 5], reused):
        swept = vlm.sweep(inputs, [[Scale(site, 2.0)], [Scale(site, 3.0)]], metric=metric)
        assert [one.untyped_storage().nbytes() for one in kept] == [2 * 4] * 3
        assert (swept.values[0] - swept.values[1]).abs().min() > 1e-3
        kept.clear()
