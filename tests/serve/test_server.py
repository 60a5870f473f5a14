"""The routes and their guards, over real sockets."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import pytest

from ldm.cli.serve import main
from ldm.errors import UserError
from ldm.serve.runs import Runs
from ldm.serve.server import Server, Site


@pytest.fixture
def serve(logs, studio):
    servers = []

    def start(token=""):
        server = Server("127.0.0.1", 0, Site(Runs([logs]), studio), token)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(port, path, method="GET", body=None, **headers):
    """Return status, headers and content; JSON is parsed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and "Content-Type" not in given:
        given["Content-Type"] = "application/json"
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), given)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = "json" in response.headers["Content-Type"]
    return response.status, response.headers, json.loads(content) if is_json else content


def test_page_and_data(serve):
    port = serve()
    status, headers, page = ask(port, "/")
    assert status == 200 and b'<script type="module" src="/page.js">' in page
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert b"http" not in page  # nothing comes from elsewhere
    parts = {file.name for file in files("ldm.serve").iterdir() if file.suffix in (".js", ".css")}
    assert len(parts) > 2 and all(ask(port, f"/{name}")[0] == 200 for name in parts)
    runs = ask(port, "/api/runs")[2]
    assert [run["name"] for run in runs] == ["3-text", "2-class", "1-none", "0-broken"] and runs[3]["problem"]
    assert ask(port, "/api/runs/1/curves")[2]["val/loss"] == [[2.0, 0.5]]
    ((_, file), _) = ask(port, "/api/runs/2/images")[2]["val/samples"]
    assert ask(port, f"/api/runs/2/images/{file}")[2].startswith(b"\x89PNG")
    assert b"ClassConditioner" in ask(port, "/api/runs/1/difference/2")[2]
    assert ask(port, "/api/runs/1/controls")[2]["task"] == "class"
    assert ask(port, "/api/runs/1/classes")[2][:2] == ["red circle", "green circle"]
    page = ask(port, "/api/runs/1/data/train/12")[2]
    assert (page["total"], page["first"], len(page["items"])) == (14, 12, 2)
    page = ask(port, "/api/runs/1/data/train/12/decoded")[2]
    assert [entry["kind"] for entry in page["items"][1] if entry["key"] == "decoded"] == ["image"]
    assert ask(port, "/api/runs/1/items/13")[2]["items"][0][0]["kind"] == "image"


def test_an_order_from_beginning_to_end(serve):
    port = serve()
    status, _, job = ask(port, "/api/runs/0/samples", "POST", {"prompt": "a red circle", "count": 2, "steps": 2})
    assert status == 202
    while job["state"] not in ("done", "failed"):
        time.sleep(0.02)
        job = ask(port, f"/api/jobs/{job['number']}")[2]
    assert job["state"] == "done" and job["images"] == 2
    assert ask(port, f"/api/jobs/{job['number']}/1.png")[2].startswith(b"\x89PNG")
    assert ask(port, f"/api/jobs/{job['number']}/2.png")[0] == 404
    assert ask(port, f"/api/jobs/{job['number']}/cancel", "POST", {})[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nowhere", 404),
        ("/api/runs/99/curves", 404),
        ("/api/runs/-1/curves", 404),
        ("/api/runs/0/images/images/val/secret.png", 400),
        ("/api/runs/0/images/images/val/../../configs/config.yaml", 404),
        ("/api/runs/0/images/images%2Fval%2F..%2F..%2Fconfigs%2Fconfig.yaml", 404),
        ("/../../etc/passwd", 404),
        ("/api/jobs/12345", 400),
        ("/api/runs/3/config", 400),
        ("/api/runs/3/controls", 400),
        ("/api/runs/3/data/train/0", 400),
        ("/api/runs/1/data/train/14", 400),
        ("/api/runs/1/data/test/0", 400),
        ("/api/runs/1/data/..%2Ftrain/0", 404),
        ("/api/runs/1/evaluations/0.png", 400),
        ("/page.html", 404),
        ("/server.py", 404),
        ("/page.css/../server.py", 404),
    ],
)
def test_what_there_is_not_is_told_in_words(serve, path, status):
    answer = ask(serve(), path)
    assert answer[0] == status and answer[2]["problem"] and "\n" not in answer[2]["problem"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "named"),
    [
        (b"{", {}, 400, "JSON"),
        (b"[" * 100_000, {}, 400, "JSON"),
        ([1], {}, 400, "mapping"),
        ({"target": "os.system"}, {}, 400, "target: unknown"),
        ({"count": "4"}, {}, 400, "count"),
        ({"count": 10**9}, {}, 400, "count"),
        ({"prompt": "x" * 10_000}, {}, 400, "10000 characters"),
        ({"image": "data:;base64,!!"}, {}, 400, "image: the upload is damaged"),
        ({"map": "data:;base64,AAAA"}, {}, 400, "map: the file is no image"),
        ({"mask": ["x"]}, {}, 400, "mask: ['x'] is not a text"),
        ({"layout": "x"}, {}, 400, "layout"),
        ({"options": 5}, {}, 400, "options: 5 is not a mapping"),
        ({"interval": [0, 1, 2]}, {}, 400, "interval"),
        (b"a=1", {"Content_Type": "application/x-www-form-urlencoded"}, 415, "JSON"),
        (b"", {"Content_Length": str(2**40)}, 413, "20 MiB"),
        ({}, {"Origin": "http://evil.example"}, 403, "other sites"),
    ],
)
def test_orders_that_are_refused(serve, body, headers, status, named):
    answer = ask(serve(), "/api/runs/0/samples", "POST", body, **headers)
    assert answer[0] == status and named in answer[2]["problem"]


