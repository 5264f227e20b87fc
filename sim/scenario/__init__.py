"""Scenario files: reading YAML, checking it, and making a study of it."""
