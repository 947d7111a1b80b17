"""What several nodes on one expert are worth: steps that one node needs for the same held-out loss over the team's own."""
