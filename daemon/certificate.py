"""How workers know the daemon, and the daemon its workers: a self-signed certificate, and a secret in a 0600 file."""

from __future__ import annotations

import logging
import secrets
import ssl
import stat
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nnsight_hpc.wire.files import read_if_there, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nnsight_hpc.wire.places import Places

logger = logging.getLogger(__name__)

SERVER_NAME = "nnsight-hpc-daemon"
"""The name in the certificate: a worker gives it as ``server_hostname``, whatever host the daemon is on."""
_YEARS = 10
_USUAL = (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLZeroReturnError, ssl.SSLEOFError)
"""How TLS waits, and how it ends when the other side goes."""


class _Logged(ssl.SSLObject):
    """Says what it refuses: asyncio ends such a connection without a word."""

    def do_handshake(self) -> None:
        with _logging("a connection of a worker was refused before it began"):
            super().do_handshake()

    def read(self, *args: Any) -> Any:
        with _logging("a connection of a worker was ended: its bytes are not those that were sent"):
            return super().read(*args)


@contextmanager
def _logging(what: str) -> Iterator[None]:
    try:
        yield
    except _USUAL:
        raise
    except ssl.SSLError as error:
        logger.warning("%s: %s", what, error.reason)
        raise


def server_context(places: Places) -> ssl.SSLContext:
    """TLS for the workers' side, with the certificate of this home, which is made at first use."""
    try:
        return _load(places)
    except (OSError, ssl.SSLError):
        certificate, key = _make()
        write_atomically(places.key, key)
        write_atomically(places.certificate, certificate)
        return _load(places)


def load_secret(places: Places) -> str:
    """The secret of this home. It is made at first use, and anew when others could have read it."""
    known = read_if_there(places.secret)
    if known is not None and _is_private(places.secret):
        return known.decode()
    if known is not None:
        logger.warning("others could read %s: a new secret is made", places.secret)
    fresh = secrets.token_urlsafe(32)
    write_atomically(places.secret, fresh.encode())
    return fresh


def _is_private(path: Path) -> bool:
    return not stat.S_IMODE(path.stat().st_mode) & 0o077


def _load(places: Places) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = _Logged
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(places.certificate, places.key)
    return context


def _make() -> tuple[bytes, bytes]:
    """Certificate and key as PEM. It is its own authority, with what OpenSSL's strict mode asks of one (RFC 5280)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of a cluster differ
        .not_valid_after(now + timedelta(days=365 * _YEARS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
