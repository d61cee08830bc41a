"""Probes: heads for activations of any model, and the loop that fits any head to activations that are there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.errors import InputError, ShapeError, nearest
from interp.hyperfeatures.bottleneck import drawn_layer
from interp.hyperfeatures.fitting import Training, fit
from interp.readouts.head import ReadoutHead
from interp.readouts.losses import match_size, mse

Features = Tensor | Sequence[Tensor]


class Standardised(nn.Module):
    """Activations with every channel centred and scaled by what was measured once; several sites are joined.

    Args:
        width: channels of all sites together.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1, not {width}")
        self.width = width
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def measure(self, features: Features) -> None:
        """Take mean and standard deviation of every channel from some activations.

        Args:
            features: as for `forward`.
        """
        flat = rearrange(self._rows(features)[0], "... d -> (...) d")
        self.centre = flat.mean(dim=0).to(self.centre)
        # A channel that never changes says nothing, and is left as it is.
        spread = flat.std(dim=0, correction=0)
        self.spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread)).to(self.spread)

    def forward(self, features: Features) -> Float[Tensor, "batch *pos d"]:
        """Join, centre and scale.

        Args:
            features: of one site ``[batch, d]``, tokens ``[batch, pos, d]`` or maps ``[batch, d, height, width]``, or
                of several alike.

        Returns:
            Channels last.

        Raises:
            ShapeError: another number of channels, or sites that differ in anything but channels.
        """
        rows, _ = self._rows(features)
        return (rows - self.centre) / self.spread

    def grid(self, features: Features) -> tuple[int, int] | None:
        """Height and width of maps; None for anything else."""
        return self._rows(features)[1]

    def _rows(self, features: Features) -> tuple[Tensor, tuple[int, int] | None]:
        listed = [features] if isinstance(features, Tensor) else list(features)
        grids = {tuple(one.shape[2:]) if one.ndim == 4 else None for one in listed}
        last = [rearrange(one, "b d h w -> b h w d") if one.ndim == 4 else one for one in listed]
        if len({one.shape[:-1] for one in last}) != 1 or last[0].ndim not in (2, 3, 4):
            raise ShapeError(
                f"activations of shapes {[list(one.shape) for one in listed]}: expected [batch, d], [batch, pos, d] or "
                "[batch, d, height, width], the same for all sites but for d"
            )
        joined = torch.cat([one.to(self.centre.device, self.centre.dtype) for one in last], dim=-1)
        if joined.shape[-1] != self.width:
            raise ShapeError(f"this probe takes {self.width} channels, not {joined.shape[-1]}")
        (grid,) = grids
        return joined, None if grid is None else (int(grid[0]), int(grid[1]))


class LinearProbe(nn.Module):
    """One linear map of the activations, the same at every position.

    Args:
        width: channels of the activations.
        n_out: numbers, or classes, that are read.
        seed: of the initial weights.

    Raises:
        InputError: a number below 1.
    """

    def __init__(self, width: int, n_out: int, *, seed: int = 0) -> None:
        super().__init__()
        _positive(n_out=n_out)
        self.width, self.n_out = width, n_out
        self.standardised = Standardised(width)
        self.linear = drawn_layer(nn.Linear, width, n_out, generator=torch.Generator("cpu").manual_seed(seed))

    def settings(self) -> dict[str, Any]:
        """The arguments that make a probe of the same kind."""
        return {"width": self.width, "n_out": self.n_out}

    def forward(self, features: Features, time_embedding: Tensor | None = None) -> Float[Tensor, "batch ..."]:
        """Read.

        Args:
            features: as for `Standardised.forward`.
            time_embedding: not used.

        Returns:
            ``[batch, n_out]``, ``[batch, pos, n_out]`` or ``[batch, n_out, height, width]``, as the activations are.
        """
        read = self.linear(self.standardised(features))
        maps = self.standardised.grid(features) is not None
        return rearrange(read, "b h w out -> b out h w") if maps else read


