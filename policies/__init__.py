"""Schedulers and routers: what a replica runs next, and which replica gets a request."""
