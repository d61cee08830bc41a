"""The jobs of `benchmarks/patching.py`, done by nnsight, TransformerLens and pyvene.

Peers get a copy of the model. Their sweeps are loops of edited forwards, which is what each of them offers for this.
"""

import copy
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from patching_tools import ATTRIBUTION, GRID, HEADS, LAST, PATTERNS, STREAMS, Case, Job, eager, estimates, metric
from torch import Tensor

import interp


def nnsight(case: Case) -> dict[str, Job]:
    """nnsight: a trace for each patch."""
    from nnsight import NNsight

    traced = NNsight(copy.deepcopy(case.model))
    n_layers, d_head = case.n_layers, case.d_head
    layers = getattr(traced.model, "language_model", traced.model).layers

    def streams(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad(), traced.trace(**inputs, logits_to_keep=1):
            saved = [].save()
            for i in range(n_layers):
                saved.append(layers[i].output)
        return list(saved)

    def patterns() -> list[Tensor]:
        with eager(traced._module), torch.no_grad(), traced.trace(**case.inputs, logits_to_keep=1):
            saved = [].save()
            for i in range(n_layers):
                saved.append(layers[i].self_attn.output[1])
        return list(saved)

    def patched(layer: int, position: int) -> Tensor:
        with torch.no_grad(), traced.trace(**case.inputs, logits_to_keep=1):
            layers[layer].output[:, position] = case.value
            found = traced.lm_head.output[:, -1].save()
        return found

    def without(layer: int, head: int) -> Tensor:
        with torch.no_grad(), traced.trace(**case.inputs, logits_to_keep=1):
            layers[layer].self_attn.o_proj.input[:, -1, head * d_head : (head + 1) * d_head] = 0
            found = traced.lm_head.output[:, -1].save()
        return found

    def attribution() -> list[Tensor]:
        clean = streams(case.other)
        with traced.trace(**case.inputs, logits_to_keep=1):
            corrupt, grads = [].save(), [].save()
            layers[0].output.requires_grad_(True)
            for i in range(n_layers):
                corrupt.append(layers[i].output)
            value = metric(traced.lm_head.output[:, -1]).save()
            with value.sum().backward():
                for i in reversed(range(n_layers)):
                    grads.append(corrupt[i].grad)
        return estimates(clean, list(corrupt), list(reversed(grads)), value)

    return {
        STREAMS: Job(lambda: streams(case.inputs)),
        PATTERNS: Job(patterns, note="eager attention, which is switched on by hand"),
        LAST: case.loop(LAST, patched),
        GRID: case.loop(GRID, patched),
        HEADS: case.loop(HEADS, without),
        ATTRIBUTION: Job(attribution),
    }


def transformer_lens(case: Case) -> dict[str, Job]:
    """TransformerLens's bridge: ``run_with_hooks`` for each patch; it always runs eager attention."""
    from transformer_lens.model_bridge import TransformerBridge

    mine = copy.deepcopy(case.model)  # the bridge exchanges modules and the attention kernel
    mine.config.architectures = [type(mine).__name__]
    tokenizer = transformers.AutoTokenizer.from_pretrained(interp.zoo.path("tiny-llama"))
    n_layers, n_heads = case.n_layers, case.vlm.n_heads
    with TemporaryDirectory() as folder:
        mine.config.save_pretrained(folder)
        if "pixel_values" in case.inputs:
            # Without one to load, the bridge would run `pip install torchvision` by itself, which replaces torch.
            side = case.inputs["pixel_values"].shape[-1]
            images = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
            transformers.LlavaProcessor(images, tokenizer, patch_size=8).save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=mine, tokenizer=tokenizer)

    def given(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        return {"input": inputs["input_ids"], **rest}

    def captured(names: list[str], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(**given(inputs), names_filter=names, logits_to_keep=1)
        return [cache[name] for name in names]

    def run(name: str, hook: Callable[[Tensor, Any], Tensor]) -> Tensor:
        with torch.no_grad():
            return bridge.run_with_hooks(**given(case.inputs), fwd_hooks=[(name, hook)], logits_to_keep=1)[:, -1]

    def patched(layer: int, position: int) -> Tensor:
        def put(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, position] = case.value
            return x

        return run(f"blocks.{layer}.hook_out", put)

    def without(layer: int, head: int) -> Tensor:
        def drop(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            split = z if z.ndim == 4 else z.unflatten(-1, (n_heads, -1))
            split[:, -1, head] = 0
            return z

        return run(f"blocks.{layer}.attn.hook_z", drop)

    outs = [f"blocks.{i}.hook_out" for i in range(n_layers)]

    def attribution() -> list[Tensor]:
        clean = captured(outs, case.other)
        corrupt: list[Tensor] = []

        def keep(x: Tensor, hook: Any) -> Tensor:
            x = x if x.requires_grad else x.detach().requires_grad_()
            corrupt.append(x)
            return x

        hooks = [(name, keep) for name in outs]
        value = metric(bridge.run_with_hooks(**given(case.inputs), fwd_hooks=hooks, logits_to_keep=1)[:, -1])
        return estimates(clean, corrupt, torch.autograd.grad(value.sum(), corrupt), value)

    return {
        STREAMS: Job(lambda: captured(outs, case.inputs)),
        PATTERNS: Job(lambda: captured([f"blocks.{i}.attn.hook_pattern" for i in range(n_layers)], case.inputs)),
        LAST: case.loop(LAST, patched),
        GRID: case.loop(GRID, patched),
        HEADS: case.loop(HEADS, without),
        ATTRIBUTION: Job(attribution),
    }


def pyvene(case: Case) -> dict[str, Job]:
    """pyvene: an intervention for each patch."""
    import pyvene

    mine = copy.deepcopy(case.model)
    n_layers, d_head = case.n_layers, case.d_head
    pictured = "pixel_values" in case.inputs
    # Its own names of LLaVA's blocks do not lead anywhere in transformers 5.
    blocks = "model.language_model.layers[{}]" if pictured else "model.layers[{}]"
    note = "takes away transformers' own hooks, put back by hand before each forward" if pictured else ""

    def run(changes: dict[str, Callable[[Tensor, Any], Tensor]], inputs: Mapping[str, Tensor]) -> Tensor:
        settings = [{"component": name, "intervention": change} for name, change in changes.items()]
        intervenable = pyvene.IntervenableModel(settings, model=mine)
        for module in mine.modules():
            if hasattr(module, "_output_capturing_hooks_installed"):
                module._output_capturing_hooks_installed = False
        _, out = intervenable(base={**inputs, "logits_to_keep": 1}, unit_locations=None)
        return out.logits[:, -1]

    def changed(name: str, change: Callable[[Tensor, Any], Tensor]) -> Tensor:
        with torch.no_grad():
            return run({name: change}, case.inputs)

    def patched(layer: int, position: int) -> Tensor:
        def put(base: Tensor, source: Any) -> Tensor:
            new = base.clone()
            new[:, position] = case.value
            return new

        return changed(f"{blocks.format(layer)}.output", put)

    def without(layer: int, head: int) -> Tensor:
        def drop(base: Tensor, source: Any) -> Tensor:
            new = base.clone()
            new[:, -1, head * d_head : (head + 1) * d_head] = 0
            return new

        return changed(f"{blocks.format(layer)}.self_attn.o_proj.input", drop)

    def seen(module: str, inputs: Mapping[str, Tensor], grad: bool = False) -> tuple[list[Tensor], Tensor]:
        found: list[Tensor] = []

        def look(base: Tensor, source: Any) -> Tensor:
            if grad:
                base = base if base.requires_grad else base.detach().requires_grad_()
            found.append(base if grad else base.detach().clone())
            return base

        with torch.set_grad_enabled(grad):
            logits = run({module.format(i): look for i in range(n_layers)}, inputs)
        return found, logits

    def patterns() -> list[Tensor]:
        with eager(mine):
            found, _ = seen(f"{blocks}.self_attn.output", case.inputs)
        if found[0].ndim != 4:
            raise RuntimeError("of a module's outputs it hands on the first only, which is not the pattern")
        return found

    def attribution() -> list[Tensor]:
        clean, _ = seen(f"{blocks}.output", case.other)
        corrupt, logits = seen(f"{blocks}.output", case.inputs, grad=True)
        value = metric(logits)
        return estimates(clean, corrupt, torch.autograd.grad(value.sum(), corrupt), value)

    return {
        STREAMS: Job(lambda: seen(f"{blocks}.output", case.inputs)[0], note=note),
        PATTERNS: Job(patterns, note=note),
        LAST: case.loop(LAST, patched, note),
        GRID: case.loop(GRID, patched, note),
        HEADS: case.loop(HEADS, without, note),
        ATTRIBUTION: Job(attribution, note=note),
    }
