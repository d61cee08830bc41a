"""Function vectors: what the heads that mediate a task write together, added to the residual stream.

The sum of the mean outputs of the top heads by average indirect effect, each projected by its columns of the output
projection, added at a layer's output at the last token of every step. Source: Todd et al. 2024, "Function Vectors in
Large Language Models", section 2.4.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.edits import Add
from interp.errors import InputError, ShapeError
from interp.models.vlm import VLM
from interp.patching.head_vectors import SITE, HeadOutputs, check_heads, layout, random_heads
from interp.patching.heads import Head
from interp.patching.metric import MetricFunction, name_of
from interp.patching.options import check_draws
from interp.patching.result import PatchingResult
from interp.patching.variants import measure_variants
from interp.saved_files import check_saved, saved_files
from interp.task_vectors import SITE as RESID

Vector = Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """A direction of the residual stream that stands for a task.

    Args:
        vector: float32.
        heads: (layer, head) whose outputs it sums.
        about: what it was made from; JSON-able.
    """

    vector: Float[Tensor, " d_model"]
    heads: tuple[Head, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def edit(
        self, layer: int, *, scale: float = 1.0, at: Any = "last", when: Literal["prefill", "every"] = "every"
    ) -> Add:
        """The edit that adds it to a block's output, in the paper at the last token of every step.

        Args:
            layer: block, from 0; the paper takes one at about a third of the depth.
            scale: factor.
            at: the token.
            when: ``"prefill"``: in the prompt only.

        Source: Todd et al. 2024, section 2.4.
        """
        return Add(RESID.format(layer=layer), self.vector, scale=scale, at=at, when=when)

    def save(self, path: str | Path) -> Path:
        """Write ``path.safetensors`` and ``path.json``.

        Returns:
            The path of the safetensors file.
        """
        file, described = saved_files(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"function_vector": self.vector.detach().cpu().contiguous()}, file)
        described.write_text(json.dumps({"heads": [list(head) for head in self.heads], "about": dict(self.about)}))
        return file

    @classmethod
    def load(cls, path: str | Path) -> "FunctionVector":
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        file, described = saved_files(path)
        check_saved((file, described), "no function vector at {!r}: it is a .safetensors and a .json file")
        try:
            about = json.loads(described.read_text())
            heads = tuple((int(layer), int(head)) for layer, head in about["heads"])
            return cls(load_file(file)["function_vector"], heads, about["about"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"the function vector at {str(path)!r} is damaged: {error}") from error


@torch.no_grad()
def head_contributions(vlm: VLM, outputs: HeadOutputs) -> Float[Tensor, "layer head d_model"]:
    """What each head's output adds to the attention output: its slice through its columns of the output projection.

    Their sum over heads and the projection's bias, counted once, are the attention output. The projection itself is
    run, so that transposed, quantised or adapted weights need no case of their own.

    Args:
        vlm: the model.
        outputs: of every head.

    Returns:
        Float32, without bias.

    Raises:
        ShapeError: outputs of another shape than the model's heads.
    """
    n_layers, n_heads, d_head = layout(vlm)
    if tuple(outputs.shape) != (n_layers, n_heads, d_head):
        raise ShapeError(f"outputs of shape {tuple(outputs.shape)}: {vlm.name} has {(n_layers, n_heads, d_head)}")
    found = []
    for layer in range(n_layers):
        project = vlm.model.get_submodule(vlm.place(SITE.format(layer=layer)).path)
        weight = next(project.parameters())
        dtype = weight.dtype if weight.is_floating_point() else vlm.dtype
        rows = torch.zeros(n_heads + 1, n_heads, d_head, device=weight.device, dtype=dtype)
        # One head a row, and one row with none, which leaves the bias.
        rows[range(n_heads), range(n_heads)] = outputs[layer].to(weight.device, dtype)
        written = project(rows.flatten(1)[:, None])[:, 0].float().cpu()
        found.append(written[:-1] - written[-1])
    return torch.stack(found)


def function_vector(vlm: VLM, outputs: HeadOutputs, heads: Sequence[Sequence[int]], **about: Any) -> FunctionVector:
    """The sum of what some heads write, by their mean outputs.

    Args:
        vlm: the model.
        outputs: mean outputs of all heads over prompts of a task (`head_vectors.head_outputs`).
        heads: those that mediate it (`head_vectors.strongest_heads` of `mediation.indirect_effects`).
        about: what to keep with it, such as ``task=``.

    Raises:
        InputError: no heads, or one that does not exist.
        ShapeError: outputs of another shape than the model's heads.

    Source: Todd et al. 2024, equation 5.
    """
    chosen = check_heads(heads, *outputs.shape[:2])
    written = head_contributions(vlm, outputs)
    total = torch.stack([written[head] for head in chosen]).sum(dim=0)
    return FunctionVector(total, tuple(chosen), {"model": vlm.name, **about})


def add_by_layer(
    vlm: VLM,
    inputs: Mapping[str, Any],
    outputs: HeadOutputs,
    heads: Sequence[Sequence[int]],
    metric: MetricFunction,
    *,
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
    at: Any = "last",
    clean: Float[Tensor, " example"] | None = None,
    n_controls: int = 3,
    seed: int = 0,
    allow_no_effect: bool = False,
    **options: Any,
) -> PatchingResult:
    """Add a function vector to queries that do not say the task, at every layer in one sweep.

    Args:
        vlm: the model.
        inputs: queries, or label-shuffled prompts, prepared or plain.
        outputs: mean outputs of all heads over prompts of the task.
        heads: those that the vector sums.
        metric: logits [batch, vocab] at the last position -> [batch].
        layers: blocks to add it at; None: all.
        scale: factor.
        at: the token.
        clean: the metric of prompts that say the task, for a scale from 0 to 1.
        n_controls: draws of each control.
        seed: of the draws.
        allow_no_effect: take variants of which none changes the metric.
        options: of `VLM.sweep`, such as ``max_rows``.

    Returns:
        Axis ``layer``; ``corrupt`` is the metric without an edit. Controls: ``"random heads"``, the vector of as many
        other heads, and ``"random vector"``, one of the same norm.

    Raises:
        InputError: bad heads or layers, or a metric that gives NaN.
        ShapeError: outputs of another shape than the model's heads.

    Source: Todd et al. 2024, section 3.1 (accuracy by layer), and its random-heads baseline.
    """
    chosen = list(range(vlm.n_layers)) if layers is None else list(layers)
    if not chosen or not all(0 <= layer < vlm.n_layers for layer in chosen):
        raise InputError(f"layers {chosen}: {vlm.name} has layers 0 to {vlm.n_layers - 1}")
    check_draws(n_controls=n_controls)
    summing = check_heads(heads, *outputs.shape[:2])
    written = head_contributions(vlm, outputs)

    def summed(some: Sequence[Head]) -> Vector:
        return torch.stack([written[head] for head in some]).sum(dim=0)

    generator = torch.Generator().manual_seed(seed)
    vector = summed(summing)
    others = [random_heads(len(written), written.shape[1], len(summing), generator) for _ in range(n_controls)]
    noise = torch.randn(n_controls, len(vector), generator=generator)
    noise = noise / noise.norm(dim=-1, keepdim=True) * vector.norm()
    vectors = [vector, *(summed(one) for one in others), *noise]
    variants = [Add(RESID.format(layer=layer), one, scale=scale, at=at) for one in vectors for layer in chosen]
    measured = measure_variants(vlm, inputs, variants, metric, allow_no_effect=allow_no_effect, **options)
    values = measured.values.reshape(len(vectors), len(chosen), -1)
    controls = {"random heads": values[1 : 1 + n_controls], "random vector": values[1 + n_controls :]}
    return PatchingResult(
        name="function vector",
        metric=name_of(metric),
        values=values[0],
        axes={"layer": tuple(map(str, chosen))},
        clean=clean,
        corrupt=measured.base,
        controls=controls if n_controls else {},
        about={
            "model": vlm.name,
            "heads": [list(head) for head in summing],
            "scale": scale,
            "norm": float(vector.norm()),
            "seed": seed,
            "plan": measured.plan,
        },
    )
