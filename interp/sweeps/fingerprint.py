"""What makes one sweep another than the next: digests of its model, inputs, edits, metric and positions."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from interp.errors import InputError
from interp.hooks import Applied, live_edits
from interp.positions import Layout
from interp.sweeps.asked import Asked
from interp.sweeps.obstacles import foreign_hooks
from interp.sweeps.variants import Depths
from interp.sweeps.written import Unwritable, Writer

# Lanes of four bytes that are summed at once.
_BLOCK = 2**20
# Smaller tensors are hashed byte by byte, larger ones where they are.
_SMALL = 2**20
_CONFIG_SKIPPED = ("transformers_version", "dtype", "torch_dtype")


def fingerprint(
    vlm: Any,
    inputs: Mapping[str, Any],
    layouts: Sequence[Layout],
    variants: Sequence[Sequence[Applied]],
    metric: Callable | None,
    asked: Asked,
    depths: Depths,
) -> dict[str, str]:
    """What a sweep is, in parts that are compared one by one.

    Hooks that are not this library's count by the modules that they are on.

    Args:
        vlm: the model: its class, configuration, and every number of its parameters and buffers.
        inputs: its inputs.
        layouts: which tokens the names of positions mean.
        variants: for every variant its edits.
        metric: what is made of the logits: code, and all that it holds or reads.
        asked: positions whose logits are asked for.
        depths: of the model's modules.

    Raises:
        InputError: something that cannot be told apart from others of its kind, such as an open file.
    """
    # Stands for itself in what holds it: its numbers have a part of their own.
    writer = Writer(_tensor, {id(vlm): "the model", id(vlm.model): "the model"})
    parts = {
        "inputs": (dict(inputs), tuple(layouts)),
        "outer edits or hooks": ([a.edit for a in live_edits(vlm.model)], foreign_hooks(vlm, depths)),
        "variants": [[applied.edit for applied in edits] for edits in variants],
        "metric or positions": {"metric": metric, "positions": (asked.index, asked.single)},
    }
    found = {"model": _model(vlm, writer)}
    for name, part in parts.items():
        try:
            found[name] = writer.digest(part).hex()
        except (Unwritable, RecursionError) as error:
            # Not from the error: its trace is as deep as what was looked into.
            raise InputError(
                f"{name}: {error}, so that a folder could not tell this sweep from another; give functions and "
                "objects that hold numbers, texts and tensors only, or sweep without a folder"
            ) from None
    return found


def checksum(x: Shaped[Tensor, "..."]) -> bytes:
    """A checksum of all bits of a tensor, the same on every device, computed where the tensor is.

    Args:
        x: the tensor; its shape plays no part.
    """
    flat = x.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    octets = (flat if flat.storage_offset() == 0 else flat.clone()).view(torch.uint8)
    whole = len(octets) // 4 * 4
    weights = _weights(x.device)
    sums = [
        (lanes.to(torch.int64) * weights[: len(lanes)]).sum()
        for lanes in octets[:whole].view(torch.int32).split(_BLOCK)
    ]
    digest = hashlib.sha256(octets[whole:].cpu().numpy().tobytes())
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.digest()


@cache
def _weights(device: torch.device) -> Int[Tensor, " lane"]:
    """Odd numbers without a pattern (the mixing of SplitMix64), one for each lane of a block."""
    x = torch.arange(1, _BLOCK + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ (x >> 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    return (x ^ (x >> 27)) | 1


def _tensor(x: Tensor) -> bytes:
    if x.layout != torch.strided or x.device.type == "meta":
        raise Unwritable(f"a tensor of layout {x.layout} on {x.device}")
    header = f"{x.dtype} {tuple(x.shape)} ".encode()
    if x.numel() * x.element_size() > _SMALL:
        return header + checksum(x)
    exact = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return header + exact.view(-1).view(torch.uint8).numpy().tobytes()


def _model(vlm: Any, writer: Writer) -> str:
    digest = hashlib.sha256(f"{type(vlm.model).__name__} {vlm.dtype}".encode())
    digest.update(writer.digest(_settings(vlm.model.config.to_dict())))
    for path, module in vlm.model.named_modules():
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in held:
            x = _offloaded(module, name) if tensor.device.type == "meta" else tensor
            if x is None:
                raise InputError(
                    f"{path}.{name} is on the meta device, so that a folder could not tell this model from another; "
                    "sweep without a folder"
                )
            digest.update(f"|{path}.{name}:".encode())
            digest.update(_tensor(x))
    return digest.hexdigest()


def _settings(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A configuration without what names the copy of the model."""
    return {
        name: _settings(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not str(name).startswith("_") and name not in _CONFIG_SKIPPED
    }


def _offloaded(module: torch.nn.Module, name: str) -> Tensor | None:
    """A weight that accelerate keeps elsewhere and fetches for each call."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return kept[name]
    return None
