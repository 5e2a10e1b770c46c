"""The command line: train, generate, test-checkpoint, evaluate, runs, serve, web.

Results go to stdout, progress and errors to stderr; an error is one line, its exit code 2 where a setting is wrong
and 1 otherwise. What a command needs is loaded when it runs, so that a mistyped flag costs no torch.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from dsl import settings
from dsl.config import import_own
from dsl.schema import FIELDS, SECTIONS, DataConfig, Sampling, Section, SettingsError, kinds, read_yaml, suggest
from dsl.settings import PRESETS, Run

EXAMPLES = {
    "train": """dsl train quickstart --run-name mine --max-steps 300 --mixer delta
  dsl train linear_moe --corpus pydocs --print-config > my.yaml
  dsl train --config my.yaml --learning-rate 3e-4
  torchrun --nproc-per-node 2 -m dsl train quickstart""",
    "generate": """dsl generate --prompt "Return a list of" --temperature 0.7 --seed 1
  dsl generate --checkpoint quickstart --file prompt.txt --samples 3 --json
  echo "Raise an error if" | dsl generate --top-k 40""",
    "test-checkpoint": "dsl test-checkpoint --checkpoint quickstart && echo good",
    "serve": """dsl serve --checkpoint quickstart
  DSL_API_KEY=secret dsl serve --host 0.0.0.0 --port 8080
  curl -d '{"prompt": "Return a new", "max_length": 60}' -H 'Content-Type: application/json' localhost:8000/generate""",
    "web": "dsl web --api http://127.0.0.1:8000",
    "evaluate": "dsl evaluate --checkpoint checkpoints/quickstart/step-000300 --held-out-bytes 1e6 --json",
}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and options are never guessed from their beginning."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"dsl: error: {message} (see {self.prog} --help)\n")


def _shape(annotation: Any) -> str:
    words = {int: "N", float: "X", bool: "true|false"}
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return next((word for kind, word in words.items() if kind in kinds(annotation)), "TEXT")


def _setting_flags(parser: Parser, title: str, section: type[Section], **defaults: Any) -> None:
    """One flag a setting; values stay text, which the section converts and checks."""
    group = parser.add_argument_group(f"{title} settings")
    for name, field in section.model_fields.items():
        many, default = tuple in kinds(field.annotation), defaults.get(name, field.default)
        group.add_argument(
            "--" + name.replace("_", "-"),
            metavar=_shape(field.annotation),
            nargs="+" if many else None,
            default=defaults.get(name, argparse.SUPPRESS),
            help=field.description + ("" if many or default is None else f" ({str(default).lower()})"),
        )


def _address(parser: Parser, port: int, more: str) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=f"where to listen (127.0.0.1){more}")
    parser.add_argument("--port", type=int, default=port, metavar="N", help=f"({port})")
    text = "in a container: where its engine shows the port, if that is not everywhere (127.0.0.1)"
    parser.add_argument("--published", metavar="ADDRESS", help=text)


def _given(options: argparse.Namespace, fields: Iterable[str] = FIELDS) -> dict[str, Any]:
    given = {name: value for name, value in vars(options).items() if name in fields}
    return {name: v[0] if isinstance(v, list) and len(v) == 1 else v for name, v in given.items()}


def _parser() -> tuple[Parser, dict[str, Parser]]:
    top, parsers = Parser("dsl", description=__doc__), {}
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(run: Callable, text: str, usage: str | None = None, more: str = "") -> Parser:
        name = run.__name__.replace("_", "-")
        parser = commands.add_parser(name, help=text, usage=usage, description=f"{text[0].upper()}{text[1:]}.{more}")
        parser.epilog = f"examples:\n  {EXAMPLES[name]}" if name in EXAMPLES else None
        parser.set_defaults(run=run)
        if run not in (serve, web):
            parser.add_argument("--json", action="store_true", help="print the result as JSON")
        if run not in (runs, train, web):
            parser.add_argument("--checkpoint", default="demo", metavar="NAME", help="run, folder or hub id (demo)")
            text = "run this module first: the home of a mixer or router of yours that the checkpoint names"
            parser.add_argument("--import", dest="module", metavar="MODULE", help=text)
        parsers[name] = parser
        return parser

    more = " The same run name goes on from its newest checkpoint.\n\npresets:\n"
    more += "\n".join(f"  {name:<11} {values['about']}" for name, values in PRESETS.items())
    more += "\n\nA setting that no preset, file or flag names has the value in brackets."
    parser = command(train, "train a model", "dsl train [PRESET | --config FILE] [--SETTING VALUE ...]", more)
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="what to start from (quickstart)")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON: sections model, data, train; name, preset")
    parser.add_argument("--run-name", metavar="NAME", help="folder of the run (the preset's name)")
    parser.add_argument("--mixer", metavar="NAME", help="elu | delta | softmax | latent | module:Class, in every layer")
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and train nothing")
    for title, section in SECTIONS.items():
        _setting_flags(parser, title, section)
    parser = command(generate, "continue a prompt", "dsl generate [--prompt TEXT | --file FILE] [options]  (or stdin)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to continue")
    source.add_argument("--file", type=Path, metavar="FILE", help="a UTF-8 file that holds the prompt")
    _setting_flags(parser, "sampling", Sampling, temperature=0.8)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="number of continuations (1)")
    text = "try the prompts, measure held-out bits per byte, check routing and files; the exit code is the verdict"
    _setting_flags(command(test_checkpoint, text, "dsl test-checkpoint [options]"), "data", DataConfig)
    text = "measure bits per byte and expert load on held-out documents"
    _setting_flags(command(evaluate, text, "dsl evaluate [options]"), "data", DataConfig)
    command(runs, "list the runs on disk")
    parser = command(serve, "answer over HTTP: /generate, OpenAI's /v1/completions and /v1/models, /health")
    _address(parser, 8000, "; any other than this machine's own wants a key in DSL_API_KEY; clients are asked for it")
    parser = command(web, "a web page over such a server")
    parser.add_argument("--api", default="http://127.0.0.1:8000", metavar="URL", help="the server (this machine's)")
    _address(parser, 7860, "; likewise: the page asks for the server's key in DSL_API_KEY")
    return top, parsers


def _print(result: Any, options: argparse.Namespace) -> None:
    plain = json.dumps(result, default=str, indent=2)
    print(plain if options.json else yaml.safe_dump(json.loads(plain), sort_keys=False, allow_unicode=True).rstrip())


def train(options: argparse.Namespace) -> int:
    if None not in (options.config, options.preset):
        raise SettingsError(f"give a PRESET or --config, not both, got {options.preset!r} and {options.config!r}")
    chosen = "quickstart" if options.preset is None else options.preset
    run = settings.preset(chosen) if options.config is None else Run.from_yaml(Path(options.config))
    run = run.override(run_name=options.run_name, mixer=options.mixer, **_given(options))
    if options.print_config:
        print(run.to_json() if options.json else run.to_yaml().rstrip())
        return 0
    from dsl import training

    if options.config is not None and Path(options.config).is_file() and not any(run.run_dir.glob("step-*")):
        _compare_threads(Path(options.config))
    summary = training.train(run)
    if os.environ.get("RANK", "0") == "0":
        _print(dataclasses.asdict(summary), options)
    return 130 if summary.status == "interrupted" else 0


def _compare_threads(path: Path) -> None:
    """Say before a run begins that the recorded one had another number of threads: a CPU's sums depend on it."""
    import torch

    record, now = read_yaml(path.read_text("utf-8")).get("record"), torch.get_num_threads()
    then = record.get("threads", now) if isinstance(record, dict) else now
    if then != now and not torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
        how = f"OMP_NUM_THREADS={then} repeats that run to the bit"
        print(f"{path.name} was made with {then} threads, this process has {now}: {how}", file=sys.stderr)


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is None and options.file is None and sys.stdin.isatty():
        raise SettingsError("prompt is missing: give --prompt, --file, or text on stdin")
    try:
        if options.prompt is None:
            return (options.file.read_bytes() if options.file else sys.stdin.buffer.read()).decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{options.file or 'stdin'} must hold UTF-8 text, but {error.reason}") from None
    except OSError as error:
        raise SettingsError(f"cannot read {options.file}: {error.strerror}") from None
    return options.prompt


