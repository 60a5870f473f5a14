"""The HTTP server of the page: a few routes over run folders and a studio. Standard library only.

It listens on this machine alone unless told otherwise; then a token is needed. Requests from other sites are refused
(Host and Origin are compared), files outside of the runs' images cannot be reached, and nothing that is sent is
executed. Mistakes are answered in words.
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import PurePath
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from ldm.errors import UserError, shown
from ldm.serve.drawing import Studio
from ldm.serve.orders import read_order
from ldm.serve.runs import Runs, RunView, difference

_log = logging.getLogger(__name__)
_LARGEST_BODY = 20 * 2**20
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_STATIC = {f"/{file.name}": file for file in files("ldm.serve").iterdir() if file.name.startswith("page.")}
_STATIC["/"] = _STATIC.pop("/page.html")
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_ANY = ("0.0.0.0", "::")
_TIMEOUT = 30  # seconds for one request to arrive
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Answer:
    """Status, type and bytes of a response."""

    status: HTTPStatus
    kind: str
    body: bytes
    headers: Mapping[str, str] | None = None


class Refused(UserError):
    """A request that is not answered; `status` says why to a program."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Site:
    """The routes, apart from HTTP: a method, a path and a body give an answer."""

    def __init__(self, runs: Runs, studio: Studio) -> None:
        self.runs, self.studio = runs, studio
        run = r"/api/runs/(\d{1,6})"
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", "/api/runs", self._list),
            ("GET", f"{run}/curves", lambda run: _json(self._run(run).curves())),
            ("GET", f"{run}/images", lambda run: _json(self._run(run).images())),
            ("GET", f"{run}/images/" + r"(images/[\w-]+/[\w=.-]+)", self._image),
            ("GET", f"{run}/config", lambda run: _text(self._run(run).config())),
            ("GET", f"{run}/evaluations", lambda run: _json(self._run(run).evaluations())),
            ("GET", f"{run}/evaluations/" + r"(\d{1,4})\.png", lambda run, n: _png(self._run(run).sheet(int(n)))),
            ("GET", f"{run}/difference/" + r"(\d{1,6})", self._difference),
            ("GET", f"{run}/classes", lambda run: _json(self.studio.data.class_names(self._run(run).folder))),
            ("GET", f"{run}/data/" + r"(train|validation|test)/(\d{1,9})(/decoded)?", self._data),
            ("GET", f"{run}/items/" + r"(\d{1,9})", self._item),
            ("GET", f"{run}/controls", lambda run: _json(self.studio.controls(self._run(run).folder))),
            ("POST", f"{run}/samples", self._submit),
            ("GET", r"/api/jobs/(\d{1,9})", lambda job: _json(self.studio.public(int(job)))),
            ("POST", r"/api/jobs/(\d{1,9})/cancel", self._cancel),
            ("GET", r"/api/jobs/(\d{1,9})/source\.png", self._source),
            ("GET", r"/api/jobs/(\d{1,9})/(\d{1,3})\.png", self._sample),
        ]
        self._routes = [(verb, re.compile(pattern), respond) for verb, pattern, respond in routes]

    def answer(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Answer a request; mistakes become text."""
        try:
            if method == "GET" and path in _STATIC:
                file = _STATIC[path]
                kind = _KINDS[PurePath(file.name).suffix]
                return Answer(HTTPStatus.OK, f"{kind}; charset=utf-8", file.read_bytes())
            for verb, pattern, respond in self._routes:
                if verb == method and (match := pattern.fullmatch(path)):
                    return respond(*match.groups(), *([body] if verb == "POST" else []))
            raise Refused(HTTPStatus.NOT_FOUND, f"{shown(path)}: there is no such page")
        except UserError as error:
            status = error.status if isinstance(error, Refused) else HTTPStatus.BAD_REQUEST
            return _json({"problem": str(error)}, status)
        except Exception as error:
            _log.exception("serve: %s %s", method, shown(path))
            problem = f"{type(error).__name__}; the server's log says more"
            return _json({"problem": problem}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _run(self, number: str) -> RunView:
        if int(number) >= len(self.runs):
            raise Refused(HTTPStatus.NOT_FOUND, f"run {number}: there are {len(self.runs)}")
        return self.runs[int(number)]

    def _list(self) -> Answer:
        return _json([{"number": n, "name": run.name, "problem": run.problem()} for n, run in self.runs.now()])

    def _image(self, run: str, file: str) -> Answer:
        return _png(self._run(run).image(file), {"Cache-Control": "max-age=3600"})

    def _difference(self, a: str, b: str) -> Answer:
        return _text("\n".join(difference(self._run(a), self._run(b))))

    def _data(self, run: str, split: str, first: str, decoded: str | None) -> Answer:
        folder = self._run(run).folder
        decode = partial(self.studio.decoded, folder) if decoded else None
        return _json(self.studio.data.page(folder, split, int(first), decode=decode))

    def _item(self, run: str, number: str) -> Answer:
        return _json(self.studio.data.page(self._run(run).folder, "validation", int(number), count=1))

    def _submit(self, run: str, body: bytes) -> Answer:
        job = self.studio.submit(self._run(run).folder, read_order(body))
        return _json(self.studio.public(job.number), HTTPStatus.ACCEPTED)

    def _cancel(self, job: str, body: bytes) -> Answer:
        return _json(self.studio.cancel(int(job)).public())

    def _source(self, job: str) -> Answer:
        source = self.studio.job(int(job)).source
        if source is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"job {job}: its images are drawn from no image")
        return _png(source)

    def _sample(self, job: str, image: str) -> Answer:
        images = self.studio.job(int(job)).images
        if int(image) >= len(images):
            raise Refused(HTTPStatus.NOT_FOUND, f"image {image}: there are {len(images)}")
        return _png(images[int(image)])


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(status, "application/json; charset=utf-8", json.dumps(value).encode())


def _png(content: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(HTTPStatus.OK, "image/png", content, headers)


def _text(value: str) -> Answer:
    return Answer(HTTPStatus.OK, "text/plain; charset=utf-8", value.encode())


class Server(ThreadingHTTPServer):
    """Serves a site. `token`: what a visitor has to show; empty on this machine alone."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, site: Site, token: str = "") -> None:
        """Listen. UserError if the port is taken or the host is none of this machine."""
        self.site, self.token = site, token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            is_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            if is_host:
                raise UserError(f"--host {host}: is no address of this machine; use 127.0.0.1 or 0.0.0.0") from error
            raise UserError(f"--port {port}: {error.strerror or error}; choose another, 0 takes a free one") from error
        except OverflowError as error:
            raise UserError(f"--port {port}: is not between 0 and 65535") from error

    @property
    def address(self) -> str:
        """Return what to open in a browser."""
        host, port = self.server_address[:2]
        host = socket.gethostname() if host in _ANY else f"[{host}]" if ":" in host else host
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in the log that a visitor went away; nothing else happens here."""
        _log.debug("serve: %s went away", client_address, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """Checks who asks, reads the body, and writes what the site answers."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ldm", ""
    timeout = _TIMEOUT
    server: Server

    def do_GET(self) -> None:
        """Answer a request that changes nothing."""
        self._respond("GET")

    def do_POST(self) -> None:
        """Answer an order."""
        self._respond("POST")

    def _respond(self, method: str) -> None:
        headers = {}
        try:
            url = _split(self.path)
            self._check_host()
            if self._check_token(parse_qs(url.query)):
                headers = {"Set-Cookie": f"token={self.server.token}; HttpOnly; SameSite=Strict; Path=/"}
            body = self._body() if method == "POST" else b""
            answer = self.server.site.answer(method, url.path, body)
        except Refused as refused:
            self.close_connection = True
            answer = _json({"problem": str(refused)}, refused.status)
        self.send_response(answer.status)
        for name, value in (_HEADERS | dict(answer.headers or {}) | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def _check_host(self) -> None:
        """Refuse names that are not ours, behind which another site may hide, and requests that other sites send."""
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if not self.server.token and name not in _LOCAL:
            raise Refused(HTTPStatus.FORBIDDEN, f"{shown(host)}: this page is served to this machine only")
        origin = self.headers.get("Origin")
        if origin is not None and _split(origin).netloc != host:
            raise Refused(HTTPStatus.FORBIDDEN, "requests from other sites are refused")

    def _check_token(self, query: Mapping[str, list[str]]) -> bool:
        """Check the token in address or cookie; return whether it came in the address and belongs into a cookie."""
        if not self.server.token:
            return False
        given = query.get("token", [""])[0]
        if _same(given, self.server.token):
            return True
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get("token")
        except CookieError:
            cookie = None
        if cookie is None or not _same(cookie.value, self.server.token):
            raise Refused(HTTPStatus.UNAUTHORIZED, "open the address that the server printed, with its token")
        return False

    def _body(self) -> bytes:
        if "json" not in self.headers.get("Content-Type", ""):
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an order is JSON")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]+", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "an order says its length")
        if len(length) > 12 or int(length) > _LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_LARGEST_BODY >> 20} MiB were sent")
        return self.rfile.read(int(length))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep single requests out of the log."""


def _split(address: str) -> SplitResult:
    """Return the parts of an address. Refused if it is none."""
    try:
        return urlsplit(address)
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{shown(address)}: {error}") from error


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())
