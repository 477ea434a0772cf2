"""`antares simulate`: simulation of policies in virtual time on a step-time profile."""
