"""Metrics, status, the request ledger and logs."""
