"""The report channel: a vLLM server's scheduler class tells gateways over TCP what the server's steps compute."""
