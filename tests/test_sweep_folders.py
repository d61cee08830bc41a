"""Folders of sweeps: what makes a sweep another one, whose results are then never those of the folder."""

import functools
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import InitVar, dataclass

import pytest
import torch

from interp import VLM, Add, Function, Scale, Zero
from interp.errors import InputError
from interp.patching.metric import logit_difference, measure
from interp.prompts import Prompt, Segment
from interp.sweeps.fingerprint import checksum
from tests import tiny, worded

RESID = "blocks.{}.hook_resid_pre"
TOKEN = 5


def layers(value=3.0):
    return [[Add(RESID.format(layer), torch.full((32,), value), at="last")] for layer in range(3)]


def taking(token):
    return lambda logits: logits[:, token]


def nested(token):
    def pick(logits):
        def inner():
            return logits[:, token]

        return inner()

    return pick


def with_default(token):
    return lambda logits, *, chosen=token: logits[:, chosen]


def scaled(logits, factor):
    return logits[:, 5] * factor


@dataclass(frozen=True)
class Picked:
    token: int

    def __call__(self, logits):
        return logits[:, self.token]


@dataclass
class Hidden:
    """Keeps what it was given outside its fields."""

    token: InitVar[int]

    def __post_init__(self, token):
        self.kept = token

    def __call__(self, logits):
        return logits[:, self.kept]


class Slotted:
    __slots__ = ("token",)

    def __init__(self, token):
        self.token = token

    def __call__(self, logits):
        return logits[:, self.token]


class Weighted:
    def __init__(self, weights):
        self.weights = weights

    def __call__(self, logits):
        return logits @ self.weights

    def measured(self, logits):
        return self(logits)


class Linear(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(97, generator=torch.Generator().manual_seed(seed)))

    def forward(self, logits):
        return logits @ self.weight


def weights(seed):
    return torch.randn(97, generator=torch.Generator().manual_seed(seed))


def far_apart(seed):
    """Two large tensors that differ in one number far behind the first ones."""
    large = torch.zeros(2**19)
    large[-1] = seed
    return lambda logits: logits[:, 5] + large[-1]


def of_a_class(token, shift):
    """Objects without a state, of classes that differ in a method and an attribute."""

    class Fixed:
        width = shift

        def __call__(self, logits):
            return logits[:, 5] + self.width if token == 5 else logits[:, 7] * self.width

    return Fixed()


CHANGED = {
    "attributes of classes": (of_a_class(5, 1), of_a_class(5, 2)),
    "methods of classes": (of_a_class(5, 1), of_a_class(7, 1)),
    "attribute names": (lambda logits: logits.amax(-1), lambda logits: logits.amin(-1)),
    "closures": (taking(3), taking(9)),
    "closures of inner functions": (nested(3), nested(9)),
    "defaults": (with_default(3), with_default(9)),
    "partial": (functools.partial(scaled, factor=2.0), functools.partial(scaled, factor=3.0)),
    "dataclasses": (Picked(3), Picked(9)),
    "attributes that are no fields": (Hidden(3), Hidden(9)),
    "slots": (Slotted(3), Slotted(9)),
    "objects": (Weighted(weights(0)), Weighted(weights(1))),
    "methods": (Weighted(weights(0)).measured, Weighted(weights(1)).measured),
    "methods of tensors": (lambda logits: logits.float(), weights(0).__rmatmul__),
    "modules": (Linear(0), Linear(1)),
    "large tensors": (far_apart(0), far_apart(1)),
    "lists": (taking([3]), taking([9])),
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_metric_is_another_sweep(what, tmp_path) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    metric, other = CHANGED[what]
    first = vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path)
    again = vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path)
    assert torch.equal(first.values, again.values)
    with pytest.raises(InputError, match="other metric or positions: take another folder"):
        vlm.sweep(inputs, layers(), metric=other, folder=tmp_path)


@pytest.mark.parametrize(
    "make",
    [taking, nested, with_default, Picked, Hidden, Slotted, lambda token: functools.partial(taking(token))],
)
def test_the_same_metric_made_again_is_the_same_sweep(make, tmp_path) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    first = vlm.sweep(inputs, layers(), metric=make(3), folder=tmp_path)
    again = vlm.sweep(inputs, layers(), metric=make(3), folder=tmp_path)
    assert torch.equal(first.values, again.values)


