"""The card of the small diffusion model: what it is made of, how, and how well it does."""

import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny
from jaxtyping import UInt8
from torch import Tensor, nn

from interp.zoo.creatures import BACKGROUNDS, COLOURS, KEYPOINTS, SPECIES, STYLES, VOCABULARY, draw_scenes, render
from interp.zoo.diffusion.classifier import FIELDS, load_classifier
from interp.zoo.diffusion.evaluate import (
    BINS,
    CAPTION_SEED,
    CHECK,
    FIRST_IMAGE_SEED,
    FULL,
    HELD_OUT_SEED,
    NOISE_SEED,
    load,
    measure,
    psnr,
    reconstruct,
)
from interp.zoo.diffusion.figures import COLUMNS, GUIDANCE, ROWS, SAMPLE_SEED

ABOUT = (
    "A small text-to-image diffusion model in the layout of Stable Diffusion: an autoencoder, a CLIP text encoder, a "
    "UNet with four levels and twelve resnets in its up blocks, DDIM. It draws the articulated creatures of "
    "`interp.zoo.creatures`, whose pictures come with keypoints, parts, depth and edges of every pixel."
)
SEEDS = {
    "held-out pictures": HELD_OUT_SEED,
    "captions": CAPTION_SEED,
    "timesteps and noise": NOISE_SEED,
    "first generated picture": FIRST_IMAGE_SEED,
    "sample sheet": SAMPLE_SEED,
}
STEERED = 0.2  # of the way from chance to always: below, a word is said not to steer what is drawn
METRICS = {
    "denoising_loss": "mean squared error of the predicted noise (predicting none: 1) at random timesteps of each bin. "
    "linear: the best predictor that is linear in the noisy latents, for the mean and covariance of the training "
    "latents",
    "generated": "share of generated pictures in which the classifier sees what the caption says; all: everything at "
    "once. Captions from scenes that were never trained on, DDIM",
    "nearest_training_picture": "root mean squared difference from the nearest of the training pictures, pixels 0 to 1 "
    "and latents of unit variance. held-out: reconstructions of unseen pictures; training pictures themselves: "
    "their reconstructions, which is where a model that merely repeats them would be",
    "psnr": "dB, mean over held-out pictures",
}


def _count(part: nn.Module) -> int:
    return sum(weight.numel() for weight in part.parameters())


def write_card(
    folder: Path, recipe: dict[str, Any], training: UInt8[Tensor, "picture 3 height width"], first: AutoencoderTiny
) -> dict[str, Any]:
    """Measure the model and write ``card.json`` and ``README.md`` into its folder.

    Args:
        folder: of the model; its name is the model's.
        recipe: the settings, and the stages' records by their names.
        training: the pictures that the denoiser learned from.
        first: the autoencoder before its decoder learned alone.

    Returns:
        The card.
    """
    pipeline, classifier = load(folder), load_classifier(folder / "classifier")
    images = render(draw_scenes(FULL.held_out, HELD_OUT_SEED)).images
    before = float(psnr(reconstruct(first, images)[1], images).mean())
    parts = {
        "UNet": _count(pipeline.unet),
        "text encoder": _count(pipeline.text_encoder),
        "autoencoder": _count(pipeline.vae),
    }
    card = {
        "name": folder.name,
        "about": ABOUT,
        "class": type(pipeline).__name__,
        "parameters": {"total": sum(parts.values()), **parts},
        "classifier_parameters": _count(classifier),
        "licence": {"code and weights": "Apache-2.0", "pictures": "drawn by this package, Apache-2.0"},
        "data": {
            "species": list(SPECIES),
            "colours": list(COLOURS),
            "backgrounds": list(BACKGROUNDS),
            "keypoints": list(KEYPOINTS),
            "captions": list(STYLES),
            "vocabulary": len(VOCABULARY),
        },
        "recipe": recipe,
        "made_with": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "metrics": METRICS,
        "seeds": SEEDS,
        "figures": {
            **measure(pipeline, classifier, FULL, training),
            "psnr_before_the_decoder_learned_alone": round(before, 2),
            "check": measure(pipeline, classifier, CHECK),
        },
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(card), encoding="utf-8")
    return card


def limits(card: dict[str, Any]) -> list[str]:
    """What the model cannot do, a sentence each.

    Args:
        card: the content of ``card.json``.

    Returns:
        The sentences; what captions do not steer is taken from the figures.
    """
    known = [
        "It knows nothing but one creature on a plain background, 64×64 pixels, in the words above. Other text is "
        "spelled in bytes and means nothing to it.",
        "An area of 4×4 pixels is one place in the latents: the smallest things get lost, such as eyes, claws and "
        "thin outlines; white parts may fade.",
        "Text encoder, UNet and autoencoder were trained on this world alone: that features of this model match "
        "keypoints says what the method finds here, not how well large models do.",
    ]
    measured = card["figures"]["generated"].values()
    for field, options in FIELDS.items():
        chance = 1 / len(options)
        if max(row[field] for row in measured) < chance + STEERED * (1 - chance):
            known.append(
                f"Captions do not steer {field}: pictures agree with the word about as often as by chance, at every "
                "guidance scale measured. The noise that a picture starts from decides."
            )
    return known


