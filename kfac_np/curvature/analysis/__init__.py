"""How good a curvature is, what it costs, and what its approximations assume."""

__all__: list[str] = []
