"""Rounds of attack against a real coordinator."""
