"""Kernel bodies in Numba; imported only when one has to be compiled."""
