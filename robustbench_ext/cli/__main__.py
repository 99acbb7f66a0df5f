"""`python -m robustbench_ext.cli` is `rbx`: what launchers that take a module (accelerate, torchrun) are given."""

from robustbench_ext.cli.main import run

run()
