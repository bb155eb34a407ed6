"""Training runs of other frameworks, recorded, and what it takes to record and to repeat them."""
