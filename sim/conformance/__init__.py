"""What a policy or a router promises, tried on small workloads: ``chairlift check``."""
