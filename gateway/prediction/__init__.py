"""Output-length predictions: the client, the reports of real lengths, and the supervised service process."""
