"""Replicas on one clock: a trace arrives, routers choose, replicas fail, come and go, clients give up, KV moves.

`build.build` makes a `cluster.Cluster` from a `Setup`; `run.run` serves its trace and audits the run.
"""
