"""Tables as LaTeX: a strict reader of the little LaTeX that they use, and a compiler where there is one."""

import re
import shutil
import subprocess

import pytest

from reports.contents import sections
from reports.latex import LONGEST, WIDEST, escape, fragment, render_latex
from reports.tables import Cell, Column, Table
from tests.reports.synthetic import EVIL, synthetic

COMMANDS = re.compile(
    r"begin|end|caption|label|centering|small|scriptsize|toprule|midrule|bottomrule|endhead|endfirsthead|textbf|mathbf|"
    r"textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|symbol|dots|textperiodcentered|"
    r"uparrow|downarrow|to|times|pm|leq|geq|infty|Delta|alpha|beta|varepsilon|kappa|lambda|mu|sigma|tau"
)
TOKEN = re.compile(r"\\([A-Za-z]+)|\\(.)|([{}$&#^_~%])|(\n)|([^\\{}$&#^_~%\n]+)", re.DOTALL)


class Reader:
    """Reads a fragment as TeX would, and stops at what TeX would stop at.

    Braces and environments are balanced; `&`, `#`, `^`, `_`, `~`, `%` have no meaning outside of their places; every row has as
    many cells as the table has columns; nothing but known commands.
    """

    def __init__(self, text):
        self.rows, self.labels, self.columns = [], [], None
        body = "\n".join(line for line in text.split("\n") if not line.startswith("% "))
        self.depth, self.stack, self.math = 0, [], False
        self.cells, self.filled = 1, False
        at = 0
        while at < len(body):
            found = TOKEN.match(body, at)
            assert found, body[at : at + 40]
            at = found.end()
            at = self.step(found, body, at)
        assert not self.stack and not self.math and self.depth == 0

    def step(self, found, body, at):
        word, symbol, special, _, text = found.groups()
        if word:
            assert COMMANDS.fullmatch(word), word
            if word in ("begin", "end"):
                return self.environment(word, body, at)
            if word == "label":
                name = re.compile(r"\{([a-z0-9:-]+)\}").match(body, at)
                assert name, body[at : at + 40]
                self.labels.append(name[1])
                return name.end()
            if word in ("toprule", "midrule", "bottomrule", "endhead", "endfirsthead"):
                assert not self.filled, "a rule in the middle of a row"
            # A letter behind a command would belong to its name.
            assert not re.match(r"[A-Za-z]", body[at : at + 1])
        elif symbol == "\\":
            assert not self.math and self.depth <= 1  # braces of {\small, none of a cell
            assert body[at : at + 1] == "\n" and body[at + 1 : at + 2] not in ("[", "*")
            if self.filled or self.cells > 1:
                self.rows.append(self.cells)
            self.cells, self.filled = 1, False
        elif symbol:
            assert symbol in "{}$&#_%,", symbol
            self.filled = True
        elif special == "{":
            self.depth += 1
        elif special == "}":
            self.depth -= 1
            assert self.depth >= 0
        elif special == "$":
            self.math = not self.math
        elif special == "&":
            assert self.stack[-1] in ("tabular", "longtable") and not self.math
            self.cells += 1
        elif special == "^":
            assert self.math
        else:
            assert special is None, f"{special} has a meaning"
            if text and text.strip():
                assert text.isascii() or all("\u00c0" <= c <= "\u017e" or c.isascii() for c in text), text
                self.filled = self.stack[-1] in ("tabular", "longtable")
        return at

    def environment(self, word, body, at):
        name = re.compile(r"\{(table|tabular|longtable)\}(?:\[tbp\])?(?:\{([lr]+)\})?").match(body, at)
        assert name, body[at : at + 40]
        if word == "begin":
            self.stack.append(name[1])
            if name[2]:
                self.columns = len(name[2])
                self.rows = []
        else:
            assert self.stack.pop() == name[1]
            if name[1] in ("tabular", "longtable"):
                assert not self.filled, "the last row is not ended"
                wrong = [n for n in self.rows if n != self.columns]
                assert not wrong or (name[1] == "longtable" and wrong == [1]), wrong  # its caption
        return name.end()


@pytest.mark.parametrize(
    "evil", ["plain", *EVIL, "a & b \\\\ [2em] %", "\\input{/etc/passwd}", "*", "[x]", "{", "ε漢é"]
)
def test_names_are_text(evil):
    results = synthetic([evil, "b"])
    for text in render_latex(results).values():
        Reader(text)
        assert "\\input" not in text


def test_what_the_reader_refuses():
    """The reader itself: each of these stops TeX or changes the table."""
    good = fragment(Table("c", "m", [Column("x")], [("a", [Cell("1.0 [0.9, 1.1]", 1.0)])]), "C.", "tab:x")
    Reader("\n".join(good))
    for bad in ("a & b", "50%", "a_b", "{", "$", "\\evil", "#1", "a^b", "~"):
        lines = [line.replace("a &", f"{bad} &") for line in good]
        with pytest.raises(AssertionError):
            Reader("\n".join(lines))
    bracket = [line.replace("a &", "[a] &") for line in good]
    bracket.insert(bracket.index("\\midrule") + 1, "b & 2 \\\\")
    with pytest.raises(AssertionError):
        Reader("\n".join(bracket))


def test_every_section_has_a_fragment_with_its_own_label():
    results = synthetic(["a", "b"])
    found = render_latex(results)
    assert list(found) == [re.sub(r"[^a-z0-9]+", "-", s.title.lower()) for s in sections(results)]
    labels = [label for text in found.values() for label in Reader(text).labels]
    assert labels == [f"tab:s:{name}" for name in found]
    assert render_latex(results) == found


def test_values_intervals_and_the_best():
    headline = render_latex(synthetic(["a", "b"]))["headline"]
    assert "a & $\\mathbf{90.0}$ {\\scriptsize $[87.0, 93.0]$} & " in headline
    assert "Bold: better than every other model beyond chance." in headline
    assert "clean accuracy, \\% $\\uparrow$" in headline
    assert "mnist5k, $n = 1000$ test samples." in headline
    assert "Bold" not in render_latex(synthetic(["a", "b"], compared=False))["headline"]


def test_wide_tables_are_cut_and_long_ones_break_over_pages():
    wide = Table("c", "m", [Column(f"x{i}") for i in range(14)], [("a", [Cell(str(i), i) for i in range(14)])])
    lines = fragment(wide, "C.", "tab:x")
    reader = Reader("\n".join(lines))
    assert reader.labels == ["tab:x", "tab:x-2", "tab:x-3"]
    assert lines.count("\\begin{table}[tbp]") == 3
    assert f"\\caption{{C. Columns {WIDEST + 1} to {2 * WIDEST} of 14.}}" in lines
    long = Table("c", "m", [Column("x")], [(f"r{i}", [Cell("1")]) for i in range(LONGEST + 1)])
    lines = fragment(long, "C.", "tab:x")
    Reader("\n".join(lines))
    assert "\\begin{longtable}{ll}" in lines


def test_a_letter_without_a_glyph_is_named():
    assert escape("é漢") == "é{[}U+6F22{]}"


@pytest.mark.skipif(not (shutil.which("pdflatex") or shutil.which("tectonic")), reason="there is no LaTeX here")
def test_it_compiles(tmp_path):
    fragments = render_latex(synthetic([*EVIL, "[x]", "*"], corruptions=60))
    body = "\n".join(fragments.values())
    document = (
        f"\\documentclass{{article}}\\usepackage{{booktabs,longtable}}\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    (tmp_path / "all.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "all.tex"] if shutil.which("pdflatex") else ["tectonic", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
