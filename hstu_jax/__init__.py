"""HSTU Match: two-tower retrieval in JAX. See README.md for the path of the data."""
