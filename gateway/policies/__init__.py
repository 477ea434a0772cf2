"""Scheduling policies, one per file or package. A policy does no I/O and reads no clock."""
