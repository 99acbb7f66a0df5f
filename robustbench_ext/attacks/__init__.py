"""Attacks: one file each, under one sealed base class; `rbx list attacks` names them all."""

from robustbench_ext.attacks.apgd import APGDCE
from robustbench_ext.attacks.base import Attack, AttackResult, build_attack
from robustbench_ext.attacks.fgsm import FGSM
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.attacks.threat import Threat

__all__ = ["APGDCE", "FGSM", "PGD", "Attack", "AttackResult", "Threat", "build_attack"]
