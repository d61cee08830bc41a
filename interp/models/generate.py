"""Generation with edits: transformers' own ``generate``, its KV cache, and a session around it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.clock import Clock, known_layouts
from interp.errors import InputError
from interp.hooks import Applied, Session
from interp.inputs import Inputs
from interp.models.checks import check_guidance, check_length
from interp.positions import layouts_from_mask


def continue_prompts(
    vlm: Any, inputs: Mapping[str, Any], edits: Sequence[Applied], *, max_new_tokens: int, **options: Any
) -> Int[Tensor, "row new"]:
    """Continue prompts; see `VLM.generate`.

    Args:
        vlm: the model.
        inputs: prepared or plain model inputs.
        edits: edits, placed.
        max_new_tokens: how many tokens at most.
        options: passed on to transformers' ``generate``.

    Returns:
        The new tokens only.

    Raises:
        InputError: no ``input_ids``, padding that is not on the left, more tokens than the model has positions for,
            or guidance together with edits.
    """
    arguments = dict(inputs)
    ids = arguments.get("input_ids")
    if not isinstance(ids, Tensor):
        raise InputError("generation needs input_ids")
    if arguments.get("attention_mask") is None:
        arguments["attention_mask"] = torch.ones_like(ids)
    check_length(arguments, vlm.max_positions, max_new_tokens)
    check_guidance(vlm, edits, options)
    # The mask that the model sees may cover a chunk of the prompt, or drafted tokens after it: this one is right.
    layouts = inputs.layout if isinstance(inputs, Inputs) else layouts_from_mask(arguments["attention_mask"])
    with torch.no_grad(), known_layouts(layouts), Session(vlm.model, Clock(vlm.model, vlm.decoder), edits=edits):
        made = vlm.model.generate(**arguments, max_new_tokens=max_new_tokens, **_settings(vlm, options))
    sequences = getattr(made, "sequences", made)  # an object, with return_dict_in_generate
    return sequences[:, ids.shape[1] :]


def _settings(vlm: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, **options}
    if not settings["do_sample"]:
        # Checkpoints may come with sampling settings, which mean nothing here and only raise warnings.
        settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
    if getattr(vlm.model.generation_config, "pad_token_id", None) is None:
        tokens = (getattr(vlm.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        settings.setdefault("pad_token_id", next((token for token in tokens if token is not None), None))
    return settings
