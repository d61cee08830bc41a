"""The positions whose logits a sweep is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import ShapeError
from interp.positions import Layout, plain, resolve


@dataclass(frozen=True, eq=False)
class Asked:
    """Positions whose logits are wanted.

    Args:
        index: in the padded prompt, for each row.
        seq_len: padded length of the prompts.
        single: whether one position was asked for, whose axis is dropped.
    """

    index: Int[Tensor, "batch n"]
    seq_len: int
    single: bool

    @property
    def first(self) -> int:
        """The first of them, in any row."""
        return int(self.index.min())

    def keep(self, tail: bool) -> int | Tensor:
        """What to tell a model in ``logits_to_keep``.

        Args:
            tail: keep the end of the prompt whole, which edits at the unembedding count positions from.
        """
        return self.seq_len - self.first if tail or self.first == self.seq_len - 1 else self.index

    def gather(self, logits: Float[Tensor, "batch kept vocab"], tail: bool) -> Float[Tensor, "batch n vocab"]:
        """The asked positions among those that `keep` kept."""
        if not isinstance(self.keep(tail), int):
            return logits
        index = (self.index - self.first).to(logits.device)
        return torch.take_along_dim(logits, index[..., None], dim=1)

    def shown(self, logits: Float[Tensor, "batch n vocab"]) -> Float[Tensor, "batch *n vocab"]:
        """Logits as users see them: without an axis for a single position."""
        return logits[:, 0] if self.single else logits


def asked(positions: Any, layouts: Sequence[Layout], seq_len: int) -> Asked:
    """Resolve the asked positions.

    Args:
        positions: ``"last"``, a segment's name, an integer, a slice, or a list of these.
        layouts: where the tokens of each prompt are.
        seq_len: padded length of the prompts.

    Raises:
        UnknownNameError, InputError: a position that a prompt lacks.
        ShapeError: another number of positions in each row.
    """
    positions = plain(positions)
    rows = resolve(positions, layouts, seq_len)
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1:
        raise ShapeError(
            f"positions={positions!r} are {counts[0]} to {counts[-1]} tokens in the rows, whose logits are no "
            "rectangle: ask for one token of each (.first, .last), or sweep the rows apart"
        )
    single = counts == [1] and isinstance(positions, int | str)
    return Asked(torch.tensor(rows), seq_len, single)
