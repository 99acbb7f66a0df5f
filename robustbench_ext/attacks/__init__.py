"""Attacks: one file each, under one sealed base class; `rbx list attacks` names them all."""

from robustbench_ext.attacks.apgd import APGDCE, APGDDLR, APGDT
from robustbench_ext.attacks.base import Attack, AttackResult, Passes, build_attack
from robustbench_ext.attacks.cw import CW
from robustbench_ext.attacks.ddn import DDN
from robustbench_ext.attacks.deepfool import DeepFool
from robustbench_ext.attacks.ensemble import Standard
from robustbench_ext.attacks.fab import FABT
from robustbench_ext.attacks.fgsm import FGSM
from robustbench_ext.attacks.fmn import FMN
from robustbench_ext.attacks.mifgsm import MIFGSM
from robustbench_ext.attacks.noise import RandomNoise
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.attacks.spatial import Spatial
from robustbench_ext.attacks.square import Square
from robustbench_ext.attacks.threat import Threat

__all__ = [
    "APGDCE",
    "APGDDLR",
    "APGDT",
    "CW",
    "DDN",
    "FABT",
    "FGSM",
    "FMN",
    "MIFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "DeepFool",
    "Passes",
    "RandomNoise",
    "Spatial",
    "Square",
    "Standard",
    "Threat",
    "build_attack",
]
