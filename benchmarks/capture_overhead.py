"""Capture of every residual stream: this library beside plain hooks, nnsight and TransformerLens, in one run.

Two random models, a Llama of GPT-2-small's size and a LLaVA with 64 image tokens, and the same inputs for all. Rounds
are interleaved, so that a machine whose speed drifts treats all alike; each figure is the median over rounds of the
ratio to the bare forward of the same round. Every tool's activations are compared with plain torch hooks.

    make bench
"""

import argparse
import copy
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import interp
from interp import tables
from interp.progress import track

Inputs = dict[str, Tensor]
Capture = Callable[[], list[Tensor]]
VOCAB = 32000


def text_model() -> tuple[nn.Module, Inputs]:
    """A Llama of 12 layers of width 768, and 4 rows of 128 tokens."""
    config = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=VOCAB,
    )
    return transformers.LlamaForCausalLM(config).eval(), tokens(4, 128)


def image_model() -> tuple[nn.Module, Inputs]:
    """A LLaVA of 8 layers of width 512 with 64 tokens an image, and 4 rows of one image and 32 tokens."""
    decoder = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=VOCAB
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=decoder, image_token_index=VOCAB - 1)
    inputs = tokens(4, 64 + 32)
    inputs["input_ids"][:, :64] = VOCAB - 1
    inputs["pixel_values"] = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return transformers.LlavaForConditionalGeneration(config).eval(), inputs


def tokens(batch: int, length: int) -> Inputs:
    """Random tokens without padding."""
    ids = torch.randint(3, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plain_hooks(model: nn.Module, inputs: Inputs) -> Capture:
    """The least that can be done: one torch hook per block."""
    blocks = interp.VLM(model).decoder.layers

    def run() -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [block.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone())) for block in blocks]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        return seen

    return run


def this_library(model: nn.Module, inputs: Inputs) -> Capture:
    """interp, all positions."""
    vlm = interp.VLM(model)
    return lambda: list(vlm.capture(inputs, "blocks.*.hook_resid_post").values())


def this_library_last(model: nn.Module, inputs: Inputs) -> Capture:
    """interp, the last token only."""
    vlm = interp.VLM(model)
    return lambda: list(vlm.capture(inputs, "blocks.*.hook_resid_post", at="last").values())


def with_nnsight(model: nn.Module, inputs: Inputs) -> Capture:
    """nnsight, one trace that saves every block's output."""
    from nnsight import NNsight

    traced = NNsight(copy.deepcopy(model))
    n_layers = interp.VLM(model).n_layers

    def run() -> list[Tensor]:
        layers = getattr(traced.model, "language_model", traced.model).layers
        with torch.no_grad(), traced.trace(**inputs):
            saved = [].save()
            for i in range(n_layers):
                saved.append(layers[i].output)
        return [value if isinstance(value, Tensor) else value[0] for value in saved]

    return run


def with_transformer_lens(model: nn.Module, inputs: Inputs) -> Capture:
    """TransformerLens's bridge around a copy of the model; it always runs eager attention."""
    from transformer_lens.model_bridge import TransformerBridge

    if "pixel_values" in inputs and importlib.util.find_spec("torchvision") is None:
        # Its bridge would run `pip install torchvision`, which replaces this environment's torch.
        raise RuntimeError("needs torchvision for a model with images, and installs it by itself")
    mine = copy.deepcopy(model)  # the bridge exchanges modules and the attention kernel
    mine.config.architectures = [type(model).__name__]
    tokenizer = transformers.AutoTokenizer.from_pretrained(interp.zoo.path("tiny-llama"))
    with TemporaryDirectory() as folder:
        mine.config.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=mine, tokenizer=tokenizer)
    names = [f"blocks.{i}.hook_out" for i in range(interp.VLM(model).n_layers)]
    images = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}

    def run() -> list[Tensor]:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(inputs["input_ids"], names_filter=names, **images)
        return [cache[name] for name in names]

    return run


TOOLS: dict[str, Callable[[nn.Module, Inputs], Capture]] = {
    "plain torch hooks": plain_hooks,
    "interp": this_library,
    "interp, last token": this_library_last,
    "nnsight": with_nnsight,
    "TransformerLens": with_transformer_lens,
}


def measure(model: nn.Module, inputs: Inputs, rounds: int) -> list[dict[str, object]]:
    """Time the bare forward and every tool in turn; one row per tool, with its largest error."""

    def bare() -> list[Tensor]:
        with torch.no_grad():
            model(**inputs)
        return []

    reference = plain_hooks(model, inputs)()
    captures: dict[str, Capture] = {}
    rows: list[dict[str, object]] = []
    for name, make in TOOLS.items():
        try:
            captures[name] = make(model, inputs)
            captures[name]()
        except Exception as error:  # a peer that cannot do the job is a result, stated in its row
            captures.pop(name, None)
            rows.append({"tool": name, "ratio": None, "note": f"fails: {type(error).__name__}: {str(error)[:80]}"})
    times: dict[str, list[float]] = {name: [] for name in ("bare", *captures)}
    for _ in track(range(rounds), "rounds"):
        for name, run in (("bare", bare), *captures.items()):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    for name, run in captures.items():
        ratios = np.array(times[name]) / np.array(times["bare"])
        found = run()
        expected = [full[:, -1] for full in reference] if found[0].ndim == 2 else reference
        error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        low, high = np.percentile(ratios, [25, 75])
        rows.append(
            {"tool": name, "ratio": float(np.median(ratios)), "spread": f"{low:.2f} to {high:.2f}",
             "largest difference": f"{error:.1e}", "note": ""}
        )  # fmt: skip
    return rows


def main() -> None:
    """Run both models, print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/capture-overhead.json"))
    options = parser.parse_args()
    results = {}
    for title, build in (
        ("Llama, 12 layers x 768, 4 x 128 tokens", text_model),
        ("LLaVA, 8 layers x 512, 64 image tokens", image_model),
    ):
        torch.manual_seed(0)
        results[title] = measure(*build(), options.rounds)
        columns = ["tool", "ratio", "spread", "largest difference", "note"]
        rows = [[row.get(column) for column in columns] for row in results[title]]
        tables.show(
            ["capture of all residual streams", "time / bare forward", "quartiles", "largest difference", ""],
            rows,
            title=title,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor(),
    }
    options.out.write_text(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
