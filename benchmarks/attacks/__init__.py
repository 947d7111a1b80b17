"""Results that lie and results that are honest, before the coordinator's real ladder and audits, with real tiny experts."""
