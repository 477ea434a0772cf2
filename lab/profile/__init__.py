"""`antares profile`: make or show a step-time profile."""
