"""Kernels that stand alone: they import jax, numpy and jaxtyping, never hstu_jax.

One folder per op; `hstu_attention/api.py` is the entry of the only op so far. What several ops need
(choice of an implementation, argument checks, timing) lies beside the folders.
"""
