"""Metrics, status, request ledger and logs."""
