"""Measure how good generated clips are. Every figure comes with its sample size, its interval and its floor."""
