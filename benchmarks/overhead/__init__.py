"""Measures the CPU time and latency of the gateway and its scheduler."""
