"""Ray's torch backend with one thing more: gloo talks over the network that Ray uses.

Left alone, gloo binds to the address that the host's own name resolves to. On Debian that is 127.0.1.1, where no other
node finds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Any

from ray.train.torch.config import TorchConfig, _TorchBackend

SIOCGIFADDR = 0x8915  # linux/sockios.h


class AddressedTorch(TorchConfig):
    @property
    def backend_cls(self) -> Any:  # type: ignore[override]
        return _AddressedBackend


class _AddressedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:  # type: ignore[override]
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """On a worker: GLOO_SOCKET_IFNAME becomes the interface that has this node's address, unless it is set."""
    import ray

    address = ray.util.get_node_ip_address()
    name = interface_of(address)
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface that has the IPv4 `address`; None when none has it, or where Linux is not."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                found = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    return None
