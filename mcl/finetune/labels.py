"""Few labels: which images of a data set are trained on."""

import hashlib
from collections.abc import Iterable

CHOSEN = "train_ids.txt"


def choose(ids: Iterable[int | str], fraction: float, seed: int) -> list[int | str]:
    """Chooses a fraction of images, by a rule that depends on no library, and on the order of a file neither.

    Images are sorted by the SHA-256 of the text ``SEED ID``, and the first are taken. So those of 1% are among those of
    10% with the same seed.

    Args:
        ids: of all images.
        fraction: above 0, up to 1; one image is taken at least.
        seed: of the rule.
    """
    if fraction == 1:
        return [*ids]
    order = sorted(ids, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    return order[: max(1, round(fraction * len(order)))]
