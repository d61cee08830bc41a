"""Hooks by hand: the independent path that captures and edits are compared with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _swap(given: Any, new: Tensor) -> Any:
    return new if isinstance(given, Tensor) else (new, *given[1:])


def _tensor(given: Any) -> Tensor:
    return given if isinstance(given, Tensor) else given[0]


@contextmanager
def reading(model: nn.Module, path: str, side: str = "output") -> Iterator[list[Tensor]]:
    """Every tensor that a module puts out, or is given, while the block runs."""
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    if side == "output":
        handle = module.register_forward_hook(lambda m, args, out: seen.append(_tensor(out).detach().clone()))
    else:

        def before(m: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def writing(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Exchange a module's output for ``change(output)`` while the block runs."""
    handle = model.get_submodule(path).register_forward_hook(
        lambda m, args, out: _swap(out, change(_tensor(out).clone()))
    )
    try:
        yield
    finally:
        handle.remove()


def state_of(model: nn.Module) -> dict[str, tuple]:
    """All hooks and the configuration object of every module.

    Transformers' own recorders, which the first forward that needs them installs for good, are left out.
    """

    def ours(hooks: dict) -> tuple:
        return tuple(key for key, hook in hooks.items() if not hook.__module__.startswith("transformers."))

    return {
        name: (
            ours(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks_with_kwargs),
            tuple(module._forward_pre_hooks_with_kwargs),
            tuple(module._backward_hooks),
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def greedy_without_cache(
    model: nn.Module,
    inputs: dict[str, Tensor],
    steps: int,
    path: str | None = None,
    position: int = 0,
    value: Any = None,
) -> Tensor:
    """Greedy tokens from whole forwards, the output of ``path`` exchanged at one position in each of them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rest = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}

    def patch(x: Tensor) -> Tensor:
        x[:, position] = value
        return x

    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        arguments = dict(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **rest)
        if path is None:
            logits = model(**arguments).logits
        else:
            with writing(model, path, patch):
                logits = model(**arguments).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, -steps:]
