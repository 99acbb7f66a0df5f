"""Training methods: one file each. A defense is an objective; attack, schedule and data belong to the trainer."""

from defenses.advstyle import AdvStyle, AdvStyleModule
from defenses.awp import AWP
from defenses.balanced import ClassPrior
from defenses.base import Batch, Defense, Loss, Task
from defenses.done import DONE
from defenses.dsu import DSU, DSUModule
from defenses.gairat import GAIRAT
from defenses.gradient_mix import GradientMix
from defenses.mail import MAIL
from defenses.mart import MART
from defenses.mixstyle import MixStyle, MixStyleModule
from defenses.mixup import Mixup
from defenses.padain import PAdaIN, PAdaINModule
from defenses.pgd_at import PGDAT
from defenses.self_distill import SelfDistill
from defenses.srat import SRAT
from defenses.standard import ERM, Standard
from defenses.style import StyleModule, place_style
from defenses.trades import TRADES
from defenses.weat import WEAT

__all__ = [
    "AWP",
    "DONE",
    "DSU",
    "ERM",
    "GAIRAT",
    "MAIL",
    "MART",
    "PGDAT",
    "SRAT",
    "TRADES",
    "WEAT",
    "AdvStyle",
    "AdvStyleModule",
    "Batch",
    "ClassPrior",
    "DSUModule",
    "Defense",
    "GradientMix",
    "Loss",
    "MixStyle",
    "MixStyleModule",
    "Mixup",
    "PAdaIN",
    "PAdaINModule",
    "SelfDistill",
    "Standard",
    "StyleModule",
    "Task",
    "place_style",
]
