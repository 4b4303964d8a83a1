"""The cluster secret, and the keys of the channels that follow from it."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import NamedTuple

import zmq
import zmq.utils.z85 as z85
from blake3 import blake3

from messages.errors import ConfigError

SECRET_BYTES = 32
_KEY_ID_BYTES = 4


class CurveKeys(NamedTuple):
    """A CURVE key pair, each half 40 characters of Z85."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"CurveKeys(public={self.public!r})"


@dataclass(frozen=True, slots=True, repr=False)
class ClusterSecret:
    """What every process of a cluster knows and nobody else: 32 random bytes. Never printed, never logged.

    While one secret follows another a process knows both: it listens with `key`, and connects with whichever of the two
    the other side listens with.
    """

    key: bytes
    other_key: bytes | None = None  #: of the secret before or after it

    def __post_init__(self) -> None:
        for key in (self.key, self.other_key):
            if key is not None and len(key) != SECRET_BYTES:
                raise ConfigError(f"cluster secret: {len(key)} bytes seen, {SECRET_BYTES} wanted")

    @classmethod
    def generate(cls) -> ClusterSecret:
        """Draw a fresh secret from the operating system's randomness."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_hex(cls, text: str) -> ClusterSecret:
        """Read a secret from 64 hexadecimal digits, or two from two lines or with a comma between.

        Raises:
            ConfigError: `text` is something else. The message does not repeat it.
        """
        words = re.split(r"\s*[,\n]\s*", text.strip())
        for word in words:
            if not re.fullmatch(f"[0-9a-fA-F]{{{2 * SECRET_BYTES}}}", word):
                raise ConfigError(
                    f"wanted {2 * SECRET_BYTES} hexadecimal digits, saw {len(word)} characters that are not"
                )
        if len(words) > 2:
            raise ConfigError(f"wanted one secret, or two while one follows another, saw {len(words)}")
        return cls(*map(bytes.fromhex, words))

    def hex(self) -> str:
        """Return the secret as `from_hex` reads it."""
        return "\n".join(key.hex() for key in (self.key, self.other_key) if key is not None)

    @property
    def key_id(self) -> str:
        """What tells others, without telling the secret, which one this process listens with: 8 hexadecimal digits."""
        return blake3(b"kvray key id 1", key=self.key).hexdigest(length=_KEY_ID_BYTES)

    def known_as(self, key_id: str) -> ClusterSecret | None:
        """Return the one of the known secrets that has this id; None: a stranger's."""
        known = [ClusterSecret(key) for key in (self.key, self.other_key) if key is not None]
        return next((secret for secret in known if secret.key_id == key_id), None)

    def server_keys(self) -> CurveKeys:
        """Derive the keys of every channel's listening side."""
        return self._derive(b"kvray channel server 1")

    def client_keys(self) -> CurveKeys:
        """Derive the keys of every channel's connecting side: whoever holds them knows the secret."""
        return self._derive(b"kvray channel client 1")

    def _derive(self, purpose: bytes) -> CurveKeys:
        """Derive a key pair by keyed BLAKE3, clamped as Curve25519 wants its scalars (RFC 7748 section 5)."""
        scalar = bytearray(blake3(purpose, key=self.key).digest(length=32))
        scalar[0] &= 248
        scalar[31] &= 127
        scalar[31] |= 64
        secret = z85.encode(bytes(scalar))
        return CurveKeys(public=zmq.curve_public(secret), secret=secret)

    def __repr__(self) -> str:
        return "ClusterSecret(...)"
