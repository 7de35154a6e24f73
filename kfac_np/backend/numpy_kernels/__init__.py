"""Kernels on NumPy's arrays, and the threads that they work on."""

__all__: list[str] = []
