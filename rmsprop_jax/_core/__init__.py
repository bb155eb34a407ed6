"""The algorithm: the mathematics of one array, its use on the leaves of a tree, and the public
edge."""
