"""A corpus behind https with a certificate of one's own authority."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus.samples import png
from tests.web import Site, serving


def certificates(folder: Path, names: list[str], days: int = 1) -> ssl.SSLContext:
    """`ca.pem`, an authority of a moment, in `folder`; and what serves with a certificate of it for `names`."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def made(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey) -> bytes:
        common = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
        start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=min(0, days) * 2)
        addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in names]
        extra: list[tuple[x509.ExtensionType, bool]] = (
            [(x509.BasicConstraints(ca=True, path_length=None), True)] if name == issuer
            else [(x509.SubjectAlternativeName(addresses), False)]
        )  # fmt: skip
        told = x509.CertificateBuilder(
            issuer_name=common[1], subject_name=common[0], public_key=key.public_key(),
            serial_number=x509.random_serial_number(), not_valid_before=start,
            not_valid_after=start + datetime.timedelta(days=abs(days)),
        )  # fmt: skip
        for extension, critical in extra:
            told = told.add_extension(extension, critical)
        return told.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.pem").write_bytes(made("mmlm test authority", "mmlm test authority", authority, authority))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(made("mmlm test server", "mmlm test authority", key, authority) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("authority")


@pytest.fixture(scope="module")
def site(authority: Path) -> Iterator[Site]:
    with serving(certificates(authority, ["127.0.0.1"])) as site:
        site.files |= {"/c/t.csv": b"id,p,l\n1,pics/1.png,a\n2,pics/2.png,b\n"}
        site.files |= {f"/c/pics/{n}.png": png(n) for n in (1, 2)}
        yield site


SCAN = """
import argparse, json, sys
from pathlib import Path
from mmlm import cli
from mmlm.config import parse
from mmlm.corpus.config import ScanConfig
from mmlm.corpus.scan import scan

def verb(_):
    source = {"kind": "table", "files": sys.argv[1], "map": {"id": "id", "image": "p"}, "ask": [{"task": "t", "label": "l"}]}
    config = parse(ScanConfig, {"sources": [source], "split": {"fill": False}}, "scan.yaml")
    print(json.dumps(scan(config, data=Path("."), out=Path("out")).counts))

sys.exit(cli._guarded(argparse.Namespace(command=verb, debug=False)))
"""


def scan(folder: Path, uri: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The verb, guarded as the command guards it, in a process of its own: whom to trust is read once in a process."""
    told = {name: value for name, value in os.environ.items() if name not in ("SSL_CERT_FILE", "AWS_CA_BUNDLE")}
    told |= {"MMLM_CACHE": str(folder / "cache"), "PYTHONPATH": os.getcwd(), **environment}
    return subprocess.run(
        [sys.executable, "-c", SCAN, uri], cwd=folder, env=told, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_whom_to_trust_is_named_by_the_environment(scheme: str, site: Site, authority: Path, tmp_path: Path) -> None:
    """The server answers as a store would, too: where an object lies, how large it is, and which version."""
    keys = {"AWS_ENDPOINT_URL": site.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    variable = {"https": "SSL_CERT_FILE", "s3": "AWS_CA_BUNDLE"}[scheme]
    uri = {"https": f"{site.url}/c/t.csv", "s3": "s3://c/t.csv"}[scheme]
    site.salt = b"" if scheme == "s3" else b"salt"
    trusting = scan(tmp_path, uri, **keys, **{variable: str(authority / "ca.pem")})
    assert trusting.returncode == 0, trusting.stderr
    assert json.loads(trusting.stdout)["kept"] == 2
    asked, began = len(site.asked), time.monotonic()
    (tmp_path / "other").mkdir()
    refused = scan(tmp_path / "other", uri, **keys)
    assert f"mmlm: the certificate of the server of {uri} is not to be trusted (unable to get local" in refused.stderr
    assert "; wanted one for this address" in refused.stderr and f"; set {variable} to" in refused.stderr
    lost = scan(tmp_path / "other", uri, **keys, **{variable: "/nowhere/ca.pem"})
    assert f"there is no file /nowhere/ca.pem, which {variable} names" in lost.stderr
    for told in (refused, lost):
        assert (told.returncode, told.stdout, len(told.stderr.splitlines())) == (2, "", 1)
    assert time.monotonic() - began < 15, "it is asked again and again"
    assert len(site.asked) == asked and not (tmp_path / "other/out").exists()


@pytest.mark.parametrize(
    ("names", "days", "why"), [(["127.0.0.2"], 1, "not valid for '127.0.0.1'"), (["127.0.0.1"], -1, "has expired")]
)
def test_a_certificate_of_another_or_of_old(names: list[str], days: int, why: str, tmp_path: Path) -> None:
    with serving(certificates(tmp_path, names, days)) as site:
        refused = scan(tmp_path, f"{site.url}/c/t.csv", SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    assert refused.returncode == 2 and why in refused.stderr and "Traceback" not in refused.stderr
    assert not site.asked
