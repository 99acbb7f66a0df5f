"""Benchmarks of domain generalization: PACS and Office-Home, one domain, several, or all but some.

Li, Yang, Song, Hospedales: *Deeper, broader and artier domain generalization*, ICCV 2017, arXiv 1710.03077.
Venkateswara, Eusebio,
Chakraborty, Panchanathan: *Deep hashing network for unsupervised domain adaptation*, CVPR 2017, arXiv 1706.07522.

Neither has a test split of its own (PACS's lists test on a whole domain, training images included): a domain is cut
60/20/20 by class, as for `domains:`. No checksums are published; each domain's number of images is checked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robustbench_ext.data.base import SPLITS, Dataset, Subset
from robustbench_ext.data.digits_dg import chosen_domains, joined
from robustbench_ext.data.named.folders import check_count, class_folders, sorted_split
from robustbench_ext.data.named.imaging import FILTERS, Preparation
from robustbench_ext.data.named.options import Options
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.named_data import NAMED, Named, find

SIZE = 224


def pacs(rest: str = "") -> Dataset:
    """`pacs:photo`, `pacs:art_painting+cartoon`, `pacs:without-sketch`: seven classes, resized to 3x224x224.

    Options: `size=227` (the published one), `interpolation=bilinear` (or bicubic), `root=FOLDER`.
    """
    return _domains(NAMED["pacs"], rest)


def office_home(rest: str = "") -> Dataset:
    """`office-home:art`, `clipart`, `product`, `real-world`, A+B, `without-A`: 65 classes, resized to 3x224x224.

    Options as of `pacs`; images have all sizes, so there is none that leaves them as they are.
    """
    return _domains(NAMED["office-home"], rest)


def _domains(named: Named, rest: str) -> Dataset:
    options = Options(named.name, rest, ("size", "interpolation"))
    if not options.argument:
        domains = ", ".join(named.images)
        raise ConfigError(f"data '{options.spec}': expected {named.name}:DOMAIN, of {domains}, or without-DOMAIN")
    names = chosen_domains(options.argument, tuple(named.images), named.name)
    prepare = Preparation(
        options.number("size", SIZE), "square", interpolation=options.choice("interpolation", FILTERS)
    )
    found = find(named, options.root)
    classes = tuple(folder.name for folder in class_folders(found[names[0]]))
    if len(classes) != named.classes:
        raise DataError(f"{found[names[0]]}: {len(classes)} folders of classes, but {named.title} has {named.classes}")
    source = f"{named.title}, cut 60/20/20; {prepare}; checked by numbers and classes"
    made = {name: _domain(named, name, found[name], classes, prepare, source) for name in names}
    return joined(options.name, made)


def _domain(
    named: Named, name: str, folder: Path, classes: tuple[str, ...], prepare: Preparation, source: str
) -> Dataset:
    whole = sorted_split(folder, "", classes, prepare)
    check_count(len(whole), named.images[name], f"{named.title}'s domain {name}", folder)
    bounds = (0, round(0.6 * len(whole)), round(0.8 * len(whole)), len(whole))
    splits = {part: Subset(whole, np.arange(*bounds[i : i + 2])) for i, part in enumerate(SPLITS)}
    return Dataset(name, splits, classes, (3, prepare.size, prepare.size), source)
