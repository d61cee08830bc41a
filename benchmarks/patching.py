"""Captures, sweeps of patches and attribution patching: this library beside its peers, on the same models and inputs.

Random models, with weights and norm gains drawn large: text of GPT-2-small's shape, and LLaVAs with 64 and 576 image
tokens, of several depths. ``--scale 1`` is meant for two cores; 4 and more for a GPU. Rounds take turns in a random
order; figures are medians and quartiles of the ratios within a round, to the bare forward and to this library. Every
tool's results are compared with those of plain torch hooks in a loop; a job that a tool cannot do, or does wrongly, is
a row that says so. This library runs every patch of a sweep. Tools that run a forward for each patch are timed and
compared on some of them, spread evenly, and their time is multiplied up; the row says on how many.

    make bench
    python benchmarks/patching.py --models 2 --jobs "layers at the last token"

Peers have to be there, as `make bench` installs them: ``pip install -e .[bench]``, and then ``pip install --no-deps
pyvene==0.1.8``, whose further dependencies are for notebooks and plots.
"""

import argparse
import ctypes
import gc
import json
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import patching_peers as peers
import patching_tools as tools
import torch
import transformers
from hyperfeatures import peak
from patching_tools import ATTRIBUTION, GRID, HEADS, LAST, PATTERNS, STREAMS, Case, Job
from torch import Tensor, nn

from interp import tables
from interp.progress import track

VOCAB = 8000
IMAGE = VOCAB - 1
# Differences from plain hooks beyond this share of the largest entry are no rounding: other kernels differ by 1e-5.
LARGEST = 1e-3
JOBS = (STREAMS, PATTERNS, LAST, GRID, HEADS, ATTRIBUTION)
OURS, REFERENCE, COST = "interp", "plain hooks in a loop", "two forwards and a backward"
TOOLS: dict[str, Callable[[Case], dict[str, Job]]] = {
    REFERENCE: tools.plain_hooks,
    "plain hooks, patches in rows": tools.batched_hooks,
    OURS: tools.this_library,
    "nnsight": peers.nnsight,
    "TransformerLens": peers.transformer_lens,
    "pyvene": peers.pyvene,
    COST: tools.two_forwards_and_a_backward,
}
COLUMNS = (
    "job",
    "tool",
    "time / bare forward",
    "time / interp",
    "peak memory / bare forward",
    "peak memory / interp",
    "largest difference",
    "note",
)


