"""What a check says: a verdict, its evidence, and what to do about it. Before a run (preflight) and after it (doubts)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Status = Literal["pass", "doubt", "fail"]


@dataclass(frozen=True)
class Check:
    """One check's outcome; `hint` says what to do where it is not a pass."""

    name: str
    status: Status
    message: str
    hint: str = ""


class _HasStatus(Protocol):
    @property
    def status(self) -> Status: ...


def verdict(checks: Iterable[_HasStatus]) -> Status:
    """The worst status of all checks; a pass where there are none.

    >>> verdict([Check("a", "pass", ""), Check("b", "doubt", "")])
    'doubt'
    """
    statuses = {check.status for check in checks}
    return "fail" if "fail" in statuses else "doubt" if "doubt" in statuses else "pass"
