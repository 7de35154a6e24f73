"""What is done with CuPy alone: copies that nobody waits for, and the precision of products."""

__all__: list[str] = []
