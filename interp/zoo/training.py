"""The stages of training: a language model, a vision tower, and a VLM made of both."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from interp.progress import track
from interp.zoo import images
from interp.zoo.corpus import CONTEXT_WEIGHT, Corpus, Row
from interp.zoo.facts import entities

CONTEXT_SHARE = 0.1  # share of the tokens that are not answers whose prediction is scored


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns.

    Attributes:
        name: of the stage, and of its log.
        steps: optimiser steps.
        batch: rows (or pictures) a step.
        rates: the peak learning rate of each group of parameters, in the order the stage names them.
        seed: of the data drawn.
    """

    name: str
    steps: int
    batch: int
    rates: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Pictures:
    """Pre-drawn training pictures, as the processor gives them, in 8 bits."""

    pixels: UInt8[Tensor, "entity variant channel height width"]
    index: dict[str, int]

    def take(self, names: list[str], rng: np.random.Generator) -> Float[Tensor, "image channel height width"]:
        """One random picture of each entity, scaled to -1 .. 1 as the processor does."""
        which = [self.index[name] for name in names]
        variants = rng.integers(self.pixels.shape[1], size=len(names))
        return self.pixels[which, torch.from_numpy(variants)].float() / 127.5 - 1.0


def draw_pictures(processor: LlavaProcessor, variants: int) -> Pictures:
    """Draw the training pictures of every entity.

    Args:
        processor: resizes and normalises the pictures.
        variants: pictures per entity.

    Returns:
        The pictures.
    """
    pixels = []
    names = [entity.name for entity in entities()]
    for name in track(names, "drawing pictures", len(names)):
        drawn = [images.draw(name, seed, purpose="training") for seed in range(variants)]
        values = processor.image_processor(drawn, return_tensors="pt").pixel_values
        pixels.append(((values + 1.0) * 127.5).round().to(torch.uint8))
    return Pictures(torch.stack(pixels), {name: index for index, name in enumerate(names)})


def optimise(stage: Stage, groups: list[list[nn.Parameter]], loss: Callable[[int], Tensor], log: Path) -> None:
    """Minimise a loss with AdamW: linear warm-up, cosine decay to a twentieth, clipped gradients.

    Args:
        stage: steps and peak learning rates.
        groups: the parameters of each group; ``stage.rates`` has one rate per group.
        loss: the loss of a step, given the step's number.
        log: a file of JSON lines, one every 50 steps.
    """
    parameters = [parameter for group in groups for parameter in group]
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, stage.rates, strict=True)],
        betas=(0.9, 0.98),
        weight_decay=0.02,
    )
    warm = max(1, min(200, stage.steps // 10))

    def factor(step: int) -> float:
        decay = (step - warm) / max(1, stage.steps - warm)
        return (step + 1) / warm if step < warm else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * decay))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    recent: list[float] = []
    with log.open("w", encoding="utf-8") as lines:
        for step in track(range(stage.steps), stage.name, stage.steps):
            value = loss(step)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            recent.append(value.item())
            if (step + 1) % 50 == 0 or step + 1 == stage.steps:
                lines.write(json.dumps({"step": step + 1, "loss": float(np.mean(recent))}) + "\n")
                lines.flush()
                recent.clear()


def answer_loss(
    hidden: Float[Tensor, "row pos d_model"],
    ids: Int[Tensor, "row pos"],
    weights: Float[Tensor, "row pos"],
    head: nn.Module,
    rng: np.random.Generator,
) -> Float[Tensor, ""]:
    """Weighted cross-entropy of the next token; only a sample of the context tokens is scored.

    Args:
        hidden: the decoder's output, after the final norm.
        ids: the tokens.
        weights: the weight of predicting each token.
        head: the unembedding.
        rng: draws the sample of context tokens.

    Returns:
        The mean over the weights.
    """
    target, weight = ids[:, 1:], weights[:, 1:]
    sampled = torch.from_numpy(rng.random(weight.shape) < CONTEXT_SHARE)
    context = weight == torch.tensor(CONTEXT_WEIGHT)
    scored = (weight > 0) & (~context | sampled)
    weight = torch.where(context, weight / CONTEXT_SHARE, weight)[scored]
    losses = nn.functional.cross_entropy(head(hidden[:, :-1][scored]), target[scored], reduction="none")
    return (losses * weight).sum() / weight.sum()


