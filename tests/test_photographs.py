import dataclasses
import io
import pickle
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import CIFAR10, ImageFolder

from utils import photographs
from utils.data import CLASS_MAP, read_class_map
from utils.photographs import PHOTOGRAPHS, find_dataset, prepare_dataset
from utils.run.errors import InputError

unpacks = pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="a Python that unpacks nothing safely")


def write_folders(root, name, splits=("train", "test"), per_class=2):
    """Class folders of JPEG files, as an archive of the data set has them; returns the bytes of one file."""
    for split in splits:
        for label, folder in enumerate(PHOTOGRAPHS[name].classes):
            (root / split / folder).mkdir(parents=True)
            for index in range(per_class):
                image = Image.fromarray(np.full((8, 8, 3), 20 * label + index, np.uint8))
                image.save(root / split / folder / f"{index:04d}.jpg")
    return (root / splits[1] / PHOTOGRAPHS[name].classes[3] / f"{per_class - 1:04d}.jpg").read_bytes()


@pytest.fixture
def archive(tmp_path):
    """A .tar.gz of CIFAR-10's class folders below a folder of their own, and one file of it."""
    content = write_folders(tmp_path / "made" / "cifar10", "cifar10")
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar10", "cifar10")
    shutil.rmtree(tmp_path / "made")
    return tmp_path / "made.tar.gz", content


def check_written(root, content):
    assert [entry.name for entry in sorted(root.parent.iterdir())] == [root.name]
    for split in ("train", "val"):
        folders = ImageFolder(str(root / split))
        assert len(folders) == 20 and folders.classes == sorted(PHOTOGRAPHS[root.name].classes)
    assert (root / "val" / PHOTOGRAPHS[root.name].classes[3] / "0001.jpg").read_bytes() == content


@unpacks
def test_an_archive_becomes_a_data_set_once_and_its_files_are_kept_as_they_are(archive, tmp_path):
    root = prepare_dataset("cifar10", tmp_path / "data", archive[0])
    assert root == tmp_path / "data" / "cifar10"
    check_written(root, archive[1])
    archive[0].unlink()
    assert prepare_dataset("cifar10", tmp_path / "data", archive[0]) == root  # it is there: no archive is needed


def test_a_folder_becomes_a_data_set_and_stays(tmp_path):
    content = write_folders(tmp_path / "mine", "cifar10", ("train", "val"))
    (tmp_path / "mine" / "train" / "cat" / "notes.txt").write_text("no image")
    check_written(prepare_dataset("cifar10", tmp_path / "data", tmp_path / "mine"), content)
    assert (tmp_path / "mine" / "train" / "cat" / "0000.jpg").is_file()
    assert not list((tmp_path / "data").rglob("notes.txt"))


@unpacks
@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the command zstd")
def test_a_zstd_archive_is_unpacked(archive, tmp_path):
    plain = subprocess.run(["gzip", "-dc", archive[0]], capture_output=True, check=True).stdout
    file = tmp_path / "made.tar.zst"
    subprocess.run(["zstd", "-q", "-o", file], input=plain, check=True)
    check_written(prepare_dataset("cifar10", tmp_path / "data", file), archive[1])
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"made\.tar\.zst: not a readable tar archive"):
        prepare_dataset("cifar10", tmp_path / "other", file)
    assert not list((tmp_path / "other").iterdir())


def test_a_zstd_archive_without_the_command_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "made.tar.zst").write_bytes(photographs._ZSTD + b"more")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="the command zstd, which unpacks it, is not there"):
        prepare_dataset("cifar10", tmp_path / "data", tmp_path / "made.tar.zst")


def batch(labels):
    rng = np.random.default_rng(0)
    return {"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}


@unpacks
def test_torchvisions_batches_become_png_files(tmp_path, monkeypatch):
    files = {"data_batch_1": batch(list(range(10))), "test_batch": batch([3] * 10)}
    files["batches.meta"] = {"label_names": list(PHOTOGRAPHS["cifar10"].classes)}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    root = prepare_dataset("cifar10", tmp_path / "data", tmp_path / "cifar-10-python.tar.gz")
    samples = ImageFolder(str(root / "train"))
    assert [label for _, label in samples.samples] == list(range(10))
    pixels = files["data_batch_1"]["data"][4].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(samples[4][0]), pixels)
    assert {file.parent.name for file in (root / "val").rglob("*.png")} == {"cat"}


def test_batches_with_another_checksum_are_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    folder = tmp_path / "mine" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], ""]):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="not the files of CIFAR-10"):
        prepare_dataset("cifar10", tmp_path / "data", tmp_path / "mine")
    assert not (tmp_path / "executed").exists() and not list((tmp_path / "data").iterdir())


