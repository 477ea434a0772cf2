"""Measures the gateway's overhead beside other gateways, in front of one scripted upstream."""
