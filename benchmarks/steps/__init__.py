"""What :mod:`benchmarks.step` compares: ``contenders`` do steps, ``processes`` gives them processes of their own."""

from collections.abc import Callable

Step = Callable[[int], object]
"""Does a step on images, or canvases, of so many pixels."""
