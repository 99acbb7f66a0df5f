"""Published datasets that have a name here: how they may lie on a disk, and whether they do. Imports nothing heavy.

They are looked for in $RBX_DATA (default `./data`): in a folder of the set's name, however it is spelt (`cifar10`,
`CIFAR-10`), and some in $RBX_DATA itself, as torchvision puts them. A `Layout` is a way in which people have a set;
the first one that is complete is taken, and what is nearest to complete is named in the error otherwise. Readers are
in `robustbench_ext.data.named`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from robustbench_ext.errors import DataError
from robustbench_ext.named_code import split_source
from robustbench_ext.own import is_own
from robustbench_ext.settings import DATA


@dataclass(frozen=True)
class Layout:
    """One way in which a dataset lies in its folder.

    Attributes:
        reader: what a reader knows it by.
        says: one line for errors and documents.
        needs: a name for each file, and where it may be, relative to the folder; a folder where it ends in /.
        anywhere: whether it may lie in $RBX_DATA itself, its names being unmistakable.
    """

    reader: str
    says: str
    needs: Mapping[str, tuple[str, ...]]
    anywhere: bool = False


@dataclass(frozen=True)
class Named:
    """A published dataset.

    Attributes:
        name: in a suite.
        title, page, licence: as its authors say; an empty licence where they say none.
        images: how many each published part has (of PACS and Office-Home: each domain).
        classes: their number; 0 where it depends on the argument.
        layouts: the accepted ones, the best first.
        aliases: further names of its folder; case, hyphens, underscores and spaces make no difference.
        fetched_by: `torchvision:CLASS` or `medmnist`, whose own downloader `rbx fetch` calls; empty where there is
            none.
        argument: what follows the name, such as DOMAIN; empty where nothing does.
    """

    name: str
    title: str
    page: str
    licence: str
    images: Mapping[str, int]
    classes: int
    layouts: tuple[Layout, ...]
    aliases: tuple[str, ...] = ()
    fetched_by: str = ""
    argument: str = ""


@dataclass(frozen=True)
class Found:
    """Where a dataset lies: its folder, the layout, and the path of each thing that the layout needs."""

    folder: Path
    layout: Layout
    paths: Mapping[str, Path] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Path:
        return self.paths[name]


def data_folder() -> Path:
    """$RBX_DATA, by default `./data`."""
    return Path(os.environ.get(DATA) or "data").expanduser()


def names_dataset(spec: str) -> bool:
    """Whether a name in a suite that might be something else too (an outlier set) is that of a dataset."""
    return spec.partition("#")[0] in NAMED or (":" in spec and not names_code(spec))


def names_code(spec: str) -> bool:
    """Whether a name of data or of outliers is that of a user's own code, `file.py:make_data#n=500`."""
    from robustbench_ext.catalog import DATASETS

    name = spec.partition("#")[0]
    return split_source(name)[0] not in DATASETS and is_own(name)


def _plain(name: str) -> str:
    return re.sub(r"[-_ .]", "", name).lower()


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        return []


def _folders(named: Named, root: Path | None) -> Iterator[tuple[Path, bool]]:
    """Where to look, and whether the place is the set's own: the given folder, or those of its name and $RBX_DATA
    itself.
    """
    if root is not None:
        yield root, True
        return
    wanted = {_plain(name) for name in (named.name, *named.aliases)}
    home = data_folder()
    for child in _subfolders(home):
        if _plain(child.name) in wanted:
            yield child, True
    yield home, False


def _at(folder: Path, layout: Layout) -> dict[str, Path]:
    """What of a layout is there. Nothing but `is_file` and `is_dir` is asked: names may differ in case on some
    systems.
    """
    there = {}
    for name, places in layout.needs.items():
        for place in places:
            path = folder / place
            if path.is_dir() if place.endswith("/") else path.is_file():
                there[name] = path
                break
    return there


def find(named: Named, root: Path | None = None) -> Found:
    """Where the dataset lies on this machine.

    Args:
        root: its own folder; by default it is looked for in $RBX_DATA.

    Raises:
        DataError: it is not there, or not all of it; with what to put where.
    """
    nearest: tuple[int, Path, Layout, dict[str, Path]] | None = None
    for folder, own in _folders(named, root):
        for layout in named.layouts:
            if not (own or layout.anywhere):
                continue
            there = _at(folder, layout)
            if len(there) == len(layout.needs):
                return Found(folder, layout, there)
            if there and (nearest is None or len(there) > nearest[0]):
                nearest = (len(there), folder, layout, there)
    raise DataError(_instructions(named, root, nearest))


def medmnist_folders() -> list[Path]:
    """Where files of MedMNIST are looked for: in $RBX_DATA, and where the package medmnist puts them."""
    home = data_folder()
    with suppress(RuntimeError):  # a user without a home
        return [home / "medmnist", home / "MedMNIST", home, Path.home() / ".medmnist"]
    return [home / "medmnist", home / "MedMNIST", home]


