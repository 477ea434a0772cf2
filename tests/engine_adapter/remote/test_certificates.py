"""Certificates of a remote engine: they are verified, by the authorities that the environment names."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from engine_adapter.engine import EngineUnreachable
from engine_adapter.remote.client import Upstream

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TEST_TIMEOUT_S = 30


async def read(upstream: Upstream) -> bytes:
    async with asyncio.timeout(TEST_TIMEOUT_S):
        with await upstream.send("POST", b"/x", [], b"{}") as response:
            return await response.read_all()


async def test_certificate_authority_of_the_environment_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    certificate, key = self_signed(tmp_path)
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(certificate, key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(OK)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=serving)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for named, reason in (("", "CERTIFICATE_VERIFY_FAILED"), (str(tmp_path / "none"), "FileNotFoundError")):
        monkeypatch.setenv("SSL_CERT_FILE", named)
        upstream = Upstream("e", url, 5.0, 5.0)
        with pytest.raises(EngineUnreachable, match=reason):
            await read(upstream)
        await upstream.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    upstream = Upstream("e", url, 5.0, 5.0)
    assert await read(upstream) == b"ok"
    await upstream.close()
    server.close()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """The files of a certificate for 127.0.0.1 that no authority signed, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    )
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(signed.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
async def test_upstream_verifies_certificates_for_any_spelling_of_https(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[ssl.SSLContext] = []
    original = httpx.create_ssl_context

    def create(**options: Any) -> ssl.SSLContext:
        contexts.append(original(**options))
        return contexts[-1]

    monkeypatch.setattr(httpx, "create_ssl_context", create)
    upstream = Upstream("e", f"{scheme}://127.0.0.1:9", 1.0, 1.0)
    with pytest.raises(EngineUnreachable):
        await read(upstream)
    await upstream.close()
    assert [context.verify_mode.name for context in contexts] == ["CERT_REQUIRED"]
