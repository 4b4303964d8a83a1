"""Who asks, by the API key: a tenant, or nobody in particular; and what follows for what is cached.

    names of blocks    salted with 16 bytes that follow from the tenant's name and the salt secret, then the client's
                       own cache_salt: no other tenant can name them, and so neither find them nor write others there
    owner of blocks    a number that follows from the tenant's name; of nobody's, from the client's cache_salt

Who has a key without a tenant, and whoever asks where no key is wanted, is an operator.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.openai.errors import bad_field
from kvcache.names import tenant_number, tenant_of
from messages.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request. `name`: the tenant's, "" for nobody in particular."""

    name: str = ""
    base_salt: bytes = field(default=b"", repr=False)  #: what stands before every salt of this tenant's
    is_operator: bool = True  #: manages all blocks, and sees what the whole cluster counts
    may_hint: bool = False  #: may say in requests what is to be kept

    def salt(self, cache_salt: str | None) -> bytes:
        """Return the salt of block names for a request with this `cache_salt`."""
        return self.base_salt + (cache_salt or "").encode()

    def owner(self, cache_salt: str | None) -> int:
        """Return the number by which blocks say that they are this caller's; 0: nobody's in particular."""
        return tenant_number(self.name) if self.name else tenant_of((cache_salt or "").encode())


NOBODY = Caller()  #: in particular


class Callers:
    """All who may call. Without any key whoever asks is nobody in particular."""

    def __init__(self, keys: Iterable[tuple[str, Caller]] = (), nobody: Caller = NOBODY) -> None:
        """Know callers by their keys, several of one caller's, say, while one follows another.

        Args:
            keys: each with whose it is.
            nobody: who asks where there are no keys.

        Raises:
            ConfigError: a key is of two callers.
        """
        self.nobody = nobody
        self._by_digest: dict[bytes, Caller] = {}
        for key, caller in keys:
            other = self._by_digest.setdefault(_digest(key), caller)
            if other != caller:
                raise ConfigError(
                    f"API keys: one is of {_shown(other)} and of {_shown(caller)}; each wants keys of its own"
                )
        tenants = {caller.name: caller for caller in self._by_digest.values() if caller.name}
        self.tenants = dict(sorted(tenants.items()))  #: by name
        self.names = {tenant_number(name): name for name in self.tenants}  #: of tenants, by the number in their blocks

    @classmethod
    def of_keys(cls, keys: Sequence[str]) -> Callers:
        """Return those who hold one of `keys`, all of them nobody in particular."""
        return cls((key, NOBODY) for key in keys)

    @property
    def has_keys(self) -> bool:
        """Whether a key is wanted."""
        return bool(self._by_digest)

    def find(self, authorization: str) -> Caller | None:
        """Return who sends this Authorization header; None: nobody who may call."""
        if not self._by_digest:
            return self.nobody
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # All keys are compared, whole, so that time says nothing about any of them.
        matches = [caller for known, caller in self._by_digest.items() if hmac.compare_digest(digest, known)]
        return matches[0] if matches and scheme.lower() == "bearer" else None

    def owner(self, caller: Caller, authorization: str) -> str:
        """Return whose responses are kept for this caller: the tenant's, else the key's, else everybody's."""
        if caller.name or not self._by_digest:
            return caller.name
        return f"key {_digest(authorization.partition(' ')[2].strip()).hex()}"  # no tenant's name has a space

    def meant(self, caller: Caller, tenant: str | None) -> Caller:
        """Return whose blocks `caller` means who names a `tenant`; None: its own.

        Raises:
            RequestError: they are another's, and it is no operator; or there is no such tenant.
        """
        if tenant is None or tenant == caller.name:
            return caller
        if not caller.is_operator:
            raise not_allowed("tenant", "another tenant's blocks")
        found = self.tenants.get(tenant)
        if found is None:
            raise bad_field("tenant", tenant, f"one of {', '.join(self.tenants)}" if self.tenants else "none")
        return found


def not_allowed(param: str | None, what: str) -> RequestError:
    """Make the 403 for what is an operator's to do."""
    return RequestError(
        f"{what}: got the key of a tenant, want that of an operator", param=param, code="not_allowed", status=403
    )


def _shown(caller: Caller) -> str:
    return f"tenant {caller.name}" if caller.name else "no tenant"


def _digest(key: str) -> bytes:
    """Hash a key, so that all are of one length for a comparison in constant time."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
