"""A whole swarm in virtual time: the real state machines of node and coordinator over a model of network, disks and training."""
