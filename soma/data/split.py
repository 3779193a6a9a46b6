"""Which documents are held out: by the hash of their group, so that what is alike is never on both sides."""

from collections.abc import Mapping
from hashlib import sha256

from soma.base.errors import UserError

LARGE = 0.5  # a group of more than this share of the wanted validation bytes always goes to train


def position(group: str, seed: int) -> float:
    """Where in [0, 1) a group lies; held out when below the validation fraction. Does not move when the corpus
    grows.
    """
    return int.from_bytes(sha256(f"{seed}:{group}".encode()).digest()[:8], "big") / 2**64


def held_out(group_bytes: Mapping[str, int], fraction: float, seed: int) -> set[str]:
    """The groups that are validation, given each group's bytes.

    Groups whose `position` is below `fraction`, less those so large that one of them would make the held-out text
    lopsided. Where that leaves none (few documents), the group with the lowest position among those of at most half of
    all bytes. Raises UserError if there is only one group.
    """
    if fraction == 0:
        return set()
    if len(group_bytes) < 2:
        raise UserError(
            "validation_fraction: only one document (or group of near-duplicates) is left, so none can be held out; "
            "add text or set validation_fraction to 0"
        )
    total = sum(group_bytes.values())
    fits = {group for group, size in group_bytes.items() if size <= LARGE * fraction * total}
    chosen = {group for group in fits if position(group, seed) < fraction}
    if not chosen:
        chosen = {min(group_bytes, key=lambda group: (group_bytes[group] > total / 2, position(group, seed)))}
    return chosen
