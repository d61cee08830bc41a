"""How alike two pictures of creatures look, and whether one copied the other's pose, by judges that no head saw."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from interp.guidance.creature_trials import COMMON
from interp.zoo import path
from interp.zoo.creatures import KEYPOINTS, Scene
from interp.zoo.diffusion.classifier import FIELDS, load_classifier, targets
from interp.zoo.readouts.estimator import Estimator

BINS = 4
WORN = ("body", "head", "legs")
FOREGROUND = 0.1  # depth above which a pixel is the creature's; parts have 0.2 and more


def likeness(
    images: Float[Tensor, "trial 3 height width"],
    references: Float[Tensor, "trial 3 height width"],
    scenes: Sequence[Scene],
    estimator: Estimator,
) -> dict[str, list[float]]:
    """How alike each picture is to its reference.

    Args:
        images, references: 0 to 1.
        scenes: what the references' prompts describe.
        estimator: sees the poses.

    Returns:
        For each trial ``"colour histogram"`` (overlap of 64 bins, 1 for equal histograms), ``"creature's colours"``
        (the same of the pixels where the estimator sees a creature), ``"embedding"`` (cosine of the last hidden layer
        of a classifier trained on renders), ``"creature"`` (share of species and colours of body, head and legs in
        which the classifier sees what the reference's caption says) and ``"pose apart"`` (median distance in pixels of
        the keypoints that all species have).
    """
    classifier = load_classifier(path("tiny-diffusion") / "classifier")
    with torch.no_grad():
        hidden, other = (classifier.layers[:-1](2 * some - 1) for some in (images, references))
    columns = [list(FIELDS).index(field) for field in ("species", *WORN)]
    same = (classifier.predict(images) == targets(scenes))[:, columns]
    seen = [estimator.estimate(some) for some in (images, references)]
    points, others = (one.keypoints[:, [KEYPOINTS.index(name) for name in COMMON]] for one in seen)
    masks = [F.interpolate(one.depth[:, None], size=images.shape[-1])[:, 0] > FOREGROUND for one in seen]
    worn = [histogram(some, mask) for some, mask in zip((images, references), masks, strict=True)]
    return {
        "colour histogram": torch.minimum(histogram(images), histogram(references)).sum(dim=1).tolist(),
        "creature's colours": torch.minimum(*worn).sum(dim=1).tolist(),
        "embedding": torch.cosine_similarity(hidden, other, dim=1).tolist(),
        "creature": same.float().mean(dim=1).tolist(),
        "pose apart": (points - others).norm(dim=-1).median(dim=1).values.tolist(),
    }


def histogram(
    images: Float[Tensor, "trial 3 height width"], mask: Bool[Tensor, "trial height width"] | None = None
) -> Float[Tensor, "trial bin"]:
    """The share of pixels in each of 64 bins of red, green and blue.

    Args:
        images: 0 to 1.
        mask: which pixels count; all without it. Where none does, all shares are 0.
    """
    levels = (images.clamp(0, 1) * BINS).long().clamp(max=BINS - 1)
    bins = (levels * torch.tensor([BINS**2, BINS, 1])[:, None, None]).sum(dim=1)
    counted = F.one_hot(bins, BINS**3) if mask is None else F.one_hot(bins, BINS**3) * mask[..., None]
    totals = counted.flatten(1, 2).sum(dim=1).float()
    return totals / totals.sum(dim=1, keepdim=True).clamp(min=1)
