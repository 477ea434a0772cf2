"""The HTTP edge: reads a request, relays its response, answers errors."""
