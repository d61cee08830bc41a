"""Loading diffusers pipelines: a Hub id, a local folder, or a model of the zoo."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from interp import progress, zoo
from interp.errors import InputError


def load_pipeline(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Any:
    """Load a pipeline with diffusers.

    Args:
        name: ``"zoo:tiny-diffusion"``, a local folder, or a Hub id.
        dtype: of the weights, such as ``torch.float16`` or ``"float16"``. None: float32, whatever the files hold,
            because processors compute half precision slowly or not at all.
        device: where the pipeline goes; None: the processor.
        options: anything else that ``DiffusionPipeline.from_pretrained`` takes (``variant``, ``revision``,
            ``device_map``, ...).

    Returns:
        The pipeline, its models in evaluation mode.

    Raises:
        UnknownNameError: an unknown zoo name.
        InputError: nothing to load there, damaged files, an unknown dtype, or both ``device`` and ``device_map``.
    """
    if device is not None and options.get("device_map") is not None:
        raise InputError("give device or device_map, not both")
    settings = {"dtype": _dtype(dtype), **options}
    source = _source(name)
    try:
        with _bars_where_seen(), _expected_messages_left_out():
            from diffusers import DiffusionPipeline

            pipeline = DiffusionPipeline.from_pretrained(source, **settings)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load a diffusion pipeline from {str(name)!r}: {reason}") from error
    return pipeline if device is None else pipeline.to(device)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype={dtype!r}: give a floating dtype such as 'float16', 'bfloat16' or torch.float32")
    return found


@contextmanager
def _bars_where_seen() -> Iterator[None]:
    """Keep the bars of diffusers and transformers out of pipes and log files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    if progress.visible():
        shown = []
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


# Said of every pipeline where torchvision is not installed, and of every one with a small autoencoder.
_LOGGERS = ("transformers.utils.import_utils", "diffusers.pipelines.pipeline_utils")
_EXPECTED = (
    "requires torchvision (not installed); falling back",
    "got <class 'diffusers.models.autoencoders.autoencoder_tiny",
)


@contextmanager
def _expected_messages_left_out() -> Iterator[None]:
    """Keep messages that tell users nothing out of what a load logs; all others stay."""

    def worth_saying(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _EXPECTED)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(worth_saying)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(worth_saying)


def _source(name: str | Path) -> str:
    if isinstance(name, str) and name.startswith(zoo.PREFIX):
        return str(zoo.path(name))
    path = Path(name)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise InputError(f"the folder {str(name)!r} has no model_index.json, so it is no diffusers pipeline")
    if isinstance(name, Path) and not path.exists():
        raise InputError(f"there is no folder {str(name)!r}")
    return str(name)