def redrawn(model: nn.Module) -> nn.Module:
    """All weights drawn anew: matrices with gain 2, norm gains in 0.5 to 2."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.data = normal * (1.0 if "embed" in name else 2 / parameter[0].numel() ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.data = 0.5 + 1.5 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data = 0.3 * normal
    return model.eval().requires_grad_(False)


def decoder(layers: int, d_model: int, heads: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=VOCAB,
    )


def llava(layers: int, d_model: int, n_image: int) -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=8 * round(n_image**0.5),
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=decoder(layers, d_model, 8), image_token_index=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config)


def tokens(length: int, seed: int) -> dict[str, Tensor]:
    """A row of random tokens."""
    ids = torch.randint(3, IMAGE, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictured(n_image: int, n_text: int, seed: int) -> dict[str, Tensor]:
    """A row of an image between random tokens."""
    inputs = tokens(n_image + n_text, seed)
    inputs["input_ids"][:, 4 : 4 + n_image] = IMAGE
    side = 8 * round(n_image**0.5)
    inputs["pixel_values"] = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return inputs


def cases(scale: float, device: torch.device) -> dict[str, Callable[[], Case]]:
    """The models, what is done with each, and on how many positions and patches."""
    width = int(256 * scale) // 64 * 64

    def case(model: nn.Module, inputs: tuple[dict, dict], n_positions: int, n_timed: int, jobs: tuple = JOBS) -> Case:
        here = redrawn(model).to(device)
        first, second = ({name: x.to(device) for name, x in one.items()} for one in inputs)
        d_model, length = here.config.get_text_config().hidden_size, first["input_ids"].shape[1]
        value = torch.randn(d_model, generator=torch.Generator().manual_seed(0)).to(device)
        positions = np.linspace(0, length - 1, n_positions).round().astype(int).tolist()
        return Case(here, first, second, value, tuple(positions), n_timed, jobs)

    def text() -> Case:
        model = transformers.LlamaForCausalLM(decoder(12, 3 * width, 12))
        return case(model, (tokens(64, 0), tokens(64, 1)), n_positions=32, n_timed=8)

    def small() -> Case:
        pair = (pictured(64, 16, 0), pictured(64, 16, 1))
        return case(llava(12, 2 * width, 64), pair, n_positions=40, n_timed=8)

    def large(layers: int, jobs: tuple = JOBS) -> Case:
        pair = (pictured(576, 24, 0), pictured(576, 24, 1))
        return case(llava(layers, width, 576), pair, n_positions=8, n_timed=4, jobs=jobs)

    return {
        f"text, 12 layers x {3 * width}, 64 tokens, grid of 32 positions": text,
        f"LLaVA, 12 layers x {2 * width}, 64 + 16 tokens, grid of 40 positions": small,
        f"LLaVA, 24 layers x {width}, 576 + 24 tokens, grid of 8 positions": lambda: large(24),
        f"LLaVA, 12 layers x {width}, 576 + 24 tokens": lambda: large(12, (LAST,)),
        f"LLaVA, 48 layers x {width}, 576 + 24 tokens": lambda: large(48, (LAST,)),
    }


def failure(error: Exception) -> str:
    return f"fails: {type(error).__name__}: {str(error)[:110]}"


def offered(case: Case, verbose: bool) -> tuple[dict[str, dict[str, Job]], dict[str, str]]:
    """The jobs of every tool, and why a tool cannot be used at all."""
    jobs: dict[str, dict[str, Job]] = {}
    refused: dict[str, str] = {}
    for name, make in TOOLS.items():
        try:
            jobs[name] = make(case)
        except Exception as error:  # a peer that cannot do the job is a result, stated in its row
            refused[name] = failure(error)
            if verbose:
                traceback.print_exc()
    return jobs, refused


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(
    runs: dict[str, Callable[[], Any]], rounds: int, budget: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each round: at least so many rounds, and more while they fit the budget of seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    began = time.perf_counter()
    done = 0
    while done < rounds or (done < 25 and time.perf_counter() - began < budget):
        for name in order.permutation(list(runs)):
            times[name].append(seconds(runs[name], device))
        done += 1
    return times


def memory(run: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call needs at most, over what is held before it."""
    gc.collect()
    if device.type == "cpu":
        # Freed memory that the allocator keeps would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
    return max(peak(run, device), 0.1)


def ratio(times: list[float], base: list[float], factor: float = 1.0) -> tuple[float, float, float]:
    """Median and quartiles of the ratios within rounds."""
    low, middle, high = np.percentile(factor * np.array(times) / np.array(base), [25, 50, 75])
    return float(middle), float(low), float(high)


def largest_difference(case: Case, name: str, found: list[Tensor], reference: list[Tensor]) -> float:
    if name in case.sweeps and len(found) != len(reference):
        found = [found[index] for index in case.timed(name)]
    pairs = list(zip(found, reference, strict=True))
    return max(float((a.reshape(b.shape) - b).abs().max()) for a, b in pairs)


