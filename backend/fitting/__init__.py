"""From recorded steps to a profile."""
