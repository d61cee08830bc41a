"""GPT-2: one fused projection for q, k and v."""

from interp.models.families.base import Family, Stack

GPT2 = Family(
    "gpt2",
    ("gpt2",),
    text=Stack(
        "transformer",
        blocks="h",
        embed="wte",
        final_norm="ln_f",
        attn="attn",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp_out="mlp.c_proj",
    ),
)
