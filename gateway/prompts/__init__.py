"""What a prompt consists of, how many tokens that is, and which of its blocks an engine may have cached."""
