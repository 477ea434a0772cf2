"""Studies: the runs behind the figures in docs/results. The product imports nothing from here."""