def lacking(named: Named, root: Path | None = None) -> str | None:
    """None where the dataset is there (as far as names say); else in a few words what is missing."""
    if named.name == "medmnist":
        there = any(True for folder in medmnist_folders() for _ in folder.glob("*mnist*.npz"))
        return None if there else f"no *mnist*.npz in {medmnist_folders()[0].absolute()} or ~/.medmnist"
    try:
        find(named, root)
    except DataError as error:
        first = str(error).split("\n", 1)[0]
        return first.partition(": ")[2]
    return None


def _instructions(named: Named, root: Path | None, nearest: tuple[int, Path, Layout, dict[str, Path]] | None) -> str:
    home = (root or data_folder()).resolve()
    if nearest is None:
        head = f"not found in {home}"
    else:
        _, folder, layout, there = nearest
        beside = {path.parent for path in there.values()}
        missing = [
            next((place for place in places if (folder / place).parent in beside), places[0])
            for name, places in layout.needs.items()
            if name not in there
        ]
        head = f"incomplete: {folder.resolve()} lacks {', '.join(missing)}"
    lines = [f"data '{named.name}': {head}"]
    lines.append(f"{named.title} ({named.page}) may lie in {home if root else home / named.name} as")
    lines += [f"  {layout.says}" for layout in named.layouts]
    lines.append(
        "Set RBX_DATA to the folder that holds it"
        + (f", or fetch it: rbx fetch {named.name}{':NAME' if named.argument else ''}" if named.fetched_by else "")
        + "."
    )
    return "\n".join(lines)


# The table ------------------------------------------------------------------------------------------------------------


def _under(prefixes: tuple[str, ...], *names: str) -> dict[str, tuple[str, ...]]:
    """Each name under each of the prefixes."""
    return {name.rstrip("/"): tuple(prefix + name for prefix in prefixes) for name in names}


_IMAGES = Layout(
    "images",
    "train/CLASS/*.png and test/CLASS/*.png (its images have ids of their own: published corruptions do not fit them)",
    {"train": ("train/", "training/"), "test": ("test/", "testing/")},
)


def _cifar(number: int, title: str, classes: int, train: tuple[str, ...], test: str, meta: str) -> Named:
    python, binary = (f"cifar-{number}-{kind}/" for kind in ("batches-py", "batches-bin"))
    names = [*(f"{name}.bin" for name in train), f"{test}.bin"]
    if number == 100:
        python, binary = "cifar-100-python/", "cifar-100-binary/"
    listed = f"{train[0]} ... {train[-1]}" if len(train) > 1 else train[0]
    dots = f"{names[0]} ..." if len(names) > 2 else names[0]
    words = "batches.meta.txt" if number == 10 else "fine_label_names.txt"
    return Named(
        f"cifar{number}",
        title,
        "www.cs.toronto.edu/~kriz/cifar.html",
        "",
        {"train": 50_000, "test": 10_000},
        classes,
        (
            Layout(
                "python",
                f"{python} with {listed}, {test}, {meta} (the python version, unpacked)",
                _under((python, ""), *train, test, meta),
                anywhere=True,
            ),
            Layout(
                "archive",
                f"cifar-{number}-python.tar.gz (the same archive as it was downloaded)",
                {"archive": (f"cifar-{number}-python.tar.gz",)},
                anywhere=True,
            ),
            Layout(
                "binary",
                f"{binary} with {dots}, {names[-1]}, {words} (the binary version, unpacked)",
                _under((binary, ""), *names, words),
                anywhere=True,
            ),
            _IMAGES,
        ),
        (python.rstrip("/"), binary.rstrip("/"), f"cifar-{number}-python", f"cifar-{number}-binary"),
        f"torchvision:CIFAR{number}",
    )


def _idx(name: str, title: str, page: str, licence: str, torchvision: str) -> Named:
    prefixes = ("", "raw/", f"{torchvision}/raw/", "data/fashion/")
    needs = {}
    for part in ("train", "t10k"):
        for kind, digit in (("images", 3), ("labels", 1)):
            stem, dotted = f"{part}-{kind}-idx{digit}-ubyte", f"{part}-{kind}.idx{digit}-ubyte"
            spelt = (stem, f"{stem}.gz", dotted, f"{dotted}.gz", f"{stem}/{stem}", f"{dotted}/{dotted}")
            needs[f"{part}-{kind}"] = tuple(prefix + each for prefix in prefixes for each in spelt)
    says = (
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, each with or "
        "without .gz, there or in raw/ (as torchvision has them)"
    )
    return Named(
        name,
        title,
        page,
        licence,
        {"train": 60_000, "test": 10_000},
        10,
        (Layout("idx", says, needs), _IMAGES),
        (torchvision,),
        f"torchvision:{torchvision}",
    )


_PACS = ("", "images/", "kfold/", "PACS/")
_ILSVRC = ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/", "ILSVRC2012/")
_TINY = ("", "tiny-imagenet-200/")

