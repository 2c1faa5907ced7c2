"""Formats of other projects, read and written without them."""