def generate(options: argparse.Namespace) -> int:
    if options.samples < 1:
        raise SettingsError(f"samples must be at least 1, got {options.samples}")
    how, prompt = Sampling(**_given(options, Sampling.model_fields)), _prompt(options)
    from dsl import generation, hub

    model, tokenizer = hub.load(options.checkpoint)
    samples = []
    for number in range(options.samples):
        seed = None if how.seed is None else (how.seed + number) % 2**63
        tokens, start = [], time.perf_counter()
        for token in generation.generate(model, tokenizer, prompt, **{**how.model_dump(), "seed": seed}):
            if not options.json:
                print(("" if tokens else prompt) + token.text, end="", flush=True)
            tokens.append(token)
        if not options.json:
            print()
        seconds = time.perf_counter() - start
        speed = f"{len(tokens)} tokens, {len(tokens) / seconds:.0f} a second"
        print(f"[{number + 1} of {options.samples}: {speed}]", file=sys.stderr)
        samples.append({"text": "".join(t.text for t in tokens), "tokens": len(tokens), "seed": seed})
    if options.json:
        _print({"checkpoint": model.name_or_path, "prompt": prompt, "samples": samples}, options)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from dsl import hub, report

    _print(report.measure(*hub.load(options.checkpoint), **_given(options)), options)
    return 0


