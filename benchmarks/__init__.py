"""Measurements of Lutetia's budgets: `python -m benchmarks [NAME …]`. Ratios against an alternative in one run wherever possible."""
