"""Proof that a model stayed as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

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
    for key, (tensor, version, grad) in _state(model).items():
        held = before.get(key)
        if held is None or held[0] is not tensor or held[1] != version:
            raise InputError(f"{name} is not frozen: {key!r} changed while a head was trained on it")
        if grad is not held[2]:
            raise InputError(f"{name} is not frozen: {key!r} got a gradient while a head was trained on it")


def _state(model: nn.Module) -> dict[str, tuple[Tensor, int, Tensor | None]]:
    """Every weight and buffer, how often it was written to, and its gradient."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    # Tensors made in inference mode count no writes, and nothing can write to them outside it.
    return {
        key: (tensor, 0 if tensor.is_inference() else tensor._version, tensor.grad if tensor.is_leaf else None)
        for key, tensor in held.items()
    }
