"""Nodes in lanes as real processes: how many accepted samples they deliver."""
