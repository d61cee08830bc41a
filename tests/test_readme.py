"""The README's code runs as it stands, and its example does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_readme_code_runs_and_the_patch_gives_the_capitals():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected, alone, patched = done.stdout.splitlines()[:3]
    assert patched == expected and alone != expected


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md"])
def test_every_file_that_a_page_links_to_exists(page):
    file = ROOT / page
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    assert not [link for link in links if not (file.parent / link).exists()]
