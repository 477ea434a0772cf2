"""Policies compared on every profile and workload."""
