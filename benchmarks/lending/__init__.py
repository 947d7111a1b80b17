"""Measurements of checks that are lent to nodes."""
