"""How wrong the size of a prompt is, for each kind of traffic: estimated for remote servers, exact in-process."""
