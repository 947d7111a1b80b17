"""What each lane costs a real coordinator."""
