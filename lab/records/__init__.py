"""Run records: one JSON shape for simulated and measured runs, tables and plots of them."""
