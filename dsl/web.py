"""A web page for a model that a REST server holds: Gradio, talking HTTP to the server and to nothing else.

Loads neither torch nor transformers, so the page may live in another container than the model.
"""

import hmac
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import openai

from dsl import colors
from dsl.address import in_url, key_for, listen
from dsl.schema import SettingsError


def colored(pieces: list[tuple[str, list]], row: int, experts: int) -> str:
    """HTML of texts in the colours of their tokens' first experts in one MoE layer, with the legend."""
    body = "".join(colors.span(text, routes[row][0] if routes else None) for text, routes in pieces)
    return f"<p>{' '.join(colors.span(f' expert {i} ', i) for i in range(experts))}</p>{colors.box(body)}"


def page(api: str, key: str | None = None) -> gr.Blocks:
    """The page over the server at `api`. Raises SettingsError where no server answers there."""
    client = openai.OpenAI(base_url=f"{api.rstrip('/')}/v1", api_key=key or "none", max_retries=0, timeout=150.0)
    try:
        card = client.models.list().data[0]
        extra = card.model_extra or {}
    except (openai.OpenAIError, LookupError, ValueError, TypeError, AttributeError) as error:
        said = getattr(error, "message", None) or type(error).__name__
        raise SettingsError(f"api={api!r} must be a dsl server: {said}") from None
    layers, experts = extra.get("moe_layers", []), extra.get("num_experts", 0)

    going: dict[str, object] = {}  # by browser session: the run that may go on (Gradio's own cancel shows an error)

    def generate(prompt, length, temperature, top_p, seed, layer, request: gr.Request) -> Iterator:
        run = going[request.session_hash] = object()
        count, pieces, row = 0, [(prompt, [])], layers.index(layer) if layer in layers else 0
        how = {"model": card.id, "prompt": prompt, "max_tokens": int(length), "temperature": temperature}
        how |= {"top_p": top_p, "seed": None if seed is None else int(seed), "extra_body": {"routing": bool(layers)}}
        try:
            with client.completions.create(**how, stream=True) as stream:
                for part in stream:
                    if going.get(request.session_hash) is not run:
                        return
                    choice = part.choices[0]
                    count += choice.finish_reason is None
                    route = (choice.model_extra or {}).get("routing") or []
                    pieces.append((choice.text, route[0]["experts"] if route else []))
                    yield colored(pieces, row, experts), f"{count} tokens", pieces
        except openai.OpenAIError as error:
            problem = getattr(error, "body", None) or {}
            said = problem.get("message") if isinstance(problem, dict) else None
            yield colored(pieces, row, experts), f"error: {said or 'the server does not answer'}", pieces
        finally:
            if going.get(request.session_hash) is run:
                del going[request.session_hash]

    def halt(request: gr.Request) -> None:
        going.pop(request.session_hash, None)

    def recolor(pieces, layer):
        return colored(pieces, layers.index(layer), experts)

    with gr.Blocks(title="dsl", analytics_enabled=False) as blocks:
        gr.Markdown(f"# dsl\n`{card.id}` continues a prompt; each token has the colour of its first expert.")
        prompt = gr.Textbox("Return a new", label="Prompt", lines=2, elem_id="prompt")
        with gr.Row():
            length = gr.Slider(1, 1000, 100, step=1, label="Tokens", elem_id="length")
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature (0: the likeliest)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            layer = gr.Dropdown(layers, value=layers[0] if layers else None, label="Layer", visible=bool(layers))
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="go")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
        status = gr.Markdown("", elem_id="status")
        text = gr.HTML(elem_id="text")
        pieces = gr.State([])
        go.click(
            generate, [prompt, length, temperature, top_p, seed, layer], [text, status, pieces], api_name="generate"
        )
        stop.click(halt, queue=False, api_visibility="private")
        layer.input(recolor, [pieces, layer], text, api_visibility="private")
    return blocks


def serve(api: str, host: str, port: int, published: str | None = None) -> None:
    """Show the page until a signal; where there is a key, it asks for that too. Raises SettingsError and OSError."""
    key = key_for(host, published)
    with listen(host, port) as door:  # Gradio opens its own, and says less of what is wrong
        port = door.getsockname()[1]
    blocks = page(api, key).queue(default_concurrency_limit=8)
    print(f"dsl: the page is at http://{in_url(host)}:{port}, its model at {api}", file=sys.stderr, flush=True)
    login = {"auth": lambda _, given: hmac.compare_digest(given.encode(), key.encode())} if key else {}
    login |= {"auth_message": "Any name, and the server's key as the password."}
    blocks.launch(server_name=in_url(host), server_port=port, quiet=True, show_error=True, **login)
