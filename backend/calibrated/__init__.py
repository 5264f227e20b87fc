"""Step costs by a profile fitted to recorded steps."""
