"""From nothing to trainaug in one call: two downloads that resume, are verified and unpacked, and a conversion."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from helpers.local_server import local_server
from PIL import Image

from deeplabzoo.cli import prepare
from deeplabzoo.data.dataset import build_dataset, split_hash
from deeplabzoo.data.download import SBD, VOC_2012, Archive, SplitInfo, prepare_trainaug
from deeplabzoo.errors import DownloadError
from deeplabzoo.hub.http_download import ExpectedFile, download

matlab = pytest.importorskip("scipy.io", reason="reading .mat needs scipy, from the train extra")


def fetch(url, file) -> None:
    download(url, file, ExpectedFile())


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.new("L", (12, 8), value).save(sink, "PNG")
    return sink.getvalue()


def jpeg() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (12, 8)).save(sink, "JPEG")
    return sink.getvalue()


def mat(value: int) -> bytes:
    sink = io.BytesIO()
    matlab.savemat(sink, {"GTcls": {"Segmentation": np.full((8, 12), value, np.uint8)}})
    return sink.getvalue()


def archive_of(server, name: str, folder: str, files: dict[str, bytes], **how) -> Archive:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = sink.getvalue()
    url = server.serve(f"/{name}", content, **how)
    return Archive((url,), name, hashlib.md5(content).hexdigest(), folder, 10**7)


def test_trainaug_is_made_from_two_downloads(tmp_path) -> None:
    """The connection breaks in the middle of the first; a second call downloads and converts nothing."""
    lists = "ImageSets/Segmentation"
    voc_files = {f"{lists}/train.txt": b"a\n", f"{lists}/val.txt": b"b\n"}
    voc_files |= {f"JPEGImages/{name}.jpg": jpeg() for name in "abc"}
    voc_files |= {f"SegmentationClass/{name}.png": png(3) for name in "ab"}
    sbd_files = {"train.txt": b"c\n", "val.txt": b"b\n"} | {f"cls/{name}.mat": mat(7) for name in "bc"}
    with local_server() as server:
        voc = archive_of(server, "voc.tar", "VOCdevkit/VOC2012", voc_files, faults=["cut:3000"])
        sbd = archive_of(server, "sbd.tgz", "benchmark_RELEASE/dataset", sbd_files)
        facts = SplitInfo(2, split_hash(["a", "c"]))
        home = prepare_trainaug(tmp_path, fetch, voc, sbd, facts)
        assert [one.headers.get("Range") for one in server.asked("GET", "voc.tar")] == [None, "bytes=3000-"]
        before = len(server.requests)
        assert prepare_trainaug(tmp_path, fetch, voc, sbd, facts) == home
        assert len(server.requests) == before
    data = build_dataset("voc", tmp_path, "trainaug")
    assert data.names == ("a", "c")
    assert (data[0].labels == 3).all()
    assert (data[1].labels == 7).all()


def test_a_file_that_is_not_the_published_one_is_never_unpacked(tmp_path) -> None:
    with local_server() as server:
        voc = archive_of(server, "voc.tar", "VOCdevkit/VOC2012", {"x": b"x"})
        server.serve("/voc.tar", b"something else")
        with pytest.raises(DownloadError, match="md5"):
            prepare_trainaug(tmp_path, fetch, voc)
    assert not (tmp_path / "VOCdevkit" / "VOC2012").exists()


def test_the_published_hashes_are_torchvisions() -> None:
    """Neither VOC nor SBD publishes one; torchvision's have been checked by everybody who downloaded through it."""
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    assert DATASET_YEAR_DICT["2012"]["md5"] == VOC_2012.md5
    assert SBDataset.md5 == SBD.md5


def test_what_is_there_already_is_kept(tmp_path, capsys) -> None:
    """The command finds an existing VOC2012 and reaches for no network; a wrong name leaves with status 2."""
    home = tmp_path / "VOCdevkit" / "VOC2012"
    (home / "ImageSets" / "Segmentation").mkdir(parents=True)
    assert prepare.main(["voc", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(home)
    assert prepare.main(["imagenet", "--root", str(tmp_path)]) == 2


@pytest.mark.parametrize("switch", ["DEEPLABZOO_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_offline_switch_forbids_data_sets_too(switch, tmp_path, monkeypatch, capsys) -> None:
    """No host is asked, the sentence names the file and the switch, nothing is left behind."""
    monkeypatch.setenv(switch, "1")
    assert prepare.main(["voc", "--root", str(tmp_path / "data")]) == 1
    sentence = capsys.readouterr().err
    assert f"VOCtrainval_11-May-2012.tar is not in '{tmp_path / 'data' / 'archives'}' and {switch} forbids" in sentence
    assert not list((tmp_path / "data").rglob("*.*"))
