"""The command line: what it prints, where errors go, and experiments loaded by name or by file."""

import importlib.metadata
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import interp
from interp import cli, tables, zoo
from interp.errors import InputError, UnknownNameError

ROOT = Path(interp.__file__).parent.parent
EXPERIMENT = '''"""Adds two numbers.

More about that.
"""

from dataclasses import dataclass

from interp.errors import InputError


@dataclass
class Sum:
    value: "int"


def run(first: int = 1, second: int = 2, label: str = "sum") -> None:
    if first < 0:
        raise InputError("first must not be negative,\\nbut it is")
    print(label, Sum(first + second).value)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "add_numbers.py").write_text(EXPERIMENT)
    (tmp_path / "broken.py").write_text('"""Has no run."""\n')
    (tmp_path / "_helper.py").write_text("")
    return tmp_path


def call(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_experiments_are_listed_without_running_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert list(cli.experiments(folder)) == ["add-numbers", "broken"]
    monkeypatch.setattr(cli, "experiments_folder", lambda: folder)
    code, out, err = call("run", capsys=capsys)
    assert code == 0
    assert out == "experiment\twhat it shows\nadd-numbers\tAdds two numbers.\nbroken\tHas no run.\n"
    assert err == ""
    assert out in call("run", "--help", capsys=capsys)[1]


def test_options_come_from_the_signature(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "experiments_folder", lambda: folder)
    assert call("run", "add-numbers", capsys=capsys) == (0, "sum 3\n", "")
    assert call("run", "add_numbers", "--first", "40", "--label=total", capsys=capsys)[1] == "total 42\n"
    code, out, _ = call("run", "add-numbers", "--help", capsys=capsys)
    assert code == 0
    assert "Adds two numbers." in out
    assert "--second" in out
    code, out, err = call("run", "add-numbers", "--frist", "3", capsys=capsys)
    assert (code, out) == (2, "")
    assert "--first" in err


def test_a_file_of_ones_own_runs_too(folder: Path, capsys: pytest.CaptureFixture[str]):
    file = str(folder / "add_numbers.py")
    assert call("run", file, "--second", "5", capsys=capsys) == (0, "sum 6\n", "")
    with pytest.raises(InputError, match="There is no file"):
        cli.load_experiment(str(folder / "absent.py"))


def test_errors_of_use_are_one_message(folder: Path, capsys: pytest.CaptureFixture[str]):
    file = str(folder / "add_numbers.py")
    code, out, err = call("run", file, "--first", "-1", capsys=capsys)
    assert (code, out) == (2, "")
    assert err == "interp: first must not be negative,\nbut it is\n"
    with pytest.raises(InputError, match="must not be negative"):
        cli.main(["--debug", "run", file, "--first", "-1"])


def test_unknown_experiments_name_the_nearest(folder: Path):
    with pytest.raises(UnknownNameError, match=r"Did you mean 'add-numbers'\? Experiments: add-numbers, broken\."):
        cli.load_experiment("add-number", folder)
    with pytest.raises(InputError, match=r"broken\.py' has no function 'run'"):
        cli.load_experiment("broken", folder)


def test_the_experiments_that_ship_are_found_and_described():
    assert cli.experiments_folder() == ROOT / "experiments"
    found = cli.experiments()
    assert "task-vector-transfer" in found
    for path in found.values():
        assert cli.first_line(path).endswith("."), f"{path} has no docstring that says what it shows"


def test_versions_are_those_installed(capsys: pytest.CaptureFixture[str]):
    lines = call("version", capsys=capsys)[1].splitlines()
    rows = dict(line.split("\t") for line in lines)
    assert rows["interp"] == interp.__version__
    assert rows["torch"] == importlib.metadata.version("torch")


def test_sites_are_listed_one_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    asked = []

    class Model:
        @classmethod
        def from_pretrained(cls, name: str) -> "Model":
            asked.append(name)
            return cls()

        def sites(self, pattern: str | None = None) -> list[str]:
            asked.append(pattern)
            return ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    monkeypatch.setattr("interp.models.vlm.VLM", Model)
    code, out, _ = call("sites", "someone/tiny", "blocks.*", capsys=capsys)
    assert (code, out) == (0, "blocks.0.hook_resid_post\nblocks.1.hook_resid_post\n")
    call("sites", "someone/tiny", capsys=capsys)
    assert asked == ["someone/tiny", "blocks.*", "someone/tiny", None]


def test_sites_of_a_diffusion_pipeline_are_listed(capsys: pytest.CaptureFixture[str]):
    code, out, _ = call("sites", "zoo:tiny-diffusion", "up.3.resnets.*.hook_branch", capsys=capsys)
    assert (code, out.split()) == (0, [f"up.3.resnets.{index}.hook_branch" for index in range(3)])


def test_the_zoo_is_listed_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "weights").write_bytes(bytes(2_500_000))
    monkeypatch.setattr(zoo, "names", lambda: ["tiny"])
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path)
    measured = {"first_token": 0.987, "exact": 0.9, "by_task": {"capital": 1.0}}
    card = {"figures": {"prompts": {"few-shot, text": measured}, "patches": {"text -> image": measured}}}
    monkeypatch.setattr(zoo, "card", lambda name: card)
    code, out, _ = call("zoo", capsys=capsys)
    assert code == 0
    assert [line.split("\t") for line in out.splitlines()] == [
        ["model", "figure", "value"],
        ["zoo:tiny", "size in MB", "2.50"],
        ["zoo:tiny", "prompts: few-shot, text", "0.99"],
        ["zoo:tiny", "patches: text -> image", "0.99"],
    ]


def test_a_typo_in_a_command_is_an_error(capsys: pytest.CaptureFixture[str]):
    code, _, err = call("runn", capsys=capsys)
    assert code == 2
    assert "runn" in err


def test_the_command_is_light_and_installed():
    script = "import sys, interp.cli; print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="interp")
    assert entry.value == "interp.cli:main"


def test_tables_are_ruled_on_a_terminal_only():
    rows = [("a[b]", 0.5, None), ("c", 0.123, 7)]
    pipe = Console(file=io.StringIO())
    tables.show(("name", "score", "n"), rows, title="Scores", console=pipe)
    assert pipe.file.getvalue() == "name\tscore\tn\na[b]\t0.50\t\nc\t0.12\t7\n"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=60)
    tables.show(("name", "score", "n"), rows, title="Scores", console=terminal)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", terminal.file.getvalue())
    assert drawn.splitlines()[0].strip() == "Scores"
    assert [line.split() for line in drawn.splitlines()[1:]] == [
        ["name", "score", "n"],
        ["a[b]", "0.50"],
        ["c", "0.12", "7"],
    ]
    with pytest.raises(ValueError, match="1 cells does not fit 2 columns"):
        tables.show(("a", "b"), [("x",)], console=pipe)
