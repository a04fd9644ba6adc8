"""The published metrics, including the peculiarities of their implementations."""