def test_globals_that_a_metric_reads_belong_to_it(tmp_path, monkeypatch) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()

    def metric(logits):
        return logits[:, TOKEN] + math.pi + tiny.VOCAB

    first = vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path)
    monkeypatch.setitem(globals(), "UNREAD", 3)
    assert torch.equal(vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path).values, first.values)
    for change in (lambda patch: patch.setitem(globals(), "TOKEN", 6), lambda patch: patch.setattr(tiny, "VOCAB", 98)):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="other metric"):
            change(patch)
            vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path)


def test_functions_and_models_that_a_metric_holds(tmp_path) -> None:
    vlm, inputs = worded.llama(), tiny.text_inputs((5, 5))

    def countdown(n):
        return 0 if n == 0 else countdown(n - 1)

    def metric(logits):
        return logits[:, vlm.tokenizer("a")["input_ids"][0] + countdown(2)]

    first = vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path)
    assert torch.equal(vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path).values, first.values)


@pytest.mark.parametrize("held", [threading.Lock(), (x for x in [1, 2])])
def test_what_cannot_be_told_apart_is_refused(held, tmp_path) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()

    def metric(logits):
        return logits[:, 5] if held is not None else logits[:, 6]

    nest = []
    for _ in range(2000):
        nest = [nest]
    with pytest.raises(InputError, match="without a folder"):
        vlm.sweep(inputs, layers(), metric=taking(nest), folder=tmp_path / "new")
    with pytest.raises(InputError, match=rf"metric.*held.*{type(held).__name__}.*without a folder"):
        vlm.sweep(inputs, layers(), metric=metric, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert vlm.sweep(inputs, layers(), metric=metric).values.shape == (3, 2)


@pytest.mark.parametrize(
    ("edit", "other"),
    [
        (Function(RESID.format(1), lambda x: x.abs(), at="last"), Function(RESID.format(1), lambda x: -x, at="last")),
        (Scale(RESID.format(1), 2.0, at="last"), Scale(RESID.format(1), 3.0, at="last")),
        (Scale(RESID.format(1), 2.0, at="last"), Scale(RESID.format(2), 2.0, at="last")),
        (Scale(RESID.format(1), 2.0, at="last"), Scale(RESID.format(1), 2.0, at=-2)),
        (Scale(RESID.format(1), 2.0, rows=0), Scale(RESID.format(1), 2.0, rows=1)),
        (Zero(RESID.format(1), at="last"), Scale(RESID.format(1), 2.0, at="last")),
    ],
)
def test_other_edits_are_another_sweep(edit, other, tmp_path) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    vlm.sweep(inputs, [[edit]], folder=tmp_path)
    vlm.sweep(inputs, [[edit]], folder=tmp_path)
    with pytest.raises(InputError, match="other variants"):
        vlm.sweep(inputs, [[other]], folder=tmp_path)


def test_edits_of_outer_blocks_and_hooks_belong_to_the_sweep(tmp_path) -> None:
    vlm, inputs = VLM(tiny.llama()), tiny.text_inputs()
    vlm.sweep(inputs, layers(), folder=tmp_path / "bare")
    outer = Zero("blocks.0.hook_mlp_out")
    with vlm.edit(outer):
        with pytest.raises(InputError, match="other outer edits or hooks"):
            vlm.sweep(inputs, layers(), folder=tmp_path / "bare")
        first = vlm.sweep(inputs, layers(), folder=tmp_path / "edited")
        assert torch.equal(vlm.sweep(inputs, layers(), folder=tmp_path / "edited").logits, first.logits)
    with pytest.raises(InputError, match="other outer edits or hooks"):
        vlm.sweep(inputs, layers(), folder=tmp_path / "edited")
    handle = vlm.model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    with pytest.raises(InputError, match="other outer edits or hooks"):
        vlm.sweep(inputs, layers(), folder=tmp_path / "bare")
    handle.remove()


def test_names_of_positions_belong_to_the_inputs(tmp_path) -> None:
    vlm = worded.llama()
    one = vlm.prepare([Prompt((Segment("x", text="France"), Segment("y", text="Japan")))])
    other = vlm.prepare([Prompt((Segment("y", text="France"), Segment("x", text="Japan")))])
    assert torch.equal(one["input_ids"], other["input_ids"])
    edits = [[Zero("blocks.0.hook_mlp_out", at="x.first")]]
    vlm.sweep(one, edits, folder=tmp_path)
    with pytest.raises(InputError, match="other inputs"):
        vlm.sweep(other, edits, folder=tmp_path)


@pytest.mark.parametrize("what", ["weight", "buffer", "config"])
def test_another_model_is_another_sweep(what, tmp_path) -> None:
    vlm, inputs = VLM(tiny.llama()), tiny.text_inputs()
    first = vlm.sweep(inputs, layers(), folder=tmp_path)
    assert torch.equal(VLM(tiny.llama()).sweep(inputs, layers(), folder=tmp_path).logits, first.logits)
    with torch.no_grad():
        if what == "weight":
            vlm.model.model.layers[2].mlp.down_proj.weight[-1, -1] += 1.0
        elif what == "buffer":
            vlm.model.model.rotary_emb.inv_freq[-1] += 1.0
        else:
            vlm.model.config.rms_norm_eps = 0.5
    with pytest.raises(InputError, match="other model"):
        vlm.sweep(inputs, layers(), folder=tmp_path)


def test_weights_that_accelerate_keeps_elsewhere(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = tiny.text_inputs()
    for where, other in (("same", False), ("other", True)):
        vlm = VLM(tiny.llama())
        accelerate.cpu_offload(vlm.model.model.layers[2], execution_device="cpu")
        vlm.sweep(inputs, layers(), folder=tmp_path / where)
        changed = VLM(tiny.llama())
        with torch.no_grad():
            changed.model.model.layers[2].mlp.down_proj.weight[-1, -1] += float(other)
        accelerate.cpu_offload(changed.model.model.layers[2], execution_device="cpu")
        if other:
            with pytest.raises(InputError, match="other model"):
                changed.sweep(inputs, layers(), folder=tmp_path / where)
        else:
            changed.sweep(inputs, layers(), folder=tmp_path / where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_checksums_see_every_number_of_large_tensors(dtype) -> None:
    n = 2**21 + 3
    x = (torch.arange(n) % 7 > 2).to(dtype)
    first = checksum(x)
    assert checksum(x.clone()) == first and checksum(x.view(1, n)) == first
    for index in (0, n // 2, n - 1):
        changed = x.clone()
        changed[index] = x[index] == 0
        assert checksum(changed) != first
    assert checksum(x.flip(0)) != first
    assert checksum(x.roll(1)) != first


def test_patching_calls_tell_their_metrics_apart(tmp_path) -> None:
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    first = logit_difference(vlm, [3, 4], [5, 6])
    other = logit_difference(vlm, [13, 14], [15, 16])
    values, _ = measure(vlm, inputs, layers(), first, folder=tmp_path)
    again, _ = measure(vlm, inputs, layers(), logit_difference(vlm, [3, 4], [5, 6]), folder=tmp_path)
    assert torch.equal(values, again)
    with pytest.raises(InputError, match="other metric"):
        measure(vlm, inputs, layers(), other, folder=tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()).keys() == {
        "model",
        "inputs",
        "outer edits or hooks",
        "variants",
        "metric or positions",
    }


def test_digests_are_those_of_other_processes(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import re, torch\n"
        "from interp.sweeps.written import Writer\n"
        "WORDS = {'a', 'b', 'c', 5, 7}\n"
        "class Metric:\n"
        "    names = frozenset(('x', 'y', 'z'))\n"
        "    def __init__(self):\n"
        "        self.kept = {3: 1, 'q': re.compile('x')}\n"
        "        self.layer = torch.nn.Softmax(-1)\n"
        "    def __call__(self, logits):\n"
        "        return logits[:, 5] if logits in {'u', 'v', 'w'} else WORDS\n"
        "print(Writer(lambda x: b'', {}).digest([Metric(), lambda: Metric]).hex())\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, script], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1 and len(seen.pop().strip()) == 64
