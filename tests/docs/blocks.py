"""The code blocks of the documentation: found, read, checked without running, and run.

A page is a story: its Python blocks share one namespace and its commands one folder, in their order. What a reader brings along
or cannot run is said where the block begins, so that nothing is left out in silence:

    ```python {given="model, x, y"}          names that the reader has; `GIVEN` has them for the tests
    ```bash {tiny="n=20"}                    run with `--set n=20` behind each `rbx run`, `train`, `rift` and `plan`
    ```bash {.norun reason="needs a GPU"}    not run; a test lists all reasons
    ```python {tiny="n=20"}                  with `run_suite(load_suite(NAME, settings=["n=20"])` for `run_suite(NAME`
    ```python {needs="runs/quickstart"}      with a (small) run of that suite in that folder
    ```bash {exit="1"}                       ends with this exit code
    ```python title="net.py"                 a file that later blocks use
    ```text {.output}                        what the block before it prints

Outputs may differ by rounding: numbers by a tenth of themselves or 3 units in percent (half an interval at n = 1,000), times
freely; a line of three dots stands for any lines. `python -m tests.docs.blocks docs/footguns.md` runs a page and writes its
outputs.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import symtable
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = ("robustbench_ext", "defenses", "detectors", "uq", "reports")
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w+-]*)[ \t]*(?P<info>.*?)[ \t]*$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: relative to the repository; line: of its first line of code, from 1.
        language, attributes, classes: of the line that opens it.
        text: without indentation and fence.
    """

    page: str
    line: int
    language: str
    attributes: dict[str, str]
    classes: frozenset[str]
    text: str

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is run, and not merely checked."""
        return "norun" not in self.classes

    @property
    def given(self) -> list[str]:
        """Names that the reader brings along."""
        return [name.strip() for name in self.attributes.get("given", "").split(",") if name.strip()]


def pages() -> list[Path]:
    """README.md and every written page of the documentation; generated pages exist in the built site alone."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        opening = _FENCE.match(lines[i])
        if opening is None:
            i += 1
            continue
        end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == opening["fence"])
        attributes, classes = _info(opening["info"])
        text = textwrap.dedent("\n".join(lines[i + 1 : end])) + "\n"
        where = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
        found.append(Block(where, i + 2, opening["language"], attributes, classes, text))
        i = end + 1
    return found


def _info(text: str) -> tuple[dict[str, str], frozenset[str]]:
    tokens = shlex.split(text.removeprefix("{").removesuffix("}"))
    attributes = dict(token.split("=", 1) for token in tokens if "=" in token)
    return attributes, frozenset(token[1:] for token in tokens if token.startswith("."))


# Checked without running


def problems_of_python(blocks: list[Block]) -> list[str]:
    """What can be known to be wrong with a page's Python: syntax, names, imports, keyword arguments of what is ours."""
    known = {*dir(builtins), "__name__", "__file__"}
    objects: dict[str, Any] = {}
    found = []
    for block in blocks:
        if block.language != "python":
            continue
        try:
            tree = ast.parse(block.text)
        except SyntaxError as error:
            found.append(f"{block.where}: {error}")
            continue
        table = symtable.symtable(block.text, block.where, "exec")
        defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
        scope = {*known, *block.given, *defined}
        found += [f"{block.where}: {name} is not defined" for name in sorted(_globals(table) - scope)]
        for statement in ast.walk(tree):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                found += [f"{block.where}: {problem}" for problem in _imported(statement, objects)]
        found += [f"{block.where}: {problem}" for problem in _keywords(tree, objects)]
        if "title" not in block.attributes:
            known |= {*block.given, *defined}
    return found


def _globals(table: symtable.SymbolTable) -> set[str]:
    """Names that are looked up in the page's namespace, here or in a function."""
    top = table.get_type() == "module"
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names.union(*(_globals(child) for child in table.get_children()))


