"""Progress bars: drawn on a terminal and in Jupyter, never in a pipe; elements pass through."""

import os
import pty
import subprocess
import sys
import types

import pytest

from interp import progress as progress_module
from interp.progress import in_jupyter, progress, track

SCRIPT = "from interp.progress import track\nprint(sum(track(range(5), 'layers')))"


def run_script(stderr: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=True,
        timeout=300,
    )


def test_nothing_is_drawn_in_a_pipe():
    done = run_script(subprocess.PIPE)
    assert done.stdout == "10\n"
    assert done.stderr == ""


def test_a_bar_is_drawn_on_a_terminal():
    reader, writer = pty.openpty()
    done = run_script(writer)
    os.close(writer)
    drawn = os.read(reader, 65536).decode()
    os.close(reader)
    assert done.stdout == "10\n"
    assert "layers" in drawn
    assert "5/5" in drawn


def test_a_total_serves_iterables_without_length():
    assert list(track((n for n in "abc"), "letters", total=3)) == ["a", "b", "c"]
    with progress(total=7, description="moved by hand") as bar:
        bar.update(3)
        assert bar.total == 7


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_outside_a_kernel_is_not_jupyter(monkeypatch: pytest.MonkeyPatch):
    assert not in_jupyter()
    shell = types.SimpleNamespace(config={"TerminalIPythonApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert not in_jupyter()


@pytest.mark.usefixtures("kernel")
def test_jupyter_without_widgets_gets_a_text_bar_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert in_jupyter()
    monkeypatch.setattr(progress_module.importlib.util, "find_spec", lambda name: None)
    assert list(track(range(4), "seeds")) == [0, 1, 2, 3]
    drawn = capsys.readouterr().err
    assert "seeds" in drawn
    assert "4/4" in drawn


def test_the_bar_closes_when_the_loop_breaks(monkeypatch: pytest.MonkeyPatch):
    closed = []
    monkeypatch.setattr(progress_module.tqdm, "close", lambda bar: closed.append(bar.n))
    for n in track(range(10), "stops early"):
        if n == 2:
            break
    assert closed
