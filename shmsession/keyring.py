"""Cryptographic keys: made once, rotated by appending, separated by purpose with HKDF-SHA256 (RFC 5869)."""

import contextlib
import os
import stat
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from hashlib import blake2b
from hmac import compare_digest
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import ConfigError

KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 4
MAC_BYTES: Final = 16
NONCE_BYTES: Final = 12


class Key:
    """A secret of 32 bytes. `str(key)` is its text, for a settings file; its repr shows only its id."""

    __slots__ = ("_secret", "id")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"a Key has {KEY_BYTES} bytes, not {len(secret)}: make one with Key.generate()")
        self._secret = secret
        self.id = blake2b(secret, digest_size=KEY_ID_BYTES, person=b"shmsession keyid").digest()

    @classmethod
    def generate(cls) -> Self:
        """A new random Key. `print(Key.generate())` prints what SHMSESSION_KEY takes."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The Key that `str(key)` printed. Raises ConfigError, without quoting the text, when it is not one."""
        stripped = text.strip()
        try:
            secret = urlsafe_b64decode(stripped + "=" * (-len(stripped) % 4))
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES or urlsafe_b64encode(secret).rstrip(b"=").decode() != stripped.rstrip("="):
            raise ConfigError("not a Key: write what `print(shmsession.Key.generate())` prints, 43 characters")
        return cls(secret)

    def derive(self, purpose: str) -> bytes:
        """A 32-byte secret for one purpose; secrets of different purposes say nothing about each other."""
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"shmsession " + purpose.encode()).derive(self._secret)

    def __str__(self) -> str:
        return urlsafe_b64encode(self._secret).rstrip(b"=").decode()

    def __repr__(self) -> str:
        return f"<Key {self.id.hex()}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.id)


class Keyring:
    """Keys from oldest to newest: the newest seals, all of them open. `purpose` parts what they seal from all else."""

    def __init__(self, keys: Sequence[Key], purpose: str = "cookie") -> None:
        if not keys:
            raise ConfigError("a keyring needs at least one Key: make one with Key.generate()")
        self.keys = tuple(keys)
        self.newest_id: Final = keys[-1].id
        self._ciphers = {key.id: AESGCM(key.derive(purpose)) for key in keys}
        self._seal = self._ciphers[self.newest_id].encrypt
        self.mac = self.macs("record")
        """Keyed BLAKE2b-128 (RFC 7693) of a message, by Key id. Raises KeyError for an unknown Key."""

    def __contains__(self, key_id: bytes) -> bool:
        return key_id in self._ciphers

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """nonce + AES-256-GCM ciphertext under the newest Key, bound to `context`."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._seal(nonce, plain, context)

    def unseal(self, key_id: bytes, sealed: bytes, context: bytes) -> bytes:
        """What `seal` was given. Raises KeyError for an unknown Key, InvalidTag for anything altered."""
        return self._ciphers[key_id].decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)

    def macs(self, purpose: str) -> Callable[[bytes, bytes], bytes]:
        """`mac` for a purpose of its own."""
        states = {key.id: blake2b(key=key.derive(purpose), digest_size=MAC_BYTES) for key in self.keys}

        def mac(key_id: bytes, message: bytes) -> bytes:
            state = states[key_id].copy()
            state.update(message)
            return state.digest()

        return mac

    def __repr__(self) -> str:
        return f"<Keyring of {len(self.keys)}>"


def parse_keys(text: str) -> tuple[Key, ...]:
    """Keys separated by commas or lines, oldest first; lines that begin with # are comments."""
    words = [
        word.strip() for line in text.splitlines() if not line.lstrip().startswith("#") for word in line.split(",")
    ]
    return tuple(Key.parse(word) for word in words if word)


def load_or_create(path: Path) -> tuple[Key, ...]:
    """The Keys kept in `path`, mode 0600; a missing file is made with one new Key, once, whoever comes first."""
    if not os.path.lexists(path):
        _create(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"the key file {path} (SHMSESSION_KEY_FILE) cannot be read: {error.strerror}") from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise ConfigError(
                f"the key file {path} (SHMSESSION_KEY_FILE) must be a file of uid {os.geteuid()} with mode 0600"
            )
        with os.fdopen(descriptor, "r", encoding="utf-8", errors="replace", closefd=False) as file:
            keys = parse_keys(file.read())
    finally:
        os.close(descriptor)
    if not keys:
        raise ConfigError(
            f"the key file {path} (SHMSESSION_KEY_FILE) holds no Key: "
            "remove it, or write what Key.generate() prints into it"
        )
    return keys


def _create(path: Path) -> None:
    """Write a new Key beside `path` and link it there: two processes that start together end with one Key."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{Key.generate()}\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
        finally:
            scratch.unlink()
    except OSError as error:
        raise ConfigError(
            f"no Key is configured and {path} cannot be made ({error.strerror}): "
            "set SHMSESSION_KEY to what Key.generate() prints, or SHMSESSION_KEY_FILE to a writable path"
        ) from error
