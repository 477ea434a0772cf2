"""`antares bench`: an open-loop load generator for OpenAI-compatible servers."""