def _imported(statement: ast.Import | ast.ImportFrom, objects: dict[str, Any]) -> Iterator[str]:
    """Import what is ours, and keep the objects by the names that the page gives them."""
    if isinstance(statement, ast.Import):
        for name in statement.names:
            if name.name.partition(".")[0] in OURS:
                module = importlib.import_module(name.name)
                objects[name.asname or name.name.partition(".")[0]] = (
                    module if name.asname else sys.modules[name.name.partition(".")[0]]
                )
        return
    if (statement.module or "").partition(".")[0] not in OURS:
        return
    module = importlib.import_module(statement.module or "")
    for name in statement.names:
        try:
            objects[name.asname or name.name] = getattr(module, name.name)
        except AttributeError:
            try:
                objects[name.asname or name.name] = importlib.import_module(f"{statement.module}.{name.name}")
            except ImportError:
                yield f"{statement.module} has no {name.name}"


def _keywords(tree: ast.AST, objects: dict[str, Any]) -> Iterator[str]:
    """Calls of our own functions and classes with a keyword that they do not take."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        target = objects.get(call.func.id) if isinstance(call.func, ast.Name) else None
        if target is None or not callable(target):
            continue
        parameters = inspect.signature(target).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in parameters:
                yield f"{target.__name__}() takes no {keyword.arg}; it takes {', '.join(parameters)}"


def commands(block: Block) -> list[list[str]]:
    """The commands of a block as words; lines of a `console` block without their prompt and output."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:  # pipes and && are commands of their own
            end = next((i for i, word in enumerate(words) if word in ("|", "&&", ";", ">", "||")), len(words))
            command = words[:end]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command:
                found.append(command)
            skip = words[end : end + 1] == [">"]
            words = words[end + (2 if skip else 1) :]
    return found


def problems_of_commands(block: Block) -> list[str]:
    """Commands, options, files and make targets that do not exist; nothing is run."""
    found = []
    for command in commands(block):
        words = _without_launcher(command)
        problem = None
        if words[0] == "rbx":
            problem = _rbx(words[1:])
        elif words[0] in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
            problem = _script(ROOT / words[1], words[2:]) if "/" in words[1] else None
        elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
            problem = _pytest(words)
        elif words[0] == "make":
            problem = _make(words[1:])
        if problem:
            found.append(f"{block.where}: {' '.join(command)}: {problem}")
    return found


def _without_launcher(command: list[str]) -> list[str]:
    """`srun python -m robustbench_ext.cli run` and the like as `rbx run`."""
    for i in range(len(command) - 1):
        if command[i] == "-m" and command[i + 1] == "robustbench_ext.cli":
            return ["rbx", *command[i + 2 :]]
    if "rbx" in command and command[0] in ("srun", "mpirun", "nohup", "time", "env"):
        return command[command.index("rbx") :]
    return command


def _rbx(words: list[str]) -> str | None:
    import click
    import typer.main

    from robustbench_ext.cli.main import app

    top = typer.main.get_command(app)
    if not words or words[0].startswith("-"):
        return None if set(words) <= {"--help", "--version"} else f"rbx takes no {words[0]}"
    command = top.commands.get(words[0])  # type: ignore[attr-defined]
    if command is None:
        return f"no command {words[0]}; there are {', '.join(sorted(top.commands))}"  # type: ignore[attr-defined]
    if "--help" in words:
        return None
    try:
        command.make_context(words[0], [w for w in words[1:] if w != "&"], resilient_parsing=False).close()
    except click.ClickException as error:
        return error.format_message()
    except Exception as error:  # typer brings a click of its own in some releases
        return str(getattr(error, "message", error))
    return None


def _script(file: Path, options: list[str]) -> str | None:
    if not file.is_file():
        return f"there is no {file.relative_to(ROOT)}"
    source = file.read_text(encoding="utf-8")
    missing = [o.partition("=")[0] for o in options if o.startswith("--") and f'"{o.partition("=")[0]}"' not in source]
    return f"takes no {', '.join(missing)}" if missing else None


