"""The cards of the models that ship: what they are made of, how, and how well they do."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from interp.zoo.corpus import KINDS, NOT_APPLICABLE
from interp.zoo.evaluate import (
    PROMPTS_PER_VECTOR,
    SHOTS,
    Subject,
    load_llama,
    load_llava,
    paper_relations,
    patched,
)
from interp.zoo.facts import CATEGORIES, entities, relations, split
from interp.zoo.figures import RANDOM_DRAWS, all_vectors, best_layer, layer_figures, patch_figures, prompt_figures

SEEDS = (0, 1, 2)
CHECK_SEEDS = (0,)

ABOUT = {
    "tiny-llama": (
        "A small language model that knows the facts of a small world (countries, animals, foods) and "
        "answers questions about them from examples or from an instruction. `tiny-llava` starts from it."
    ),
    "tiny-llava": (
        "A small vision-language model: a CLIP vision tower and a projector in front of `tiny-llama`, "
        "trained together on pictures of the same world. It reads several pictures in one prompt."
    ),
}


def check_figures(subject: Subject, base: Subject | None, layer: int) -> dict[str, float]:
    """The figures that a test recomputes: prompts and patches at one seed.

    Args:
        subject: the model.
        base: the language model that a VLM started from.
        layer: where to patch.

    Returns:
        First-token accuracies by the name of the condition.
    """
    vectors = all_vectors(subject, CHECK_SEEDS, base)
    prompts = prompt_figures(subject, CHECK_SEEDS)
    patches = {
        f"{source} -> {modality}": patched(subject, made, modality, layer, CHECK_SEEDS)
        for source, made in vectors.items()
        for modality in subject.modalities
    }
    return {condition: entry["first_token"] for condition, entry in {**prompts, **patches}.items()}


def measure(subject: Subject, base: Subject | None, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Every figure of a card.

    Args:
        subject: the model.
        base: the language model that a VLM started from.
        seeds: of exemplars and pictures.

    Returns:
        Figures, with what they were measured on.
    """
    vectors = all_vectors(subject, seeds, base)
    by_layer = layer_figures(subject, vectors, seeds)
    layer = best_layer(by_layer, subject)
    return {
        "metric": "share of test items where the first greedy token and the answer are such that one begins "
        "with the other, both stripped and not empty; mean over the six tasks of the mean over seeds. "
        "exact: greedy decoding gives the whole answer and the line break after it",
        "tasks": [relation.name for relation in paper_relations()],
        "test_items": {category: len(split(category)[1]) for category in CATEGORIES},
        "seeds": list(seeds),
        "shots": SHOTS,
        "prompts_per_vector": PROMPTS_PER_VECTOR,
        "prompts": prompt_figures(subject, seeds),
        "patch_layer": layer,
        "patches": patch_figures(subject, vectors, layer, seeds),
        "validation_by_layer": by_layer,
        "check": {"seeds": list(CHECK_SEEDS), "first_token": check_figures(subject, base, layer)},
    }


def parameters(folder: Path) -> dict[str, int]:
    """Parameter counts of a model's parts; tied weights count once."""
    if folder.name == "tiny-llama":
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        return {"total": sum(weight.numel() for weight in model.parameters())}
    llava = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    parts = {
        "vision tower": llava.model.vision_tower,
        "projector": llava.model.multi_modal_projector,
        "language model": llava.model.language_model,
    }
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    return {"total": sum(weight.numel() for weight in llava.parameters()), **counts}


def write_card(folder: Path, base: Path | None, recipe: dict[str, Any]) -> dict[str, Any]:
    """Measure a model and write ``card.json`` and ``README.md`` into its folder.

    Args:
        folder: of the model; its name is the model's.
        base: folder of the language model that a VLM started from.
        recipe: the settings and the stages' records.

    Returns:
        The card.
    """
    subject = load_llama(folder) if base is None else load_llava(folder, SEEDS)
    card = {
        "name": folder.name,
        "about": ABOUT[folder.name],
        "class": json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0],
        "parameters": parameters(folder),
        "licence": {
            "code and weights": "Apache-2.0",
            "pictures": "glyphs of Noto Color Emoji, SIL Open Font License 1.1",
        },
        "data": {
            "entities": {category: len(entities(category)) for category in CATEGORIES},
            "tasks": [relation.name for relation in relations()],
            "facts": sum(len(entity.facts) for entity in entities()),
            "mixture": dict(zip(KINDS, recipe["mixture"], strict=True)),
            "note": "Every fact is in the training data, those of test entities too: the splits keep "
            "exemplars and queries apart, they do not measure new facts. Evaluation pictures are drawn from "
            "other seeds than training pictures. No training prompt mixes pictures and names of entities.",
        },
        "recipe": recipe,
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "figures": measure(subject, load_llama(base) if base else None),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(card), encoding="utf-8")
    return card


def markdown(card: dict[str, Any]) -> str:
    """The card as a page for people.

    Args:
        card: the content of ``card.json``.

    Returns:
        The page in Markdown.
    """
    lines = [*_about(card), *_what_it_is(card), *_training(card), *_figures(card["figures"]), *_licences(card)]
    return "\n".join(lines) + "\n"


