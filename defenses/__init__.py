"""Training methods: one file each. A defense is an objective; attack, schedule and data belong to the trainer."""

from defenses.awp import AWP
from defenses.base import Batch, Defense, Loss, Task
from defenses.done import DONE
from defenses.gairat import GAIRAT
from defenses.mail import MAIL
from defenses.mart import MART
from defenses.pgd_at import PGDAT
from defenses.srat import SRAT
from defenses.standard import Standard
from defenses.trades import TRADES
from defenses.weat import WEAT

__all__ = [
    "AWP",
    "DONE",
    "GAIRAT",
    "MAIL",
    "MART",
    "PGDAT",
    "SRAT",
    "TRADES",
    "WEAT",
    "Batch",
    "Defense",
    "Loss",
    "Standard",
    "Task",
]
