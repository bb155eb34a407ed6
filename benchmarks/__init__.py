"""Measurements of the optimizer step: `make bench`. See README.md beside this file."""
