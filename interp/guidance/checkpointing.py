"""Gradients through a model for less memory: frozen weights, and activations that are computed twice."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from interp.errors import InputError
from interp.hooks import live_calls
from interp.replay import Replaying, is_replay


@contextmanager
def without_weight_gradients(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No gradients for any weight, so that nothing is kept for them; what asked for gradients before does again after.

    Args:
        modules: whose weights.
    """
    asked = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    for weight in asked:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)


@contextmanager
def checkpointed(denoiser: nn.Module) -> Iterator[None]:
    """Compute what is inside the denoiser's blocks again in backward passes, instead of keeping it.

    The second time, edits of open sessions apply as in the first, and nothing is captured twice. Blocks that were
    checkpointed before are as they were after.

    Args:
        denoiser: a diffusers model.

    Raises:
        InputError: none of its blocks can be checkpointed.
    """
    blocks = [module for module in denoiser.modules() if hasattr(module, "gradient_checkpointing")]
    if not blocks:
        raise InputError(f"{type(denoiser).__name__} has no gradient checkpointing: give Guide(checkpointing=False)")
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(block)[name] for name in names if name in vars(block)} for block in blocks]
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, run_again  # type: ignore[assignment]
    try:
        yield
    finally:
        for block, values in zip(blocks, before, strict=True):
            for name in names:
                vars(block).pop(name, None)
            vars(block).update(values)


def run_again(block: Callable[..., Any], *args: Any) -> Any:
    """Run a block and forget what is inside; when gradients need it, run the block again.

    Args:
        block: a module, or a function of tensors.
        args: what it is called with.

    Returns:
        Its output.
    """
    owner, calls = threading.get_ident(), live_calls()
    ended: list[BaseException] = []

    def run(*given: Any) -> Any:
        if is_replay():
            return block(*given)
        # An error that left the checkpoint would leave its saving hooks in place for as long as its traceback lives,
        # and a forward that ended early, after its last capture, is still wanted back to where it came.
        try:
            return block(*given)
        except BaseException as error:
            ended.append(error)
            return None

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), Replaying(owner, calls)

    output = checkpoint(run, *args, use_reentrant=False, context_fn=contexts)
    if ended:
        raise ended.pop()
    return output
