"""Reading vectors in words: the logit lens by phase, decodes of any vector, and patchscopes.

Sources: nostalgebraist 2020 (logit lens); Luo et al. 2025, section 5 (phases: input, then task, then answer);
Ghandeharioun et al. 2024, "Patchscopes" (a vector is put into another prompt, and what the model writes then is read).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.edits import Replace
from interp.errors import InputError, ShapeError
from interp.inputs import PromptLike
from interp.lens import phases, unembed
from interp.models.vlm import VLM
from interp.patching.result import PatchingResult
from interp.prompts import Prompt, Segment
from interp.task_vectors import SITE as RESID

Vectors = Float[Tensor, "vector d_model"]


def identity_prompt(pairs: Sequence[str] = ("cat", "1135", "hello"), placeholder: str = "x") -> Prompt:
    """The patchscope's target prompt that asks the model to repeat a token: ``cat->cat; 1135->1135; hello->hello; x``.

    Args:
        pairs: the tokens of the examples.
        placeholder: the word whose place the vector takes.

    Returns:
        A prompt whose last token belongs to its segment ``placeholder``.

    Raises:
        InputError: an empty placeholder.

    Source: Ghandeharioun et al. 2024, section 4.1 (token identity prompt).
    """
    if not placeholder.strip():
        raise InputError("the placeholder of a patchscope's prompt must not be empty")
    shown = "; ".join(f"{word}->{word}" for word in pairs)
    before = (Segment("examples", text=f"{shown}; "),) if shown else ()
    return Prompt((*before, Segment("placeholder", text=placeholder)))


def lens(
    vlm: VLM,
    inputs: Mapping[str, Any],
    tokens: Mapping[str, Sequence[int] | Int[Tensor, " batch"]],
    *,
    at: Any = "last",
    control: bool = True,
    seed: int = 0,
) -> PatchingResult:
    """What each layer would say at one token: the probability of the input's, the task's and the answer's word.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        tokens: for every phase, such as ``"input"``, ``"task"`` and ``"answer"``, one token id per example.
        at: the token, by meaning.
        control: also decode random vectors of the same norms.
        seed: of those vectors.

    Returns:
        Probabilities, axes ``phase`` and ``layer``. Control ``"random vector"``.

    Raises:
        InputError: no phases, a position that is several tokens, or a token that the vocabulary lacks.
        ShapeError: another number of tokens than of examples.

    Source: Luo et al. 2025, figure on the phases of the answer token.
    """
    if not tokens:
        raise InputError("the lens needs at least one phase, such as {'answer': ids}")
    residual = vlm.capture(inputs, "blocks.*.hook_resid_post", at=at).stack("hook_resid_post")
    if residual.ndim != 3:
        raise InputError(f"the lens reads one token per row, but {at!r} selects {residual.shape[2]}")

    def read(vectors: Float[Tensor, "layer batch d_model"]) -> Float[Tensor, "phase layer batch"]:
        return torch.stack(list(phases(unembed(vlm, vectors), tokens).values())).cpu()

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(residual.shape, generator=generator).to(residual.device)
    noise = noise / noise.norm(dim=-1, keepdim=True) * residual.float().norm(dim=-1, keepdim=True)
    return PatchingResult(
        name="logit lens",
        metric="probability",
        values=read(residual),
        axes={"phase": tuple(tokens), "layer": tuple(map(str, range(len(residual))))},
        controls={"random vector": read(noise)} if control else {},
        about={"model": vlm.name, "at": at if isinstance(at, str | int) else repr(at), "seed": seed},
    )


def peaks(result: PatchingResult) -> dict[str, int]:
    """For every phase the layer at which its mean probability is largest; the first one on ties.

    Args:
        result: of `lens`.
    """
    best = result.mean(normalised=False).argmax(dim=-1).tolist()
    return {phase: int(result.axes["layer"][layer]) for phase, layer in zip(result.axes["phase"], best, strict=True)}


def decodes(vlm: VLM, vectors: Tensor | Mapping[str, Tensor], k: int = 5) -> pd.DataFrame:
    """The likeliest tokens of any vectors of the residual stream: task vectors, function vectors, directions.

    Args:
        vlm: the model, with a tokenizer.
        vectors: several, or by name; such as ``task_vectors.mean``, one a layer.
        k: tokens for each.

    Returns:
        One row for each vector and rank: ``vector``, ``rank`` (from 0), ``token``, ``id``, ``probability``.

    Raises:
        InputError: a model without a tokenizer, no vectors, or fewer than one token.
        ShapeError: vectors of another width.
    """
    if vlm.tokenizer is None:
        raise InputError("decoding needs a tokenizer: VLM(model, processor)")
    names, stacked = _named(vlm, vectors)
    if k < 1:
        raise InputError(f"k={k}: at least one token")
    probabilities, ids = (x.cpu().tolist() for x in unembed(vlm, stacked).softmax(dim=-1).topk(k))
    return pd.DataFrame(
        [
            {"vector": name, "rank": rank, "token": vlm.tokenizer.decode([token]), "id": token, "probability": p}
            for name, tokens, ps in zip(names, ids, probabilities, strict=True)
            for rank, (token, p) in enumerate(zip(tokens, ps, strict=True))
        ]
    )


def patchscope(
    vlm: VLM,
    vectors: Tensor | Mapping[str, Tensor],
    target: PromptLike,
    *,
    layers: Sequence[int] | None = None,
    at: Any = "last",
    max_new_tokens: int = 5,
    control: bool = True,
    seed: int = 0,
    max_rows: int = 64,
) -> pd.DataFrame:
    """Put vectors into a target prompt, and read what the model writes: at every layer, in batches of rows.

    Args:
        vlm: the model, with a tokenizer.
        vectors: several, or by name.
        target: the prompt, such as `identity_prompt`, or a question that ends where the vector goes.
        layers: blocks whose output the vector replaces; None: all.
        at: the token that it replaces, by meaning, such as ``"placeholder"``.
        max_new_tokens: how much the model writes.
        control: also put in a random vector of the same norm.
        seed: of those vectors.
        max_rows: rows of one generation.

    Returns:
        One row for each vector and layer: ``vector``, ``layer``, ``text``, with the control also ``random``; and
        ``unpatched``, what the model writes by itself.

    Raises:
        InputError: no vectors, a layer that does not exist, or a position that is several tokens.
        ShapeError: vectors of another width.

    Source: Ghandeharioun et al. 2024, section 3 and 4.1.
    """
    names, stacked = _named(vlm, vectors)
    chosen = list(range(vlm.n_layers)) if layers is None else list(layers)
    if not chosen or not all(0 <= layer < vlm.n_layers for layer in chosen) or max_rows < 1:
        raise InputError(f"layers {chosen} of 0 to {vlm.n_layers - 1}, max_rows={max_rows}")
    cells = [(index, layer) for index in range(len(names)) for layer in chosen]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(stacked.shape, generator=generator)
    noise = noise / noise.norm(dim=-1, keepdim=True) * stacked.norm(dim=-1, keepdim=True)

    def written(from_: Vectors) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(cells), max_rows):
            chunk = cells[start : start + max_rows]
            edits = []
            for layer in dict.fromkeys(layer for _, layer in chunk):
                rows = [row for row, (_, at_layer) in enumerate(chunk) if at_layer == layer]
                values = torch.stack([from_[chunk[row][0]] for row in rows])
                edits.append(Replace(RESID.format(layer=layer), values, at=at, rows=rows))
            inputs = vlm.prepare([target] * len(chunk))
            texts += map(str, vlm.generate(inputs, edits=edits, max_new_tokens=max_new_tokens, decode=True))
        return texts

    plain = vlm.generate(vlm.prepare([target]), max_new_tokens=max_new_tokens, decode=True)[0]
    table = pd.DataFrame([{"vector": names[index], "layer": layer} for index, layer in cells])
    table["text"] = written(stacked)
    if control:
        table["random"] = written(noise)
    table["unpatched"] = str(plain)
    return table


def _named(vlm: VLM, vectors: Tensor | Mapping[str, Tensor]) -> tuple[list[str], Float[Tensor, "vector d_model"]]:
    if not len(vectors):
        raise InputError("there are no vectors to read")
    if isinstance(vectors, Mapping):
        names, stacked = [str(name) for name in vectors], torch.stack(list(vectors.values()))
    else:
        names, stacked = [str(index) for index in range(len(vectors))], vectors
    if stacked.ndim != 2 or stacked.shape[1] != vlm.d_model:
        raise ShapeError(f"vectors of shape {tuple(stacked.shape)}: give [vector, {vlm.d_model}]")
    return names, stacked.float().cpu()
