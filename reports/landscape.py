"""The section on loss landscapes: how high and sharp it is round each network, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from reports.figures import new_axes
from reports.names import shorten
from reports.section import Figure, Section, figure
from reports.svg import MUTED, PALETTE
from reports.tables import Cell, Column, Table
from robustbench_ext.results import Landscape, Quantity, RunResults

MOST = 12  # figures that are shown; the others are behind a heading
LONGEST = 22

NETWORKS = (
    Column(
        "loss",
        "Mean cross-entropy on n training samples, attacked ones where the loss is an attack's; bootstrap interval.",
    ),
    Column(
        "top eigenvalue",
        "The largest eigenvalue of the loss's Hessian in all parameters, by Lanczos on the same samples: some eigenvalue lies "
        "in the brackets, and the largest is no smaller than the value.",
    ),
    Column(
        "trace",
        "The trace of the same Hessian, by Hutchinson's random signs; the interval is that of the random probes (Student's t).",
    ),
)
PAIRS = (
    Column(
        "connectivity",
        "mc: the mean of the losses at both ends minus the loss where it is farthest from that mean, on the straight line "
        "between the weights. Negative: a barrier. The interval is over samples, at the point that was found.",
    ),
    Column("at", "Where on the line that is: 0 is the first network, 1 the second."),
    Column(
        "CKA",
        "Linear centred kernel alignment of the networks' logits, in [0, 1]. 1: alike but for rotation and scale.",
    ),
    Column(
        "phase",
        "I: high, sharp, barrier. II: high, sharp, no barrier. III: low, flat, barrier. IV: low, flat, connected; A: unlike "
        "logits, B: like ones. The cut-offs are the suite's own; none were published.",
    ),
    Column("passes", "Forward and backward passes of all of it, in samples, the networks' own parts included."),
)


def landscape(results: RunResults) -> Section:
    """What lies between the networks, before an attack budget is spent on their average."""
    section = Section(
        "landscape",
        "Loss landscape",
        "On training samples. A barrier on the line between two networks (negative connectivity) says that their average, a "
        "soup, is worse than they are. Batch norms are measured again at every point of the line, the ends included, so that "
        "its ends may differ from the losses of the networks as they are.",
    )
    drawn = [_line(i, card) for i, card in enumerate(results.landscapes)]
    section.figures = drawn[:MOST]
    if len(drawn) > MOST:
        section.drawn = [(f"{len(drawn) - MOST} more lines", drawn[MOST:])]
    section.tables = [table for table in (networks(results), pairs(results)) if table.rows]
    return section


def networks(results: RunResults) -> Table:
    """Each network on each loss."""
    table = Table("Round each network", "model · loss", list(NETWORKS))
    seen: set[tuple[str, str]] = set()
    for card in results.landscapes:
        for i, name in enumerate(card.models):
            if (name, card.loss) not in seen:
                seen.add((name, card.loss))
                cells = [_cell(part[i]) for part in (card.train_loss, card.top_eigenvalue, card.trace)]
                table.rows.append((f"{name} · {card.loss}", cells))
    return table


def pairs(results: RunResults) -> Table:
    """Each pair on each loss."""
    table = Table("Between two networks", "models · loss", list(PAIRS))
    for card in results.landscapes:
        phase = Cell("–" if card.phase is None else card.phase, None, card.phase_reason or _cuts(card))
        passes = Cell(f"{card.forwards:,} + {card.backwards:,}", float(card.forwards + card.backwards))
        cells = [_cell(card.connectivity), Cell(f"{card.at:.2g}", card.at), _cell(card.cka), phase, passes]
        table.rows.append((f"{' to '.join(card.models)} · {card.loss}", cells))
    return table


def _cuts(card: Landscape) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in (card.cuts or {}).items())


def _cell(quantity: Quantity) -> Cell:
    if quantity.value is None:
        return Cell("–", None, quantity.reason)
    text = _digits(quantity.value)
    if quantity.ci_low is not None and quantity.ci_high is not None:
        text += f" [{_digits(quantity.ci_low)}, {_digits(quantity.ci_high)}]"
    return Cell(text, quantity.value, f"n = {quantity.n}; {quantity.ci_method}")


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _line(i: int, card: Landscape) -> Figure:
    first, second = card.models
    barrier = "a barrier" if (card.connectivity.value or 0) < 0 else "no barrier"
    alt = f"Loss ({card.loss}) on the straight line from {first} to {second}: {barrier}."
    return figure(f"landscape-{i}", alt, lambda ax: loss_line(card, ax))


def loss_line(card: Landscape, ax: Axes | None = None) -> Axes:
    """The loss on the straight line between two networks with pointwise 95 % bands, and where connectivity is read."""
    ax = ax or new_axes()
    t, loss = card.curve["t"], card.curve["loss"]
    ax.plot(t, loss, color=PALETTE[0], marker="o", markersize=3)
    ax.fill_between(t, card.curve["low"], card.curve["high"], color=PALETTE[0], alpha=0.18, linewidth=0)
    dashed, dotted = (0, (4, 3)), (0, (1, 2))
    ends = [(loss[0] + loss[-1]) / 2] * 2
    ax.plot([t[0], t[-1]], ends, color=MUTED, linewidth=1, linestyle=dashed, label="mean of ends")
    mc = f"mc {_digits(card.connectivity.value or 0)}"
    ax.axvline(card.at, color=PALETTE[1], linewidth=1, linestyle=dotted, label=mc)
    ax.set_xticks([0, 0.5, 1], [shorten(card.models[0], LONGEST), "between", shorten(card.models[1], LONGEST)])
    ax.set_ylabel("cross-entropy")
    ax.set_title(f"Loss: {shorten(card.loss, 30)}")
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


__all__: Sequence[str] = ["landscape", "loss_line", "networks", "pairs"]