def measured(
    case: Case, name: str, offers: tuple[dict[str, dict[str, Job]], dict[str, str]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per tool: time and memory against the bare forward and this library, and the largest difference."""
    device = case.vlm.device
    jobs = {tool: found[name] for tool, found in offers[0].items() if name in found}
    notes = offers[1] | {tool: job.note for tool, job in jobs.items()}
    unedited = tools.last_logits(case)
    reference = jobs[REFERENCE].run()
    scale = max(float(one.abs().max()) for one in reference)
    differences: dict[str, float | None] = {}
    if name in case.sweeps:
        moved = max(float((logits - unedited).abs().max()) for logits in reference)
        notes[REFERENCE] = "; ".join([*filter(None, [notes[REFERENCE]]), f"patches move logits by up to {moved:.1f}"])
    peaks: dict[str, float] = {}
    for tool, job in jobs.items():
        found: list[Tensor] = []

        def keeping(job: Job = job, found: list[Tensor] = found) -> None:
            found += job.run()

        try:
            peaks[tool] = memory(keeping, device)
            differences[tool] = None if tool == COST else largest_difference(case, name, found, reference)
        except Exception as error:  # as above
            notes[tool] = failure(error)
            if options.verbose:
                traceback.print_exc()
            continue
        if (differences[tool] or 0.0) > LARGEST * scale:
            notes[tool] = "; ".join(["WRONG", *filter(None, [notes[tool]])])

    def bare() -> Tensor:
        return tools.last_logits(case)

    working = {tool: jobs[tool] for tool in differences}
    # What a capture adds is of the order of what a forward's time varies by.
    rounds = 8 * options.rounds if name == STREAMS else options.rounds
    times = timed({"bare": bare} | {tool: job.run for tool, job in working.items()}, rounds, options.seconds, device)
    base = memory(bare, device)
    rows = []
    for tool in TOOLS:
        row: dict[str, Any] = {"job": name, "tool": tool, "note": notes.get(tool, "")}
        if tool in working:
            factor = working[tool].times
            row |= {
                "rounds": len(times["bare"]),
                "time / bare forward": ratio(times[tool], times["bare"], factor),
                "peak memory / bare forward": peaks[tool] / base,
                "largest difference": differences[tool],
            }
            if OURS in working:
                row |= {
                    "time / interp": ratio(times[tool], times[OURS], factor / working[OURS].times),
                    "peak memory / interp": peaks[tool] / peaks[OURS],
                }
        if tool in working or tool in offers[1] or notes.get(tool):
            rows.append(row)
    return rows


def shown(value: Any, column: str) -> Any:
    if isinstance(value, tuple):
        middle, low, high = value
        digits = 0 if middle >= 100 else 3 if middle < 10 else 1
        return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.1e}" if column == "largest difference" and value is not None else value


def targets(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """What was aimed at, and what came out."""
    table: list[list[str]] = []

    def aim(title: str, job: str, words: str, value: float, met: bool, of: str = "") -> None:
        table.append([title, job, words, f"{value:.3f}" if value < 10 else f"{value:.1f}", of, "yes" if met else "NO"])

    for title, rows in results.items():
        found = {(row["job"], row["tool"]): row for row in rows if "time / interp" in row}
        for job in dict.fromkeys(row["job"] for row in rows):
            ours = found[job, OURS]["time / bare forward"][0]
            others = {tool: row["time / interp"][0] for (of, tool), row in found.items() if of == job}
            cost = others.pop(COST, None)
            others.pop(OURS)
            peer = min(others, key=others.__getitem__)
            if job == STREAMS:
                aim(title, job, "at most 1.02 bare forwards", ours, ours <= 1.02)
            if job == LAST and "576" in title:
                n_layers = int(title.split(" layers")[0].split()[-1])
                aim(title, job, "at most 1.5 bare forwards", ours, ours <= 1.5)
                words = f"at least {n_layers / 1.5:.0f} x faster than every peer"
                aim(title, job, words, others[peer], others[peer] >= n_layers / 1.5, peer)
            if job in (GRID, HEADS):
                least = 3 if job == GRID else 20
                words = f"at least {least} x faster than every peer"
                aim(title, job, words, others[peer], others[peer] >= least, peer)
            if cost is not None:
                aim(title, job, f"at most 1.15 x {COST}", 1 / cost, 1 / cost <= 1.15)
    return table


def main() -> None:
    """Run all, print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="at least; eight times as many of the residual streams")
    parser.add_argument("--seconds", type=float, default=10.0, help="per job: more rounds, up to 25, while they fit")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the models")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--models", nargs="+", type=int, choices=range(5), default=list(range(5)))
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--verbose", action="store_true", help="show why a tool fails")
    parser.add_argument("--out", type=Path, default=Path("runs/patching.json"))
    options = parser.parse_args()
    for name in set(TOOLS) - {REFERENCE, *options.tools}:
        del TOOLS[name]
    results: dict[str, list[dict[str, Any]]] = {}
    chosen = list(cases(options.scale, options.device).items())
    for title, build in [chosen[index] for index in options.models]:
        case = build()
        offers = offered(case, options.verbose)
        results[title] = []
        for job in track([job for job in options.jobs if job in case.jobs], title):
            results[title] += measured(case, job, offers, options)
        print(f"\n{title}")
        tables.show(COLUMNS, [[shown(row.get(column), column) for column in COLUMNS] for row in results[title]])
    print()
    found = targets(results)
    tables.show(["model", "job", "target", "measured", "nearest", "met"], found)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor(),
        "device": str(options.device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "results": results, "targets": found}, indent=1))


if __name__ == "__main__":
    main()
