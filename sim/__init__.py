"""The world of Chairlift: workloads, replicas, cluster, records, reports, sweeps, plans and the command line."""
