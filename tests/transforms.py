"""Transforms of data sets that a spawned worker finds by name."""

from __future__ import annotations

from typing import Any


def first_channel(item: dict[str, Any]) -> Any:
    return item["maps"][..., 0, :, :], item["row"]


def told_whether_shared(item: dict[str, Any]) -> Any:
    return item | {"shared": item["maps"].is_shared()}
