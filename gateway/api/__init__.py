"""The HTTP edge: read a request, schedule it, relay its response, answer errors."""