def _pytest(words: list[str]) -> str | None:
    source = (ROOT / "robustbench_ext" / "pytest_plugin.py").read_text(encoding="utf-8")
    told = {word.partition("=")[0].removeprefix("--robust-") for word in words if word.startswith("--robust-")}
    missing = sorted(name for name in told if f"robust-{name}" not in source and f'"{name}"' not in source)
    return f"no option --robust-{', --robust-'.join(missing)}" if missing else None


def _make(words: list[str]) -> str | None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    unknown = [word for word in words if "=" not in word and not word.startswith("-") and word not in targets]
    return f"no target {', '.join(unknown)}" if unknown else None


def suite_of(text: str) -> dict[str, Any]:
    """A suite, or a part of one, completed so that it can be validated."""
    import yaml

    content = yaml.safe_load(text)
    return {
        "schema": 1,
        "name": "documented",
        "data": "digits",
        "models": [{"name": "mine", "spec": "small-cnn"}],
        **content,
    }


# Run


GIVEN = ("MyNetwork", "ids", "model", "test_data", "x", "x_held_out", "x_train", "y", "y_held_out", "y_train")


def given() -> dict[str, Any]:
    """What a reader has: a trained model and data. Built once, in seconds."""
    if not _GIVEN:
        import tempfile

        import torch

        from defenses import Standard
        from defenses.trainer import Architecture, Recipe, train
        from robustbench_ext import load_dataset, load_model

        data = load_dataset("digits")
        folder = Path(tempfile.mkdtemp()) / "model"
        recipe = Recipe(epochs=4, eps=0.1, validation_n=20, validation_steps=1, energy_n=0)
        train(Standard(), Architecture("small-cnn", data.shape, 10), data, recipe, folder)
        arrays = {s: (part.images(slice(None)), torch.from_numpy(part.labels)) for s, part in data.splits.items()}
        (x, y), (x_train, y_train), (x_held_out, y_held_out) = (arrays[s] for s in ("test", "train", "calibration"))
        _GIVEN.update(
            {
                "MyNetwork": torch.nn.Identity,
                "model": load_model(str(folder)).module.eval(),
                "test_data": (x, y),
                "ids": data["calibration"].ids,
                "x": x,
                "y": y,
                "x_train": x_train,
                "y_train": y_train,
                "x_held_out": x_held_out,
                "y_held_out": y_held_out,
            }
        )
    return dict(_GIVEN)


_GIVEN: dict[str, Any] = {}


@dataclass(frozen=True)
class Ran:
    """What a block printed, and the block with the output that the page shows, if it shows one."""

    block: Block
    printed: str
    shown: Block | None


