"""Make checkpoints/demo from a trained run: its newest step, in bf16 and without moments, so that it stays small.

python tests/make_demo.py [RUN]        the run's name, quickstart by default
"""

import shutil
import sys
from pathlib import Path

from dsl import checkpoint, hub, settings

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "demo"


def main(run: str = "quickstart") -> None:
    source, _ = checkpoint.newest(settings.find_run(run))
    model, tokenizer = hub.load(source)
    state = checkpoint.read_trainer(source)
    shutil.rmtree(DEMO, ignore_errors=True)
    card = (source / "README.md").read_text(encoding="utf-8") if (source / "README.md").exists() else None
    made = checkpoint.save(
        DEMO, state["step"], model=model.bfloat16(), tokenizer=tokenizer, trainer=state, optimizer={}, card=card
    )
    size = sum(path.stat().st_size for path in made.iterdir())
    print(f"{made}: {size / 1e6:.1f} MB, {state['bits_per_byte']:.3f} bits per byte on held-out documents")


if __name__ == "__main__":
    main(*sys.argv[1:])
