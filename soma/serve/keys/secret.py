"""What a key looks like and what is stored of it.

A key is `soma_PREFIX_SECRET`: the prefix (10 hex digits) is public and finds the row, the secret is 256 random bits.
Stored is the SHA-256 of the whole key. A slow hash (bcrypt, argon2) protects what people choose, which can be guessed;
256 random bits cannot be, however fast the hash, while 50 ms of bcrypt for every request, wrong keys included, would
be a way to bring the service down.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

KEY = re.compile(r"soma_([0-9a-f]{10})_[A-Za-z0-9_-]{43}", re.ASCII)


@dataclass(frozen=True)
class Secret:
    """A new key: shown once, then only its hash is known."""

    prefix: str
    text: str = field(repr=False)

    @property
    def hash(self) -> str:
        return hash_of(self.text)


def new_secret() -> Secret:
    """A key from the system's random source."""
    prefix = secrets.token_hex(5)
    return Secret(prefix, f"soma_{prefix}_{secrets.token_urlsafe(32)}")


def prefix_of(text: str) -> str | None:
    """The prefix of what looks like a key."""
    found = KEY.fullmatch(text)
    return found[1] if found else None


def hash_of(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_same(text: str, stored: str) -> bool:
    """Whether `text` is the key whose hash was stored, in a time that does not tell where they differ."""
    return hmac.compare_digest(hash_of(text), stored)
