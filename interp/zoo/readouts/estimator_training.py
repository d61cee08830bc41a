"""How the estimator learns from renders, and how well it sees."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from interp.progress import track
from interp.zoo.creatures import Rendered, Scene, render
from interp.zoo.diffusion.classifier import worsened
from interp.zoo.diffusion.training import Log, Optimiser, Stage, epochs
from interp.zoo.readouts.estimator import CELLS, PIXELS, Estimator

SPREAD = 0.8  # deviation, in cells, of where the estimator is to look for a keypoint
PICTURES = 10.0  # weight of the squared errors of depth and edges beside the cross-entropy


def train_estimator(estimator: Estimator, scenes: Sequence[Scene], stage: Stage, folder: Path) -> None:
    """Train an estimator on renders, some of them blurred or noisy.

    Args:
        estimator: trained in place.
        scenes: what the pictures show.
        stage: its length and rate.
        folder: gets ``log.jsonl``.
    """
    chunks = range(0, len(scenes), 256)
    drawn = [render(scenes[at : at + 256]) for at in track(chunks, "drawing pictures", len(chunks))]
    images = torch.cat([(part.images * 255).round().to(torch.uint8) for part in drawn])
    points = torch.cat([part.keypoints for part in drawn])
    present = torch.cat([part.present for part in drawn])
    pictures = torch.cat([pictures_of(part).half() for part in drawn])
    optimiser, log = Optimiser(list(estimator.parameters()), stage), Log(folder / "log.jsonl", stage.steps)
    rng, generator = np.random.default_rng(stage.seed), torch.Generator().manual_seed(stage.seed)
    for step, indexes in enumerate(track(epochs(len(images), stage, rng), stage.name, stage.steps), start=1):
        logits, seen = estimator(worsened(images[indexes].float() / 255, generator))
        wanted = _attention(points[indexes])
        flat = rearrange(logits, "picture keypoint y x -> picture keypoint (y x)")
        places = -(wanted * flat.log_softmax(dim=-1)).sum(dim=-1)[present[indexes]].mean()
        loss = places + PICTURES * functional.mse_loss(seen, pictures[indexes].float())
        optimiser.step(loss)
        log.add(step, loss.item())


def pictures_of(rendered: Rendered) -> Float[Tensor, "scene 2 cell_y cell_x"]:
    """Depth and edges of pictures in the estimator's cells."""
    both = torch.stack([rendered.depth, rendered.edges], dim=1)
    return functional.adaptive_avg_pool2d(both, CELLS)


def accuracy(estimator: Estimator, rendered: Rendered, images: Float[Tensor, "scene 3 h w"]) -> dict[str, float]:
    """How well an estimator sees.

    Args:
        estimator: to be measured.
        rendered: what is true.
        images: the same pictures, as they are or as the autoencoder returns them.

    Returns:
        Median keypoint error in pixels, and root mean squared errors of depth and edges (both 0 to 1).
    """
    seen = estimator.estimate(images)
    apart = (seen.keypoints - rendered.keypoints).norm(dim=-1)[rendered.present]
    errors = (torch.stack([seen.depth, seen.edges], dim=1) - pictures_of(rendered)).square().mean(dim=(0, 2, 3)).sqrt()
    found = {"keypoint error (pixels)": float(apart.median()), "depth RMSE": float(errors[0])}
    return {name: round(value, 4) for name, value in (found | {"edge RMSE": float(errors[1])}).items()}


def _attention(points: Float[Tensor, "picture keypoint 2"]) -> Float[Tensor, "picture keypoint cell"]:
    """A Gaussian around each keypoint, which adds up to 1."""
    cells = (points.float() + 0.5) * (CELLS / PIXELS) - 0.5
    side = torch.arange(CELLS, dtype=torch.float32)
    down, across = ((side - cells[..., axis, None]).square() for axis in (0, 1))
    apart = rearrange(down[..., :, None] + across[..., None, :], "picture keypoint y x -> picture keypoint (y x)")
    return (-apart / (2 * SPREAD**2)).softmax(dim=-1)
