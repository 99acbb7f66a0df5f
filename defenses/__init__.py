"""Training methods: one file each. A defense is an objective; attack, schedule and data belong to the trainer."""

from defenses.base import Batch, Defense, Loss
from defenses.pgd_at import PGDAT
from defenses.standard import Standard
from defenses.trades import TRADES

__all__ = ["PGDAT", "TRADES", "Batch", "Defense", "Loss", "Standard"]
