"""Proof that a model stayed as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from interp.errors import InputError


@contextmanager
def frozen(model: nn.Module, name: str = "the model") -> Iterator[None]:
    """Run the model in evaluation mode, and see to it that no gradient reaches it and no weight changes.

    Args:
        model: what is frozen; its modules are in the mode they were in when the block ends.
        name: for messages.

    Raises:
        InputError: at the end of the block, naming the first weight that changed or got a gradient.
    """
    before = _state(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
    for key, now in _state(model).items():
        held = before.get(key)
        if held is None or held.tensor is not now.tensor or (held.version, held.sums) != (now.version, now.sums):
            raise InputError(f"{name} is not frozen: {key!r} changed while a head was trained on it")
        if (held.grad is not now.grad) or held.grad_version != now.grad_version:
            raise InputError(f"{name} is not frozen: {key!r} got a gradient while a head was trained on it")


class _Held(NamedTuple):
    tensor: Tensor
    version: int
    sums: tuple[float, float]
    grad: Tensor | None
    grad_version: int


def _state(model: nn.Module) -> dict[str, _Held]:
    """Every weight and buffer: how often it was written to, what it adds up to, and its gradient."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    return {key: _held(tensor) for key, tensor in held.items()}


def _held(tensor: Tensor) -> _Held:
    values = tensor.detach().double()
    # What is written through `.data` counts no writes.
    sums = (float(values.sum()), float(values.square().sum()))
    grad = tensor.grad if tensor.is_leaf else None
    return _Held(tensor, _version(tensor), sums, grad, -1 if grad is None else _version(grad))


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no writes, and nothing can write to them outside it.
    return 0 if tensor.is_inference() else tensor._version
