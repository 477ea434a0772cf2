"""Requests as the scheduler sees them, and the queue that holds them."""
