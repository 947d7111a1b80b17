"""Long studies of the simulated swarm: many seeds, and costs by the number of peers."""
