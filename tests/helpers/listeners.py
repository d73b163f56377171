"""Where processes listen, by Linux's own tables."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path


def listeners(pids: Iterable[int]) -> list[str]:
    """Return the addresses at which these processes listen for TCP, sorted."""
    links = []
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(link))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = line.split()
            # 0A is the state of a socket that listens.
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                found.append(_address(fields[1].partition(":")[0]))
    return sorted(found)


def _address(text: str) -> str:
    """Return an address that the kernel writes as words of four bytes, each the wrong way round on these machines."""
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return str(ipaddress.ip_address(raw))
