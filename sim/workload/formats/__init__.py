"""Formats of trace files, a module each; `read` tells them apart."""
