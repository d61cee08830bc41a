"""What a sweep does before it does it: which variants run together, laid out how, and what that costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from interp.sweeps.variants import Variant

Layout = Literal["packed", "rows"]

# What a forward of one block costs beside its arithmetic (launches, Python, reading the weights), and what reading or
# writing one number costs, in units that chunks are chosen by: tokens through one block, and multiplications.
BLOCK_OVERHEAD_TOKENS = 32
COPY_COST = 8
# A row may run this share of its tokens before its own first edit, to run together with others; chunks that hold
# this many tokens have no need of that.
WASTE = 0.125
ENOUGH_TOKENS = 1024


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide what a chunk costs.

    Args:
        n_layers: blocks.
        d_model: width of the residual stream.
        weights: numbers in one block.
        d_attention: query heads times their width.
        d_keys: key heads times their width.
        n_heads: query heads.
        d_mlp: widest activation of a block.
        vocab: width of the logits.
        bytes_each: of one number.
        explicit: whether the attention kernel forms its probabilities.
    """

    n_layers: int
    d_model: int
    weights: int
    d_attention: int
    d_keys: int
    n_heads: int
    d_mlp: int
    vocab: int
    bytes_each: int
    explicit: bool

    @property
    def packed_tokens(self) -> int:
        """Tokens in a packed sequence at which its two costs, few tokens per forward and many keys, are equal."""
        return max(64, int(math.sqrt(BLOCK_OVERHEAD_TOKENS * self.weights / (2 * self.d_attention))))


