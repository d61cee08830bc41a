"""A small network that sees pose, depth and edges in clean pictures: the judge of guided samples.

It learned from renders alone and never saw an activation of the diffusion model, so that what it says of a sample is
independent of the heads that guided it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from interp.errors import InputError
from interp.zoo.creatures import KEYPOINTS

WIDTHS = (32, 64, 96)  # channels at 32, 16 and 8 cells a side
CELLS = 32
PIXELS = 64
WINDOW = 2  # cells on each side of the highest one that the place of a keypoint is averaged over
CHUNK = 128


class Estimate(NamedTuple):
    """What the estimator sees in pictures.

    Attributes:
        keypoints: (y, x) in pixels, (0, 0) being the centre of the top left one, in the order of ``KEYPOINTS``;
            meaningless for those that the creature does not have.
        depth: 0 for the background to 1 for what is nearest.
        edges: 0 to 1.
    """

    keypoints: Float[Tensor, "picture keypoint 2"]
    depth: Float[Tensor, "picture cell_y cell_x"]
    edges: Float[Tensor, "picture cell_y cell_x"]


class _Block(nn.Sequential):
    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.ReLU())


class Estimator(nn.Module):
    """Strided convolutions down to 8 cells a side, and up again to 32 with the finer maps joined in."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.stem = nn.Sequential(_Block(3, first, 2), _Block(first, first))
        self.middle = nn.Sequential(_Block(first, second, 2), _Block(second, second))
        self.coarse = nn.Sequential(_Block(second, third, 2), _Block(third, third), _Block(third, third))
        self.up_half = _Block(third + second, second)
        self.up_stem = _Block(second + first, second)
        self.out = nn.Conv2d(second, len(KEYPOINTS) + 2, 1)

    def forward(
        self, images: Float[Tensor, "picture 3 height width"]
    ) -> tuple[Float[Tensor, "picture keypoint cell_y cell_x"], Float[Tensor, "picture 2 cell_y cell_x"]]:
        """Logits of where each keypoint is, and depth with edges.

        Args:
            images: 64 pixels a side, 0 to 1.
        """
        fine = self.stem(2 * images - 1)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.up_half(torch.cat([functional.interpolate(coarse, scale_factor=2.0), middle], dim=1))
        fine = self.up_stem(torch.cat([functional.interpolate(middle, scale_factor=2.0), fine], dim=1))
        logits, pictures = self.out(fine).split([len(KEYPOINTS), 2], dim=1)
        return logits, pictures

    @torch.no_grad()
    def estimate(self, images: Float[Tensor, "picture 3 height width"]) -> Estimate:
        """Keypoints, depth and edges of pictures.

        Args:
            images: 64 pixels a side, 0 to 1.

        Raises:
            InputError: pictures of another size.
        """
        if tuple(images.shape[1:]) != (3, PIXELS, PIXELS):
            raise InputError(f"pictures of {list(images.shape[1:])}: expected [3, {PIXELS}, {PIXELS}]")
        found = [self(chunk) for chunk in images.split(CHUNK)]
        pictures = torch.cat([pair[1] for pair in found]).clamp(0, 1)
        return Estimate(_places(torch.cat([pair[0] for pair in found])), pictures[:, 0], pictures[:, 1])


def _places(logits: Float[Tensor, "picture keypoint cell_y cell_x"]) -> Float[Tensor, "picture keypoint 2"]:
    """The mean place, in pixels, of the probability around its highest cell."""
    side = logits.shape[-1]
    flat = rearrange(logits, "picture keypoint y x -> picture keypoint (y x)")
    peak = flat.argmax(dim=-1)
    cells = torch.arange(side * side)
    y, x = torch.div(cells, side, rounding_mode="floor"), cells % side
    peak_y, peak_x = torch.div(peak, side, rounding_mode="floor"), peak % side
    near = ((y - peak_y[..., None]).abs() <= WINDOW) & ((x - peak_x[..., None]).abs() <= WINDOW)
    share = flat.masked_fill(~near, -torch.inf).softmax(dim=-1)
    place = torch.stack([(share * y).sum(dim=-1), (share * x).sum(dim=-1)], dim=-1)
    return (place + 0.5) * (PIXELS / side) - 0.5


def new_estimator(seed: int) -> Estimator:
    """An estimator with random weights, drawn from a seed; torch's global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Estimator()


def save_estimator(estimator: Estimator, folder: Path) -> None:
    """Write ``model.safetensors``, in half precision, and ``config.json``.

    Args:
        estimator: what to save.
        folder: where; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in estimator.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights))
    content = {"class": f"{Estimator.__module__}.{Estimator.__name__}", "keypoints": list(KEYPOINTS)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_estimator(folder: Path) -> Estimator:
    """Load an estimator.

    Args:
        folder: where `save_estimator` wrote it.

    Returns:
        The estimator, in single precision.

    Raises:
        InputError: there is none, or it sees other keypoints.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"the folder {str(folder)!r} has no config.json, so it holds no estimator")
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content["keypoints"] != list(KEYPOINTS):
        raise InputError(f"the estimator in {str(folder)!r} sees other keypoints than {', '.join(KEYPOINTS)}")
    estimator = Estimator()
    estimator.load_state_dict(load_file(folder / "model.safetensors"))
    return estimator.eval()
