"""How good generated clips are: every figure with its sample size, its interval and its floor."""
