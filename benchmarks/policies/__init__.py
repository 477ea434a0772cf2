"""Compares the policies on every profile and workload."""
