"""Capacity planning: the cheapest system that keeps a promise, with the statistics behind it."""
