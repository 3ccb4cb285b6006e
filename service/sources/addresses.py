"""Which addresses may be connected to: a name is looked up once for each connection, and that answer is used."""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx

from service.errors import ApiError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
NAT64 = ip_network("64:ff9b::/96")
UNICAST = ip_network("2000::/3")
"""All of IPv6 that is public. Python calls more of it so: site-local addresses, IPv4 inside others, local NAT64."""
PUBLIC_BUT_INTERNAL = (
    ip_network("168.63.129.16/32"),  # Azure's own services, as seen from its machines
    ip_network("192.0.0.0/24"),  # protocol assignments, which older releases of Python call public
)


def _embedded(address: IPv6Address) -> list[IPv4Address]:
    """The IPv4 addresses that packets to `address` may go to."""
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in NAT64:
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def is_internal(address: Address) -> bool:
    """Whether `address` is not one of the public internet: loopback, private, link-local, metadata, multicast."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_internal(address.ipv4_mapped)
        if any(map(is_internal, _embedded(address))) or not (address in UNICAST or address in NAT64):
            return True
    if address.is_multicast or any(address in network for network in PUBLIC_BUT_INTERNAL):
        return True
    return not address.is_global


def read_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """The networks that `texts` name, as 10.0.0.0/8; ValueError for one that is none."""
    return tuple(map(ip_network, texts))


class CheckedTransport(httpx.AsyncHTTPTransport):
    """Connects to public addresses, and to those in `networks`.

    The host of every request is looked up afresh and all of its addresses are checked; the connection is made to one of
    them, not to the name, so that no second answer counts. Certificates are those of the name.
    """

    def __init__(self, networks: Sequence[Network], verify: ssl.SSLContext) -> None:
        super().__init__(verify=verify, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._networks = networks

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; `ApiError` 403 when its host has an internal address, httpx's errors otherwise."""
        host = request.url.host
        extensions = {**request.extensions, "sni_hostname": host}
        failure: httpx.ConnectError | None = None
        for address in await self._look_up(host, request):
            url = request.url.copy_with(host=str(address))
            try:
                return await super().handle_async_request(
                    httpx.Request(request.method, url, headers=request.headers, extensions=extensions)
                )
            except httpx.ConnectError as error:  # the next one may answer
                failure = error
        raise failure or httpx.ConnectError("the name has no address", request=request)

    async def _look_up(self, host: str, request: httpx.Request) -> list[Address]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError("the name is not known", request=request) from error
        addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            plain = (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
            if is_internal(address) and not any(plain in network for network in self._networks):
                message = f"{host!r} has an internal address; the operator can allow its network: "
                raise ApiError(403, f"{message}FUSION_SOURCE_NETWORKS.", param="source")
        return addresses
