"""How much memory a sweep may take."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from interp import Add
from interp.sweeps import memory
from tests import tiny

CPU = [torch.device("cpu")]
GIB = 2**30
VERSIONS = [
    (".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with 4 GiB free, and control groups that the test writes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * GIB))
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    return tmp_path


def write(machine, version, limit, used, droppable):
    folder, *names, stat = version
    (machine / folder).mkdir(exist_ok=True)
    for name, text in zip(names, (limit, used), strict=True):
        (machine / folder / name).write_text(f"{text}\n")
    (machine / folder / "memory.stat").write_text(f"cache 5\n{stat} {droppable}\nactive_file 7\nodd line here\n")


def test_without_a_container_half_of_what_is_free(machine) -> None:
    assert memory.free_memory(CPU) == 4 * GIB and memory.budget(CPU) == 2 * GIB


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_allows_what_it_has_left_and_what_it_can_drop(version, machine) -> None:
    write(machine, version, 3 * GIB, 2 * GIB, 0)
    assert memory.free_memory(CPU) == GIB
    write(machine, version, 3 * GIB, 2 * GIB, GIB // 2)
    assert memory.free_memory(CPU) == 3 * GIB // 2
    write(machine, version, 100 * GIB, 0, 0)
    assert memory.free_memory(CPU) == 4 * GIB
    # Version 1 writes a huge number for no limit, version 2 a word.
    for none in ("max", 2**63 - 4096):
        write(machine, version, none, 2 * GIB, 0)
        assert memory.free_memory(CPU) == 4 * GIB


@pytest.mark.parametrize("version", VERSIONS)
def test_a_full_container_still_leaves_a_forward_some_memory_and_the_plan_says_so(version, machine) -> None:
    write(machine, version, GIB, GIB, 0)
    assert memory.free_memory(CPU) == 0 and memory.budget(CPU) == memory.LEAST
    vlm, inputs = tiny.vlm("llama"), tiny.text_inputs()
    variants = [[Add(f"blocks.{layer}.hook_resid_pre", torch.ones(32), at="last")] for layer in range(4)]
    plan = vlm.sweep(inputs, variants, dry_run=True).plan
    assert plan.memory == memory.LEAST and plan.variants_per_forward == 4
    assert "1 forwards of up to 4 variants and 64 MiB" in str(plan)
