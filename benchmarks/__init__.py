"""Studies behind the results in docs/results. The product does not import this package."""