class AttentionProbe(nn.Module):
    """Tokens or cells pooled by learned queries, then one linear map.

    Args:
        width: channels of the activations.
        n_out: numbers, or classes, that are read.
        n_heads: queries, each of which pools for itself.
        seed: of the initial weights.

    Raises:
        InputError: a number below 1.

    Source: attention pooling, Set Transformer, section 3.2, with one linear layer for keys.
    """

    def __init__(self, width: int, n_out: int, *, n_heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        _positive(n_out=n_out, n_heads=n_heads)
        self.width, self.n_out, self.n_heads = width, n_out, n_heads
        generator = torch.Generator("cpu").manual_seed(seed)
        self.standardised = Standardised(width)
        self.scores = drawn_layer(nn.Linear, width, n_heads, generator=generator)
        self.linear = drawn_layer(nn.Linear, width * n_heads, n_out, generator=generator)

    def settings(self) -> dict[str, Any]:
        """The arguments that make a probe of the same kind."""
        return {"width": self.width, "n_out": self.n_out, "n_heads": self.n_heads}

    def forward(
        self,
        features: Features,
        time_embedding: Tensor | None = None,
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch n_out"]:
        """Read.

        Args:
            features: tokens or maps, as for `Standardised.forward`.
            time_embedding: not used.
            mask: which tokens count; all, when not given.

        Raises:
            ShapeError: activations without positions, or another mask.
            InputError: a row in which no token counts.
        """
        tokens = self.standardised(features)
        if tokens.ndim == 4:
            tokens = rearrange(tokens, "b h w d -> b (h w) d")
        if tokens.ndim != 3:
            raise ShapeError(f"attention pools positions, and activations of shape {list(tokens.shape)} have none")
        scores = self.scores(tokens)
        if mask is not None:
            if mask.shape != tokens.shape[:2]:
                raise ShapeError(f"the mask is {list(mask.shape)}, the tokens {list(tokens.shape[:2])}")
            if not bool(mask.any(dim=1).all()):
                raise InputError(f"row {int((~mask.any(dim=1)).nonzero()[0])} has no token that counts")
            scores = scores.masked_fill(~mask.to(scores.device)[..., None], -torch.inf)
        pooled = einsum(scores.softmax(dim=1), tokens, "b pos head, b pos d -> b head d")
        return self.linear(rearrange(pooled, "b head d -> b (head d)"))


ProbeLoss = Callable[[Tensor, Tensor], Tensor]
PROBE_LOSSES = ("mse", "cross_entropy")


def fit_probe(
    head: nn.Module,
    features: Features,
    targets: Tensor,
    loss: str | ProbeLoss = "mse",
    *,
    mask: Bool[Tensor, "example pos"] | None = None,
    steps: int = 500,
    batch: int = 32,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    standardise: bool = True,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    title: str = "fitting a probe",
    progress: bool = True,
) -> Training:
    """Fit a head, in place, to activations that were captured before: of a language model, a vision tower, a UNet.

    Args:
        head: a `LinearProbe`, `AttentionProbe`, a `ReadoutHead` without time embedding, or any module that takes the
            activations.
        features: of one site, with examples on the first axis; or of several, in a list.
        targets: one for each example: classes (whole numbers) for ``"cross_entropy"``, else numbers of the shape that
            the head gives; pictures are resized to its maps by the nearest pixel.
        loss: ``"mse"``, ``"cross_entropy"``, or a function of readouts and targets.
        mask: which tokens count, for an `AttentionProbe`.
        steps: of the optimizer.
        batch: examples a step.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        standardise: let probes centre and scale every channel by these activations.
        validate: measures the head; more is better, and the best weights are what remains.
        validate_every, patience: see `interp.hyperfeatures.fitting.fit`.
        seed: of the order of the examples.
        folder: keeps the state of the training; one found there goes on.
        settings: what the activations are, in what JSON can say; compared when a training goes on.
        title: the words before the progress bar.
        progress: show a bar.

    Returns:
        The history of the training.

    Raises:
        InputError: other numbers of targets than examples, activations or targets that are not finite, an unknown loss.
        ShapeError: activations or targets that do not fit the head.
    """
    listed = [features] if isinstance(features, Tensor) else list(features)
    objective = _probe_loss(loss)
    _check(listed, targets, mask)
    if standardise:
        for module in head.modules():
            if isinstance(module, Standardised):
                module.measure(features)

    def loss_of(indices: list[int], step: int) -> tuple[Tensor, dict[str, Any]]:
        chosen = torch.tensor(indices)
        some = [one[chosen.to(one.device)] for one in listed]
        marked = {} if mask is None else {"mask": mask[chosen.to(mask.device)]}
        given = some if isinstance(head, ReadoutHead) or not isinstance(features, Tensor) else some[0]
        read = head(given, **marked)
        return objective(read, targets[chosen.to(targets.device)].to(read.device)), {}

    return fit(
        head,
        loss_of,
        len(targets),
        steps=steps,
        batch=batch,
        lr=lr,
        weight_decay=weight_decay,
        validate=None if validate is None else lambda: validate(head),
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        folder=folder,
        settings={"n_examples": len(targets), "loss": loss if isinstance(loss, str) else "a function"}
        | {"standardise": standardise, **(settings or {})},
        title=title,
        progress=progress,
    )


def _against(read: Tensor, targets: Tensor) -> Tensor:
    pictures = read.ndim == 4 and targets.ndim == 4
    return mse(read, match_size(targets, (read.shape[-2], read.shape[-1])) if pictures else targets)


def _classes(read: Tensor, targets: Tensor) -> Tensor:
    if read.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        raise ShapeError(
            f"cross_entropy takes readouts [example, class] and whole numbers [example], not {list(read.shape)} and "
            f"{targets.dtype} {list(targets.shape)}"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= read.shape[1]:
        raise InputError(f"classes {int(targets.min())} to {int(targets.max())} for a head of {read.shape[1]}")
    return F.cross_entropy(read.float(), targets)


def _probe_loss(loss: str | ProbeLoss) -> ProbeLoss:
    known: dict[str, ProbeLoss] = {"mse": _against, "cross_entropy": _classes}
    if not isinstance(loss, str):
        return loss
    if loss not in known:
        raise InputError(f"no loss {loss!r}: there are {', '.join(known)}. {nearest(loss, known)}".rstrip())
    return known[loss]


def _check(features: Sequence[Tensor], targets: Tensor, mask: Tensor | None) -> None:
    if not features:
        raise InputError("there are no activations")
    counts = [len(one) for one in features] + ([] if mask is None else [len(mask)])
    wrong = [count for count in counts if count != len(targets)]
    if wrong:
        raise InputError(f"{wrong[0]} rows of activations for {len(targets)} targets")
    for what, tensor in (*(("activations", one) for one in features), ("targets", targets)):
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the {what} hold NaN or infinity")


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
