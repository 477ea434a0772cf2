"""Measurements: workloads, load clients, and the runs behind the figures in the docs."""
