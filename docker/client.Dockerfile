# The web page over a REST server: dsl web. It has neither torch nor transformers. Built from the repository's root:
#     docker build -f docker/client.Dockerfile -t dsl-client .
# It listens on all addresses of the container, so it wants a key: docker run --init -e DSL_API_KEY=... (or see
# compose.yaml; without --init, docker stop waits ten seconds).
# By tag: the machine of development reaches no registry to learn the digest from.
FROM python:3.11.14-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 GRADIO_ANALYTICS_ENABLED=False
WORKDIR /app

COPY requirements.txt ./
RUN pip install --constraint requirements.txt gradio openai pydantic pyyaml
COPY pyproject.toml LICENSE README.md ./
COPY dsl ./dsl
RUN pip install --no-deps . && useradd --create-home --uid 1000 dsl

USER 1000
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/', timeout=4)"]
ENTRYPOINT ["dsl"]
CMD ["web", "--host", "0.0.0.0", "--port", "7860", "--api", "http://model-service:8000"]
