"""`antares profile`: create or show a step-time profile."""