def test_checkpoint(options: argparse.Namespace) -> int:
    from dsl import report

    result = report.examine(options.checkpoint, **_given(options))
    if not options.json:
        for prompt, text in result.pop("texts").items():
            print(f"{prompt}{text}\n")
    _print(result, options)
    return bool(result["problems"])


def runs(options: argparse.Namespace) -> int:
    from dsl import report

    found = report.runs()
    if options.json:
        _print(found, options)
    elif found:
        lines = [list(found[0]), *([_cell(value) for value in row.values()] for row in found)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    else:
        print(f"no runs in {settings.home() / 'checkpoints'}: `dsl train` makes one", file=sys.stderr)
    return 0


def serve(options: argparse.Namespace) -> int:
    from dsl import serving

    serving.serve(options.checkpoint, options.host, options.port, options.published)
    return 0


def web(options: argparse.Namespace) -> int:
    from dsl import web as page

    page.serve(options.api, options.host, options.port, options.published)
    return 0


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _complain(error: BaseException, code: int) -> int:
    # Of the processes that torchrun started, all see a wrong setting; of other errors only the first comes here.
    if code == 1 or os.environ.get("RANK", "0") == "0":
        lines = [*str(error).splitlines(), *getattr(error, "__notes__", ())]
        text = "; ".join(line for line in lines if line.strip())
        print(f"dsl: error: {text or type(error).__name__}", file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run one command (`sys.argv` by default) and return its exit code; SystemExit where argparse ends it."""
    given = sys.argv[1:] if arguments is None else arguments
    top, parsers = _parser()
    flags = {flag: flag for parser in parsers.values() for flag in parser._option_string_actions}
    # --max_steps is --max-steps; a word that is no option, such as a prompt, stays as it is.
    words = [re.sub("^--[^=]+", lambda name: flags.get(name[0].replace("_", "-"), name[0]), word) for word in given]
    if words and words[0] not in parsers and not words[0].startswith("-"):
        top.error(f"unknown command {words[0]!r}{suggest(words[0], parsers)}")
    options, unknown = top.parse_known_args(words)
    if unknown:
        parser = parsers.get(words[0], top)
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown option {unknown[0]!r}" + (f", did you mean {near[0]}?" if near else ""))
    try:
        try:
            if (module := getattr(options, "module", None)) is not None:
                import_own(module)
        except (ImportError, ValueError) as error:
            raise SettingsError(f"--import {module} failed: {error}") from None
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SettingsError as error:
        return _complain(error, 2)
    except (ValueError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError:  # ours have names of their own: this one is a bug, and shows where
            raise
        return _complain(error, 1)


if __name__ == "__main__":
    sys.exit(main())
