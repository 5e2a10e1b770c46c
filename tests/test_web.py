"""The web page with Gradio's own client, over a real server: it knows the model by HTTP alone."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape

import pytest
import tiny
import torch
from servers import free_port, process, serving

from dsl import web
from dsl.generation import complete
from dsl.settings import SettingsError


@pytest.mark.slow
def test_gradio_client_gets_what_the_loop_gives():
    from gradio_client import Client

    torch.manual_seed(0)
    model, tokenizer, port = tiny.shell(), tiny.bytes_tokenizer(ends=False), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dsl", "web", "--port", str(port), "--api"]
    with serving(model, tokenizer) as api, process([*command, api], url):
        client = Client(url, verbose=False)
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
    assert body.count(web.PALETTE[2]) == 2 and web.PALETTE[0] not in body


def test_no_server_is_one_sentence():
    with pytest.raises(SettingsError, match=r"api='http://127.0.0.1:1' must be a dsl server: Connection error"):
        web.page("http://127.0.0.1:1")


def test_the_page_needs_no_torch():
    code = "import sys, dsl.web; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
