"""LLaVA and its relatives: a CLIP or SigLIP tower, a projector, and a decoder laid out like Llama."""

from interp.models.families.base import Family, Stack

LLAVA = Family(
    "llava",
    ("llava", "llava_next", "llava_onevision"),
    text=Stack("model.language_model"),
    vision=Stack(
        "model.vision_tower",
        blocks="encoder.layers",
        embed="embeddings",
        final_norm="post_layernorm",
        o="self_attn.out_proj",
        mlp_out="mlp.fc2",
    ),
    projector="model.multi_modal_projector",
)
