"""Studies of the annealing policy."""
