"""Transformers with hand-set weights, whose mechanism is known, so that patching has a right answer.

Every feature of the residual stream is a pair of dimensions with opposite signs, so that its mean is always zero;
every token carries the same number of features, so that the layer norms only rescale. Attention is as good as hard:
scores differ by SHARP, and what else is attended to weighs exp(-SHARP).
"""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from interp import VLM

VOCAB = 12
POSITIONS = 12
D_HEAD = 30  # room for a position or a token, and a constant
SHARP = 60.0
BOS = 0
SINK = VOCAB  # the dimension of a head in which queries are constant and the first token is a key
# exp(-SHARP) of the values, and float32 of logits of order 1.
TOLERANCE = 1e-4

# Features of the residual stream: what a token is, where it is, what is before it, the answer; two that nothing reads.
TOKEN, PLACE, BEFORE, ANSWER, IDLE_0, IDLE_1 = range(6)
_SIZES = (VOCAB, POSITIONS, VOCAB, VOCAB, VOCAB, VOCAB)
_STARTS = [sum(_SIZES[:kind]) for kind in range(6)]
N_FEATURES = sum(_SIZES)
D_MODEL = 150  # at least 2 * N_FEATURES, and a multiple of the heads


def induction(through: str = "k") -> VLM:
    """Head 0.0 writes the token before, and head 1.1 hears of it through its keys, queries or values.

    Keys: it looks for the place behind an earlier copy of the token, and answers what is there; without a copy it looks
    at the first token. Queries: it looks for the token before, and answers it. Values: it looks at its own place, and
    answers the token before. Heads 0.1 and 1.0 copy tokens to where nothing reads them, and the MLPs write nothing.
    """
    model = _blank()
    # Positions: the query of p is the key of p - 1.
    before = torch.zeros(POSITIONS, D_HEAD)
    before[torch.arange(1, POSITIONS), torch.arange(POSITIONS - 1)] = 1
    place = torch.zeros(POSITIONS, D_HEAD)
    place[torch.arange(POSITIONS), torch.arange(POSITIONS)] = 1
    token = torch.zeros(VOCAB, D_HEAD)
    token[torch.arange(VOCAB), torch.arange(VOCAB)] = 1
    _head(model, 0, 0, (PLACE, before), (PLACE, place), (TOKEN, token), BEFORE)
    _head(model, 0, 1, (PLACE, place), (PLACE, place), (TOKEN, token), IDLE_0)
    _head(model, 1, 0, (PLACE, place), (PLACE, place), (TOKEN, token), IDLE_1)
    hearing = {
        "k": ((TOKEN, token), (BEFORE, token), (TOKEN, token)),
        "q": ((BEFORE, token), (TOKEN, token), (TOKEN, token)),
        "v": ((PLACE, place), (PLACE, place), (BEFORE, token)),
    }
    _head(model, 1, 1, *hearing[through], ANSWER, sink=through == "k")
    return VLM(model)


def carrier(position: int) -> VLM:
    """Head 1.0 looks at one position from everywhere, and writes its token as the answer; all else is idle."""
    model = _blank()
    token = torch.zeros(VOCAB, D_HEAD)
    token[torch.arange(VOCAB), torch.arange(VOCAB)] = 1
    place = torch.zeros(POSITIONS, D_HEAD)
    place[torch.arange(POSITIONS), torch.arange(POSITIONS)] = 1
    there = torch.zeros(POSITIONS, D_HEAD)
    there[:, position] = 1
    _head(model, 0, 0, (PLACE, place), (PLACE, place), (TOKEN, token), IDLE_0)
    _head(model, 0, 1, (PLACE, place), (PLACE, place), (TOKEN, token), IDLE_1)
    _head(model, 1, 0, (PLACE, there), (PLACE, place), (TOKEN, token), ANSWER)
    _head(model, 1, 1, (PLACE, place), (PLACE, place), (TOKEN, token), BEFORE)
    return VLM(model)


def prompts(*rows: list[int]) -> dict[str, Tensor]:
    """Token ids without padding, each after a first token of its own."""
    ids = torch.tensor([[BOS, *row] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _blank() -> GPT2LMHeadModel:
    """Two layers of two heads that write nothing; the unembedding reads the answer."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=D_MODEL, n_layer=2, n_head=2, n_positions=POSITIONS,
                        n_inner=8, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=BOS)  # fmt: skip
    model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    wte, wpe = model.transformer.wte.weight.data, model.transformer.wpe.weight.data
    for index in range(VOCAB):
        wte[index] = feature(TOKEN, index)
        model.lm_head.weight.data[index] = feature(ANSWER, index)
    for index in range(POSITIONS):
        wpe[index] = feature(PLACE, index)
    return model


def feature(kind: int, index: int) -> Tensor:
    """The direction of one feature."""
    direction = torch.zeros(D_MODEL)
    direction[_STARTS[kind] + index], direction[N_FEATURES + _STARTS[kind] + index] = 1.0, -1.0
    return direction


def _head(
    model: GPT2LMHeadModel,
    layer: int,
    head: int,
    query: tuple[int, Tensor],
    key: tuple[int, Tensor],
    value: tuple[int, Tensor],
    writes: int,
    sink: bool = False,
) -> None:
    """Set one head: each of query, key and value turns the features of one kind into dimensions of the head."""
    attention, width = model.transformer.h[layer].attn, D_MODEL // model.config.n_head
    # What the norm leaves of a feature: tokens carry two features below layer 0 and four below layer 1.
    size = (D_MODEL / (2 * (2 + 2 * layer))) ** 0.5
    for part, (kind, table) in enumerate((query, key, value)):
        factor = 1.0 if part == 2 else (SHARP * width**0.5) ** 0.5
        for index, row in enumerate(table):
            columns = part * D_MODEL + head * width
            # A feature has two dimensions, each of which gives half.
            weight = feature(kind, index)[:, None] * row[None] * factor / (2 * size)
            attention.c_attn.weight.data[:, columns : columns + D_HEAD] += weight
    if sink:
        strength = (SHARP * width**0.5 / 2) ** 0.5
        attention.c_attn.bias.data[head * width + SINK] = strength
        weight = feature(TOKEN, BOS) * strength / (2 * size)
        attention.c_attn.weight.data[:, D_MODEL + head * width + SINK] += weight
    for index, row in enumerate(value[1]):
        rows = slice(head * width, head * width + D_HEAD)
        attention.c_proj.weight.data[rows] += row[:, None] * feature(writes, index)[None]
