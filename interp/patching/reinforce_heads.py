"""Head sets by REINFORCE: which heads' outputs, put into a query together, make it give the task's answers?

Source: Huang et al. 2024, "Multimodal Task Vectors Enable Many-Shot Multimodal In-Context Learning", section 3.2: one
Bernoulli variable for each head, sampled sets replaced by mean outputs at the last token, the first answer token's
cross-entropy as the (negative, standardised) reward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError, ShapeError
from interp.inputs import Inputs
from interp.metrics import token_log_prob
from interp.models.vlm import VLM
from interp.patching.head_vectors import HeadOutputs, layout, random_heads, replace_heads
from interp.patching.heads import Head
from interp.patching.metric import Answers, log_probability, measure
from interp.patching.result import PatchingResult
from interp.patching.tokens import followed
from interp.progress import track

# Where every head's logit starts; the chance of a head is then 0.27.
START = -1.0


@dataclass(frozen=True, eq=False)
class HeadSelection:
    """Heads chosen by REINFORCE.

    Args:
        heads: (layer, head) of the best sampled set.
        probabilities: of every head to be in a set, at the end.
        outputs: what the heads are replaced by.
        losses: the mean cross-entropy of the sampled sets, step by step.
        candidates: the cross-entropy over all queries of each set that the best was chosen from.
        result: the cross-entropy of each query under the set; ``corrupt`` is that without it. Control
            ``"random heads"``: sets of as many heads.
    """

    heads: tuple[Head, ...]
    probabilities: Float[Tensor, "layer head"]
    outputs: Float[Tensor, "layer head d_head"]
    losses: Float[Tensor, " step"]
    candidates: Float[Tensor, " candidate"]
    result: PatchingResult
    about: dict[str, Any] = field(default_factory=dict)

    def edits(self, *, at: Any = "last") -> list[Edit]:
        """The edits that put the chosen heads' outputs at the last token of every step.

        Source: Huang et al. 2024, section 3.3.
        """
        return replace_heads(self.outputs, self.heads, at=at, when="every")


def reinforce_heads(
    vlm: VLM,
    inputs: Mapping[str, Any],
    answers: Answers,
    outputs: HeadOutputs,
    *,
    at: Any = "last",
    steps: int = 600,
    samples: int = 32,
    learning_rate: float = 0.1,
    queries_per_step: int = 1,
    n_candidates: int = 10,
    threshold: float | None = None,
    n_controls: int = 5,
    seed: int = 0,
    max_rows: int = 256,
    progress: bool = True,
) -> HeadSelection:
    """Choose the heads whose mean outputs carry a task, by REINFORCE.

    Args:
        vlm: the model, with text or with images; its weights are not trained.
        inputs: queries without examples, prepared or plain.
        answers: for every query its answer, as text or as its first token's id.
        outputs: mean outputs of all heads over few-shot prompts (`head_vectors.head_outputs`).
        at: the token whose head outputs are replaced.
        steps: of Adam.
        samples: sets drawn in each step.
        learning_rate: of Adam.
        queries_per_step: queries that each step's sets are scored on.
        n_candidates: sets drawn at the end, of which the one of lowest cross-entropy over all queries is taken.
        threshold: probabilities below this count as 0 at the end, as the paper does for Idefics2 (0.8). None: none do.
        n_controls: random sets of as many heads.
        seed: of all draws.
        max_rows: the most rows of one forward.
        progress: show a bar.

    Raises:
        InputError: another number of answers than of queries, settings below 1, fewer than two samples, or candidates
            without any head.
        ShapeError: outputs of another shape than the model's heads.

    Source: Huang et al. 2024, section 3.2 and official code (logits from -1, Adam 0.1, 600 steps of 32 samples, best of
        10 sets).
    """
    n_layers, n_heads, d_head = layout(vlm)
    if tuple(outputs.shape) != (n_layers, n_heads, d_head):
        raise ShapeError(f"outputs of shape {tuple(outputs.shape)}: {vlm.name} has {(n_layers, n_heads, d_head)}")
    wanted = log_probability(vlm, answers, inputs=followed(inputs, answers)).answers
    n_queries = len(inputs["input_ids"])
    if wanted.shape != (n_queries,):
        raise InputError(f"{wanted.numel()} answers for {n_queries} queries: give one token for each")
    if min(steps, n_candidates, queries_per_step) < 1 or samples < 2 or queries_per_step > n_queries:
        raise InputError(
            f"steps={steps}, samples={samples} (2 or more), n_candidates={n_candidates}, queries_per_step="
            f"{queries_per_step} of {n_queries}"
        )
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((n_layers, n_heads), START, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=learning_rate)
    scorer = _Scorer(vlm, inputs, wanted, outputs, at, max_rows)
    losses = []
    counted = range(steps)
    for step in track(counted, "REINFORCE over heads", steps) if progress else counted:
        drawn = torch.bernoulli(logits.detach().sigmoid().expand(samples, -1, -1), generator=generator).bool()
        queries = torch.randperm(n_queries, generator=generator)[:queries_per_step].tolist()
        # One comparison with plain edited forwards is enough: all steps run the same kind of sweep.
        loss = scorer(drawn, queries, check=step == 0).mean(dim=-1)
        policy = torch.distributions.Bernoulli(logits=logits, validate_args=False)
        log_prob = policy.log_prob(drawn.float()).sum(dim=(1, 2))
        optimiser.zero_grad()
        (log_prob * standardised(loss)).mean().backward()
        optimiser.step()
        losses.append(float(loss.mean()))
    probabilities = logits.detach().sigmoid()
    kept = probabilities if threshold is None else probabilities.where(probabilities >= threshold, 0.0)
    candidates = torch.bernoulli(kept.expand(n_candidates, -1, -1), generator=generator).bool()
    candidates = candidates[candidates.any(dim=2).any(dim=1)]
    if not len(candidates):
        largest = f"the largest probability is {float(probabilities.max()):.2f}"
        raise InputError(
            f"none of {n_candidates} sampled sets has a head; {largest}"
            f"{'' if threshold is None else f', and threshold={threshold}'}. Take a lower threshold or more steps"
        )
    everything = list(range(n_queries))
    scores = scorer(candidates, everything)
    best = int(scores.mean(dim=-1).argmin())
    chosen = candidates[best]
    heads = tuple((int(layer), int(head)) for layer, head in chosen.nonzero().tolist())
    controls = [random_heads(n_layers, n_heads, len(heads), generator) for _ in range(n_controls)]
    masks = torch.zeros(1 + n_controls, n_layers, n_heads, dtype=torch.bool)
    for index, one in enumerate(controls, start=1):
        for layer, head in one:
            masks[index, layer, head] = True
    others = scorer(masks, everything)
    result = PatchingResult(
        name="REINFORCE heads",
        metric="cross-entropy",
        values=scores[best][None],
        axes={"heads": ("chosen",)},
        corrupt=others[0],
        controls={"random heads": others[1:, None]} if n_controls else {},
        about={"model": vlm.name, "n_heads": len(heads)},
    )
    about = {
        "model": vlm.name,
        "steps": steps,
        "samples": samples,
        "learning_rate": learning_rate,
        "queries_per_step": queries_per_step,
        "threshold": threshold,
        "seed": seed,
    }
    return HeadSelection(heads, probabilities, outputs, torch.tensor(losses), scores.mean(dim=-1), result, about)


def standardised(loss: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    """Losses with mean 0 and standard deviation 1; zeros where they are all alike."""
    return (loss - loss.mean()) / (loss.std() + torch.finfo(loss.dtype).eps)


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Cross-entropy of the answers' first tokens under sets of heads, as one sweep."""

    vlm: VLM
    inputs: Mapping[str, Any]
    answers: Tensor
    outputs: Tensor
    at: Any
    max_rows: int

    def __call__(
        self, masks: Bool[Tensor, "sample layer head"], queries: list[int], *, check: bool = True
    ) -> Float[Tensor, "sample query"]:
        """One row for each set; an empty one leaves the model as it is."""
        answers = self.answers[queries]
        sets = [[(int(layer), int(head)) for layer, head in mask.nonzero().tolist()] for mask in masks]
        edits = [replace_heads(self.outputs, heads, at=self.at) if heads else [] for heads in sets]

        def loss(logits: Float[Tensor, "query vocab"]) -> Float[Tensor, " query"]:
            return -token_log_prob(logits, answers)

        part = rows_of(self.vlm, self.inputs, queries)
        return measure(self.vlm, part, edits, loss, max_rows=self.max_rows, check=check, progress=False)[0]


def rows_of(vlm: VLM, inputs: Mapping[str, Any], rows: Sequence[int]) -> Mapping[str, Any]:
    """Some rows of a batch of model inputs, with the images that are theirs.

    Args:
        vlm: the model.
        inputs: prepared inputs, or plain ones without images.
        rows: which, in order.

    Raises:
        InputError: plain inputs with images, of which it is not known whose they are.
    """
    if list(rows) == list(range(len(inputs["input_ids"]))):
        return inputs
    if isinstance(inputs, Inputs):
        chat = any("chat_prefix" in row.spans for row in inputs.layout)
        return vlm.prepare([inputs.prompts[row] for row in rows], chat=chat)
    other = sorted(set(inputs) - {"input_ids", "attention_mask", "position_ids"})
    if other:
        raise InputError(f"plain inputs with {', '.join(other)} cannot be taken row by row: make them by vlm.prepare")
    return {name: tensor[list(rows)] for name, tensor in inputs.items()}
