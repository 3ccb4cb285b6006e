"""Requests that ask to go on in another protocol, read as if they had not asked.

A server may ignore such a wish (https://www.rfc-editor.org/rfc/rfc9110#section-7.8), and many clients rely on it:
Java's sends `Upgrade: h2c` with the first request of each connection. But httptools takes what follows the head of
such a request, its body above all, for the other protocol.
"""

from collections.abc import Iterator
from typing import Protocol

import httptools

HOP_HEADERS = (b"upgrade", b"http2-settings")
"""Headers about the other protocol (RFC 9110, RFC 7540)."""


class Receiver(Protocol):
    """What httptools calls, with the head that it has read so far."""

    url: bytes
    headers: list[tuple[bytes, bytes]]

    def on_message_begin(self) -> None:
        """A head begins."""

    def on_url(self, url: bytes) -> None:
        """A part of its target."""

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""

    def on_headers_complete(self) -> None:
        """The head has ended."""

    def on_body(self, body: bytes) -> None:
        """A part of the body."""

    def on_message_complete(self) -> None:
        """The request has ended."""


class UpgradeBlindParser:
    """httptools' request parser for `receiver`, which sees every request without its wish to upgrade.

    The head of a request that asks is parsed twice, the second time without the wish.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._is_skipped = False
        self.on_message_begin = receiver.on_message_begin
        self.on_url = receiver.on_url
        self.on_header = receiver.on_header
        self.on_body = receiver.on_body
        self._parser = self._make_parser()

    def _make_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return parser

    def close(self) -> None:
        """Let go of what refers back to this object, so that it is freed at once."""
        del self._parser

    def feed_data(self, data: bytes) -> None:
        """Parse; raises `httptools.HttpParserError`, and `HttpParserUpgrade` for CONNECT alone."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._is_skipped:
                    raise
                data = b"\r\n".join([*self._list_head(), b"", data[upgrade.args[0] :]])
            self._is_skipped = False
            self._parser = self._make_parser()

    def on_headers_complete(self) -> None:
        """Pass it on, unless the head asks to upgrade and will be parsed again."""
        self._is_skipped = self._parser.should_upgrade() and self._parser.get_method() != b"CONNECT"
        if not self._is_skipped:
            self._receiver.on_headers_complete()

    def on_message_complete(self) -> None:
        """Likewise."""
        if not self._is_skipped:
            self._receiver.on_message_complete()

    def _list_head(self) -> Iterator[bytes]:
        """The lines of the head that has been read, without the wish."""
        version = self._parser.get_http_version().encode()
        yield b"%s %s HTTP/%s" % (self._parser.get_method(), self._receiver.url, version)
        for name, value in self._receiver.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in HOP_HEADERS)
            if name not in HOP_HEADERS:
                yield b"%s: %s" % (name, value)

    def should_upgrade(self) -> bool:
        """Whether the request at hand goes on in another protocol."""
        return self._parser.should_upgrade()

    def should_keep_alive(self) -> bool:
        """Whether another request may follow."""
        return self._parser.should_keep_alive()

    def get_method(self) -> bytes:
        """The method of the request at hand."""
        return self._parser.get_method()

    def get_http_version(self) -> str:
        """Its version, as `1.1`."""
        return self._parser.get_http_version()
