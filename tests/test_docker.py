"""The containers without an engine: files linted, schema checked, and the images' own commands run as processes.

`compose.schema.json` is the schema of github.com/compose-spec/compose-spec, Apache-2.0, unchanged.
"""

import copy
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as normal
from servers import free_port, process

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
FILES = {name: DOCKER / f"{name}.Dockerfile" for name in ("model", "client")}
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
PUBLISHED = ["--published", "127.0.0.1"]
SCHEMA = json.loads((Path(__file__).parent / "compose.schema.json").read_text())


def lines(name: str, word: str) -> list[str]:
    """The arguments of an instruction, wherever a Dockerfile has it."""
    text = FILES[name].read_text().replace("\\\n", " ")
    return re.findall(rf"^(?:HEALTHCHECK .*?)?\s*{word} (.*)$", text, flags=re.MULTILINE)


def problems(compose: dict) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(compose)]


def test_the_compose_file_keeps_its_schema():
    assert problems(COMPOSE) == []
    for spoil in (
        lambda c: c["services"]["model-service"].update(environmnt={}),
        lambda c: c["services"]["model-service"].update(ports="8000"),
        lambda c: c["services"]["client-service"]["depends_on"]["model-service"].update(condition="service_happy"),
    ):
        spoiled = copy.deepcopy(COMPOSE)
        spoil(spoiled)
        assert problems(spoiled)


@pytest.mark.parametrize("name", FILES)
def test_hadolint(name):
    binary = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([binary, "--no-color", FILES[name]], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize("name", FILES)
def test_an_image_is_pinned_is_not_root_and_finds_what_it_copies(name):
    [base] = lines(name, "FROM")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    assert lines(name, "USER") == ["1000"]
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in lines(name, "COPY"):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source.removeprefix("./"), pattern) for pattern in let_in), source


def test_services():
    services = COMPOSE["services"]
    for name, service in services.items():
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name
        assert service["read_only"] and service["user"] == "1000" and service["init"] and service["cap_drop"] == ["ALL"]
        assert "healthcheck" not in service  # the image's own
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert all(volume["read_only"] for volume in service.get("volumes", ())), name
        assert name.endswith("-gpu") == ("gpu" in service.get("profiles", ()))
        assert service["environment"].keys() == {"DSL_API_KEY"}
    assert services["client-service"]["depends_on"] == {"model-service": {"condition": "service_healthy"}}
    gpu = services["model-service-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    for name, kind in (("model-service", "model"), ("client-service", "client")):  # the same as in the image
        assert len(lines(kind, "CMD")) == 2, "the health check's, for which the other service waits, and the image's"
        ours = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in services[name]["command"]]
        at = ours.index("--published")
        assert ours[at : at + 2] == PUBLISHED, "the ports are this machine's, so no key is asked for"
        assert ours[:at] + ours[at + 2 :] == json.loads(lines(kind, "CMD")[1])
    assert {service["environment"]["DSL_API_KEY"] for service in services.values()} == {"${DSL_API_KEY:-}"}


def test_the_client_image_installs_what_the_page_imports():
    """The page in a process that has only what pip would bring there."""
    [install] = [line for line in lines("client", "RUN") if "--constraint" in line]
    wanted, there = install.split("requirements.txt")[1].split(), {"dsl"}
    while wanted:
        name = normal(wanted.pop())
        if name not in there:
            there.add(name)
            needs = map(Requirement, metadata.requires(name) or ())
            wanted += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    owners = metadata.packages_distributions().items()
    absent = [module for module, names in owners if not there.intersection(map(normal, names))]
    assert {"torch", "transformers", "fastapi"} - set(absent) == {"fastapi"}
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import dsl.__main__, dsl.web
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "secret"], ids=["as compose starts them", "with a key"])
def test_the_commands_of_the_images_answer_their_health_checks(tmp_path, key):
    """Both as local processes with the images' words, but for ports and the server's name."""
    ports = {"8000": str(free_port()), "7860": str(free_port())}

    def local(words: list[str]) -> list[str]:
        text = json.dumps(words).replace("model-service", "127.0.0.1")
        for port, free in ports.items():
            text = text.replace(port, free)
        return json.loads(text)

    def command(name: str) -> list[str]:
        assert json.loads(lines(name, "ENTRYPOINT")[0]) == ["dsl"]
        words = local(json.loads(lines(name, "CMD")[1])) + (PUBLISHED if not key else [])
        return [sys.executable, "-m", "dsl", *words]

    env = os.environ | {"DSL_API_KEY": key, "DSL_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    health = {name: local(json.loads(lines(name, "CMD")[0])) for name in FILES}
    with process(command("model"), f"http://127.0.0.1:{ports['8000']}/health", env=env):
        with process(command("client"), f"http://127.0.0.1:{ports['7860']}", env=env):
            for check in health.values():
                assert subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode == 0, shlex.join(
                    check
                )
        assert subprocess.run([sys.executable, *health["client"][1:]], capture_output=True).returncode != 0
    assert [*tmp_path.iterdir()] == []  # a read-only system is enough
