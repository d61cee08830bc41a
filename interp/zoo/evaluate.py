"""The figures of the cards: accuracies of prompts, and of task vectors patched with plain hooks.

Deliberately apart from the library's own machinery, so that each checks the other.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlamaForCausalLM, LlavaForConditionalGeneration

from interp.zoo import images
from interp.zoo.facts import PAPER_TASKS, Entity, Relation, entities, relations, split

SHOTS = 5
PROMPTS_PER_VECTOR = 18
MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Piece:
    """A prompt under construction: its text, with ``<image>`` placeholders, and what they show."""

    text: str
    shown: tuple[Entity, ...] = ()

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.text + other.text, self.shown + other.shown)


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        decoder: the decoder, a transformers model without its unembedding.
        head: the unembedding.
        tokenizer: of the model.
        features: image features by picture seed and entity; empty for a language model.
    """

    decoder: Any
    head: nn.Module
    tokenizer: Any
    features: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities in which the model reads entities."""
        return MODALITIES if self.features else MODALITIES[:1]

    @property
    def n_layers(self) -> int:
        """The number of decoder blocks."""
        return len(self.decoder.layers)


def load_llama(folder: Path) -> Subject:
    """Load a language model to evaluate."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    return Subject(model.model, model.lm_head, AutoTokenizer.from_pretrained(folder))


