"""Published trace formats, a file each."""
