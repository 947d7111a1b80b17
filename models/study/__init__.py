"""The study: one model against a mixture of experts on equal data and equal compute, and what explains the difference."""
