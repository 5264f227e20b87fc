"""Replicas on one clock: routing, failures, autoscaling, timeouts and transfers of KV."""
