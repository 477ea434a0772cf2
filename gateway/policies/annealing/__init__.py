"""Scheduling by simulated annealing (arXiv 2504.14966)."""
