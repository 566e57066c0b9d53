"""VOC 2012 and SBD from their publishers, each verified and unpacked, or left alone where it is there already."""

from pathlib import Path

from deeplabzoo.data.archives import Archive, Download, fetch_archive
from deeplabzoo.data.sbd import TRAINAUG, SplitFacts, make_trainaug
from deeplabzoo.data.voc import voc_home
from deeplabzoo.errors import DataError
from deeplabzoo.say import say

VOC_2012 = Archive(
    urls=(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ),
    file_name="VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    folder="VOCdevkit/VOC2012",
    max_bytes=4 << 30,
)
"""2 GB. VOC publishes no hash; this md5 is the one against which torchvision checks downloads (datasets/voc.py)."""

SBD = Archive(
    urls=("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    file_name="benchmark.tgz",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    folder="benchmark_RELEASE/dataset",
    max_bytes=8 << 30,
)
"""1.4 GB. The md5 is torchvision's, too (datasets/sbd.py)."""

ARCHIVES = "archives"
"""The folder below the root in which archives are kept; it may be deleted afterwards."""


def prepare_voc(root: Path, download: Download, archive: Archive = VOC_2012) -> Path:
    """Return the folder VOC2012 below `root`, downloaded and unpacked first if it is not there."""
    try:
        home = voc_home(root)
    except DataError:
        home = root / "VOCdevkit" / "VOC2012"
        fetch_archive(archive, home, download, keep_in=root / ARCHIVES)
        say(f"VOC 2012 is in '{home}'; its archive in '{root / ARCHIVES}' may be deleted.")
    return home


def prepare_trainaug(
    root: Path, download: Download, voc: Archive = VOC_2012, sbd: Archive = SBD, expected: SplitFacts = TRAINAUG
) -> Path:
    """Return the folder VOC2012 with `trainaug` in it: VOC, then SBD into `root/SBD`, then its masks as PNG (make_trainaug)."""
    home = prepare_voc(root, download, voc)
    if (home / "ImageSets" / "Segmentation" / "trainaug.txt").is_file() and (home / "SegmentationClassAug").is_dir():
        return home
    if not (root / "SBD").is_dir():
        fetch_archive(sbd, root / "SBD", download, keep_in=root / ARCHIVES)
    make_trainaug(home, root / "SBD", expected)
    return home
