"""Scheduling policies, one file each. Pure functions of what they are shown: no I/O, no clock reads."""
