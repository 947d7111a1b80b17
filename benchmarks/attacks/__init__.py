"""Results that lie and results that are honest, before the coordinator's real checks and audits, with real tiny experts."""
