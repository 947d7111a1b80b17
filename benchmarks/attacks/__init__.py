"""Lying and honest results, put through the coordinator's real checks and audits, with real tiny experts."""
