"""Models under one set of names."""

from interp.models.vlm import VLM

__all__ = ["VLM"]
