"""Measurements of Lutetia's budgets: `python -m benchmarks [NAME …]`. Ratios in one run wherever possible."""
