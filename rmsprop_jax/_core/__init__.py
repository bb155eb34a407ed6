"""The algorithm: the mathematics of one array, how leaves of a tree go through it, and the edge
where users meet it."""
