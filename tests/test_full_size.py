"""The presets that want a GPU, at full size for twenty steps on a CPU: GPT-2's vocabulary, streamed from a hub.

Only under DSL_SOAK=1 (make soak), since it takes minutes and gigabytes.
"""

import csv
import math
import os
import statistics
import subprocess
import sys

import pytest
from hub_emulator import Hub, write_dataset
from runs import cache, home  # noqa: F401

from dsl import checkpoint, pydocs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not os.environ.get("DSL_SOAK"), reason="minutes and gigabytes: make soak"),
]
CORPORA = {"linear_moe": ("HuggingFaceTB/cosmopedia", "web_samples_v2")}
CORPORA["gqa_moe"] = ("Salesforce/wikitext", "wikitext-103-raw-v1")
SETTINGS = "--max-steps 20 --per-device-train-batch-size 1 --gradient-accumulation-steps 1 --logging-steps 1"
SETTINGS += " --save-steps 20 --eval-steps 20 --sample-steps 20 --sample-tokens 8 --held-out-bytes 4000"
SETTINGS += " --fraction 1 --held-out 0.05 --block-size 64 --shuffle-rows 64"


@pytest.mark.parametrize("preset", CORPORA)
def test_twenty_steps_of_the_whole_model(preset, home):  # noqa: F811
    name, config = CORPORA[preset]
    texts = [text for text in pydocs.documents(small=True).values() if len(text) < 20_000]
    rows = [row for i, text in enumerate(texts) for row in (f" = {i} = \n", text)]  # wikitext's articles have headings
    half = len(texts) // 2 * 2
    write_dataset(home / "hub", name, {config: [rows[:half], rows[half:]]}, rows_per_group=100)
    command = [sys.executable, "-m", "dsl", "train", preset, *SETTINGS.split()]
    with Hub(home / "hub") as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf")}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and any(span for _, span in hub.requests)
    with (home / "logs" / "training" / preset / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    losses, speeds = ([float(row[name]) for row in logged] for name in ("loss", "tokens_per_second"))
    assert len(logged) == 20 and math.isclose(losses[0], math.log(50_257), rel_tol=0.05) and losses[-1] < losses[0]
    folder = checkpoint.step_dir(home / "checkpoints" / preset, 20)
    assert checkpoint.verify(folder) == []
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{preset}: loss {losses[0]:.2f} to {losses[-1]:.2f}, {statistics.median(speeds):,.0f} tokens/s, "
        f"peak memory {usage.ru_maxrss / 1e6:.1f} GB, checkpoint {size / 1e9:.2f} GB"
    )
