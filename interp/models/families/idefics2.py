"""Idefics2: a SigLIP tower whose last norm is used, a perceiver that makes few tokens of it, a Mistral."""

from interp.models.families.base import Family, Stack

IDEFICS2 = Family(
    "idefics2",
    ("idefics2",),
    text=Stack("model.text_model"),
    vision=Stack(
        "model.vision_model",
        blocks="encoder.layers",
        embed="embeddings",
        final_norm="post_layernorm",
        o="self_attn.out_proj",
        mlp_out="mlp.fc2",
    ),
    projector="model.connector",
)
