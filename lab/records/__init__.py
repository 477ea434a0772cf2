"""Run records: one JSON format for simulated and measured runs, with tables and plots."""
