"""What a sweep shares, against loops of edited forwards: every family, random edits, both layouts."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from interp import VLM, Add, Function, Interpolate, MeanAblate, Project, Replace, Scale, Zero
from interp.positions import PerRow
from interp.sweeps import plan as plans
from tests import tiny
from tests.models.test_places import RELATIVES

# The issue of a sweep is the loop's to rounding: logits are of order 10 with these weights. Measured: 3e-5 at most.
LARGEST = 1e-4


def sliding():
    """A Mistral whose tokens see four others."""
    config = MistralConfig(**tiny.DECODER, head_dim=8, sliding_window=4)
    return tiny.redraw(MistralForCausalLM._from_config(config, attn_implementation="sdpa"))


FAMILIES = {
    **{name: (make, lambda name=name: tiny.inputs_for(name)) for name, make in tiny.ALL.items()},
    "sliding": (sliding, lambda: tiny.text_inputs((14, 9))),
    "eager gpt2": (lambda: tiny.gpt2("eager"), tiny.text_inputs),
    "eager llava": (lambda: tiny.llava("eager"), tiny.image_inputs),
    **RELATIVES,
}


def naive(vlm, inputs, variants, positions=-1):
    logits = []
    for edits in variants:
        with torch.no_grad():
            if edits:
                with vlm.edit(*edits):
                    logits.append(vlm(inputs).logits[:, positions])
            else:
                logits.append(vlm(inputs).logits[:, positions])
    return torch.stack(logits)


def drawn(vlm, inputs, n, seed):
    """Random edits at random sites, positions (image tokens too), heads and rows; one to three per variant."""
    g = torch.Generator().manual_seed(seed)
    mask = inputs["attention_mask"]
    batch, shortest = mask.shape[0], int(mask.sum(-1).min())
    sites = [s for s in vlm.sites() if s.startswith(("blocks.", "ln_final"))]

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=g))]

    def edit():
        site = pick(sites)
        place = vlm.place(site)
        at = pick(["last", int(torch.randint(-shortest, 0, (), generator=g)), [-1, -2], None, slice(1, None)])
        if pick([True, False]) and batch > 1:
            lengths = mask.sum(-1).tolist()
            at = PerRow(tuple(int(torch.randint(0, length, (), generator=g)) for length in lengths))
        rows = pick([None, None, 0])
        if isinstance(at, PerRow):
            rows = None
        if place.side == "pattern":
            return Scale(site, 0.5, at=at, rows=rows, heads=pick([None, 1]))
        heads = pick([None, [0], 1]) if place.n_heads else None
        where = {"at": at, "rows": rows, "heads": heads}
        value = 3 * torch.randn(place.width, generator=g)
        return pick([
            Replace(site, value, **where),
            Add(site, value, **where),
            Interpolate(site, value, 0.4, **where),
            Zero(site, **where),
            Project(site, value, **where),
            MeanAblate(site, **where) if at not in (None,) and not isinstance(at, slice) else Scale(site, 2.0, **where),
            Function(site, torch.tanh, **where),
        ])  # fmt: skip

    variants = []
    while len(variants) < n:
        edits = [edit() for _ in range(pick([1, 1, 2, 3]))]
        # Edits of two positions of one site mix no entry twice.
        if len({e.site for e in edits}) == len(edits):
            variants.append(edits)
    return variants


@pytest.mark.parametrize("name", FAMILIES)
def test_random_edits_give_what_the_loop_gives(name):
    make, inputs_of = FAMILIES[name]
    vlm, inputs = VLM(make()), inputs_of()
    variants = drawn(vlm, inputs, 40, seed=3)
    want = naive(vlm, inputs, variants)
    moved = (want - naive(vlm, inputs, [[]])).abs().amax((1, 2))
    assert (moved > 1e-2).float().mean() > 0.7  # within reach of the last token
    for options in ({}, {"check": False, "max_rows": 6}):
        swept = vlm.sweep(inputs, variants, allow_no_effect=True, **options)
        assert (swept.logits - want).abs().max() <= LARGEST
        # A quarter of the edits are on all tokens, which share nothing but the images.
        assert swept.plan.token_layers < 0.8 * swept.plan.naive_token_layers and not swept.plan.reason


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava", "sliding"])
def test_both_layouts_on_a_grid(name, layout, monkeypatch):
    monkeypatch.setattr(plans, "_packs", lambda *arguments: layout == "packed")
    make, inputs_of = FAMILIES[name]
    vlm, inputs = VLM(make()), inputs_of()
    lengths = inputs["attention_mask"].sum(-1).tolist()
    value = 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    variants = [
        [Add(f"blocks.{layer}.{leaf}", value, at=at)]
        for layer in range(4)
        for leaf in ("hook_resid_pre", "hook_attn_out", "hook_resid_post")
        for at in (-1, -2, -5, PerRow((lengths[0] - 3, 0)))
    ]
    swept = vlm.sweep(inputs, variants, allow_no_effect=True)
    assert (swept.logits - naive(vlm, inputs, variants)).abs().max() <= LARGEST
    assert all(layout in chunk for chunk in swept.plan.chunks)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
@pytest.mark.parametrize("positions", [[-1, -3], -2, "last", [0, -1], slice(None)])
def test_other_positions_than_the_last(name, positions):
    vlm, inputs = tiny.vlm(name), tiny.inputs_for(name)
    inputs = {key: x for key, x in inputs.items() if key != "attention_mask"} if positions == slice(None) else inputs
    if positions == slice(None):
        inputs["input_ids"] = inputs["input_ids"].clamp(min=3)
    inputs["attention_mask"] = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    start = (1 - inputs["attention_mask"]).sum(-1)
    length = inputs["attention_mask"].shape[1]
    picks = {"last": [-1], -2: [-2]}.get(positions if not isinstance(positions, list | slice) else None, positions)
    picks = list(range(length)) if isinstance(picks, slice) else picks
    index = torch.stack([torch.tensor([p % length if p < 0 else p + int(s) for p in picks]) for s in start])
    variants = [
        [Add("blocks.1.hook_resid_post", torch.full((32,), 3.0), at=-2)],
        [Scale("blocks.2.attn.hook_z", 3.0, heads=1, at=-3)],
        [Add("unembed.hook_out", torch.ones(97), at=-1), Zero("blocks.3.hook_mlp_out", at="last")],
        [Zero("ln_final.hook_out", at=-1)],
    ]
    want = torch.take_along_dim(naive(vlm, inputs, variants, slice(None)), index[None, :, :, None], dim=2)
    want = want[:, :, 0] if isinstance(positions, int | str) else want
    kept = [one for one in range(4) if one != 2 or positions != -2]
    swept = vlm.sweep(inputs, [variants[k] for k in kept], positions=positions, allow_no_effect=True)
    assert swept.logits.shape == want[kept].shape
    assert (swept.logits - want[kept]).abs().max() <= LARGEST
    assert not swept.plan.reason


def counted(vlm, run):
    """Token-layers that ran, counted by hooks of torch's own on all modules."""
    blocks = {id(vlm.model.get_submodule(vlm.place(f"blocks.{i}.hook_resid_pre").path)) for i in range(vlm.n_layers)}
    n_tokens = []

    def count(module, args, output):
        if id(module) in blocks:
            n_tokens.append(args[0].shape[0] * args[0].shape[1])

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        return run(), sum(n_tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "llava", "gpt2", "sliding"])
@pytest.mark.parametrize("check", [True, False])
def test_the_plan_counts_what_runs(name, check):
    make, inputs_of = FAMILIES[name]
    vlm, inputs = VLM(make()), inputs_of()
    one = {key: x[:1] for key, x in inputs.items()} if name != "llava" else tiny.image_inputs((2,))
    cases = {
        "last": [[Zero(f"blocks.{layer}.hook_resid_post", at="last")] for layer in range(4)] * 3,
        "grid": [[Scale(f"blocks.{layer}.hook_resid_post", 2.0, at=at)] for layer in range(4) for at in range(-6, 0)],
        "heads": [[Zero(f"blocks.{layer}.attn.hook_z", heads=h, at="last")] for layer in range(4) for h in range(4)],
    }
    for case, variants in cases.items():
        for given in (inputs, one):
            options = {"allow_no_effect": True, "check": check}
            dry = vlm.sweep(given, variants, dry_run=True, **options).plan
            swept, n_tokens = counted(vlm, lambda v=variants, g=given, o=options: vlm.sweep(g, v, **o))
            assert n_tokens == swept.plan.token_layers == dry.token_layers, case
            assert swept.plan.naive_token_layers == len(variants) * given["input_ids"].numel() * 4
            assert dry == swept.plan
            if case == "last":
                assert n_tokens < 0.2 * swept.plan.naive_token_layers


def test_a_grid_comes_near_the_ideal():
    """A variant at layer l and position p needs blocks l + 1 on, and tokens from p on: a quarter of them all."""
    vlm = VLM(tiny.llama(num_hidden_layers=8))
    inputs = tiny.text_inputs((40,))
    variants = [[Scale(f"blocks.{layer}.hook_resid_post", 2.0, at=at)] for layer in range(8) for at in range(40)]
    plan = vlm.sweep(inputs, variants, dry_run=True, allow_no_effect=True).plan
    ideal = sum((7 - layer) * (40 - at) for layer in range(8) for at in range(40))
    assert plan.layers_shared == sum((layer + 1) * (40 - at) for layer in range(8) for at in range(40))
    assert plan.token_layers < 1.15 * ideal and plan.naive_token_layers > 4 * plan.token_layers
