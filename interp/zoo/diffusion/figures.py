"""The pictures beside the card: samples, reconstructions, and how the stages learned."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from interp.figures import panels, style
from interp.zoo.creatures import draw_scenes, render
from interp.zoo.diffusion.evaluate import captions, generate, load, reconstruct

SAMPLE_SEED = 15  # of the scenes whose captions are drawn and whose pictures are reconstructed: none was chosen
ROWS, COLUMNS = 4, 6
GUIDANCE = 3.0
STEPS = 50
WIDTH = 7.0  # inches
LETTERS = 26  # of a caption in a line


def _show(ax: Axes, image: Float[Tensor, "3 height width"], words: str) -> None:
    ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("\n".join(textwrap.wrap(words, LETTERS)), fontsize=5.5)


def sheet(images: Sequence[Float[Tensor, "3 height width"]], words: Sequence[str]) -> Figure:
    """Pictures in rows, with words below each.

    Args:
        images: 0 to 1.
        words: as many.

    Returns:
        The figure.
    """
    rows = -(-len(images) // COLUMNS)
    figure, axes = panels(rows, COLUMNS, width=WIDTH, height=1.45 * WIDTH / COLUMNS * rows)
    with style():
        for ax in axes.flat[len(images) :]:
            ax.axis("off")
        for ax, image, caption in zip(axes.flat, images, words, strict=False):
            _show(ax, image, caption)
    return figure


def samples(pipeline: StableDiffusionPipeline) -> Figure:
    """Generated pictures with their captions, as many as there is room for, as they come."""
    texts = captions(draw_scenes(ROWS * COLUMNS, SAMPLE_SEED))
    _, images = generate(pipeline, texts, GUIDANCE, STEPS)
    return sheet(list(images), texts)


def reconstructions(pipeline: StableDiffusionPipeline) -> Figure:
    """Held-out pictures, each above what the autoencoder makes of it."""
    images = render(draw_scenes(2 * COLUMNS, SAMPLE_SEED)).images
    _, again = reconstruct(pipeline.vae, images)
    rows = [part for pair in zip(images.split(COLUMNS), again.split(COLUMNS), strict=True) for part in pair]
    words = [name for _ in range(2) for name in COLUMNS * ["picture"] + COLUMNS * ["reconstruction"]]
    return sheet(list(torch.cat(rows)), words)


def learning(logs: Mapping[str, Path]) -> Figure:
    """The training loss of each stage.

    Args:
        logs: ``log.jsonl`` by the name of the stage.

    Returns:
        The figure: a panel for each stage.
    """
    figure, axes = panels(1, len(logs), width=WIDTH, height=1.6)
    with style():
        for ax, (name, path) in zip(axes.flat, logs.items(), strict=True):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            ax.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
            ax.set(title=name, xlabel="step", yscale="log")
        axes.flat[0].set_ylabel("training loss")
    return figure


def draw_figures(folder: Path, logs: Mapping[str, Path]) -> None:
    """Write the figures of a model into the folder ``figures`` beside it.

    Args:
        folder: of the model.
        logs: ``log.jsonl`` by the name of the stage.
    """
    pipeline = load(folder)
    drawn = {
        "samples": samples(pipeline),
        "reconstructions": reconstructions(pipeline),
        "learning": learning(logs),
    }
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150, metadata={"Software": None})
