"""Values of edits, brought into the shape of the entries that they replace."""

import torch
from einops import rearrange
from torch import Tensor

from interp.errors import ShapeError
from interp.selection import Group
from interp.sites import Place


def aligned(what: object, value: Tensor, x: Tensor, group: Group, place: Place) -> Tensor:
    """Bring a value into the shape ``[row, n, ...]`` of the entries, up to broadcasting.

    Args:
        what: whose value it is, for errors.
        value: with the shapes that edits take.
        x: the selected entries.
        group: which entries they are.
        place: the site.

    Raises:
        ShapeError: a value that does not fit.
    """
    value = value.to(x.device, x.dtype)
    if place.side == "pattern" and value.ndim >= 2:
        if value.ndim > 4:
            raise ShapeError(f"{what!r}: the value has more axes than the attention pattern {tuple(x.shape)}")
        value = rearrange(value[(None,) * (4 - value.ndim)], "batch head query key -> batch query head key")
    if group.grid is not None and value.ndim >= 2:
        return _by_cell(what, value, group)
    by_example = value.ndim - (x.ndim - 2)
    if by_example > 2:
        raise ShapeError(f"{what!r}: the value has more axes than the activation {tuple(x.shape)}")
    if by_example > 0:
        if len(value) not in (1, group.n_examples):
            raise ShapeError(f"{what!r}: the value holds {len(value)} examples, the edit selects {group.n_examples}")
        value = value.expand(group.n_examples, *value.shape[1:])[group.examples]
        value = rearrange(value, "row ... -> row 1 ...") if by_example == 1 else _by_position(what, value, group)
    if any(have not in (1, want) for have, want in zip(value.shape[::-1], x.shape[::-1], strict=False)):
        raise ShapeError(f"{what!r}: the value does not fit the selected activations {tuple(x.shape)} (row, pos, ...)")
    return value


def _by_position(what: object, value: Tensor, group: Group) -> Tensor:
    """The values of the positions at hand, out of those of all selected positions of the prompt."""
    if value.shape[1] == 1:
        return value
    if value.shape[1] != group.n_positions or bool((group.ordinals < 0).any()):
        raise ShapeError(
            f"{what!r}: the value holds {value.shape[1]} positions, the edit selects {group.n_positions} of the "
            f"prompt{' and decoded tokens besides' if bool((group.ordinals < 0).any()) else ''}"
        )
    return value[torch.arange(len(value), device=value.device)[:, None], group.ordinals]


def _by_cell(what: object, value: Tensor, group: Group) -> Tensor:
    """The values of the selected cells of a feature map, out of those of the whole map."""
    height, width = group.grid or (1, 1)
    if value.ndim not in (3, 4) or value.shape[-2:] not in ((height, width), (1, 1)):
        raise ShapeError(
            f"{what!r}: the value has shape {tuple(value.shape)}; at this {height} × {width} feature map it must be "
            f"[channel], [channel, {height}, {width}] or [batch, channel, {height}, {width}]"
        )
    value = value if value.ndim == 4 else rearrange(value, "channel height width -> 1 channel height width")
    if len(value) not in (1, group.n_examples):
        raise ShapeError(f"{what!r}: the value holds {len(value)} examples, the edit selects {group.n_examples}")
    value = rearrange(value, "batch channel height width -> batch (height width) channel")
    value = value.expand(group.n_examples, *value.shape[1:])[group.examples]
    if value.shape[1] == 1 or group.whole:
        return value
    return value[torch.arange(len(value), device=value.device)[:, None], group.positions]


def precise(x: Tensor) -> torch.dtype:
    """The dtype to compute in: half precisions lose too much in sums."""
    return torch.promote_types(x.dtype, torch.float32)