def sizes_of(vlm: Any) -> Sizes:
    """The sizes of a model.

    Args:
        vlm: the model.
    """
    block = vlm.model.get_submodule(vlm.place("blocks.0.hook_resid_pre").path)
    weights = [parameter for parameter in block.parameters() if parameter.ndim >= 2]
    return Sizes(
        n_layers=vlm.n_layers,
        d_model=vlm.d_model,
        weights=sum(weight.numel() for weight in weights),
        d_attention=vlm.n_heads * vlm.d_head,
        d_keys=vlm.place("blocks.0.attn.hook_k").n_heads * vlm.d_head,
        n_heads=vlm.n_heads,
        d_mlp=max(max(weight.shape) for weight in weights),
        vocab=int(vlm.model.config.get_text_config().vocab_size),
        bytes_each=torch.finfo(vlm.dtype).bits // 8,
        explicit=vlm.decoder.config._attn_implementation != "sdpa",
    )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Variants that run in one forward.

    Args:
        layout: ``packed``: side by side in one sequence; ``rows``: each in rows of its own.
        start: first token that the rows hold; of a packed sequence, the first token of any variant.
        variants: which ones.
    """

    layout: Layout
    start: int
    variants: tuple[Variant, ...]

    def __str__(self) -> str:
        return f"{len(self.variants)} {self.layout} from token {self.start}"

    @property
    def first_layer(self) -> int:
        """The block at which the first of its variants joins."""
        return min(variant.layer for variant in self.variants)

    def token_layers(self, batch: int, seq_len: int, n_layers: int, outer: bool = False) -> int:
        """Token-layers that running it takes.

        Args:
            batch: prompts.
            seq_len: padded length of the prompts.
            n_layers: blocks.
            outer: edits of outer blocks apply too, for which whole rows run below the first variant's block.
        """
        mine = sum(
            (n_layers - one.layer) * (seq_len - (one.start if self.layout == "packed" else self.start))
            for one in self.variants
        )
        below = batch * (seq_len - self.start) if outer else 1
        return batch * mine + self.first_layer * below

    def halves(self) -> "tuple[Chunk, Chunk]":
        """The chunk in two, for when memory runs out."""
        middle = len(self.variants) // 2
        parts = (self.variants[:middle], self.variants[middle:])
        first, second = (
            Chunk(self.layout, min(one.start for one in part) if self.layout == "packed" else self.start, part)
            for part in parts
        )
        return first, second


@dataclass(frozen=True)
class Plan:
    """What a sweep shares and what it costs.

    Args:
        n_variants, batch, seq_len: size of the sweep.
        shared_prefix: tokens per row before every variant's first edit, whose keys and values are computed once.
        images_shared: whether images are encoded once rather than once per variant.
        variants_per_forward: the most variants that run in one forward.
        token_layers: token-layer evaluations: the run that all start from, and what each variant adds. Not counted:
            plain forwards of variants that seem to have no effect, eight at most.
        naive_token_layers: those of a loop of edited forwards.
        reason: why something cannot be shared; empty when all can.
        layers_shared: token-layers that no variant runs, because they lie below its first edit.
        chunks: the forwards after the shared one, in words.
        memory: bytes that one forward may take.
        checked: the variant that a plain edited forward is compared with; None: none, or all variants run so.
    """

    n_variants: int
    batch: int
    seq_len: int
    shared_prefix: int
    images_shared: bool
    variants_per_forward: int
    token_layers: int
    naive_token_layers: int
    reason: str = ""
    layers_shared: int = 0
    chunks: tuple[str, ...] = ()
    memory: int = 0
    checked: int | None = None

    def __str__(self) -> str:
        ratio = self.naive_token_layers / max(1, self.token_layers)
        forwards = f"{len(self.chunks)} forwards of up to {self.variants_per_forward} variants"
        forwards += f" and {self.memory / 2**20:,.3g} MiB"
        return (
            f"{self.n_variants} variants × {self.batch} rows: {self.token_layers:,} token-layers against "
            f"{self.naive_token_layers:,} of the naive loop ({ratio:.1f}×); shared prefix of {self.shared_prefix} of "
            f"{self.seq_len} tokens{f'; {forwards}' if self.chunks else ''}{f'; {self.reason}' if self.reason else ''}"
        )


def chunked(
    variants: Sequence[Variant],
    batch: int,
    seq_len: int,
    n_kept: int,
    sizes: Sizes,
    *,
    memory: int,
    max_rows: int,
    outer: bool,
) -> list[Chunk]:
    """Choose which variants run together, and in which layout.

    Args:
        variants: those that have edits.
        batch: prompts.
        seq_len: padded length of the prompts.
        n_kept: positions per prompt whose logits are asked for.
        sizes: of the model.
        memory: bytes that one forward may take.
        max_rows: the most variants times prompts in one forward, though never less than one variant.
        outer: edits of outer blocks apply too, which have to find each variant in rows of its own.
    """
    by_start: dict[int, list[Variant]] = {}
    for variant in sorted(variants, key=lambda one: (one.start, one.layer, one.index)):
        by_start.setdefault(variant.start, []).append(variant)
    packed: list[Variant] = []
    rows: list[Variant] = []
    for start, found in by_start.items():
        pack = not outer and _packs(seq_len - start, seq_len, sizes)
        for variant in found:
            (packed if pack and variant.packable else rows).append(variant)
    limits = _Limits(batch, seq_len, n_kept, sizes, memory, max_rows)
    return [*limits.in_packs(packed), *limits.in_rows(rows)]


def _packs(length: int, seq_len: int, sizes: Sizes) -> bool:
    """Whether variants of this many tokens are cheaper side by side than in rows; both per token."""
    copied = COPY_COST * 2 * (sizes.d_keys + sizes.d_attention)
    together = max(length, sizes.packed_tokens)
    side_by_side = 2 * sizes.d_attention * (seq_len + together) + copied * (seq_len + together) / together
    in_rows = 2 * sizes.d_attention * seq_len + copied * seq_len / length
    return side_by_side < in_rows


@dataclass(frozen=True)
class _Limits:
    batch: int
    seq_len: int
    n_kept: int
    sizes: Sizes
    memory: int
    max_rows: int

    def in_packs(self, variants: list[Variant]) -> list[Chunk]:
        """Chunks of variants whose tokens lie one after the other in one row."""
        chunks: list[list[Variant]] = []
        n_tokens = 0
        for variant in variants:
            length = self.seq_len - min(variant.start, self.seq_len - 1)
            full = n_tokens + length > max(self.sizes.packed_tokens, length)
            if not chunks or full or not self._fit(len(chunks[-1]) + 1, n_tokens + length, packed=True):
                chunks.append([])
                n_tokens = 0
            chunks[-1].append(variant)
            n_tokens += length
        return [Chunk("packed", min(one.start for one in part), tuple(part)) for part in chunks]

    def in_rows(self, variants: list[Variant]) -> list[Chunk]:
        """Chunks of variants that are rows of one forward, from the first patched token of any on."""
        chunks: list[list[Variant]] = []
        for variant in variants:
            start = chunks[-1][0].start if chunks else 0
            length, own = self.seq_len - start, self.seq_len - variant.start
            n = len(chunks[-1]) + 1 if chunks else 1
            apart = start != variant.start and (
                length - own > WASTE * own or self.batch * (n - 1) * length >= ENOUGH_TOKENS
            )
            if not chunks or apart or not self._fit(n, n * length, packed=False):
                chunks.append([])
            chunks[-1].append(variant)
        return [Chunk("rows", part[0].start, tuple(part)) for part in chunks]

    def _fit(self, n: int, n_tokens: int, *, packed: bool) -> bool:
        return n * self.batch <= self.max_rows and self.needs(n, n_tokens, packed=packed) <= self.memory

    def needs(self, n: int, n_tokens: int, *, packed: bool) -> int:
        """Bytes that a forward of ``n`` variants with ``n_tokens`` tokens of each prompt takes at its peak."""
        s = self.sizes
        n_keys = self.seq_len + n_tokens if packed else self.seq_len
        streams = self.batch * n_tokens * (6 * s.d_model + 3 * s.d_mlp + 4 * s.d_attention)
        keys = self.batch * n_keys * (1 if packed else n) * 2 * (s.d_keys + s.d_attention)
        scores = self.batch * n_tokens * n_keys * (3 * s.n_heads if s.explicit else 1)
        logits = 3 * self.batch * n * self.n_kept * s.vocab
        return s.bytes_each * (streams + keys + scores + logits)
