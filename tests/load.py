"""How much a server gives to 1, 8 and 32 clients at once: python tests/load.py [CHECKPOINT].

Each asks for 32 tokens at temperature 0 and must get the same text; single runs, so read the figures as such.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
from servers import free_port, process

BODY = {"prompt": "Return a new", "max_tokens": 32, "temperature": 0}


def main(checkpoint: str = "demo") -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "dsl", "serve", "--port", str(port), "--checkpoint", checkpoint]
    with process(command, f"{url}/health") as server, httpx.Client(base_url=url, timeout=300) as client:
        watch = psutil.Process(server.pid)

        def ask(_) -> tuple[float, dict]:
            start = time.perf_counter()
            answer = client.post("/v1/completions", json=BODY).raise_for_status().json()
            return time.perf_counter() - start, answer

        ask(0)
        for clients in (1, 8, 32):
            start, cpu = time.perf_counter(), sum(watch.cpu_times()[:2])
            with ThreadPoolExecutor(clients) as pool:
                times, answers = zip(*pool.map(ask, range(max(clients, 8))), strict=True)
            wall, cpu = time.perf_counter() - start, sum(watch.cpu_times()[:2]) - cpu
            tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
            assert len({answer["choices"][0]["text"] for answer in answers}) == 1
            speed = f"{tokens / wall:.0f} tokens/s, {tokens / cpu:.0f} a CPU-second"
            latency = f"latency {statistics.median(times):.2f} s, at most {max(times):.2f} s"
            print(f"{clients:3} clients: {speed}, {latency}, {watch.memory_info().rss / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
