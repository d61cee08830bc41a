"""The models that ship: they load with transformers alone, and do what their cards say."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from interp import zoo
from interp.errors import UnknownNameError
from interp.zoo import cards, evaluate, images
from interp.zoo.tokenizer import train_tokenizer

# Accuracies are shares of 30 to 36 items in six tasks. The CPU's kernels may add in another order than those
# that the card was measured with, which can flip an answer that was nearly a tie: one item in each task.
TOLERANCE = 0.03
LANGUAGE_MODELS = ["tiny-llama", "tiny-llava"]


def test_names_paths_and_cards():
    assert zoo.names() == ["tiny-diffusion", *LANGUAGE_MODELS]
    assert zoo.path("zoo:tiny-llava") == zoo.path("tiny-llava")
    assert zoo.card("tiny-llama")["class"] == "LlamaForCausalLM"
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny-llava'"):
        zoo.path("tiny-lava")


def test_importing_the_zoo_does_not_import_torch():
    code = "import sys, interp.zoo; interp.zoo.card('tiny-llava'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_are_small_and_complete():
    for name in LANGUAGE_MODELS:
        files = {file.name: file.stat().st_size for file in zoo.path(name).iterdir()}
        assert sum(files.values()) <= 10 * 2**20
        assert {"model.safetensors", "config.json", "tokenizer.json", "card.json", "README.md"} <= set(files)
        assert json.loads((zoo.path(name) / "card.json").read_text())["name"] == name


def test_they_load_with_transformers_alone_and_answer():
    processor = LlavaProcessor.from_pretrained(zoo.path("tiny-llava"))
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
    model = LlavaForConditionalGeneration.from_pretrained(zoo.path("tiny-llava")).eval()
    text = "The capital city of the country:\nQ:<image>\nA:"
    inputs = processor(text=[text], images=[images.draw("France", seed=0)], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert processor.tokenizer.decode(out[0, inputs.input_ids.shape[1] :]).startswith("Paris")

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("tiny-llama"))
    llama = AutoModelForCausalLM.from_pretrained(zoo.path("tiny-llama")).eval()
    assert isinstance(llama, LlamaForCausalLM)
    inputs = tokenizer("Q:Japan\nThe capital city of the country:", return_tensors="pt")
    out = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0, inputs.input_ids.shape[1] :]).startswith("Tokyo")


def test_the_tokenizer_that_ships_is_the_one_the_recipe_trains():
    fresh = train_tokenizer()
    for name in LANGUAGE_MODELS:
        shipped = AutoTokenizer.from_pretrained(zoo.path(name))
        assert shipped.get_vocab() == fresh.get_vocab()
        text = "Q:Saudi Arabia\nThe scientific name of the animal's species in latin:"
        assert shipped(text).input_ids == fresh(text).input_ids


def test_the_vlm_started_from_the_language_model_and_really_moved():
    llama = LlamaForCausalLM.from_pretrained(zoo.path("tiny-llama")).model
    llava = LlavaForConditionalGeneration.from_pretrained(zoo.path("tiny-llava")).model.language_model
    for (name, before), (_, after) in zip(llama.named_parameters(), llava.named_parameters(), strict=True):
        assert not torch.equal(before, after), name
        if before.dim() == 2:
            similarity = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
            # Unrelated weights would be orthogonal, to within a hundredth at these sizes.
            assert similarity > 0.5, name


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_figures_of_the_card_can_be_measured_again(name):
    folder, card = zoo.path(name), zoo.card(name)
    assert tuple(card["figures"]["check"]["seeds"]) == cards.CHECK_SEEDS
    base = evaluate.load_llama(zoo.path("tiny-llama")) if name == "tiny-llava" else None
    subject = evaluate.load_llava(folder, cards.CHECK_SEEDS) if base else evaluate.load_llama(folder)
    measured = cards.check_figures(subject, base, card["figures"]["patch_layer"])
    assert measured == pytest.approx(card["figures"]["check"]["first_token"], abs=TOLERANCE)
    assert (folder / "README.md").read_text(encoding="utf-8") == cards.markdown(card)


def test_the_card_reports_what_the_models_are_for():
    figures = zoo.card("tiny-llava")["figures"]
    prompts, patches = figures["prompts"], figures["patches"]
    assert prompts["few-shot, text"]["first_token"] >= 0.95
    assert prompts["few-shot, image"]["first_token"] >= 0.90
    assert max(prompts[f"none, {modality}"]["first_token"] for modality in ("text", "image")) <= 0.40
    floors = {
        "text -> image": 0.85,
        "image -> image": 0.85,
        "text -> text": 0.80,
        "image -> text": 0.75,
        "instruction -> image": 0.60,
        "language model -> image": 0.60,
    }
    for condition, floor in floors.items():
        assert patches[condition]["first_token"] >= floor, condition
    for control in ("random", "other category"):
        for modality in ("text", "image"):
            assert patches[f"{control} -> {modality}"]["first_token"] <= 0.10, (control, modality)