JSON = "Content-Type: application/json"


@pytest.mark.parametrize(
    ("request_line", "header", "status"),
    [
        ("GET http://[x/ HTTP/1.1", "Accept: */*", b"400"),
        ("GET /api/runs HTTP/1.1", "Origin: http://[x", b"400"),
        ("POST /api/runs/1/samples HTTP/1.1", f"{JSON}\r\nContent-Length: {'9' * 5000}", b"413"),
    ],
)
def test_a_request_of_no_form_is_answered(serve, request_line, header, status):
    port = serve()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"{request_line}\r\nHost: 127.0.0.1:{port}\r\n{header}\r\n\r\n".encode())
        assert connection.recv(100).split()[1] == status


def test_other_names_of_this_machine_are_refused(serve):
    port = serve()
    assert ask(port, "/api/runs", Host="evil.example")[0] == 403
    assert ask(port, "/api/runs", Host=f"localhost:{port}")[0] == 200


def test_a_token_is_needed_where_one_was_set(serve):
    port = serve("secret")
    assert ask(port, "/")[0] == ask(port, "/?token=wrong")[0] == ask(port, "/", Cookie="token=wrong")[0] == 401
    status, headers, _ = ask(port, "/?token=secret")
    assert status == 200 and "HttpOnly" in headers["Set-Cookie"]
    assert ask(port, "/api/runs", Cookie="token=secret", Host="machine.example")[0] == 200


def test_many_visitors_at_once(serve):
    port = serve()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(port, "/api/runs/0/curves")[0], range(60)))
    assert answers == [200] * 60


def test_a_visitor_who_goes_away_harms_nobody(serve):
    port = serve()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.putrequest("POST", "/api/runs/0/samples")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    connection.close()
    assert ask(port, "/api/runs")[0] == 200


def test_a_port_that_is_taken(serve, logs, capsys):
    port = serve()
    with pytest.raises(UserError, match=f"--port {port}"):
        Server("127.0.0.1", port, Site([], None))
    with pytest.raises(SystemExit):
        main([str(logs), "--port", str(port), "--device", "cpu"])
    assert f"--port {port}" in capsys.readouterr().err
    for host in ("no.such.host.invalid", "203.0.113.1"):
        with pytest.raises(UserError, match=f"--host {host}: is no address of this machine"):
            Server(host, 0, Site([], None))
    with pytest.raises(SystemExit):
        main([str(logs / "absent")])
    assert "absent" in capsys.readouterr().err
