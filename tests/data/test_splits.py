"""Splits: by list, or by a seeded fraction that two machines agree on without exchanging anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deeplabzoo.data.dataset import Subset, build_dataset, hold_out, read_list, split_hash
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import DataError, UsageError

names = st.lists(st.text("abcdef0123_", min_size=1, max_size=8), min_size=2, max_size=60, unique=True)
fractions = st.floats(0.01, 0.99)


@given(names, fractions, st.integers(0, 9), st.randoms())
def test_the_held_out_part_depends_on_names_and_seed_alone(stems, fraction, seed, shuffler) -> None:
    """The order in which a file system lists pictures differs between machines; the split must not."""
    held = hold_out(stems, fraction, seed)
    shuffled = list(stems)
    shuffler.shuffle(shuffled)
    assert hold_out(shuffled, fraction, seed) == held
    assert 1 <= len(held) < len(stems)
    assert abs(len(held) - fraction * len(stems)) <= 1
    assert held < set(stems)


@given(names, fractions)
def test_one_more_image_moves_at_most_one_across_the_line(stems, fraction) -> None:
    before, after = hold_out(stems, fraction), hold_out([*stems, "new!"], fraction)
    assert len((before ^ after) - {"new!"}) <= 1


def test_seeds_choose_differently() -> None:
    stems = [f"{i:03d}" for i in range(100)]
    assert hold_out(stems, 0.2, seed=0) != hold_out(stems, 0.2, seed=1)


def test_impossible_fractions_are_refused() -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        hold_out(["a", "b"], 1.0)
    with pytest.raises(UsageError, match="two images"):
        hold_out(["a"], 0.5)


def test_a_subset_keeps_the_order_of_its_list() -> None:
    data = SyntheticShapes("train", count=5)
    subset = Subset(data, ["train_00003", "train_00001"], "mine")
    assert [sample.name for sample in (subset[0], subset[1])] == ["train_00003", "train_00001"]
    assert (subset.read_labels(1) == data[1].labels).all()
    with pytest.raises(DataError, match=r"'train_0007'.*Did you mean"):
        Subset(data, ["train_0007"], "mine")
    with pytest.raises(DataError, match="empty"):
        Subset(data, [], "mine")


def test_lists_are_read_with_or_without_suffixes(tmp_path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("a.jpg\n\nframe.0001 \nb\n", encoding="utf-8")
    assert read_list(file) == ["a", "frame.0001", "b"]
    file.write_text("a\nb\na\n")
    with pytest.raises(DataError, match="'a' more than once"):
        read_list(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_list(file)


def test_the_hash_is_of_the_sorted_names() -> None:
    """Anyone can repeat it: `printf 'a\\nb' | sha256sum`."""
    assert split_hash(["b", "a"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"


@pytest.fixture
def unsplit(tmp_path):
    for sub in ("images", "masks"):
        (tmp_path / sub).mkdir()
    for i in range(10):
        Image.new("RGB", (4, 3)).save(tmp_path / f"images/p{i}.jpg")
        Image.new("L", (4, 3), i % 2).save(tmp_path / f"masks/p{i}.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    return tmp_path


def test_a_folder_without_splits_gets_a_fraction_by_name(unsplit) -> None:
    """train and val cover it once; adding to nothing but names; and it is said."""
    train, val = (build_dataset("folder", unsplit, split).names for split in ("train", "val"))
    assert len(val) == 2
    assert sorted((*train, *val)) == [f"p{i}" for i in range(10)]
    assert build_dataset("folder", unsplit, "val").names == val
    assert build_dataset("folder", unsplit, "all").names == tuple(f"p{i}" for i in range(10))


def test_lists_split_a_folder(unsplit) -> None:
    """Lists go before the fraction, and once there is one the others have to be there, too."""
    (unsplit / "train.txt").write_text("p3.jpg\np1.jpg\n")
    assert build_dataset("folder", unsplit, "train").names == ("p3", "p1")
    with pytest.raises(DataError, match="train, all"):
        build_dataset("folder", unsplit, "val")
    (unsplit / "val.txt").write_text("p9\np99\n")
    with pytest.raises(DataError, match="p99"):
        build_dataset("folder", unsplit, "val")


def test_a_split_can_be_written_in_parts(tmp_path) -> None:
    """A percentage and its rest, a pattern and its rest, and sums of these: every image once, read from its own folder."""
    for split, stems in (("train", ["a1", "a2", "b1", "b2"]), ("val", ["c1"])):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for place, stem in enumerate(stems):
            Image.new("RGB", (4, 4), (10 * place, 0, len(split))).save(tmp_path / split / "images" / f"{stem}.png")
            Image.new("L", (4, 4), place % 2).save(tmp_path / split / "masks" / f"{stem}.png")

    def parts(split: str):
        return build_dataset("folder", tmp_path, split, classes=("no", "yes"))

    assert parts("train[a*]").names == ("a1", "a2")
    assert parts("train[!a*]").names == ("b1", "b2")
    assert parts("train[a*]").split == "train[a*]"
    held, rest = parts("train[25%]"), parts("train[!25%]")
    assert (len(held), len(rest)) == (1, 3)
    assert sorted(held.names + rest.names) == ["a1", "a2", "b1", "b2"]
    both = parts("train[!a*]+val")
    assert both.names == ("b1", "b2", "c1")
    assert [both[place].image[0, 0].tolist() for place in range(3)] == [[20, 0, 5], [30, 0, 5], [0, 0, 3]]
    assert [int(both.read_labels(place)[0, 0]) for place in range(3)] == [0, 1, 0]
    with pytest.raises(DataError, match="would be empty"):
        parts("train[z*]")
    with pytest.raises(
        DataError, match=r"Split 'train\+train\[a\*\]' holds 2 images in more than one of its parts, such as 'a1'"
    ):
        parts("train+train[a*]")
    with pytest.raises(UsageError, match="between 0 and 1"):
        parts("train[100%]")
    with pytest.raises(UsageError, match=r"The split 'train\[a' cannot be read"):
        parts("train[a")
