"""Measures the storage formats: `make storage-study` runs every part and writes docs/storage.md's
tables and figures."""
