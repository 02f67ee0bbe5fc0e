import json

import pytest

from utils.errors import InputError
from utils.files import check_writable, new_run_folder, replacing, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyError), replacing(path) as draft:
        draft.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_runs_never_share_a_folder(tmp_path):
    folders = [new_run_folder(tmp_path / "runs", "x") for _ in range(3)]
    assert [folder.name for folder in folders] == ["x", "x-2", "x-3"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder to write to"):
        check_writable(tmp_path / "file" / "folder")
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
