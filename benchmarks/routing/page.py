"""Writes the result page of `benchmarks.routing.study`."""

from __future__ import annotations


def page(found: dict) -> str:
    return ""
