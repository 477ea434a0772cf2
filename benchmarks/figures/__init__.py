"""Reproduces the papers' figures and draws our own in the simulator: ``python -m benchmarks.figures``.

Each figure is one module, which runs, draws and describes it. `benchmarks.figures.catalogue` lists them. All figures
are simulated (`lab.simulate.simulator`).
"""
