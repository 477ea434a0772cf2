"""All figures in the order of the page."""

from __future__ import annotations

from benchmarks.figures import (
    ablation,
    azure_trace,
    capacity,
    cost,
    determinism,
    other_profiles,
    prediction,
    qps_scaling,
)

FIGURES = {
    module.FIGURE.name: module.FIGURE
    for module in (qps_scaling, other_profiles, azure_trace, ablation, prediction, capacity, cost, determinism)
}
