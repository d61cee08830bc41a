"""Loading through transformers' own ``from_pretrained``: a Hub id, a local folder, or a model of the zoo."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.utils import logging

from interp import progress, zoo
from interp.errors import InputError
from interp.models.families import family_of


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Load a model and its processor (or tokenizer).

    Args:
        name: ``"zoo:tiny-llava"``, a local folder, or a Hub id.
        dtype: of the weights; None: as the checkpoint says.
        device: where the model goes; not together with ``device_map``.
        device_map: accelerate's map, for models over several devices.
        revision: branch, tag or commit on the Hub.
        options: anything else that ``from_pretrained`` takes (``attn_implementation``,
            ``quantization_config``, ...).

    Returns:
        The model in evaluation mode, and its processor for models that see images, else its tokenizer.

    Raises:
        UnknownNameError: an unknown zoo name.
        InputError: nothing to load there, a diffusion pipeline, damaged files, an unsupported family, or both
            ``device`` and ``device_map``.
    """
    if device is not None and device_map is not None:
        raise InputError("give device or device_map, not both")
    source = _source(name)
    where = {} if revision is None else {"revision": revision}
    config = _found(AutoConfig, name, source, **where)
    family = family_of(config.model_type)
    reader: Any = AutoTokenizer if family.vision is None else AutoProcessor
    processor = _found(reader, name, source, **where)
    if family.vision is not None and not isinstance(processor, ProcessorMixin):
        raise InputError(
            f"{str(name)!r} has no processor, only a {type(processor).__name__}: images cannot be prepared"
        )
    auto: Any = AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText
    settings = {"dtype": dtype or "auto", "device_map": device_map, **where, **options}
    model = _found(auto, name, source, **settings).eval()
    return (model if device is None else model.to(device)), processor


def _found(auto: Any, name: str | Path, source: str, **options: Any) -> Any:
    try:
        with _bars_where_seen():
            return auto.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        what = auto.__name__.removeprefix("Auto").removesuffix("ForCausalLM").removesuffix("ForImageTextToText")
        raise InputError(f"cannot load a {what.lower()} from {str(name)!r}: {str(error).splitlines()[0]}") from error


@contextmanager
def _bars_where_seen() -> Iterator[None]:
    """Keep transformers' own bars out of pipes and log files."""
    if progress.visible() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _source(name: str | Path) -> str:
    in_zoo = isinstance(name, str) and name.startswith(zoo.PREFIX)
    path = zoo.path(str(name)) if in_zoo else Path(name)
    if (path / "model_index.json").is_file():
        raise InputError(
            f"{str(name)!r} is a diffusion pipeline, no language or vision-language model; "
            f"load it with interp.Diffusion.from_pretrained({str(name)!r})"
        )
    if in_zoo:
        return str(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"the folder {str(name)!r} has no config.json, so it is no model folder")
    if isinstance(name, Path) and not path.exists():
        raise InputError(f"there is no folder {str(name)!r}")
    return str(name)
