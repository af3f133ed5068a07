"""What patterns chose and a capture cannot hold: said with its reason, never silently.

A layer or tap that was asked for by its name and cannot be captured is an error. What a pattern chose beside
others (`**`, `type:Linear`) is left out, and the store, the report and a warning say so. A reason is a text;
what is particular to one tap comes behind its first colon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def told(left_out: Mapping[str, str], most: int = 3) -> list[str]:
    """Return a line for each reason: how many were left out for it, and the first `most` of them."""
    lines = []
    for reason, names in by_reason(left_out.items()).items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"{len(names)} left out ({reason}): {', '.join(names[:most])}{more}")
    return lines


def by_reason(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the names for each reason, without what is particular to one of them."""
    groups: dict[str, list[str]] = {}
    for name, reason in left_out:
        groups.setdefault(reason.partition(":")[0], []).append(name)
    return groups
