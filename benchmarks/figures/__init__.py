"""The papers' figures and our own, made again by one command: ``python -m benchmarks.figures``.

A module a figure: what is run, how it is drawn, and what its part of the page says. `benchmarks.figures.catalogue` has
them all. Everything here is simulated (`lab.simulate.simulator`).
"""
