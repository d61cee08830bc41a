"""What is installed: everything the package needs at run time, at versions that are pinned once."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import interp

ROOT = Path(interp.__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_code_data_and_experiments(wheel: set[str]):
    ignored = re.compile(r"__pycache__|\.pyc$")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "interp").rglob("*") if path.is_file()}
    assert {name for name in package if not ignored.search(name)} <= wheel
    experiments = {f"interp/_experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    assert experiments <= wheel
    assert "interp/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_wheel_holds_nothing_else(wheel: set[str]):
    assert {name.split("/")[0] for name in wheel} == {"interp", f"interp-{interp.__version__}.dist-info"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pinned.items()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    pinned = pins()
    for text in wanted:
        requirement = Requirement(text)
        version = pinned[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"
        assert [part.operator for part in requirement.specifier] == [">="]
