"""The card of the heads that ship: what they are, how they were trained, and how well they read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.readouts.head_study import MEAN, PIXELS


def write_card(folder: Path, study: Mapping[str, Any], heads: Mapping[str, Any], estimator: Mapping[str, Any]) -> None:
    """Write ``card.json``, and ``README.md`` from it.

    Args:
        folder: of the heads.
        study: what was trained and measured.
        heads: the errors of each head and of its bounds.
        estimator: how the estimator was trained, and its accuracy.
    """
    content = {"study": dict(study), "heads": dict(heads), "estimator": dict(estimator)}
    (folder / "card.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(json.loads(json.dumps(content))), encoding="utf-8")


def markdown(card: Mapping[str, Any]) -> str:
    """The card as a page.

    Args:
        card: the content of ``card.json``.
    """
    study, estimator = card["study"], card["estimator"]
    largest, smallest = str(max(study["samples"])), str(min(study["samples"]))
    times = [f"{time:g}" for time in study["timesteps"]]
    lines = [
        "# Readout heads of tiny-diffusion",
        "",
        "Small heads that read a property of a creature from the noisy latents of `zoo:tiny-diffusion`, whose weights "
        'stay as they are: `interp.zoo.readouts.head("pose", sd)`. Trained by '
        f"`python -m interp.zoo.readouts.train` on {largest} renders (seed {study['train_seed']}), in steps of "
        f"{study['batch']} at random timesteps, seed {study['seed']}: {_steps(card['heads'])}.",
        "",
        f"Errors on {study['held_out']} held-out renders (seed {study['test_seed']}) by timestep; less is better. "
        f"{MEAN}: for triplets, chance; for correspondence, the mean place. {PIXELS}: a head of the same shape whose "
        "every layer is given the picture itself, without noise.",
        "",
        f"| head | measured | {MEAN} | {' | '.join(f't = {time}' for time in times)} | {PIXELS} |",
        "| --- " * (len(times) + 4) + "|",
    ]  # fmt: skip
    for name, head in card["heads"].items():
        read = head["by samples and timestep"][largest]
        cells = [f"{head[MEAN]:.4f}", *(f"{read[time]:.4f}" for time in times), f"{head[PIXELS]:.4f}"]
        lines.append(f"| {name} | {head['error']} | {' | '.join(cells)} |")
    lines += ["", f"The same heads trained on {smallest} renders:", ""]
    lines += [f"| head | {' | '.join(f't = {time}' for time in times)} |", "| --- " * (len(times) + 1) + "|"]
    for name, head in card["heads"].items():
        if smallest not in head["by samples and timestep"]:
            continue
        read = head["by samples and timestep"][smallest]
        lines.append(f"| {name} | {' | '.join(f'{read[time]:.4f}' for time in times)} |")
    accuracy = estimator["accuracy"]
    measures = list(next(iter(accuracy.values())))
    lines += [
        "",
        "## The estimator",
        "",
        "`interp.zoo.readouts.estimator()` sees keypoints, depth and edges in clean pictures. It judges guided "
        f"samples: it learned from {estimator['renders']:,} other renders (seed {estimator['seed']}), some blurred or "
        f"noisy, and never saw the diffusion model. On {estimator['held_out']} held-out ones (seed "
        f"{estimator['held_out_seed']}):",
        "",
        f"|  | {' | '.join(measures)} |",
        "| --- " * (len(measures) + 1) + "|",
        *(f"| {where} | {' | '.join(str(seen[m]) for m in measures)} |" for where, seen in accuracy.items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _steps(heads: Mapping[str, Any]) -> str:
    """How many steps which heads were trained for."""
    by_steps: dict[int, list[str]] = {}
    for name, head in heads.items():
        by_steps.setdefault(head["steps"], []).append(name)
    return "; ".join(f"{steps:,} steps for {', '.join(names)}" for steps, names in by_steps.items())
