"""Why no connection came about, so that the error can say what to do; proxies among the causes."""

from __future__ import annotations

import errno
import os

import grpc

from edgeml.core import Deadline, EdgemlError, PermissionDenied, Unreachable, Url
from edgeml.core.advice import explain_no_connection
from edgeml.core.security import TlsKeys
from edgeml.core.strangers import HTTP2, find_stranger
from edgeml.core.tls import explain_refusal
from edgeml.core.url import require_this_machine
from edgeml.transports.grpc.protocol import ERRORS

__all__ = ["explain_failure", "find_proxy"]

_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in the order in which gRPC looks
_EXCEPT = ("no_grpc_proxy", "no_proxy")


def find_proxy(host: str, deadline: Deadline) -> str:
    """Return the environment variable that names the proxy to a host; "" if there is none.

    There is none to this machine itself, by whatever name. gRPC would ask the proxy even so.
    """
    variable = next((name for name in _PROXIES if os.environ.get(name)), "")
    excepted = next((os.environ[name] for name in _EXCEPT if os.environ.get(name)), "")
    suffixes = [each.strip() for each in excepted.split(",")]
    if not variable or any(each and host.endswith(each) for each in suffixes):
        return ""
    try:
        require_this_machine(host, deadline)
    except OSError:
        return variable
    return ""


def explain_failure(
    url: Url, error: grpc.RpcError, keys: TlsKeys | None, proxy: str, deadline: Deadline
) -> EdgemlError:
    """Return the error for one of gRPC's, of the first call.

    Args:
        url: where to.
        error: what gRPC says.
        keys: those that the connection was to be secured by; None for none.
        proxy: what `find_proxy` says.
        deadline: by which to find out who listens.
    """
    code, details = error.code(), error.details()
    if ERRORS.get(code) is PermissionDenied:
        return PermissionDenied(f"{url}: {details}")
    if proxy:
        return explain_no_connection(
            url,
            details,
            hint=f"gRPC connects through the proxy that ${proxy} names: unset it, or add the host "
            "to $no_proxy",
        )
    if "resolution" not in details:  # of the host's name; it would fail again, and take its time
        asking = Deadline(min(1.4, deadline.left))
        found = explain_refusal(url, keys, HTTP2, asking.left * 2 / 3)
        if found is None and keys is None:
            found = find_stranger(url, HTTP2, min(0.4, asking.left))
        if found is not None:
            return found
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unreachable(f"what answers at {url} is no edgeml server: {details}")
    number = errno.EMFILE if os.strerror(errno.EMFILE) in details else None
    return explain_no_connection(url, details, number)
