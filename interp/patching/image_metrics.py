"""Metrics of generated images: whose layout, colour or species do they show?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.patching.metric import name_of

Pixels = Float[Tensor, "batch 3 height width"]
ImageMetric = Callable[[Tensor], Tensor]

# Colours of the tiny world differ by twice this from the background that they are drawn on.
_FOREGROUND = 0.19


@dataclass(frozen=True, eq=False)
class Compared:
    """A metric that compares images with those of the two unpatched runs.

    Args:
        name: what it measures.
        function: (images, clean images, corrupt images) -> one number for each example.
    """

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]


def layout_agreement() -> Compared:
    """Whose layout an image has: how far its foreground overlaps the clean run's less how far the corrupt run's.

    The foreground is what differs from the colour of the image's border, so that recolouring leaves it alone.
    Overlaps are intersection over union: 1 less than 1 for the clean image, and the reverse for the corrupt one. An
    image like neither run lies about half way between the two: what must be told apart from that needs a one-sided
    metric, such as the overlap with one of them.
    """

    def difference(images: Pixels, clean: Pixels, corrupt: Pixels) -> Float[Tensor, " batch"]:
        mine, first, second = (foreground(one) for one in (images, clean, corrupt))
        return _iou(mine, first) - _iou(mine, second)

    return Compared("layout agreement", difference)


def foreground(images: Pixels) -> Bool[Tensor, "batch height width"]:
    """The pixels that differ from the median colour of the image's border.

    Args:
        images: in 0..1, on a plain background.
    """
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=-1)
    behind = border.median(dim=-1).values[:, :, None, None]
    return (images - behind).norm(dim=1) > _FOREGROUND


@dataclass(frozen=True, eq=False)
class OptionDifference:
    """The logit of one option less that of another by a classifier of images: images ``[batch, ...]`` to ``[batch]``.

    Args:
        name: what it measures.
        classifier: images -> one tensor of logits [batch, option] for each field.
        field: which of these.
        clean: for each example the option of its clean run, or one for all.
        corrupt: the same of the corrupt run.
    """

    name: str
    classifier: Callable[[Tensor], Sequence[Tensor]]
    field: int
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, images: Pixels) -> Float[Tensor, " batch"]:
        """The difference of every example."""
        logits = self.classifier(images)[self.field].float()
        for options in (self.clean, self.corrupt):
            if len(options) not in (1, len(images)):
                raise ShapeError(f"{self.name}: {len(options)} options for {len(images)} images")
        row = torch.arange(len(logits))
        first, second = (torch.tensor(options).expand(len(row)) for options in (self.clean, self.corrupt))
        return logits[row, first] - logits[row, second]


def option_difference(
    classifier: Callable[[Tensor], Sequence[Tensor]],
    fields: Mapping[str, Sequence[str]],
    field: str,
    clean: str | Sequence[str],
    corrupt: str | Sequence[str],
) -> OptionDifference:
    """Whose colour, species or direction an image shows, by a classifier such as the tiny world's.

    Args:
        classifier: such as ``interp.zoo.diffusion.classifier.load_classifier(folder)``.
        fields: what it tells apart, in the order of its outputs: ``interp.zoo.diffusion.classifier.FIELDS``.
        field: such as ``"body"``.
        clean: the option that the clean run shows, such as ``"red"``; one for all examples, or one for each.
        corrupt: the same of the corrupt run.

    Raises:
        InputError: no such field or option, or an example with the same option in both.
    """
    if field not in fields:
        raise InputError(f"the classifier has no field {field!r}: it tells {', '.join(fields)} apart")
    sides = []
    for given in (clean, corrupt):
        listed = (given,) if isinstance(given, str) else tuple(given)
        unknown = [one for one in listed if one not in fields[field]]
        if unknown or not listed:
            raise InputError(f"{field}: no option {unknown or listed}: it is one of {', '.join(fields[field])}")
        sides.append(tuple(fields[field].index(one) for one in listed))
    n = max(map(len, sides))
    if any(a == b for a, b in zip(*(side * (n // len(side)) for side in sides), strict=True)):
        raise InputError(f"{field}: an example has the same option in the clean and in the corrupt run")
    return OptionDifference(f"logit difference of {field}", classifier, list(fields).index(field), *sides)


def title(metric: ImageMetric | Compared) -> str:
    """What a metric of images is called."""
    return metric.name if isinstance(metric, Compared) else name_of(metric)


def measured(metric: ImageMetric | Compared, clean: Pixels, corrupt: Pixels) -> ImageMetric:
    """A metric that refuses what is no number for each image.

    Args:
        metric: of images, or one that compares them with those of the two unpatched runs.
        clean, corrupt: the images of those runs.

    Returns:
        Images -> [batch], in float32 on the CPU.
    """
    name = title(metric)

    def measure(images: Pixels) -> Float[Tensor, " batch"]:
        images = images.float().cpu()
        values = metric.function(images, clean, corrupt) if isinstance(metric, Compared) else metric(images)
        if not isinstance(values, Tensor) or values.shape != images.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ShapeError(f"metric {name!r} returned {got} for {len(images)} images: one number for each")
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"metric {name!r} returned NaN or infinity for an image")
        return values.float().cpu()

    return measure


def _iou(a: Bool[Tensor, "batch height width"], b: Bool[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
    # Two empty foregrounds are the same layout.
    union = (a | b).sum(dim=(1, 2))
    return torch.where(union > 0, (a & b).sum(dim=(1, 2)) / union.clamp(min=1), 1.0)
