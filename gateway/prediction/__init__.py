"""Output-length prediction: the client, reports of actual lengths, and the supervisor of the service process."""
