"""Kernels of PyTorch's own for its arrays in the host's memory."""

__all__: list[str] = []
