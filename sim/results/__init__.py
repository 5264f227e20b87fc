"""What came out of a run: records, metrics, and the files that hold them."""
