"""Attention masks of tokens that leave the unedited run, cut out of the mask that the model made for the whole prompt.

So whatever the model hides (padding, what lies outside a sliding window) stays hidden, layer by layer.
"""

import torch
from einops import repeat
from torch import Tensor


def is_causal(mask: Tensor) -> bool:
    """Whether no token sees a later one.

    Args:
        mask: ``[batch or 1, 1, query, key]``, boolean (True = visible) or additive.
    """
    future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    return not bool((_visible(mask) & future).any())


def packed_mask(mask: Tensor | None, positions: Tensor, owners: Tensor, starts: Tensor, n_prefix: int) -> Tensor:
    """The mask of many variants' tokens side by side, after the keys of the unedited run.

    Args:
        mask: the model's own, of the whole prompt; None: causal, nothing hidden.
        positions: in the prompt, of each token.
        owners: which variant each token belongs to.
        starts: where in the prompt each token's variant starts.
        n_prefix: keys of the unedited run.

    Returns:
        ``[batch or 1, 1, token, n_prefix + token]``.
    """
    before = torch.arange(n_prefix, device=positions.device) < starts[:, None]
    own = owners[:, None] == owners
    if mask is None:
        own = own & (positions <= positions[:, None])
        return torch.cat([before, own], dim=-1)[None, None]
    rows = mask[:, :, positions]
    shared, mine = rows[..., :n_prefix], rows[..., positions]
    if mask.dtype == torch.bool:
        return torch.cat([shared & before, mine & own], dim=-1)
    # Not the lowest number: a row of padding, which sees nothing, would spread over the tokens of others.
    hidden = torch.full((), -torch.inf, dtype=mask.dtype, device=mask.device)
    return torch.cat([torch.where(before, shared, hidden), torch.where(own, mine, hidden)], dim=-1)


def rows_mask(mask: Tensor | None, start: int, seq_len: int, device: torch.device) -> Tensor | None:
    """The mask of tokens from ``start`` on, in rows that hold one variant each.

    Args:
        mask: the model's own, of the whole prompt; None: causal, nothing hidden.
        start: the first token.
        seq_len: length of the prompt.
        device: of a mask that is made here.

    Returns:
        ``[batch or 1, 1, token, seq_len]``; None where the kernel's own causal mask is right.
    """
    if mask is None:
        if start == 0:
            return None
        return torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device).tril()[:, :, start:]
    cut = mask[:, :, start:]
    return cut[:1] if bool((cut == cut[:1]).all()) else cut


def for_copies(tensor: Tensor, batch: int, copies: int) -> Tensor:
    """A tensor of all prompts for as many copies of each, side by side; one that has a single row serves all."""
    if tensor.shape[0] != batch or batch == 1 or copies == 1:
        return tensor
    return repeat(tensor, "batch ... -> (batch copy) ...", copy=copies)


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
