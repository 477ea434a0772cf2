"""The length models: features, trees, classifier, and how their outputs become quantiles."""
