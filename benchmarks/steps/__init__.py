"""What :mod:`benchmarks.step` compares: ``contenders`` do steps, ``memory`` finds out what one needs."""

from collections.abc import Callable

Step = Callable[[int], object]
"""Does a step on images, or canvases, of so many pixels."""