def load_llava(folder: Path, seeds: Sequence[int]) -> Subject:
    """Load a VLM to evaluate, and encode one picture of every entity per seed."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    features = {}
    for seed in seeds:
        drawn = [images.draw(entity.name, seed) for entity in entities()]
        with torch.no_grad():
            pixels = processor(drawn, return_tensors="pt").pixel_values
            encoded = model.model.get_image_features(pixels).pooler_output
        for entity, tokens in zip(entities(), encoded, strict=True):
            features[seed, entity.name] = tokens
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Subject(model.model.language_model, model.lm_head, tokenizer, features)


def name_or_show(entity: Entity, modality: str) -> Piece:
    """An entity as text or as a picture."""
    return Piece("<image>", (entity,)) if modality == "image" else Piece(entity.name)


def query(entity: Entity, modality: str) -> Piece:
    """``Q:{x}\\nA:``, the query without any task information."""
    return Piece("Q:") + name_or_show(entity, modality) + Piece("\nA:")


def examples(chosen: Sequence[Entity], relation: Relation, modality: str) -> Piece:
    """``Q:{x}\\nA:{y}\\n\\n`` for each entity."""
    prompt = Piece("")
    for entity in chosen:
        prompt = prompt + query(entity, modality) + Piece(f"{entity.facts[relation.attribute]}\n\n")
    return prompt


def draw_shots(relation: Relation, key: str) -> list[Entity]:
    """Five validation entities, drawn from a string."""
    return random.Random(f"{relation.name}/{key}").sample(split(relation.category)[0], SHOTS)


def embed(
    subject: Subject, prompts: Sequence[Piece], seed: int
) -> tuple[Float[Tensor, "prompt pos d_model"], list[list[int]]]:
    """Embed prompts, padded on the right (causal attention makes that harmless), and their token ids."""
    embeddings, tokens = [], []
    table = subject.decoder.embed_tokens
    for prompt in prompts:
        first, *rest = prompt.text.split("<image>")
        ids: list[int] = subject.tokenizer(first).input_ids
        parts = [table(torch.tensor(ids))]
        for entity, after in zip(prompt.shown, rest, strict=True):
            patches = subject.features[seed, entity.name]
            following = subject.tokenizer(after, add_special_tokens=False).input_ids
            parts += [patches, table(torch.tensor(following, dtype=torch.long))]
            ids = ids + [-1] * len(patches) + following
        embeddings.append(torch.cat(parts))
        tokens.append(ids)
    return nn.utils.rnn.pad_sequence(embeddings, batch_first=True), tokens


def answer_scores(
    subject: Subject,
    prompts: Sequence[Piece],
    answers: Sequence[str],
    seed: int,
    patch: tuple[int, Tensor] | None = None,
) -> tuple[float, float]:
    """Score greedy answers.

    Args:
        subject: the model.
        prompts: one per answer.
        answers: the right answers.
        seed: of the pictures.
        patch: a layer, and the vector that replaces its output at every prompt's last token.

    Returns:
        The official metric (the first greedy token and the answer: one begins with the other), and the share
        of answers that greedy decoding gives exactly, up to the line break that ends them.
    """
    full = [prompt + Piece(f"{answer}\n") for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        lengths = [len(ids) for ids in embed(subject, prompts, seed)[1]]
        embedded, tokens = embed(subject, full, seed)
        rows, last = torch.arange(len(full)), torch.tensor(lengths) - 1

        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            edited = output.clone()
            edited[rows, last] = patch[1] if patch else output[rows, last]
            return edited

        layer = subject.decoder.layers[patch[0] if patch else 0]
        handle = layer.register_forward_hook(replace)
        try:
            hidden = subject.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        finally:
            handle.remove()
        greedy = subject.head(hidden).argmax(dim=-1)
    first = exact = 0
    for row, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
        said = subject.tokenizer.decode([int(greedy[row, length - 1])]).strip()
        first += bool(said) and (answer.startswith(said) or said.startswith(answer))
        exact += greedy[row, length - 1 : len(tokens[row]) - 1].tolist() == tokens[row][length:]
    return first / len(answers), exact / len(answers)


def read_last(subject: Subject, prompts: Sequence[Piece], seed: int) -> Float[Tensor, "layer prompt d_model"]:
    """Every block's output at the last token of each prompt."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in subject.decoder.layers
    ]
    try:
        with torch.no_grad():
            embedded, tokens = embed(subject, prompts, seed)
            subject.decoder(inputs_embeds=embedded, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    last = torch.tensor([len(ids) for ids in tokens]) - 1
    return torch.stack([output[torch.arange(len(prompts)), last] for output in outputs])


def task_vector(subject: Subject, relation: Relation, modality: str, seed: int) -> Float[Tensor, "layer d_model"]:
    """The mean over prompts of each block's output at the ``A:`` of the fifth example."""
    prompts = []
    for number in range(PROMPTS_PER_VECTOR):
        *complete, cut = draw_shots(relation, f"vector/{seed}/{number}")
        prompts.append(examples(complete, relation, modality) + query(cut, modality))
    return read_last(subject, prompts, seed).mean(dim=1)


def instruction_vector(subject: Subject, relation: Relation) -> Float[Tensor, "layer d_model"]:
    """Each block's output at the colon that ends the bare instruction."""
    return read_last(subject, [Piece(relation.instruction)], seed=0)[:, 0]


Vectors = Callable[[Relation, int], Float[Tensor, "layer d_model"]]


def paper_relations() -> list[Relation]:
    """The paper's six tasks."""
    return [relation for relation in relations() if relation.name in PAPER_TASKS]


def partner(relation: Relation) -> Relation:
    """The other paper task of the same category."""
    return next(other for other in same_category(relation) if other.name != relation.name)


def same_category(relation: Relation) -> list[Relation]:
    """The paper's tasks of a task's category."""
    return [other for other in paper_relations() if other.category == relation.category]


def foreigners(relation: Relation) -> list[Relation]:
    """The paper's tasks of other categories."""
    return [other for other in paper_relations() if other.category != relation.category]


def prompted(subject: Subject, kind: str, modality: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Accuracy of one way to prompt, on the test entities.

    Args:
        subject: the model.
        kind: ``"few-shot"``, ``"none"`` (the query alone) or ``"instruction"``.
        modality: of examples and query.
        seeds: of exemplars and pictures.

    Returns:
        ``first_token`` and ``exact``, means over tasks and seeds, and ``by_task`` of the former.
    """

    def context(relation: Relation, entity: Entity, seed: int) -> Piece:
        if kind == "few-shot":
            return examples(draw_shots(relation, f"prompt/{seed}/{entity.name}"), relation, modality)
        return Piece(f"{relation.instruction}\n" if kind == "instruction" else "")

    def scores(relation: Relation, seed: int) -> tuple[float, float]:
        test = split(relation.category)[1]
        prompts = [context(relation, entity, seed) + query(entity, modality) for entity in test]
        return answer_scores(subject, prompts, [entity.facts[relation.attribute] for entity in test], seed)

    return summary({task.name: [scores(task, seed) for seed in seeds] for task in paper_relations()})


def patched(
    subject: Subject,
    vectors: Vectors,
    modality: str,
    layer: int,
    seeds: Sequence[int],
    part: str = "test",
    answer_of: Callable[[Relation], Relation] = lambda relation: relation,
) -> dict[str, Any]:
    """Accuracy of queries without context whose last token is patched.

    Args:
        subject: the model.
        vectors: the vectors of a task and a seed.
        modality: of the queries.
        layer: the block whose output is replaced.
        seeds: of vectors and pictures.
        part: ``"test"`` or ``"validation"`` entities.
        answer_of: the task whose answer counts as right.

    Returns:
        As ``prompted``.
    """

    def scores(relation: Relation, seed: int) -> tuple[float, float]:
        group = split(relation.category)[part == "test"]
        answers = [entity.facts[answer_of(relation).attribute] for entity in group]
        prompts = [query(entity, modality) for entity in group]
        return answer_scores(subject, prompts, answers, seed, (layer, vectors(relation, seed)[layer]))

    return summary({task.name: [scores(task, seed) for seed in seeds] for task in paper_relations()})


def summary(scores: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Means over seeds, then over tasks, rounded to four digits."""
    by_task = {name: round(fmean(first for first, _ in values), 4) for name, values in scores.items()}
    exact = fmean(fmean(exact for _, exact in values) for values in scores.values())
    return {"first_token": round(fmean(by_task.values()), 4), "exact": round(exact, 4), "by_task": by_task}