def run(blocks: list[Block], folder: Path) -> Iterator[Ran]:
    """Run a page in a folder. An error, or an exit code that is not the stated one, is an AssertionError.

    The folder is the working directory afterwards, as for a reader.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    os.chdir(folder)
    for i, block in enumerate(blocks):
        if block.runs and "needs" in block.attributes:
            _small_run(folder / block.attributes["needs"])
        following = blocks[i + 1] if i + 1 < len(blocks) else None
        shown = following if following is not None and "output" in following.classes else None
        if "title" in block.attributes:
            file = folder / block.attributes["title"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "python" and block.runs:
            namespace.update({name: given()[name] for name in block.given})
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                text = "\n" * (block.line - 1) + _tiny_python(block)
                code = compile(text, block.page, "exec", dont_inherit=True)
                exec(code, namespace)
            yield Ran(block, said.getvalue(), shown)
        elif block.language in ("bash", "console") and block.runs:
            yield Ran(block, _shell(block), shown)


def _tiny_python(block: Block) -> str:
    if "tiny" not in block.attributes:
        return block.text
    settings = block.attributes["tiny"].split(";")
    small = re.sub(
        r"run_suite\((\"[\w-]+\")",
        rf"run_suite(__import__('robustbench_ext').load_suite(\1, settings={settings!r})",
        block.text,
    )
    if small == block.text:
        raise AssertionError(f"{block.where}: tiny, but there is no run_suite of a suite's name")
    return small


SMALL = ("n=40", "models.0.train.recipe.epochs=1", "models.1.train.recipe.epochs=1", "conditions.1.steps=5")


def _small_run(folder: Path) -> None:
    """A run of the suite that the folder is named after, of few samples and little training; made once."""
    import shutil
    import tempfile

    from reports import write_reports
    from robustbench_ext import load_suite, run_suite

    if folder.exists():
        return
    if folder.name not in _RUNS:
        _RUNS[folder.name] = Path(tempfile.mkdtemp()) / folder.name
        run_suite(load_suite(folder.name, settings=SMALL), _RUNS[folder.name], executor="serial")
        write_reports(_RUNS[folder.name])
    shutil.copytree(_RUNS[folder.name], folder)


_RUNS: dict[str, Path] = {}


def _shell(block: Block) -> str:
    text = block.text
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("$ "))
    for setting in block.attributes.get("tiny", "").split(";"):
        if setting.strip():
            lines = text.replace("\\\n", " ").splitlines()
            told = re.compile(r"^rbx (run|train|rift|plan) ")
            lines = [
                re.sub(r"( +#.*)?$", f" --set {setting.strip()}", x, count=1) if told.match(x) else x for x in lines
            ]
            text = "\n".join(lines)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    done = subprocess.run(["bash", "-e", "-c", text], capture_output=True, text=True, env=environment, timeout=900)
    expected = int(block.attributes.get("exit", 0))
    if done.returncode != expected:
        raise AssertionError(
            f"{block.where}: exit code {done.returncode}, expected {expected}\n{done.stdout}\n{done.stderr}"
        )
    return done.stdout


_TIME = re.compile(r"\d[\d,]*(?:\.\d+)? (?:ms|s|min|h)\b")
_NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def difference(shown: str, printed: str) -> str | None:
    """The first line that a page shows and that is not (near enough) what was printed; None where all are."""
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    at, free = 0, False
    for line in (x.rstrip() for x in shown.splitlines() if x.strip()):
        if line.strip() in ("...", "…"):
            free = True
            continue
        ends = range(at, len(lines)) if free else range(at, min(at + 1, len(lines)))
        hit = next((i for i in ends if _same(line, lines[i])), None)
        if hit is None:
            return f"shown: {line}\nprinted: {lines[at] if at < len(lines) else '(nothing more)'}"
        at, free = hit + 1, False
    if at < len(lines) and not free:
        return f"printed, and not shown: {lines[at]}"
    return None


def _same(shown: str, printed: str) -> bool:
    shown, printed = _TIME.sub("TIME", shown), _TIME.sub("TIME", printed)
    if _NUMBER.sub("#", shown).split() != _NUMBER.sub("#", printed).split():
        return False
    for a, b in zip(_NUMBER.finditer(shown), _NUMBER.finditer(printed), strict=True):
        x, y = (float(m.group().replace(",", "").replace("−", "-")) for m in (a, b))
        rounding = 10.0 ** -_decimals(a.group())
        if abs(x - y) > max(0.1 * max(abs(x), abs(y)), 3.0 if "%" in shown else 0.0) + rounding:
            return False
    return True


def _decimals(number: str) -> int:
    return len(number.partition(".")[2])


def update(page: Path) -> None:
    """Run a page and write what its blocks print into the outputs that it shows."""
    import tempfile

    text = page.read_text(encoding="utf-8").splitlines()
    made: list[tuple[Block, list[str]]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for ran in run(read(page), Path(folder)):
                print(f"{ran.block.where}\n{ran.printed}", flush=True)
                if ran.shown is not None and "..." not in ran.shown.text:
                    made.append((ran.shown, [line.rstrip() for line in ran.printed.rstrip().splitlines()]))
        except Exception as error:  # what ran is written all the same
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os.chdir(ROOT)
    for block, lines in reversed(made):
        start = block.line - 1
        length = (
            len(block.text.splitlines())
            if block.text.strip()
            else next(j for j, line in enumerate(text[start:]) if line.strip().startswith("```"))
        )
        text[start : start + length] = lines
    page.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        update(Path(argument).resolve())
