"""The routes under ``/v1``: which are scheduled, which pass through, and how each API shapes streams and errors."""
