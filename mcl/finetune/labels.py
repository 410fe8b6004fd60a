"""Training with few labels: selects a fraction of the images."""

import hashlib
from collections.abc import Iterable

CHOSEN = "train_ids.txt"


def choose(ids: Iterable[int | str], fraction: float, seed: int) -> list[int | str]:
    """Selects a fraction of the images. The result depends neither on a library nor on the order of the images.

    Images are sorted by the SHA-256 of the text ``SEED ID``, and the first ones are selected. So with the same seed,
    the images of 1% are among those of 10%.

    Args:
        ids: ids of all images.
        fraction: above 0, at most 1; at least one image is selected.
        seed: seed of the selection.
    """
    if fraction == 1:
        return [*ids]
    order = sorted(ids, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    return order[: max(1, round(fraction * len(order)))]
