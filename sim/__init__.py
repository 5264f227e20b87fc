"""The world of Chairlift: workloads, engine, cluster, records, metrics and the command line."""
