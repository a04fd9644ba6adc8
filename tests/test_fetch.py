"""Pictures from the web: only public addresses, checked at every hop, within limits of bytes and time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import helpers
import pytest

from qvl_runtime.errors import QvlError
from qvl_runtime.inputs import fetch as module
from qvl_runtime.inputs.fetch import fetch, is_public
from qvl_runtime.inputs.images import load_image

ANYWHERE = {"allowed": lambda address: True}


@contextlib.contextmanager
def server(answer: Callable[[bytes, socket.socket], None]) -> Iterator[int]:
    """A port of this machine where `answer` is given each request and the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                channel, _ = listener.accept()
                with channel, contextlib.suppress(OSError):
                    channel.settimeout(20)
                    answer(channel.recv(65536), channel)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def replies(*heads: str, body: bytes = b"") -> Callable[[bytes, socket.socket], None]:
    head = "\r\n".join((*heads, "", "")).encode()
    return lambda request, channel: channel.sendall(head + body)


def refused(url: str, *parts: str, **options) -> None:
    """Fetching fails with one line that holds the URL and all the parts."""
    helpers.refused(lambda: fetch(url, **options), url[:40], *parts)


def test_a_picture_is_fetched(golden):
    data = (golden / "images/rgb_odd.png").read_bytes()
    asked = []

    def answer(request, channel):
        asked.append(request)
        channel.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    with server(answer) as port:
        assert fetch(f"http://127.0.0.1:{port}/a%20b é.png?x=1&y=ü#part", **ANYWHERE) == data
    line, *headers = asked[0].decode().split("\r\n")
    assert line == "GET /a%20b%20%C3%A9.png?x=1&y=%C3%BC HTTP/1.1"
    assert f"Host: 127.0.0.1:{port}" in headers and "Accept-Encoding: identity" in headers


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://example.org/a", "example.org"),
        ("https://example.org:8443/a", "example.org:8443"),
        ("http://example.org/a", "example.org"),
        ("http://example.org:443/a", "example.org:443"),
    ],
)
def test_a_host_is_named_without_the_port_of_its_scheme(url, host, monkeypatch):
    """Signatures of URLs cover the header: browsers leave the default port out."""
    asked = []

    def answer(request, channel):
        asked.append(request)
        channel.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with server(answer) as port:
        monkeypatch.setattr(module, "_connect", lambda *given: socket.create_connection(("127.0.0.1", port)))
        fetch(url)
    assert f"Host: {host}" in asked[0].decode().split("\r\n")


def test_chunks_and_replies_without_a_length():
    chunked = replies("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    for answer in (chunked, replies("HTTP/1.0 200 OK", body=b"abcde")):
        with server(answer) as port:
            assert fetch(f"http://127.0.0.1:{port}/", **ANYWHERE) == b"abcde"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:db8::1",
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "fec0::1",
        "4000::1",
    ],
)
def test_what_is_not_public(address):
    assert not is_public(address)


def test_a_mapped_group_address_is_not_public():
    assert not is_public("::ffff:224.0.0.1")


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_what_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_this_machine_is_refused_however_it_is_written(host):
    asked = []
    with server(lambda request, channel: asked.append(request)) as port:
        refused(f"http://{host}:{port}/a.png", "cannot fetch")
    assert not asked


def test_one_private_address_among_several_is_enough(monkeypatch):
    found = [(2, 1, 6, "", (address, 80)) for address in ("93.184.216.34", "192.168.0.1")]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *args, **options: found)
    refused("http://example.com/a.png", "example.com has the address 192.168.0.1, which is not public")


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    """A name that resolves to another address at a second lookup gains nothing: there is only one lookup."""
    with server(replies("HTTP/1.1 200 OK", body=b"here")) as port:
        answers = iter([[(2, 1, 6, "", ("127.0.0.1", port))]])
        real, names = socket.getaddrinfo, []

        def look_up(host, *args, **options):
            names.append(host)
            return next(answers) if host == "rebound.example" else real(host, *args, **options)

        monkeypatch.setattr(module.socket, "getaddrinfo", look_up)
        checked = []
        assert fetch(f"http://rebound.example:{port}/", allowed=lambda a: checked.append(a) or True) == b"here"
    assert checked == ["127.0.0.1"] and names.count("rebound.example") == 1


def test_every_hop_of_a_redirect_is_checked():
    """The second server listens; the first one's reply must not lead to it."""
    asked = []
    seen = []

    def first_only(address: str) -> bool:
        seen.append(address)
        return len(seen) == 1

    def redirect(request, channel):
        channel.sendall(f"HTTP/1.1 302 Found\r\nLocation: http://localhost:{inner}/secret\r\n\r\n".encode())

    with server(lambda request, channel: asked.append(request)) as inner, server(redirect) as outer:
        refused(f"http://127.0.0.1:{outer}/a.png", "which is not public", allowed=first_only)
    assert len(seen) == 2 and not asked


