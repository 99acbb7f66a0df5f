"""A badge for a README: one number of one model, with its interval, as an SVG that needs nothing from elsewhere."""

from __future__ import annotations

import html

from reports.names import clip
from robustbench_ext.axes import Axis, axes, is_regression
from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.results import RunResults

# White text on these has a contrast of at least 5.9 : 1 (WCAG asks for 4.5).
LABEL, SOUND, DOUBTFUL, GREY = "#3d444d", "#0a5aa8", "#8a4b00", "#59636e"
_NARROW, _WIDE = "fijlrtI.,:;|!'()[] ", "mwMW@%"


def render_badge(results: RunResults, model: str, axis: str | None = None) -> str:
    """One axis of the headline for one model; by default robust accuracy, else the first axis.

    The colour says whether the number can be trusted, not whether it is good: blue where all checks of the model passed, brown
    with `doubts` where some raise doubts. Where one failed, or where there is no number, the badge is grey and has none.

    Args:
        model: its name.
        axis: the title of an axis, as in the headline, such as "clean accuracy".
    """
    chosen = _axis(results, axis)
    label, (value, colour) = _label(chosen), _value(results, model, chosen)
    row = chosen.row(results, model)
    about = f"{model} on {results.data['name']}" + (f", n = {row.n}, {row.ci_method}" if row is not None else "")
    return _svg(clip(label, 60), clip(value, 60), colour, clip(f"{label}: {value} ({about})", 300))


def _axis(results: RunResults, wanted: str | None) -> Axis:
    found = {axis.title: axis for axis in axes(results)}
    if wanted is not None:
        if wanted not in found:
            raise ConfigError(unknown_name("axis", wanted, found))
        return found[wanted]
    robust = [axis for axis in found.values() if axis.metric == "robust_accuracy"]
    return [*robust, *found.values()][0]


def _label(axis: Axis) -> str:
    return f"robust accuracy {axis.title.removeprefix('robust ')}" if axis.metric == "robust_accuracy" else axis.title


def _value(results: RunResults, model: str, axis: Axis) -> tuple[str, str]:
    """What the right half says, and its colour."""
    row = axis.row(results, model)
    findings = [f for f in results.suspicions if f.model == model]
    if any(f.status == "fail" for f in findings):
        return "not to be trusted", GREY
    if row is None or row.value is None:
        return "not measured" if row is None else "inconclusive", GREY
    percent = results.metrics[row.metric]["percent"]
    scale, digits, unit = (100.0, 1, " %") if percent else (1.0, 3, "")
    text = f"{scale * row.value:.{digits}f}{unit}"
    if row.ci_low is not None and row.ci_high is not None:
        text += f" [{scale * row.ci_low:.{digits}f}, {scale * row.ci_high:.{digits}f}]"
    if is_regression(results) and not percent and results.data.get("target") and row.metric in ("rmse", "mae"):
        text += f" {results.data['target']}"
    return (f"{text} · doubts", DOUBTFUL) if findings else (text, SOUND)


def _svg(label: str, value: str, colour: str, title: str) -> str:
    """Two boxes of 20 pixels' height. `textLength` makes the text fit whatever font there is."""
    left, right = _width(label), _width(value)
    a, b, total = left + 12, right + 12, left + right + 24
    name, said = html.escape(title), {"label": html.escape(label), "value": html.escape(value)}
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20" role="img" aria-label="{name}">\n'
        f"<title>{name}</title>\n"
        f'<clipPath id="r"><rect width="{total}" height="20" rx="3"/></clipPath>\n'
        f'<g clip-path="url(#r)"><rect width="{a}" height="20" fill="{LABEL}"/>'
        f'<rect x="{a}" width="{b}" height="20" fill="{colour}"/></g>\n'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="6" y="14" textLength="{left}">{said["label"]}</text>'
        f'<text x="{a + 6}" y="14" textLength="{right}">{said["value"]}</text></g>\n'
        "</svg>\n"
    )


def _width(text: str) -> int:
    """About as many pixels as Verdana takes at 11 pixels."""
    return round(sum(4.2 if c in _NARROW else 10.0 if c in _WIDE or ord(c) > 0x2E80 else 7.0 for c in text))
