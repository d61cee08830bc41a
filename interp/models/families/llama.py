"""Decoders laid out like Llama: separate projections, pre-norm, a gated MLP."""

from interp.models.families.base import Family, Stack

LLAMA = Family("llama", ("llama", "mistral", "qwen2", "qwen3"), text=Stack("model"))
