"""What a user installs: the contents of wheel and sdist, versions and extras, what importing costs, and a first run."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("robustbench_ext", "defenses", "detectors", "uq", "reports")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of_the_packages() -> set[str]:
    """What git knows of the five packages, or would take in."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PACKAGES)
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


# --- what is shipped


def test_all_files_of_the_packages_are_shipped_and_no_others() -> None:
    # In a process of its own: setuptools changes the interpreter that imports it (distutils, warnings).
    script = """
        import sys
        from setuptools import Distribution
        dist = Distribution()
        dist.parse_config_files()
        dist.script_name = "setup.py"
        command = dist.get_command_obj("build_py")
        command.ensure_finalized()
        modules = [file for _, _, file in command.find_all_modules()]
        data = [f"{folder}/{name}" for _, folder, _, names in command._get_data_files() for name in names]
        sys.stdout.write("\\0".join(name.replace("\\\\", "/") for name in modules + data))
    """
    pytest.importorskip("setuptools")
    shipped = set(run(sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)).split("\0"))
    assert shipped == files_of_the_packages()
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped
    assert {Path(name).suffix for name in shipped} == {".py", ".yaml", ".j2", ".css", ".js", ".typed"}, (
        "compiled parts?"
    )


# --- versions and extras


def test_minimum_constraints_are_the_lower_bounds(project: dict[str, Any]) -> None:
    expected = []
    for text in project["dependencies"]:
        requirement = Requirement(text)
        (bound,) = requirement.specifier  # one lower bound each, nothing capped
        assert bound.operator == ">=", text
        expected.append(f"{requirement.name}=={bound.version}")
    lines = (ROOT / "constraints/minimum.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == expected


def test_extras_that_messages_and_documents_name_are_there(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    named = set()
    for top in (*PACKAGES, "docs", "README.md"):
        files = (
            [ROOT / top]
            if (ROOT / top).is_file()
            else [f for f in (ROOT / top).rglob("*") if f.suffix in (".py", ".md")]
        )
        for file in files:
            for names in re.findall(r"robustbench-ext\[([a-z,]+)\]", file.read_text(encoding="utf-8")):
                named |= {(name, file.name) for name in names.split(",")}
    assert {name for name, _ in named} >= {"train", "uq", "dask"}, "the pattern finds what is known to be there"
    assert [pair for pair in sorted(named) if pair[0] not in extras] == []


def test_all_is_every_extra_for_users(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]

    def members(extra: str) -> set[str]:
        found = set()
        for requirement in map(Requirement, extras[extra]):
            if requirement.name == project["name"]:
                found |= {name for inner in requirement.extras for name in members(inner) | {inner}}
        return found

    # torchattacks pins an old requests, the others are for work on this project.
    assert members("all") == set(extras) - {"all", "torchattacks", "docs", "test", "dev"}
    heavy = {"ray", "hf", "mlflow", "wandb", "robustbench"}
    assert members("integrations") >= heavy
    assert not members("dev") & heavy


def test_every_third_party_import_of_the_core_is_declared(project: dict[str, Any]) -> None:
    """What is imported at the top of a module, thus whenever it is used, has to be in the default set."""
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml", "mpl_toolkits": "matplotlib", "PIL": "pillow"}
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    missing = set()
    for name in files_of_the_packages():
        if not name.endswith(".py") or name == "robustbench_ext/pytest_plugin.py":
            continue
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - set(PACKAGES):
                if canonicalize_name(names.get(top, top)) not in declared:
                    missing.add((top, name))
    plugin = {
        ("pytest", name) for _, name in missing if name.startswith("robustbench_ext/gate/")
    }  # loaded by pytest alone
    assert missing - plugin == set()


# --- what importing costs

HEAVY = ("torch", "torchvision", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "mlxtend")


@pytest.mark.parametrize(
    "code, more",
    [
        ("import robustbench_ext", ("pydantic", "typer", "rich", "yaml", "jinja2")),
        ("import robustbench_ext as r; r.parse_number('8/255')", ("pydantic", "typer", "rich", "yaml", "jinja2")),
        ("import robustbench_ext.pytest_plugin", ("pydantic", "typer", "yaml", "jinja2")),
        ("import sys; sys.argv = ['rbx', '--help']; COMMAND", ()),
        ("import sys; sys.argv = ['rbx', '--version']; COMMAND", ()),
        ("import sys; sys.argv = ['rbx', 'run', '--help']; COMMAND", ()),
        ("import sys; sys.argv = ['rbx', 'list']; COMMAND", ()),
    ],
)
def test_nothing_heavy_is_imported(code: str, more: tuple[str, ...]) -> None:
    command = (
        "from robustbench_ext.cli.main import run\ntry: run()\nexcept SystemExit as end: assert not end.code, end.code"
    )
    script = code.replace("; COMMAND", "\n" + command)
    script += "\nimport sys; sys.stderr.write('loaded: ' + ' '.join(sorted(n for n in sys.modules if '.' not in n)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    loaded = done.stderr.partition("loaded: ")[2].split()
    assert "robustbench_ext" in loaded
    assert [name for name in (*HEAVY, *more) if name in loaded] == []


def test_every_lazy_name_exists_and_is_announced() -> None:
    import robustbench_ext

    assert set(robustbench_ext.__all__) == {*robustbench_ext._LAZY, "__version__"}
    assert all(getattr(robustbench_ext, name) is not None for name in robustbench_ext.__all__)
    assert set(robustbench_ext.__all__) <= set(dir(robustbench_ext))


# --- other systems


def test_a_console_that_lacks_a_character_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """cp1252, what Windows gives to output that is redirected, has no arrow; headlines have them."""
    from robustbench_ext.cli import main

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(main, "app", lambda: print("clean accuracy, % ↑ ± 1 · n"))
    main.run()
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").strip() == "clean accuracy, % ? ± 1 · n"


def unsaid_encodings(source: str) -> list[int]:
    """Lines that read or write text in whatever encoding the system has: UTF-8 on Linux, often cp1252 on Windows.

    ruff's rule for this (PLW1514) sees only receivers whose type it can infer.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            called, receiver = node.func.attr, getattr(node.func.value, "id", "")
        else:
            called, receiver = getattr(node.func, "id", ""), ""
        if "encoding" in keywords or None in keywords:
            continue
        if len(node.args) > {"read_text": 0, "write_text": 1}.get(called, 9):
            continue  # given by position
        if called in ("open", "fdopen") and receiver not in ("Image", "tarfile", "zipfile", "webbrowser"):
            # open(file, mode), fdopen(descriptor, mode), path.open(mode); os.open has flags instead
            at = 0 if isinstance(node.func, ast.Attribute) and receiver != "os" else 1
            mode = keywords.get("mode", node.args[at] if len(node.args) > at else ast.Constant("r"))
            text = (
                isinstance(mode, ast.Constant) and "b" not in str(mode.value) and (called, receiver) != ("open", "os")
            )
        else:
            asked = (keywords.get("text"), keywords.get("universal_newlines"))
            text = called in ("read_text", "write_text") or any(
                getattr(value, "value", False) is True for value in asked
            )
        if text:
            found.append(node.lineno)
    return found


def test_texts_are_read_and_written_as_utf8() -> None:
    bad = [
        "file.read_text()",
        "file.write_text('a')",
        "open(file)",
        "path.open('w')",
        "run(c, text=True)",
        "os.fdopen(n, 'w')",
    ]
    good = [
        "file.read_text('utf-8')",
        "open(file, 'rb')",
        "path.open('wb')",
        "Image.open(file)",
        "os.open(f, os.O_RDWR)",
    ]
    good += [
        "file.write_text('a', encoding='utf-8')",
        "run(c, text=True, encoding='utf-8')",
        "run(c)",
        "os.fdopen(n, 'wb')",
    ]
    assert unsaid_encodings("\n".join(bad + good)) == list(range(1, len(bad) + 1))
    files = sorted(name for name in files_of_the_packages() if name.endswith(".py"))
    found = {name: unsaid_encodings((ROOT / name).read_text(encoding="utf-8")) for name in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


# --- the whole way


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, set[str]]:
    """Wheel and sdist, built from a copy of what git knows, and the files of the packages in that copy."""
    pytest.importorskip("setuptools", "77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in listed:
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # Without isolation: the setuptools of this environment, nothing from an index. The wheel is made from the sdist.
    build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    sdist = out / run(sys.executable, "-W", "ignore", "-c", build, out, cwd=source).split()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (out / "unpacked").iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(*pip, "--wheel-dir", out, unpacked, cwd=out)
    (wheel,) = out.glob("*.whl")
    packaged = {file.relative_to(source).as_posix() for name in PACKAGES for file in (source / name).rglob("*")}
    return wheel, sdist, {name for name in packaged if (source / name).is_file()}


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_packages_alone(built: tuple[Path, Path, set[str]], project: dict[str, Any]) -> None:
    wheel, sdist, packaged = built
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert names == packaged
    assert set(re.findall(r"^(\S+) = ", entry_points, re.M)) == {*project["scripts"], "robustness"}
    with tarfile.open(sdist) as archive:
        tops = {member.name.split("/")[1] for member in archive.getmembers() if "/" in member.name}
    assert not tops & {"tests", "benchmarks", "docs", "examples", "runs"}
    assert {"LICENSE", "README.md", "pyproject.toml", *PACKAGES} <= tops


@pytest.mark.slow
def test_a_new_user(built: tuple[Path, Path, set[str]], tmp_path: Path) -> None:
    """The wheel in an environment of its own, used from a project that has packages of the same names as ours."""
    venv.create(tmp_path / "env", with_pip=False)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    # The dependencies come from this environment, behind the new one's own packages; this repository does not.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", site, built[0])
    ours = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    for finder in ("__editable__*", "__editable___*"):
        assert not list(site.glob(finder))
    user = tmp_path / "user"
    for name in ("reports", "uq"):
        (user / name).mkdir(parents=True)
        (user / name / "__init__.py").write_text("raise RuntimeError('the user has a package of this name')\n")
    (user / "net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()\n"
    )
    (user / "tiny.yaml").write_text(
        "schema: 1\ndata: digits\nn: 40\nmodels: [{name: mine, spec: 'net.py:build'}]\n"
        "conditions: [{attack: pgd, eps: 0.1, steps: 2}, {corruption: gaussian-noise, severity: 1}]\n"
        "detectors: [msp]\nuq: [temperature]\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    env["OMP_NUM_THREADS"] = "1"

    # What the script `rbx` is: a file elsewhere, so that the user's folder is not the first place to import from.
    script = scripts / "rbx.py"
    script.write_text(
        "from robustbench_ext.cli.main import run\n\nif __name__ == '__main__':\n    run()\n", encoding="utf-8"
    )

    def rbx(*arguments: str) -> str:
        return run(python, script, *arguments, cwd=user, env=env)

    where = run(
        python, "-c", "import robustbench_ext, defenses; print(robustbench_ext.__file__)", cwd=tmp_path, env=env
    )
    assert Path(where.strip()).is_relative_to(site)
    assert "robustbench-ext" in rbx("doctor")
    assert "quickstart" in rbx("list", "suites")
    assert "verdict" in rbx("check", "--model", "net.py:build", "--data", "digits")
    rbx("run", "tiny.yaml", "--out", "runs/tiny")
    assert {"report.html", "report.md", "results.json"} <= {file.name for file in (user / "runs/tiny").iterdir()}
    assert "--robust-strict" in run(python, "-m", "pytest", "--help", cwd=user, env=env)
