"""What enters the language model, without running it."""

import threading
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError


class _Stop(Exception):
    """Ends a forward whose rest is not wanted."""


def entering(vlm: Any, embedding: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings with the images' features in place; see `VLM.embed`.

    Args:
        vlm: the model.
        embedding: its token embedding, for decoders that embed tokens themselves.
        inputs: prepared or plain model inputs.

    Raises:
        InputError: the model did not call its language model.
    """
    entered: list[Tensor] = []
    owner = threading.get_ident()

    # Torch passes no kwargs while another thread is putting the hook in place or taking it away.
    def stop(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if threading.get_ident() != owner or kwargs is None:
            return
        given = kwargs.get("inputs_embeds")
        entered.append(embedding(args[0] if args else kwargs["input_ids"]) if given is None else given)
        raise _Stop

    handle = vlm.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        vlm(inputs)
    except _Stop:
        return entered[0]
    finally:
        handle.remove()
    raise InputError(f"{type(vlm.model).__name__} did not call its language model with these inputs")