def stack(
    rows: list[Row],
) -> tuple[Int[Tensor, "row pos"], Float[Tensor, "row pos"], Bool[Tensor, "row 1 pos pos"]]:
    """The rows' tokens and weights as tensors, and which earlier positions each position sees."""
    ids = torch.from_numpy(np.stack([row.ids for row in rows]))
    weights = torch.from_numpy(np.stack([row.weights for row in rows]))
    spans = torch.from_numpy(np.stack([row.spans for row in rows]))
    seen = (spans[:, :, None] == -1) | (spans[:, :, None] == spans[:, None, :])
    seen[:, :, 0] = True
    return ids, weights, rearrange(seen.tril(), "row query key -> row 1 query key")


def train_language_model(model: LlamaForCausalLM, corpus: Corpus, stage: Stage, log: Path, compiled: bool) -> None:
    """Stage 1: the language model learns the facts, the prompts and the instructions, from text alone.

    Args:
        model: changed in place; that is the point of training.
        corpus: draws the rows.
        stage: one learning rate.
        log: the log to write.
        compiled: run the decoder through ``torch.compile`` (needs a C++ compiler; a third faster).
    """
    rng = np.random.default_rng(stage.seed)
    decoder = torch.compile(model.model) if compiled else model.model

    def loss(step: int) -> Tensor:
        ids, weights, seen = stack([corpus.sample(rng, images=False) for _ in range(stage.batch)])
        embedded = model.model.embed_tokens(ids)
        hidden = decoder(inputs_embeds=embedded, attention_mask=seen, use_cache=False).last_hidden_state
        return answer_loss(hidden, ids, weights, model.lm_head, rng)

    model.train()
    optimise(stage, [list(model.parameters())], loss, log)
    model.eval()


def train_vision_tower(model: LlavaForConditionalGeneration, pictures: Pictures, stage: Stage, log: Path) -> None:
    """Stage 2: the vision tower learns to tell the entities apart, the part that CLIP plays for LLaVA.

    Args:
        model: its vision tower is changed in place.
        pictures: to learn from.
        stage: one learning rate.
        log: the log to write.
    """
    rng = np.random.default_rng(stage.seed)
    torch.manual_seed(stage.seed)
    tower = model.model.vision_tower
    names = list(pictures.index)
    readout = nn.Linear(tower.config.hidden_size, len(names))

    def loss(step: int) -> Tensor:
        chosen = rng.integers(len(names), size=stage.batch)
        pixels = pictures.take([names[int(index)] for index in chosen], rng)
        patches = tower(pixels).last_hidden_state[:, 1:]
        return nn.functional.cross_entropy(readout(patches.mean(dim=1)), torch.from_numpy(chosen))

    tower.train()
    optimise(stage, [[*tower.parameters(), *readout.parameters()]], loss, log)
    tower.eval()


def train_vlm(
    model: LlavaForConditionalGeneration,
    corpus: Corpus,
    pictures: Pictures,
    stage: Stage,
    log: Path,
    compiled: bool,
    text_share: float,
) -> None:
    """Stages 3 and 4: the same mixture with pictures in place of names, among rows of text.

    With two rates the language model learns too (second rate); with one it is frozen.

    Args:
        model: changed in place.
        corpus: draws the rows.
        pictures: drawn from afresh in every row.
        stage: the rate of vision tower and projector, and that of the language model.
        log: the log to write.
        compiled: as in ``train_language_model``.
        text_share: the share of rows without pictures.
    """
    rng = np.random.default_rng(stage.seed)
    inner = model.model
    language = inner.language_model
    decoder = torch.compile(language) if compiled else language
    image_token = model.config.image_token_id
    groups = [[*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]]
    if len(stage.rates) == 2:
        groups.append(list(language.parameters()))
    language.requires_grad_(len(stage.rates) == 2)

    def loss(step: int) -> Tensor:
        rows = [corpus.sample(rng, images=bool(rng.random() >= text_share)) for _ in range(stage.batch)]
        ids, weights, seen = stack(rows)
        embedded = language.embed_tokens(ids)
        shown = [entity.name for row in rows for entity in row.images]
        if shown:
            features = inner.get_image_features(pictures.take(shown, rng)).pooler_output
            tokens = torch.cat(list(features)) if not isinstance(features, Tensor) else features
            tokens = rearrange(tokens, "... d_model -> (...) d_model")
            embedded = embedded.masked_scatter((ids == image_token)[..., None], tokens)
        hidden = decoder(inputs_embeds=embedded, attention_mask=seen, use_cache=False).last_hidden_state
        return answer_loss(hidden, ids, weights, model.lm_head, rng)

    model.train()
    optimise(stage, groups, loss, log)
    language.requires_grad_(True)
    model.eval()
