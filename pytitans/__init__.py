"""PyTitans: neural memory that learns at test time."""
