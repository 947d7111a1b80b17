"""What a mixture of adapters takes in memory."""
