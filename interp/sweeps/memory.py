"""How much memory a sweep may use, and how to tell that there was too little."""

from collections.abc import Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

# More than this makes forwards no faster, on any device.
MOST = 2**33
# With less, forwards of one variant would be all that fits, however small the model.
LEAST = 2**26
SHARE = 0.5

_CGROUPS = Path("/sys/fs/cgroup")
# Folder, limit, use, and what of the use are files that the system may drop, in both versions of control groups.
_FILES = (
    (".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "cannot allocate memory")


def free_memory(devices: Iterable[torch.device]) -> int:
    """Bytes that are free on the fullest of some devices.

    Args:
        devices: where the model's blocks are.
    """
    found = [_free_on(device) for device in set(devices)]
    return min(found) if found else _free_on(torch.device("cpu"))


def budget(devices: Iterable[torch.device]) -> int:
    """Bytes that one forward of a sweep may take: half of what is free, from 64 MiB to 8 GiB.

    Args:
        devices: where the model's blocks are.
    """
    return max(LEAST, min(MOST, int(SHARE * free_memory(devices))))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_MESSAGES)


def release() -> None:
    """Give unused memory of accelerators back, before a smaller attempt."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_on(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Torch keeps what it has freed.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = int(psutil.virtual_memory().available)
    limit = _container_limit()
    return available if limit is None else min(available, limit)


def _container_limit() -> int | None:
    """What a container still allows; None where it sets no limit."""
    for folder, limit, use, droppable in _FILES:
        try:
            most, used = ((_CGROUPS / folder / name).read_text().strip() for name in (limit, use))
            stat = (_CGROUPS / folder / "memory.stat").read_text()
        except OSError:
            continue
        if not most.isdigit() or not used.isdigit():
            return None
        counts = dict(line.split() for line in stat.splitlines() if len(line.split()) == 2)
        return max(0, int(most) - int(used) + int(counts.get(droppable, 0)))
    return None
