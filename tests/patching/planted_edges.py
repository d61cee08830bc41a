"""A hand-built transformer of two hops: pictures -> question in block 1, question -> last token in block 2.

Attention goes to the first token, whose values are zero, wherever no hop is planted; the blocks' MLPs write nothing.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from interp import VLM

BOS, LAST, ANSWER_A, ANSWER_B = 1, 2, 3, 4
PICTURE_A, PICTURE_B, QUESTION = 5, 6, 7
N_LAYERS, N_HEADS, D_HEAD = 4, 2, 8
HOPS = {"picture -> question": (1, 0), "question -> last": (2, 1)}  # edge -> (layer, head)

# Dimensions of the residual stream.
_A, _B, _IS_PICTURE, _IS_QUESTION, _IS_LAST, _MOVED_A, _MOVED_B, _SAID_A, _SAID_B, _IS_BOS = range(10)


def model() -> GPT2LMHeadModel:
    """Two heads in each of four blocks; only the two of ``HOPS`` write anything."""
    config = GPT2Config(
        vocab_size=10, n_embd=N_HEADS * D_HEAD, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=64, bos_token_id=BOS,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    built = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        marks = {
            BOS: {_IS_BOS: 3.0},
            LAST: {_IS_LAST: 3.0},
            PICTURE_A: {_IS_PICTURE: 2.0, _A: 2.0},
            PICTURE_B: {_IS_PICTURE: 2.0, _B: 2.0},
            QUESTION: {_IS_QUESTION: 3.0},
        }
        for token, dims in marks.items():
            for dim, size in dims.items():
                built.transformer.wte.weight[token, dim] = size
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                _attend(built, layer, head, 0, key=_IS_BOS, strength=3.0)
        _hop(
            built,
            *HOPS["picture -> question"],
            query=_IS_QUESTION,
            key=_IS_PICTURE,
            move=((_A, _MOVED_A), (_B, _MOVED_B)),
        )
        _hop(built, *HOPS["question -> last"], query=_IS_LAST, key=_IS_QUESTION,
             move=((_MOVED_A, _SAID_A), (_MOVED_B, _SAID_B)))  # fmt: skip
        built.lm_head.weight[ANSWER_A, _SAID_A] = 4.0
        built.lm_head.weight[ANSWER_B, _SAID_B] = 4.0
    return built


def vlm() -> VLM:
    return VLM(model())


def batch() -> dict[str, torch.Tensor]:
    """Two prompts of pictures, a question and a last token; the second one is shorter, and padded."""
    rows = [
        [BOS, *[PICTURE_A] * 4, *[QUESTION] * 3, LAST],
        [BOS, *[PICTURE_B] * 3, *[QUESTION] * 2, LAST],
    ]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def _columns(head: int, part: int) -> slice:
    start = part * N_HEADS * D_HEAD + head * D_HEAD
    return slice(start, start + D_HEAD)


def _attend(built: GPT2LMHeadModel, layer: int, head: int, dim: int, *, key: int, strength: float) -> None:
    """Every query of a head looks for tokens with a mark."""
    attention = built.transformer.h[layer].attn.c_attn
    attention.bias[_columns(head, 0)][dim] = strength
    attention.weight[key, _columns(head, 1).start + dim] = strength


def _hop(
    built: GPT2LMHeadModel, layer: int, head: int, *, query: int, key: int, move: tuple[tuple[int, int], ...]
) -> None:
    """Queries with one mark look for keys with another, more than for the first token, and copy what they hold."""
    block = built.transformer.h[layer].attn
    block.c_attn.weight[query, _columns(head, 0).start + 1] = 4.0
    block.c_attn.weight[key, _columns(head, 1).start + 1] = 4.0
    for dim, (source, target) in enumerate(move):
        block.c_attn.weight[source, _columns(head, 2).start + dim] = 1.0
        block.c_proj.weight[head * D_HEAD + dim, target] = 3.0
