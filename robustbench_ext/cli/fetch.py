"""`rbx fetch`: have a published dataset downloaded by the library that publishes it. Nothing else here downloads
data.
"""

from __future__ import annotations

import typer

from robustbench_ext.cli.console import say
from robustbench_ext.errors import ConfigError, unknown_name


def fetch(
    name: str = typer.Argument(help="cifar10, cifar100, svhn, stl10, mnist, fashion-mnist, or medmnist:NAME."),
    size: int = typer.Option(28, help="Pixels, of medmnist:NAME: 28, 64, 128 or 224."),
) -> None:
    """Download a dataset into $RBX_DATA (default ./data) with torchvision's or medmnist's own downloader.

    The others, such as imagenet, have terms to be accepted or no downloader: `rbx list datasets` says what is
    missing, and an attempt to load them what to put where. A download is checked when it is first loaded.

    Example: rbx fetch cifar10
    """
    from robustbench_ext.data.named.fetching import fetch_dataset
    from robustbench_ext.named_data import NAMED, data_folder

    base, _, argument = name.partition(":")
    known = [named.name for named in NAMED.values() if named.fetched_by]
    if base not in known:
        if base in NAMED:
            named = NAMED[base]
            raise ConfigError(
                f"rbx fetch {name}: no library downloads {named.title}. Get it from {named.page} and put it into "
                f"{data_folder().absolute() / named.name} as\n"
                + "\n".join(f"  {layout.says}" for layout in named.layouts)
            )
        raise ConfigError(f"rbx fetch {name}: {unknown_name('dataset', base, known)}")
    if bool(argument) != bool(NAMED[base].argument):
        raise ConfigError(f"rbx fetch {name}: expected {base}{':NAME' if NAMED[base].argument else ''}")
    say(f"fetching {NAMED[base].title} ({NAMED[base].page}) into {data_folder().absolute()}")
    fetch_dataset(NAMED[base], argument, size)
    say(f"done; use it as --data {name}" + (f"#size={size}" if argument and size != 28 else ""))