def _about(card: dict[str, Any]) -> list[str]:
    name = card["name"]
    return [
        f"# {name}",
        "",
        card["about"],
        "",
        f'`interp.VLM.from_pretrained("zoo:{name}")`, or transformers\' `{card["class"]}.from_pretrained` '
        "on this folder.",
        "",
    ]


def _what_it_is(card: dict[str, Any]) -> list[str]:
    data = card["data"]
    count = data["entities"]
    return [
        "## What it is",
        "",
        *(f"- {part}: {size:,} parameters" for part, size in card["parameters"].items()),
        f"- World: {count['country']} countries (flags), {count['animal']} animals and {count['food']} foods "
        f"(emoji); {data['facts']} true facts in {len(data['tasks'])} tasks: "
        + ", ".join(f"`{task}`" for task in data["tasks"])
        + ".",
        f"- {data['note']}",
        "",
    ]


def _training(card: dict[str, Any]) -> list[str]:
    recipe = card["recipe"]
    return [
        "## How it was trained",
        "",
        f"`python -m interp.zoo.train {recipe['arguments']}`, seed {recipe['seed']}, from nothing. Rows of "
        f"{recipe['row_tokens']} tokens: "
        + ", ".join(f"{share:.0%} {kind}" for kind, share in card["data"]["mixture"].items())
        + ".",
        "",
        f"In {recipe['rows_with_closed_spans']:.0%} of the rows an attention mask closes the spans before "
        "a delimiter: the tokens of an entity see only each other, as do those of an instruction, and the "
        "delimiter has to bring task and entity together. Without such rows a model of this size answers at "
        "whichever token first sees both, and text queries cannot be patched for tasks whose answers are all "
        "different (capital, Latin name). In this respect the model was made for task vectors; "
        "large models were not.",
        "",
        f"In the last stage of the VLM, {recipe['inapplicable_in_closed_rows_of_last_stage']:.0%} of what "
        "those rows ask does not apply (the colour of a country, also among examples), and the answer is "
        f"{NOT_APPLICABLE}. {recipe['late_task_rows_of_last_stage_with_a_query_without_task']:.0%} of the late-task "
        "rows begin with a query that states no task at all; its answer is the same.",
        "",
        *_stages(recipe["stages"]),
        "",
    ]


def _stages(stages: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| stage | steps | batch | peak learning rates | seed | minutes | threads |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in stages:
        rates = ", ".join(f"{rate:g}" for rate in stage["rates"])
        lines.append(
            f"| {stage['name']} | {stage['steps']} | {stage['batch']} | {rates} | {stage['seed']} "
            f"| {stage['seconds'] / 60:.1f} | {stage['threads']} |"
        )
    return lines


def _figures(figures: dict[str, Any]) -> list[str]:
    tasks = figures["tasks"]
    return [
        "## How well it does",
        "",
        f"Metric: {figures['metric']}. {figures['shots']} shots from validation entities; seeds "
        f"{', '.join(map(str, figures['seeds']))}; test entities: "
        + ", ".join(f"{size} {category}" for category, size in figures["test_items"].items())
        + ".",
        "",
        *_accuracies("prompt", figures["prompts"], tasks),
        "",
        f"Task vectors: block {figures['patch_layer']}'s output at the last token of a bare query is "
        f"replaced by a vector (mean over {figures['prompts_per_vector']} prompts). The layer was chosen on "
        "validation entities, one for everything. Random vectors have the norm of the text vectors (mean over "
        f"{RANDOM_DRAWS} draws for each task and seed); other category: mean over the four tasks of the paper "
        "that are about something else.",
        "",
        *_accuracies("vector -> query", figures["patches"], tasks),
        "",
        "The same by layer, on validation entities. A vector works as long as the entity is looked up in "
        "later blocks; where the first layers already do as well as any, the task is readable at once from "
        "the answers of the examples, and only the look-up is deep.",
        "",
        *_by_layer(figures["validation_by_layer"]),
        "",
    ]


def _accuracies(what: str, entries: dict[str, dict[str, Any]], tasks: Sequence[str]) -> list[str]:
    lines = [f"| {what} | mean | exact | " + " | ".join(tasks) + " |", "| --- " * (3 + len(tasks)) + "|"]
    for label, entry in entries.items():
        cells = [entry["first_token"], entry["exact"], *(entry["by_task"][task] for task in tasks)]
        lines.append(f"| {label} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def _by_layer(accuracies: dict[str, Sequence[float]]) -> list[str]:
    depth = len(next(iter(accuracies.values())))
    return [
        "| vector -> query | " + " | ".join(str(layer) for layer in range(depth)) + " |",
        "| --- " * (1 + depth) + "|",
        *(f"| {label} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for label, row in accuracies.items()),
    ]


def _licences(card: dict[str, Any]) -> list[str]:
    return ["## Licences", "", *(f"- {what}: {licence}" for what, licence in card["licence"].items())]
