"""The web page with Gradio's own client, over a real server: it knows the model by HTTP alone."""

import colorsys
import math
import os
import re
import subprocess
import sys
import threading
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
import tiny
import torch
from servers import free_port, process, serving

from dsl import colors, web
from dsl.__main__ import main
from dsl.address import in_url, key_for, listen
from dsl.generation import complete
from dsl.settings import SettingsError


@pytest.mark.slow
def test_gradio_client_gets_what_the_loop_gives():
    from gradio_client import Client

    torch.manual_seed(0)
    model, tokenizer, port = tiny.shell(), tiny.bytes_tokenizer(ends=False), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dsl", "web", "--port", str(port), "--api"]
    keyed = {"env": os.environ | {"DSL_API_KEY": "s3cret"}}
    with serving(model, tokenizer, key="s3cret") as api, process([*command, api], url, **keyed):
        values = {"data": ["a", 2, 0, 1, 0, 1]}
        assert httpx.post(f"{url}/gradio_api/call/generate", json=values, timeout=300).status_code == 401, (
            "the key is lent to nobody"
        )
        assert httpx.post(f"{url}/login", data={"username": "a", "password": "é"}, timeout=300).status_code == 400
        client = Client(url, verbose=False, auth=("anybody", "s3cret"))
        html, status = client.predict("a <b>", 12, 0.7, 0.9, 3, 1, api_name="/generate")[:2]
        client.close()
    text = complete(model, tokenizer, "a <b>", max_new_tokens=12, temperature=0.7, top_p=0.9, seed=3)
    assert status == "12 tokens" and "expert 3" in html
    shown = re.sub("<[^>]*>", "", html.partition("<pre")[2].partition(">")[2])
    assert unescape(shown) == "a <b>" + text


def test_colors_follow_the_layer_and_text_is_escaped():
    pieces = [("<p>", []), ("a", [[1, 0], [2, 3]]), ("&", [[0, 1], [2, 0]])]
    one, other = web.colored(pieces, 0, 4), web.colored(pieces, 1, 4)
    assert "&lt;p&gt;" in one and "&amp;" in one and one != other
    body = other.partition("<pre")[2]
    assert body.count(colors.style(2)) == 2 and colors.style(0) not in body


def test_experts_have_colors_of_their_own():
    """Those of 64 are not equal, and those of 16, our largest preset, not nearly: red, green and blue from 0 to 1."""
    assert len({colors.style(expert) for expert in range(64)}) == 64
    seen = []
    for look in map(colors.style, range(16)):
        if code := re.search("#(......);", look):
            seen.append([int(code[1][i : i + 2], 16) / 255 for i in (0, 2, 4)])
        else:
            hue, saturation, light = map(float, re.search(r"hsl\((\d+),(\d+)%,(\d+)%\)", look).groups())
            seen.append(colorsys.hls_to_rgb(hue / 360, light / 100, saturation / 100))
    distance = {(i, j): math.dist(seen[i], seen[j]) for i in range(16) for j in range(i)}
    print(sorted(distance.items(), key=lambda pair: pair[1])[:5])
    assert min(distance.values()) > 0.1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_what_others_can_reach_wants_a_key(monkeypatch, host):
    monkeypatch.setenv("DSL_API_KEY", "")
    for published in (None, "0.0.0.0"):
        with pytest.raises(SettingsError, match="can be reached from elsewhere: set a key in DSL_API_KEY"):
            web.serve("http://127.0.0.1:1", host, 0, published)
    assert key_for(host, "127.0.0.1") is key_for("localhost") is key_for("::1") is None
    monkeypatch.setenv("DSL_API_KEY", "s3cret")
    assert key_for(host) == key_for("127.0.0.1") == "s3cret"


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("localhost", "localhost")])
def test_what_is_printed_is_an_address(host, shown):
    assert in_url(host) == shown and urlsplit(f"http://{in_url(host)}:8000").hostname == host


def test_the_page_starts_on_an_ipv6_address(monkeypatch, capsys):
    """Gradio asks its own server at the name that it is given, so that must suit a URL."""
    launched = {}
    page = SimpleNamespace(queue=lambda **_: page, launch=lambda **how: launched.update(how))
    monkeypatch.setattr(web, "page", lambda *_: page)
    monkeypatch.setattr(web, "listen", lambda *_: listen("127.0.0.1", 0))  # where there is no IPv6, too
    web.serve("http://127.0.0.1:1", "::1", 0)
    assert launched["server_name"] == "[::1]" and "auth" not in launched
    assert f"at http://[::1]:{launched['server_port']}, " in capsys.readouterr().err


def test_a_port_that_cannot_be_had_is_one_error(capsys):
    with listen("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        assert main(["web", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"dsl: error: cannot listen on 127.0.0.1 port {port}: .*; try another --port\n", said)
    for wrong in ("70000", "-1"):
        assert main(["web", f"--port={wrong}"]) == 2
        assert capsys.readouterr().err == f"dsl: error: --port must be from 0 to 65535, got {wrong}\n"


def test_no_server_is_one_sentence():
    with pytest.raises(SettingsError, match=r"api='http://127.0.0.1:1' must be a dsl server: Connection error"):
        web.page("http://127.0.0.1:1")


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'"x"', b"null", b'{"data": ["a"]}', b'{"data": []}'])
def test_another_server_is_one_sentence(answer):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(SettingsError, match="must be a dsl server: "):
            web.page(f"http://127.0.0.1:{server.server_port}")


def test_the_page_needs_no_torch():
    code = "import sys, dsl.web; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
