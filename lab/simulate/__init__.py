"""`antares simulate`: policies in virtual time on a step-time profile."""
