"""Experts, their training, router and mixture: everything that imports torch. Import from its modules; nothing is loaded here."""
