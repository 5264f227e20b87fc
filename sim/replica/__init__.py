"""One replica: its engine loop, KV pools, decode group and queue. It knows no event loop."""
