"""The address of a Redis server, and what a failure to use it means: in words that hold none of its secrets.

How bytes travel: redis_bulk.py. When a server is left alone: redis_store.py. Start at `read_url`.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.connection import ConnectionPool, parse_url

_TLS_OPTIONS = ("ca_certs", "ca_path", "certfile", "keyfile", "password", "cert_reqs", "check_hostname")
_OPTIONS = {"connection_class", "host", "port", "path", "username", "password", "db"}
_OPTIONS |= {f"ssl_{name}" for name in _TLS_OPTIONS}  # those that redis-py passes on to a cluster too
_SECRETS = ("password", "ssl_password")
_FORM = (
    "redis://, rediss:// (TLS) or unix://, then user:password@ or :password@ if it asks for them, then host:port or "
    "the path of a socket, then ?name=value&… of db and "
    + ", ".join(f"ssl_{name}" for name in _TLS_OPTIONS)
    + "; / ? # @ and % in a password are written %2F %3F %23 %40 and %25"
)
_ADVICE = {  # by OpenSSL's code for what is wrong with a certificate
    9: "it is not valid yet: set the clocks",
    10: "renew it",
    62: "connect by a name that it has",
    64: "connect by an address that it has",
}


def read_url(url: str) -> dict[str, Any]:
    """redis-py's options for `url`, the class of its connections among them.

    Raises ValueError, which repeats nothing of the url, unless a connection can be tried with it.
    """
    try:
        parts = urlsplit(url)
        if "@" in parts.path + parts.query + parts.fragment and not url.startswith("unix:///"):
            raise ValueError("a password with / ? or # in it")
        options = parse_url(url)
        str(options.get("host", "")).encode("idna")
        if not options.keys() <= _OPTIONS:
            raise ValueError("an option that we do not know")
        ConnectionPool(**options).make_connection()
    except (TypeError, ValueError, redis.RedisError):
        raise ValueError(f"not the address of a Redis server; its form is {_FORM}") from None
    return options


def explain(error: BaseException, url: str) -> str:
    """What `error` of the server at `url` means and, where that is known, what to do."""
    text = next(filter(None, map(_explain_cause, _causes(error))), None)
    text = text or f"it does not answer ({error}); start it or correct the URL, which for a port with TLS is rediss://"
    for secret in filter(None, map(read_url(url).get, _SECRETS)):
        text = text.replace(secret, "***")
    return text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain_cause(error: BaseException) -> str | None:
    match error:
        case ssl.SSLCertVerificationError():
            advice = _ADVICE.get(error.verify_code, "name the file of the CA that signed it: ?ssl_ca_certs=<file>")
            return f"its certificate is not accepted ({error.verify_message.rstrip('.')}); {advice}"
        case ssl.SSLError() if "CERTIFICATE_REQUIRED" in str(error.reason):
            return "it asks for a certificate of ours; name its files: ?ssl_certfile=<file>&ssl_keyfile=<file>"
        case ssl.SSLEOFError():
            return (
                "it breaks off TLS. Either it asks for a certificate of ours; name its files: "
                "?ssl_certfile=<file>&ssl_keyfile=<file>. Or its port is without TLS, which is redis://, not rediss://"
            )
        case ssl.SSLError():
            return f"no TLS with it ({error}); a port without TLS is redis://, not rediss://"
        case FileNotFoundError():
            return "the socket, or a file of certificates, that its URL names is not there"
        case redis.AuthenticationError():
            return f"it refuses the user or the password ({error}); correct them in the URL"
        case redis.exceptions.NoPermissionError():
            return f"its user may not do what is needed ({error}); docs/operations.md has the list"
        case redis.ResponseError():
            return f"its reply: {error}"
    return None
