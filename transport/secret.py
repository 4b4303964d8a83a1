"""The cluster secret, and the keys of the channels that follow from it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple

import zmq
import zmq.utils.z85 as z85
from blake3 import blake3

from messages.errors import ConfigError

SECRET_BYTES = 32


class CurveKeys(NamedTuple):
    """A CURVE key pair, each half 40 characters of Z85."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"CurveKeys(public={self.public!r})"


@dataclass(frozen=True, slots=True, repr=False)
class ClusterSecret:
    """What every process of a cluster knows and nobody else: 32 random bytes. Never printed, never logged."""

    key: bytes

    def __post_init__(self) -> None:
        if len(self.key) != SECRET_BYTES:
            raise ConfigError(f"cluster secret: {len(self.key)} bytes seen, {SECRET_BYTES} wanted")

    @classmethod
    def generate(cls) -> ClusterSecret:
        """Draw a fresh secret from the operating system's randomness."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_hex(cls, text: str) -> ClusterSecret:
        """Read a secret from 64 hexadecimal digits; white space around them is ignored.

        Raises:
            ConfigError: `text` is something else. The message does not repeat it.
        """
        try:
            key = bytes.fromhex(text.strip())
        except ValueError:
            raise ConfigError(f"cluster secret: wanted {2 * SECRET_BYTES} hexadecimal digits, saw other text") from None
        return cls(key)

    def hex(self) -> str:
        """Return the secret as `from_hex` reads it."""
        return self.key.hex()

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
