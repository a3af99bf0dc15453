"""Whether pretrained weights can be downloaded, asked before libraries try for a minute."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 4.0
"""How long a host may take to answer."""


def hub_address() -> str:
    """Return the address of the Hugging Face hub, or the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def is_reachable(address: str, seconds: float = SECONDS) -> bool:
    """Tell whether the host of an address, or the proxy on the way to it, accepts a connection.

    Args:
        address: a URL.
        seconds: to wait, for looking up the name and connecting together.
    """
    parts = urlsplit(address)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answered = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection((parts.hostname or "", port), timeout=seconds):
                answered.set()
        except OSError:
            pass

    # In a thread: looking up a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
