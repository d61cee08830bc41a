"""The public surface: quick to import, complete, and clear about names that are not there."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import interp

PROBE = """
import sys, time
start = time.process_time()
import interp
elapsed = time.process_time() - start
heavy = {"torch", "transformers", "numpy", "matplotlib", "pandas", "PIL", "sklearn"} & set(sys.modules)
dir(interp)
print(elapsed, *sorted(heavy))
"""


def test_import_is_light():
    # Processor time, which is the wall time of a machine that does nothing else.
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    elapsed, *heavy = done.stdout.split()
    assert heavy == []
    assert float(elapsed) < 0.3


@pytest.mark.parametrize("name", interp.__all__)
def test_every_public_name_resolves(name: str):
    value = getattr(interp, name)
    if name in interp._MODULES:
        assert inspect.ismodule(value)
        assert value.__name__ == f"interp.{name}"
    elif name in interp._NAMES:
        assert value.__module__.startswith("interp.")


def test_type_checkers_see_the_same_surface():
    tree = ast.parse(inspect.getsource(interp))
    guarded = next(n for n in tree.body if isinstance(n, ast.If))
    seen: dict[str | None, str | None] = {}
    for statement in guarded.body:
        if isinstance(statement, ast.Import):
            seen |= {alias.asname: alias.name for alias in statement.names}
        else:
            assert isinstance(statement, ast.ImportFrom)
            seen |= {alias.asname: statement.module for alias in statement.names}
    expected = interp._NAMES | {name: f"interp.{name}" for name in interp._MODULES}
    assert seen == expected


def test_a_typo_names_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'Replce'.*'Replace'"):
        interp.Replce  # noqa: B018
    with pytest.raises(ImportError, match="load_tsk"):
        from interp import load_tsk  # noqa: F401
    assert not hasattr(interp, "qqqqqq")


def test_dir_lists_the_surface():
    assert dir(interp) == sorted(interp.__all__)
    assert "torch" not in dir(interp)


def test_version_is_the_installed_one():
    assert importlib.metadata.version("interp") == interp.__version__
