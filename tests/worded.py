"""Small random models that read words: a LLaVA with a real processor, and a Llama that shares its decoder."""

from functools import lru_cache

from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from interp.models.vlm import VLM
from interp.tasks import Item, Task
from tests.processors import byte_level_tokenizer, llava_processor
from tests.tiny import redraw


@lru_cache
def llava() -> VLM:
    """A LLaVA of 4 layers and width 32, with 4 tokens an image."""
    tokenizer = byte_level_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_decoder(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    return VLM(redraw(LlavaForConditionalGeneration(config)), llava_processor(tokenizer))


@lru_cache
def llama() -> VLM:
    """A Llama whose weights are those of `llava`'s language model."""
    shared = llava()
    model = LlamaForCausalLM(_decoder(len(shared.tokenizer))).eval()
    model.model.load_state_dict(shared.decoder.state_dict())
    model.lm_head.load_state_dict(shared.unembed.state_dict())
    return VLM(model, shared.tokenizer)


def other_llama(n_layers: int = 4, d_model: int = 32) -> VLM:
    """A Llama of another shape."""
    tokenizer = byte_level_tokenizer()
    config = _decoder(len(tokenizer), num_hidden_layers=n_layers, hidden_size=d_model)
    return VLM(redraw(LlamaForCausalLM(config)), tokenizer)


def _decoder(vocab: int, **changes: int) -> LlamaConfig:
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


COUNTRIES = {
    "France": ("Paris", "euro"),
    "Spain": ("Madrid", "euro"),
    "Japan": ("Tokyo", "yen"),
    "Norway": ("Oslo", "krone"),
    "Peru": ("Lima", "sol"),
    "Chad": ("N'Djamena", "franc"),
}
FOODS = {"apple": ("red", "sweet"), "lemon": ("yellow", "sour"), "bean": ("green", "mild"), "egg": ("white", "rich"),
         "beet": ("purple", "earthy"), "chili": ("red", "hot")}  # fmt: skip


def image(name: str) -> Image.Image:
    """A picture that differs by name: two colours side by side."""
    code = sum(ord(letter) * (i + 1) for i, letter in enumerate(name))
    picture = Image.new("RGB", (16, 16), (code * 37 % 256, code * 91 % 256, code * 53 % 256))
    picture.paste((code * 11 % 256, code * 71 % 256, code * 29 % 256), (8, 0, 16, 16))
    return picture


def tasks() -> dict[str, Task]:
    """Two tasks of each of two categories, three validation and three test items each."""
    found = {}
    for category, facts, names in (
        ("country", COUNTRIES, ("country-capital", "country-currency")),
        ("food", FOODS, ("food-color", "food-flavor")),
    ):
        for index, name in enumerate(names):
            items = tuple(Item(x, y[index], image(x), id=x) for x, y in facts.items())
            found[name] = Task(name, f"The {name.split('-')[1]}:", items[:3], items[3:], category)
    return found
