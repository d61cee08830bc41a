"""Names of the two files of a saved set."""

from pathlib import Path

import pytest

from interp.errors import InputError
from interp.saved_files import check_saved, saved_files


@pytest.mark.parametrize("given", ["run.1", "run.1.json", "run.1.safetensors", "run.1.json.safetensors"])
def test_either_suffix_or_none_names_the_same_files(given, tmp_path) -> None:
    want = (tmp_path / "run.1.safetensors", tmp_path / "run.1.json")
    assert saved_files(tmp_path / given) == saved_files(str(tmp_path / given)) == want


def test_a_name_may_hold_dots_and_stand_in_a_folder_with_a_suffix() -> None:
    assert saved_files("runs.json/v0.2.pt") == (Path("runs.json/v0.2.pt.safetensors"), Path("runs.json/v0.2.pt.json"))


def test_the_first_missing_file_is_named_in_the_callers_words(tmp_path) -> None:
    files = saved_files(tmp_path / "set")
    with pytest.raises(InputError) as caught:
        check_saved(files, "no set at {!r}: it is two files")
    assert str(caught.value) == f"no set at '{files[0]}': it is two files"
    files[0].touch()
    with pytest.raises(InputError) as caught:
        check_saved(files, "no set at {}")
    assert str(caught.value) == f"no set at {files[1]}"
    tmp_path.joinpath("set.json").mkdir()
    with pytest.raises(InputError):
        check_saved(files, "no set at {}")
    tmp_path.joinpath("set.json").rmdir()
    files[1].touch()
    check_saved(files, "no set at {}")