def test_redirects_are_followed_a_few_times():
    def answer(request, channel):
        number = int(request.split()[1].strip(b"/") or 0)
        head = f"HTTP/1.1 307 On\r\nLocation: /{number + 1}\r\n\r\n" if number < last else "HTTP/1.1 200 OK\r\n\r\nend"
        channel.sendall(head.encode())

    with server(answer) as port:
        last = module.MAX_REDIRECTS
        assert fetch(f"http://127.0.0.1:{port}/", **ANYWHERE) == b"end"
        last += 1
        refused(f"http://127.0.0.1:{port}/", "more than 5 redirects", **ANYWHERE)


@pytest.mark.parametrize("where", ["ftp://127.0.0.1/a", "file:///etc/passwd", "//[::1", "gopher://x/", "javascript:x"])
def test_redirects_lead_to_nothing_but_http(where):
    with server(replies("HTTP/1.1 301 Moved", f"Location: {where}")) as port:
        refused(f"http://127.0.0.1:{port}/", "cannot fetch", **ANYWHERE)


@pytest.mark.parametrize(
    "url",
    (
        "http:// http:///a.png http://[::1 http://a:99999/ http://user:pass@example.com/ http://a..b/ x HTTP: "
        f"ftp://example.com/a.png http://{'a' * 70}.example/ http://127.0.0.1:0/ http://x%20y.example/"
    ).split(),
)
def test_broken_urls(url):
    refused(url, "cannot fetch", **ANYWHERE)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (replies("HTTP/1.1 404 Not Found", "Content-Length: 0"), "answers 404 Not Found"),
        (replies("HTTP/1.1 206 Partial"), "answers 206"),
        (replies("HTTP/1.1 302 Found"), "cannot fetch"),
        (replies("HTTP/1.1 200 OK", "Content-Length: 9", body=b"abc"), "6 bytes before the end"),
        (replies("HTTP/1.1 200 OK", "Content-Length: 99999"), "larger than 1,000 bytes"),
        (replies("HTTP/1.1 200 OK", body=bytes(1001)), "larger than 1,000 bytes"),
        (replies("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=b"zz\r\n"), "cannot fetch"),
        (replies("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=b"9\r\nab"), "cannot fetch"),
        (replies("SSH-2.0-OpenSSH"), "cannot fetch"),
        (replies("HTTP/1.1 200 OK", *(f"A{i}: b" for i in range(200))), "cannot fetch"),
        (replies("HTTP/1.1 200 " + "x" * 70_000), "cannot fetch"),
        (lambda request, channel: None, "cannot fetch"),
    ],
)
def test_servers_that_misbehave(answer, message):
    with server(answer) as port:
        refused(f"http://127.0.0.1:{port}/", message, max_bytes=1000, **ANYWHERE)


def test_https_wants_a_certificate_and_a_closed_port_is_said():
    with server(replies("HTTP/1.1 200 OK")) as port:
        refused(f"https://127.0.0.1:{port}/", "cannot fetch", **ANYWHERE)
    refused(f"http://127.0.0.1:{port}/", "refused", **ANYWHERE)


def _drip(head: bytes) -> Callable[[bytes, socket.socket], None]:
    def answer(request, channel):
        channel.sendall(head)
        for _ in range(200):
            channel.sendall(b"a")
            time.sleep(0.05)

    return answer


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"],
)
def test_time_is_limited_in_all_not_by_the_byte(head):
    with server(_drip(head)) as port:
        started = time.monotonic()
        refused(f"http://127.0.0.1:{port}/", "longer than 0.3 seconds", max_seconds=0.3, **ANYWHERE)
        assert time.monotonic() - started < 3


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch):
    waiting = threading.Event()
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *args, **options: waiting.wait(20) and [])
    refused("http://example.com/", "longer than 0.2 seconds", max_seconds=0.2)
    waiting.set()


def test_a_picture_by_its_url(golden, monkeypatch):
    data = (golden / "images/rgb_odd.png").read_bytes()
    with server(replies("HTTP/1.1 200 OK", body=data)) as port:
        url = f"HTTP://127.0.0.1:{port}/a.png"
        with pytest.raises(QvlError, match="unless you allow it"):
            load_image(url)
        with pytest.raises(QvlError, match="not public"):
            load_image(url, allow_urls=True)
        monkeypatch.setattr(module, "is_public", lambda address: True)
        assert load_image(url, allow_urls=True).size == (173, 91)
