"""Fitting profiles to recordings, and checking predictions against them."""
