"""What is refused before a model runs: edits without effect, and sequences that it has no positions for."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from interp.edits import Edit
from interp.errors import InputError, SiteUnavailableError
from interp.hooks import Applied, live_edits
from interp.models.places import PlaceMap
from interp.positions import names_image
from interp.selection import position_ids


def placed(edit: Edit, places: PlaceMap, image_token: int | None = None) -> Applied:
    """An edit with its site, checked.

    Args:
        edit: the edit.
        places: the model's sites.
        image_token: id of the tokens that image features take the place of; None for a model without images.

    Raises:
        UnknownNameError, SiteUnavailableError, InputError, ShapeError: a site that the model lacks or where an edit
            would change nothing, or a selection or value that the site cannot have.
    """
    place = places.place(edit.site)
    reason = places.no_effect(place)
    if reason is not None:
        raise SiteUnavailableError(f"an edit at {place.site} would change nothing: {reason}")
    edit.check(place)
    if image_token is None or place.station != places.place("hook_embed").station:
        return Applied(edit, place)
    if names_image(edit.at):
        raise SiteUnavailableError(
            f"an edit at {place.site} on {edit.at!r} would change nothing: image features take the place of the "
            "placeholders' embeddings. Edit projector.hook_out or blocks.0.hook_resid_pre"
        )
    return Applied(edit, place, image_token=image_token)


def arguments_for(inputs: Mapping[str, Any], max_positions: int | None) -> dict[str, Any]:
    """Model inputs with position ids that leave padding out, which absolute positions (GPT-2) need.

    Raises:
        InputError: a row longer than the model's positions.
    """
    arguments = dict(inputs)
    check_length(arguments, max_positions)
    mask, ids, cache = (arguments.get(name) for name in ("attention_mask", "input_ids", "past_key_values"))
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()) or arguments.get("position_ids") is not None:
        return arguments
    length = ids.shape[1] if isinstance(ids, Tensor) else mask.shape[1]
    past = 0 if cache is None else int(cache.get_seq_length())
    if mask.shape[1] == past + length:
        arguments["position_ids"] = position_ids(mask)[:, past:]
    return arguments


def check_length(inputs: Mapping[str, Any], max_positions: int | None, new: int = 0) -> None:
    """Refuse rows that, with ``new`` tokens after them, are longer than the model's positions.

    Raises:
        InputError: such a row.
    """
    ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    if max_positions is None or not isinstance(ids, Tensor) or ids.ndim != 2:
        return
    past = 0 if cache is None else int(cache.get_seq_length())
    length = past + ids.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length:
        length = int(mask.sum(-1).max())
    if length + new > max_positions:
        more = f" and {new} new ones" if new else ""
        raise InputError(f"a row has {length} tokens{more}, but the model takes {max_positions} at most")


def check_guidance(vlm: Any, edits: Sequence[Applied], options: Mapping[str, Any]) -> None:
    """Refuse guidance together with edits: its unconditional branch is another prompt, which no edit is meant for.

    Raises:
        InputError: guidance with edits, in force here or in an outer block.
    """
    if not edits and not live_edits(vlm.model):
        return
    configs = (options.get("generation_config"), vlm.model.generation_config)
    scales = [options.get("guidance_scale"), *(getattr(config, "guidance_scale", None) for config in configs)]
    scale = next((one for one in scales if one is not None), None)
    name = "negative_prompt_ids" if options.get("negative_prompt_ids") is not None else "guidance_scale"
    if name == "negative_prompt_ids" or scale not in (None, 1):
        raise InputError(
            f"{name} does not go together with edits: the branch without the prompt would be edited as if it were "
            "the prompt. Leave guidance or the edits out"
        )
