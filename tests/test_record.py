import json

import pytest
import torch

from utils.run import record as records
from utils.run.errors import InputError
from utils.run.files import locked
from utils.run.record import check_place, open_record


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def test_a_folder_in_runs_is_made_when_there_is_something_and_never_shared(runs):
    with open_record(None, "a") as first:
        assert not list(runs.iterdir())
        first.write("results.json", {"top1": 1})
        assert first.folder == runs / "a"
    with open_record(None, "a") as second:
        assert second.folder == runs / "a-2"
    assert json.loads((runs / "a" / "results.json").read_text()) == {"top1": 1}


def test_stages_are_timed_and_told():
    with open_record(None, "a") as record:
        with record.stage("build", in_turn=True):
            pass
        with record.stage("images"), record.stage("inner"):
            pass
        told = record.provenance(torch.device("cpu"), {"seed": 0, "file": records.RUNS})
    assert list(told["seconds"]) == ["build", "inner", "images"]
    assert told["options"] == {"seed": 0, "file": str(records.RUNS)} and told["device"].startswith("cpu")


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_is_refused_leaves_no_folder_that_was_not_there(tmp_path, there):
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
    with pytest.raises(InputError), open_record(folder, "a", resume=False):
        raise InputError("refused")
    assert folder.exists() == there and not (tmp_path / "out.unfinished").exists()


def test_what_a_failed_run_has_written_stays(tmp_path):
    with pytest.raises(KeyError), open_record(tmp_path / "out", "a") as record:
        record.write("ranges.json", {})
        raise KeyError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ranges.json"]


def test_the_folder_of_another_run_is_refused_and_left(tmp_path):
    (tmp_path / "out").mkdir()
    with (
        locked(tmp_path / "out"),
        pytest.raises(InputError, match="another run writes there"),
        open_record(tmp_path / "out", "a"),
    ):
        pytest.fail("runs")


def test_state_is_kept_beside_the_folder_until_the_run_ends_well(tmp_path):
    with open_record(tmp_path / "out", "a", resume=False) as record:
        assert record.state == tmp_path / "out.unfinished" and record.state.is_dir()
        record.write("results.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_place_that_cannot_be_written_to_is_refused_and_nothing_is_left(tmp_path, runs):
    check_place(tmp_path / "new")
    check_place(None)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder to write to"):
        check_place(tmp_path / "file" / "x")
