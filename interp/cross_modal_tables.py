"""Tables of cross-modal transfer: the summary that a paper prints, accuracy by layer, and every single answer."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from interp.cross_modal import Bank, Result
from interp.metrics import mean_bootstrap_interval
from interp.models.vlm import VLM
from interp.task_vectors import TaskVectors
from interp.transfer import Scores, exact_accuracy, generate_answers

LABELS = {
    ("prompt", "no context"): "no context",
    ("prompt", "text"): "text examples in the prompt",
    ("prompt", "image"): "image examples in the prompt",
    ("prompt", "instruction"): "instruction in the prompt",
    ("patch", "text"): "text examples, patched",
    ("patch", "image"): "image examples, patched",
    ("patch", "instruction"): "instruction, patched",
    ("patch", "ensemble"): "text examples + instruction, patched",
    ("patch", "language model"): "text examples in the language model, patched",
    ("control", "random"): "random vector of the same norm",
    ("control", "wrong task"): "another task of the category",
    ("control", "wrong task, its answers"): "... and how often it gives that task's answer",
    ("control", "other category"): "a task of another category",
    ("control", "shuffled labels"): "text examples with shuffled labels",
}


def at_layer(result: Result, layer: int) -> Scores:
    """A result's scores ``[draw, query]``, at one layer where it has layers."""
    if not result.by_layer:
        return result.scores
    s = result.scores
    return Scores(s.prefix[:, layer], s.log_prob[:, layer], s.rank[:, layer], s.token[:, layer])


def label(result: Result) -> str:
    """A result's condition in words."""
    return LABELS[result.kind, result.condition]


def summary(
    results: Sequence[Result],
    tasks: Sequence[str],
    layer: int,
    exact: Mapping[tuple[str, str, str], float] | None = None,
) -> pd.DataFrame:
    """Accuracy of every condition by task, with the average over tasks and its interval.

    Args:
        results: of all tasks and conditions.
        tasks: the columns.
        layer: block that is patched.
        exact: exact-match accuracy of full answers, by (query, kind, condition); see `exact_answers`.

    Returns:
        One row per query modality and condition; ``low`` and ``high`` are the 95 % bootstrap interval of ``average``
        over seeds and items.

    Raises:
        InputError: no tasks.
        ShapeError: a task with fewer than two items.
    """
    groups: dict[tuple[str, str, str], dict[str, Result]] = {}
    for result in results:
        groups.setdefault((result.query, result.kind, result.condition), {})[result.task] = result
    rows = []
    for (query, kind, condition), by_task in groups.items():
        scores = [at_layer(by_task[task], layer).prefix.float().numpy() for task in tasks]
        interval = mean_bootstrap_interval(scores, seed=0)
        rows.append(
            {
                "query": query,
                "kind": kind,
                "condition": LABELS[kind, condition],
                **{task: float(one.mean()) for task, one in zip(tasks, scores, strict=True)},
                "average": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "exact": np.nan if exact is None else exact.get((query, kind, condition), np.nan),
            }
        )
    return pd.DataFrame(rows)


def by_layer(results: Sequence[Result]) -> pd.DataFrame:
    """Accuracy of every patch by layer, task and draw, in long form."""
    rows = [
        {
            "query": r.query,
            "kind": r.kind,
            "condition": r.condition,
            "task": r.task,
            "draw": draw,
            "layer": layer,
            "accuracy": float(value),
        }
        for r in results
        if r.by_layer
        for draw, layers in enumerate(r.scores.accuracy)
        for layer, value in enumerate(layers)
    ]
    return pd.DataFrame(rows)


def per_item(vlm: VLM, results: Sequence[Result], layer: int) -> pd.DataFrame:
    """Every single greedy first token, at the chosen layer.

    Args:
        vlm: for its tokenizer.
        results: of all tasks and conditions.
        layer: block that is patched.
    """
    rows = []
    for result in results:
        scores = at_layer(result, layer)
        texts = scores.answers(vlm)
        for draw in range(len(texts)):
            for query, item in enumerate(result.items):
                rows.append(
                    {
                        "query": result.query,
                        "kind": result.kind,
                        "condition": result.condition,
                        "task": result.task,
                        "draw": draw,
                        "item": item.id or item.input,
                        "prediction": texts[draw, query],
                        "answer": item.output,
                        "correct": bool(scores.prefix[draw, query]),
                        "log_prob": float(scores.log_prob[draw, query]),
                        "rank": int(scores.rank[draw, query]),
                    }
                )
    return pd.DataFrame(rows)


def exact_answers(
    vlm: VLM, results: Sequence[Result], layer: int, *, max_new_tokens: int = 12
) -> dict[tuple[str, str, str], float]:
    """Exact-match accuracy of full greedy answers of prompts and patches, first draw, averaged over tasks.

    Args:
        vlm: the model.
        results: of all tasks and conditions.
        layer: block that is patched.
        max_new_tokens: the longest answer.

    Returns:
        Accuracy by (query, kind, condition).

    Raises:
        InputError: a layer that the vectors do not have, a prompt that is too long, or a model without a tokenizer.
        ShapeError: vectors of another model.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for result in (r for r in results if r.kind != "control"):
        edits = [result.vectors[0].patch(layer, vlm)] if result.vectors else []
        answers = generate_answers(vlm, result.prompts, edits=edits, max_new_tokens=max_new_tokens)
        key = (result.query, result.kind, result.condition)
        found.setdefault(key, []).append(exact_accuracy(answers, result.items))
    return {key: float(np.mean(values)) for key, values in found.items()}


def stacked(results: Sequence[Result], condition: str, query: str, tasks: Sequence[str]) -> np.ndarray:
    """Accuracy of one patch or control by draw and layer, averaged over tasks."""
    chosen = {r.task: r for r in results if r.by_layer and (r.condition, r.query) == (condition, query)}
    return np.mean([chosen[task].scores.accuracy.numpy() for task in tasks], axis=0)


def vectors_of(bank: Bank, specification: str, seed: int = 0) -> list[TaskVectors]:
    """One specification's vectors of every task, for one seed."""
    return [by_spec[specification][seed] for by_spec in bank.values()]
