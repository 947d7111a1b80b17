"""Experts, their training, the router and the mixture: the room that imports torch. Importing the package loads nothing."""
