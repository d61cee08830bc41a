"""A small classifier of the creatures' pictures: does a generated picture show what its caption says?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from interp.errors import InputError
from interp.progress import track
from interp.zoo.creatures import BACKGROUNDS, COLOURS, SPECIES, Scene
from interp.zoo.diffusion.training import Log, Optimiser, Stage, epochs

FIELDS: dict[str, tuple[str, ...]] = {
    "species": tuple(SPECIES),
    "body": tuple(COLOURS),
    "head": tuple(COLOURS),
    "legs": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "facing": ("left", "right"),
}
WIDTHS = (24, 48, 64, 96)  # channels; each level halves the picture's side
HIDDEN = 96
CHUNK = 256
NOISE = 0.06  # largest deviation of what is added to a training picture
BLUR = 0.7  # largest share of a training picture that is blurred


class Classifier(nn.Module):
    """Strided convolutions and two linear layers, with one softmax for each thing that a caption says."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        side = 64 // 2 ** len(WIDTHS)
        layers += [nn.Flatten(), nn.Linear(WIDTHS[-1] * side**2, HIDDEN), nn.ReLU()]
        layers += [nn.Linear(HIDDEN, sum(len(options) for options in FIELDS.values()))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "picture 3 height width"]) -> list[Float[Tensor, "picture option"]]:
        """The logits of each field.

        Args:
            images: 64 pixels a side, 0 to 1.

        Returns:
            One tensor for each of ``FIELDS``.
        """
        return list(self.layers(2 * images - 1).split([len(options) for options in FIELDS.values()], dim=1))

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "picture 3 height width"]) -> Int[Tensor, "picture field"]:
        """The likeliest option of each field.

        Args:
            images: 64 pixels a side, 0 to 1.

        Returns:
            Indexes of the options in ``FIELDS``.
        """
        chosen = [[logits.argmax(dim=1) for logits in self(chunk)] for chunk in images.split(CHUNK)]
        return torch.cat([torch.stack(fields, dim=1) for fields in chosen])


def targets(scenes: Sequence[Scene]) -> Int[Tensor, "scene field"]:
    """What scenes show, as indexes of the options in ``FIELDS``."""
    rows = [[options.index(getattr(scene, field)) for field, options in FIELDS.items()] for scene in scenes]
    return torch.tensor(rows).reshape(len(scenes), len(FIELDS))


def agreement(predicted: Int[Tensor, "picture field"], scenes: Sequence[Scene]) -> dict[str, float]:
    """How often pictures show what they should.

    Args:
        predicted: as the classifier gives it.
        scenes: what the pictures should show.

    Returns:
        The share of pictures that agree in each field, and in all of them (``"all"``).
    """
    same = predicted == targets(scenes)
    shares = torch.cat([same, same.all(dim=1, keepdim=True)], dim=1).double().mean(dim=0).tolist()
    return {field: round(share, 4) for field, share in zip((*FIELDS, "all"), shares, strict=True)}


def worsened(
    images: Float[Tensor, "picture 3 height width"], generator: torch.Generator
) -> Float[Tensor, "picture 3 height width"]:
    """Pictures with some blur and noise, as an autoencoder leaves them."""
    shares = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(images.shape, generator=generator)
    return images.lerp(blurred, BLUR * shares[0]) + NOISE * shares[1] * noise


def new_classifier(seed: int) -> Classifier:
    """A classifier with random weights, drawn from a seed; torch's global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier()


def train_classifier(
    classifier: Classifier,
    scenes: Sequence[Scene],
    pictures: UInt8[Tensor, "picture 3 height width"],
    stage: Stage,
    folder: Path,
) -> None:
    """Train a classifier on pictures, some of them blurred or noisy.

    Args:
        classifier: trained in place.
        scenes: what the pictures show.
        pictures: in 8 bits.
        stage: its length and rate.
        folder: gets ``log.jsonl``.
    """
    wanted = targets(scenes)
    optimiser, log = Optimiser(list(classifier.parameters()), stage), Log(folder / "log.jsonl", stage.steps)
    rng, generator = np.random.default_rng(stage.seed), torch.Generator().manual_seed(stage.seed)
    chosen = epochs(len(pictures), stage, rng)
    for step, indexes in enumerate(track(chosen, stage.name, stage.steps), start=1):
        logits = classifier(worsened(pictures[indexes].float() / 255, generator))
        losses = [functional.cross_entropy(field, wanted[indexes, place]) for place, field in enumerate(logits)]
        loss = torch.stack(losses).sum()
        optimiser.step(loss)
        log.add(step, loss.item())


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write ``model.safetensors``, in half precision, and ``config.json``.

    Args:
        classifier: what to save.
        folder: where; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in classifier.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights))
    content = {"class": f"{Classifier.__module__}.{Classifier.__name__}", "fields": FIELDS}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path) -> Classifier:
    """Load a classifier.

    Args:
        folder: where ``save_classifier`` wrote it.

    Returns:
        The classifier, in single precision.

    Raises:
        InputError: there is none, or it tells other things apart.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"the folder {str(folder)!r} has no config.json, so it holds no classifier")
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content["fields"] != {field: list(options) for field, options in FIELDS.items()}:
        raise InputError(f"the classifier in {str(folder)!r} tells other things apart than {', '.join(FIELDS)}")
    classifier = Classifier()
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier.eval()