@unpacks
@pytest.mark.parametrize("name", ["../../outside.jpg", "/tmp/outside.jpg"])
def test_an_archive_cannot_write_outside(tmp_path, name):
    file = tmp_path / "bad.tar"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"data"))
    with pytest.raises(InputError, match=r"bad\.tar"):
        prepare_dataset("cifar10", tmp_path / "a" / "data", file)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a", "bad.tar", "data"]


@unpacks
def test_a_link_in_an_archive_cannot_bring_a_file_of_this_machine(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    file = tmp_path / "bad.tar"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("train/cat/0000.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.jpg")
        tar.addfile(member)
    with pytest.raises(InputError, match=r"bad\.tar: not a readable tar archive"):
        prepare_dataset("cifar10", tmp_path / "data", file)


@pytest.mark.parametrize("wrong", ["no archive", "no file", "no splits", "class missing", "class empty"])
def test_what_is_no_such_data_set_is_refused_in_one_line_and_leaves_nothing(tmp_path, wrong):
    mine = tmp_path / "mine"
    expected = {
        "no archive": "not a readable tar archive",
        "no file": "no such file or folder",
        "no splits": "expected folders train/ and val/",
        "class missing": r"expected the 10 class folders airplane, .* in test/; found 9",
        "class empty": "expected images in train/frog/; found none",
    }
    if wrong == "no archive":
        mine.write_text("text")
    elif wrong == "no splits":
        (mine / "train").mkdir(parents=True)
    elif wrong.startswith("class"):
        write_folders(mine, "cifar10", per_class=1)
        if wrong == "class missing":
            shutil.rmtree(mine / "test" / "ship")
        else:
            (mine / "train" / "frog" / "0000.jpg").unlink()
    with pytest.raises(InputError, match=expected[wrong]):
        prepare_dataset("cifar10", tmp_path / "data", mine)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_without_network_and_archive_one_line_says_what_to_bring(tmp_path, monkeypatch, name):
    def refuse(request, timeout):
        assert request.full_url.startswith("https://") and timeout <= 10
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=r"no route to host.*bring the file .*gz.*--dataset-archive"):
        prepare_dataset(name, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_download_becomes_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    dataset = PHOTOGRAPHS["imagenette"]
    contents = []

    def download(folder):
        contents.append(write_folders(folder / "imagenette2-320", "imagenette", ("train", "val")))

    monkeypatch.setitem(PHOTOGRAPHS, "imagenette", dataclasses.replace(dataset, download=download))
    check_written(prepare_dataset("imagenette", tmp_path / "data"), contents[0])


def test_imagenette_has_a_class_map_of_imagenets_outputs(tmp_path):
    write_folders(tmp_path / "mine", "imagenette", ("train", "val"), per_class=1)
    root = prepare_dataset("imagenette", tmp_path / "data", tmp_path / "mine")
    lines = read_class_map(root / CLASS_MAP, 1000)
    assert len(lines) == 10
    info = ImageNetInfo()
    described = {info.index_to_description(label) for _, label in lines.values()}
    assert {"tench, Tinca tinca", "golf ball", "parachute, chute"} <= described
    assert lines["n01440764"][1] == 0 and lines["n03888257"][1] == 701  # as in ImageNet's list of classes


@unpacks
def test_a_folder_wins_over_a_name(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert find_dataset(Path("cifar10"), archive[0]) == tmp_path / "data" / "cifar10"
    for name in ("imagenet", "cifar10"):
        (tmp_path / name / "val").mkdir(parents=True)
        assert find_dataset(Path(name)) == Path(name)
    assert find_dataset("cifar10") == tmp_path / "data" / "cifar10"  # a name for certain
    with pytest.raises(InputError, match="goes with --dataset cifar10 or imagenette; got --dataset cifar10, a folder"):
        find_dataset(Path("cifar10"), archive[0])


def test_a_data_set_by_name_has_the_splits_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "DATA", tmp_path)
    (tmp_path / "cifar10" / "val").mkdir(parents=True)
    assert find_dataset("cifar10") == tmp_path / "cifar10"
    with pytest.raises(InputError, match=r"cifar10: .*train"):
        find_dataset("cifar10", splits=["val", "train"])


def test_the_demos_fractals_are_a_data_set_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "DATA", tmp_path)
    monkeypatch.setattr(photographs, "write_demo_data", lambda root: root)
    (tmp_path / "demo" / "val").mkdir(parents=True)
    assert find_dataset("demo") == find_dataset(Path("demo")) == tmp_path / "demo"
    with pytest.raises(InputError, match="--dataset-archive: goes with --dataset cifar10 or imagenette"):
        find_dataset("demo", tmp_path)


def test_a_python_that_unpacks_nothing_safely_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(InputError, match=r"Python 3\.10\.12, 3\.11\.4 or a newer one is needed"):
        photographs._extract(tmp_path / "a.tar", tmp_path)