def markdown(card: dict[str, Any]) -> str:
    """The card as a page for people.

    Args:
        card: the content of ``card.json``.

    Returns:
        The page in Markdown.
    """
    lines = [
        *_about(card),
        *_what_it_is(card),
        *_training(card["recipe"]),
        *_measured(card),
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits(card)),
        "",
        "## Licences",
        "",
        *(f"- {what}: {licence}" for what, licence in card["licence"].items()),
    ]
    return "\n".join(lines) + "\n"


def _about(card: dict[str, Any]) -> list[str]:
    measured = card["figures"]["measured_on"]
    return [
        f"# {card['name']}",
        "",
        card["about"],
        "",
        f'`interp.Diffusion.from_pretrained("zoo:{card["name"]}")`, or diffusers\' `DiffusionPipeline.from_pretrained` '
        "on this folder. The files hold half precision; where no dtype is asked for, they load in single precision.",
        "",
        f"![Samples, guidance {GUIDANCE:g}](figures/samples.png)",
        "",
        f"The captions of {ROWS * COLUMNS} scenes drawn from seed {SAMPLE_SEED}, and what the model makes of them at "
        f"guidance {GUIDANCE:g} in {measured['steps']} steps. None was chosen.",
        "",
    ]


def _what_it_is(card: dict[str, Any]) -> list[str]:
    data = card["data"]
    return [
        "## What it is",
        "",
        *(f"- {part}: {size:,} parameters" for part, size in card["parameters"].items()),
        f"- 64×64 pixels, latents of 4×16×16. World: {len(data['species'])} species ({', '.join(data['species'])}), "
        f"{len(data['colours'])} colours of body, head and legs ({', '.join(data['colours'])}), "
        f"{len(data['backgrounds'])} backgrounds ({', '.join(data['backgrounds'])}), facing left or right.",
        f"- Captions of three forms, all in {data['vocabulary']} words, each of them one token: "
        + "; ".join(f"“{form}”" for form in data["captions"])
        + ".",
        "",
    ]


def _training(recipe: dict[str, Any]) -> list[str]:
    return [
        "## How it was trained",
        "",
        f"`python -m interp.zoo.diffusion.train`, from nothing: the autoencoder on {recipe['pictures']:,} rendered "
        f"pictures (seed {recipe['data_seed']}), denoiser and text encoder together on the first "
        f"{recipe['captioned']:,} of them, then the decoder alone on the same, so that latents kept their meaning. "
        f"The classifier that measures the model learned from {recipe['classified']:,} other pictures (seed "
        f"{recipe['classified_seed']}).",
        "",
        *_stages([recipe[name] for name in ("autoencoder", "denoiser", "decoder", "classifier")]),
        "",
        "![Training losses](figures/learning.png)",
        "",
    ]


def _stages(stages: list[dict[str, Any]]) -> list[str]:
    return _table(
        ["stage", "steps", "batch", "peak learning rate", "seed", "minutes", "threads", "final training loss"],
        [
            [
                stage["name"],
                str(stage["steps"]),
                str(stage["batch"]),
                f"{stage['rate']:g}",
                str(stage["seed"]),
                f"{stage['seconds'] / 60:.1f}",
                str(stage["threads"]),
                f"{stage['final_loss']:.3g}",
            ]
            for stage in stages
        ],
    )


def _measured(card: dict[str, Any]) -> list[str]:
    figures, metrics = card["figures"], card["metrics"]
    measured = figures["measured_on"]
    return [
        "## How well it does",
        "",
        f"Every scene below is drawn from seeds that no training used. {measured['captions']} captions for each "
        f"guidance scale, {measured['steps']} steps; {measured['held_out']} held-out pictures. Seeds: "
        + ", ".join(f"{name} {seed}" for name, seed in card["seeds"].items())
        + ".",
        "",
        f"**Captions**: {metrics['generated']}. The last two rows say how good the classifier is itself.",
        "",
        *_captions(figures),
        "",
        f"**Denoising loss**: {metrics['denoising_loss']}.",
        "",
        *_losses(figures["denoising_loss"]),
        "",
        f"**Novelty**: {metrics['nearest_training_picture']}.",
        "",
        *_novelty(figures["nearest_training_picture"]),
        "",
        f"**Reconstruction**: PSNR {figures['psnr']:.1f} dB on held-out pictures; "
        f"{figures['psnr_before_the_decoder_learned_alone']:.1f} dB before the decoder learned alone.",
        "",
        "![Held-out pictures and their reconstructions](figures/reconstructions.png)",
        "",
    ]


def _captions(figures: dict[str, Any]) -> list[str]:
    fields = [*FIELDS, "all"]
    shown = {**figures["generated"], **{f"classifier on {name}": row for name, row in figures["classifier"].items()}}
    chance = [1 / len(options) for options in FIELDS.values()]
    return _table(
        ["", *fields],
        [
            *([name, *(f"{row[field]:.3f}" for field in fields)] for name, row in shown.items()),
            ["one option in so many", *(f"{share:.3f}" for share in chance), ""],
        ],
    )


def _losses(by_predictor: dict[str, list[float]]) -> list[str]:
    width = 1000 // BINS
    return _table(
        ["timesteps", *(f"{low}–{low + width - 1}" for low in range(0, 1000, width))],
        [[name, *(f"{loss:.4f}" for loss in losses)] for name, losses in by_predictor.items()],
    )


def _novelty(by_space: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    return _table(
        ["", "", "smallest", "5th percentile", "median"],
        [
            [space, name, *(f"{value:.4f}" for value in row.values())]
            for space, rows in by_space.items()
            for name, row in rows.items()
        ],
    )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
