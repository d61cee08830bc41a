"""The logit lens: what each layer would say, had the model ended there.

The last block's output is read before the final norm, so every layer goes through that norm exactly once and the last
one gives the model's own logits. Source: nostalgebraist 2020; phases as in Luo et al. 2025, section 5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.models.vlm import VLM


def unembed(vlm: VLM, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
    """Logits of a residual-stream vector: final norm, then unembedding.

    Args:
        vlm: the model.
        residual: any vectors of the model's width, such as a block's output or a task vector.

    Raises:
        ShapeError: vectors of another width.
    """
    if residual.shape[-1] != vlm.d_model:
        raise ShapeError(f"vectors of width {residual.shape[-1]} in a model of width {vlm.d_model}")
    weight = next(vlm.unembed.parameters())
    with torch.no_grad():
        return vlm.unembed(vlm.final_norm(residual.to(weight.device, weight.dtype))).float()


def logit_lens(vlm: VLM, inputs: Mapping[str, Any], at: Any = "last") -> Float[Tensor, "layer batch vocab"]:
    """Logits of every block's output at one token per row.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        at: one token by meaning.

    Returns:
        Float32 logits; the last layer's are the model's own.

    Raises:
        InputError: a position that is several tokens.
        UnknownNameError: a position that a row lacks.
    """
    acts = vlm.capture(inputs, "blocks.*.hook_resid_post", at=at)
    residual = acts.stack("hook_resid_post")
    if residual.ndim != 3:
        raise InputError(f"the lens reads one token per row, but {at!r} selects {residual.shape[2]}")
    return unembed(vlm, residual)


def phases(
    logits: Float[Tensor, "layer batch vocab"], tokens: Mapping[str, Sequence[int] | Int[Tensor, " batch"]]
) -> dict[str, Float[Tensor, "layer batch"]]:
    """Probability of chosen tokens by layer, such as the input's, the task's and the answer's.

    Args:
        logits: from `logit_lens`.
        tokens: for every phase one token id per row.

    Returns:
        For every phase the probability of its token.

    Raises:
        ShapeError: another number of tokens than of rows.
        InputError: tokens that are no integers, or that the vocabulary lacks.

    Source: Luo et al. 2025, figure "token representation evolution": input, then task, then answer.
    """
    probabilities = logits.softmax(dim=-1)
    found = {}
    for phase, ids in tokens.items():
        wanted = torch.as_tensor(ids)
        if wanted.shape != logits.shape[1:2]:
            raise ShapeError(
                f"phase {phase!r} has {wanted.numel()} tokens for {logits.shape[1]} rows: give one per row"
            )
        if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool:
            raise InputError(f"phase {phase!r}: token ids are integers, not {wanted.dtype}")
        outside = wanted[(wanted < 0) | (wanted >= logits.shape[-1])].tolist()
        if outside:
            raise InputError(f"phase {phase!r}: no token {outside[0]}; the vocabulary has 0 to {logits.shape[-1] - 1}")
        index = wanted.to(logits.device).expand(len(logits), -1)[..., None]
        found[phase] = probabilities.gather(-1, index)[..., 0]
    return found


def decode(vlm: VLM, vector: Float[Tensor, " d_model"], k: int = 5) -> list[tuple[str, float]]:
    """The tokens that a vector stands for, by final norm and unembedding.

    Args:
        vlm: the model, with a tokenizer.
        vector: such as a task vector of one layer.
        k: how many.

    Returns:
        Token texts with their probabilities, likeliest first.

    Raises:
        InputError: a model without a tokenizer.
        ShapeError: a vector of another width.
    """
    if vlm.tokenizer is None:
        raise InputError("decoding needs a tokenizer: VLM(model, processor)")
    probabilities, ids = unembed(vlm, vector).softmax(dim=-1).topk(k)
    texts = [vlm.tokenizer.decode([token]) for token in ids.tolist()]
    return list(zip(texts, probabilities.tolist(), strict=True))