NAMED: dict[str, Named] = {
    named.name: named
    for named in (
        _cifar(
            10,
            "CIFAR-10",
            10,
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            "batches.meta",
        ),
        _cifar(100, "CIFAR-100", 100, ("train",), "test", "meta"),
        Named(
            "svhn",
            "SVHN",
            "ufldl.stanford.edu/housenumbers",
            "non-commercial",
            {"train": 73_257, "test": 26_032},
            10,
            (
                Layout(
                    "mat",
                    "train_32x32.mat, test_32x32.mat (format 2, cropped digits)",
                    _under(("", "SVHN/"), "train_32x32.mat", "test_32x32.mat"),
                    anywhere=True,
                ),
                _IMAGES,
            ),
            ("housenumbers",),
            "torchvision:SVHN",
        ),
        Named(
            "stl10",
            "STL-10",
            "cs.stanford.edu/~acoates/stl10",
            "",
            {"train": 5_000, "test": 8_000},
            10,
            (
                Layout(
                    "binary",
                    "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin (the archive, unpacked)",
                    _under(("stl10_binary/", ""), "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"),
                    anywhere=True,
                ),
                _IMAGES,
            ),
            ("stl10_binary",),
            "torchvision:STL10",
        ),
        _idx("mnist", "MNIST", "yann.lecun.com/exdb/mnist", "", "MNIST"),
        _idx("fashion-mnist", "Fashion-MNIST", "github.com/zalandoresearch/fashion-mnist", "MIT", "FashionMNIST"),
        Named(
            "tiny-imagenet",
            "Tiny ImageNet",
            "cs231n.stanford.edu/tiny-imagenet-200.zip",
            "",
            {"train": 100_000, "val": 10_000},
            200,
            (
                Layout(
                    "folders",
                    "train/WNID/images/*.JPEG and val/ with val_annotations.txt and images/ (the archive, unpacked), or "
                    "val/WNID/*.JPEG (sorted into classes)",
                    _under(_TINY, "train/", "val/"),
                ),
            ),
            ("tiny-imagenet-200", "tinyimagenet200"),
        ),
        Named(
            "imagenet",
            "ImageNet (ILSVRC 2012)",
            "image-net.org",
            "non-commercial research",
            {"train": 1_281_167, "val": 50_000},
            1000,
            (
                Layout(
                    "folders",
                    "train/WNID/*.JPEG and val/WNID/*.JPEG (as torchvision has them), or Kaggle's ILSVRC/Data/CLS-LOC with "
                    "LOC_val_solution.csv, or val/*.JPEG beside ILSVRC2012_devkit_t12/ or meta.bin; train/ may be missing, "
                    "with imagenet#calibration=val or none",
                    {"val": tuple(p + v for p in _ILSVRC for v in ("val/", "validation/", "valid/"))},
                ),
            ),
            ("ilsvrc", "ilsvrc2012", "imagenet1k", "imagenet2012", "imagenet-object-localization-challenge"),
        ),
        Named(
            "pacs",
            "PACS",
            "arxiv.org/abs/1710.03077",
            "",
            {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
            7,
            (
                Layout(
                    "domains",
                    "art_painting/CLASS/*, cartoon/CLASS/*, photo/CLASS/*, sketch/CLASS/*, there or in images/ or kfold/",
                    {
                        "art_painting": tuple(p + d for p in _PACS for d in ("art_painting/", "art/")),
                        **_under(_PACS, "cartoon/", "photo/", "sketch/"),
                    },
                ),
            ),
            ("pacs_data",),
            argument="DOMAIN",
        ),
        Named(
            "office-home",
            "Office-Home",
            "hemanthdv.github.io/officehome-dataset",
            "non-commercial research",
            {"art": 2427, "clipart": 4365, "product": 4439, "real-world": 4357},
            65,
            (
                Layout(
                    "domains",
                    "Art/CLASS/*, Clipart/CLASS/*, Product/CLASS/*, Real World/CLASS/*, there or in "
                    "OfficeHomeDataset_10072016/",
                    {
                        name: tuple(
                            prefix + folder + "/"
                            for prefix in ("", "OfficeHomeDataset_10072016/", "images/")
                            for folder in folders
                        )
                        for name, folders in {
                            "art": ("Art", "art"),
                            "clipart": ("Clipart", "clipart"),
                            "product": ("Product", "product"),
                            "real-world": ("Real World", "RealWorld", "Real_World", "Real", "real_world"),
                        }.items()
                    },
                ),
            ),
            ("OfficeHomeDataset_10072016", "office_home_dg"),
            argument="DOMAIN",
        ),
        Named(
            "medmnist",
            "MedMNIST v2",
            "medmnist.com",
            "CC BY 4.0 (DermaMNIST: CC BY-NC 4.0)",
            {},
            0,
            (Layout("npz", "NAME.npz, or NAME_64.npz, NAME_128.npz, NAME_224.npz (also in ~/.medmnist)", {}),),
            (".medmnist",),
            "medmnist",
            "NAME",
        ),
    )
}
