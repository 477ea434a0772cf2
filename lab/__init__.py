"""Measuring commands that ship with the product: simulate, bench, profile."""
