"""What tables of a study say: measures, speed-ups and claims, by hand; every claim of claims.yaml is well formed."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from dsl import findings, study, study_plots

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def curve(config, seed, bits, seconds=1.0):
    steps = range(1, len(bits) + 1)
    rows = [(config, seed, 100 * n, seconds * n, b) for n, b in zip(steps, bits, strict=True)]
    return pd.DataFrame(rows, columns=["config", "seed", "tokens", "cpu_seconds", "held_out_bits_per_byte"])


def test_what_a_run_needed():
    one = curve("a", 0, [4, 3, 3.5, 2])
    assert findings.reached(one, 3, "tokens") == 200
    assert findings.reached(one, 3.5, "tokens") == 150
    assert findings.reached(one, 4, "tokens") == 100
    assert findings.reached(one, 2, "cpu_seconds") == 4
    assert findings.reached(one, 1.9, "tokens") != findings.reached(one, 1.9, "tokens"), "never: NaN"


def test_a_speed_up_and_its_inverse():
    # "a" has the 3 bits that "b" ends with after 200 of 400 tokens; its steps cost twice as much
    table = pd.concat([curve("a", 0, [4, 3, 2, 1], 2), curve("b", 0, [6, 5, 4, 3], 1)])
    assert findings.speed_up(table, "a", "b").to_dict() == {0: 2.0}
    assert findings.speed_up(table, "b", "a").to_dict() == {0: 0.5}
    assert findings.speed_up(table, "a", "b", "cpu_seconds").to_dict() == {0: 1.0}
    assert findings.speed_up(table, "a", "nobody").empty


@pytest.fixture
def fake():
    """Tables of three seeds and two configurations whose figures are known."""
    runs, curves, analysis = [], [], []
    for seed in range(3):
        for config, shift in (("hybrid", 0.0), ("hybrid-dense", 0.1)):
            states = {"state_bytes_8192": 10, "state_bytes_131072": 10 + 2 * (131_072 - 8_192)}
            bits = 2 + shift * (1 + seed / 10) + seed / 100
            runs.append({"config": config, "seed": seed, "final_bits_per_byte": bits, "training_flops": 5, **states})
            curves.append(curve(config, seed, [4, 3, bits]).assign(maxvio=[9.0, 1 + shift, 1.0]))
            for layer in (1, 3):
                for step, share in ((10, 0.5), (20, 1.0)):
                    analysis.append((config, seed, "saturation", layer, str(step), share))
                analysis.append((config, seed, "copying", layer, "again", layer + shift))
                analysis.append((config, seed, "copying", layer, "first", 5))
    columns = ["config", "seed", "measure", "layer", "key", "value"]
    return pd.DataFrame(runs), pd.concat(curves), pd.DataFrame(analysis, columns=columns)


def test_one_row_a_run_one_column_a_figure(fake):
    table = findings.measures(*fake)
    assert len(table) == 6 and findings.seeds(fake[0]) == "3 seeds"
    row = table[(table.config == "hybrid-dense") & (table.seed == 1)].iloc[0]
    assert row["copying again"] == pytest.approx(2.1), "mean of the layers"
    assert row["copying gain"] == pytest.approx(5 - 2.1) and row["saturation 20"] == 1
    assert row.maxvio == pytest.approx((9 + 1.1 + 1) / 3) and row.state_bytes_per_token == 2


def test_seeds_that_are_missing_are_named(fake):
    runs = fake[0]
    assert findings.seeds(runs[~((runs.config == "hybrid") & (runs.seed == 2))]) == "3 seeds (hybrid 2)"
    assert findings.seeds(runs[runs.seed == 0]) == "1 seed"


def test_claims_get_verdicts_only_from_seeds(fake):
    runs, curves, analysis = fake
    found = findings.claims(findings.measures(*fake), curves).set_index("claim")
    assert found.verdict["... with linear layers too"] == "for"
    # differences .10, .11, .12: mean .11, half 4.30 * .01 / sqrt(3)
    assert found.ours["... with linear layers too"] == "-0.110 ± 0.025 bits per byte"
    assert found.verdict["Top-1 of n experts costs the FLOPs of one"] == "for"
    assert found.verdict["Muon needs fewer steps than AdamW"] == "silent"
    assert found.ours["Muon needs fewer steps than AdamW"] == "not run"
    assert found.verdict["A z-loss on the router makes training stable"] == "silent"
    one = (runs[runs.seed == 0], curves[curves.seed == 0], analysis[analysis.seed == 0])
    alone = findings.claims(findings.measures(*one), one[1]).set_index("claim")
    assert alone.verdict["... with linear layers too"] == "silent"
    assert "one seed" in alone.ours["... with linear layers too"]
    assert alone.verdict["Top-1 of n experts costs the FLOPs of one"] == "for", "what is counted needs no seeds"


CLAIMS = yaml.safe_load(Path(findings.__file__).with_name("claims.yaml").read_text("utf-8"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c["claim"][:40])
def test_a_claim_is_well_formed(claim):
    assert claim["claim"] and claim["published"] and claim["source"]
    if "silent" in claim:
        assert set(claim) == {"claim", "published", "source", "silent"}
        return
    known = {"claim", "published", "source", "measure", "of", "than", "ratio", "against", "sign", "margin", "exact"}
    assert set(claim) <= known | {"unit"} and claim["sign"] in (-1, 0, 1)
    assert {claim["of"], claim.get("than", claim["of"])} <= set(study.GRID)
    assert claim["sign"] or "margin" in claim or claim["exact"], "no effect: within what?"


@pytest.mark.skipif(not (FIGURES / "04_runs.csv").exists(), reason="no study is committed")
def test_every_claim_that_is_measured_finds_its_figure():
    tables = findings.tables(FIGURES)
    table = findings.measures(tables["runs"], tables["curves"], tables["analysis"])
    found = findings.claims(table, tables["curves"])
    assert set(found.claim[found.ours == "not run"]) == set()
    assert sum(path.stat().st_size for path in FIGURES.glob("04_*.csv")) < 400_000


def test_without_tables_the_way_to_make_them_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make study"):
        findings.tables(tmp_path)


def test_a_run_of_somebody_has_a_colour_and_its_name():
    assert study_plots.style("mine", 1)["label"] == "mine"
    assert study_plots.style("mine", 1)["color"] != study_plots.style("other", 2)["color"]
    assert set(study_plots.STYLES) == set(study.GRID)


def test_figures_of_runs_that_lack_figures(fake):
    runs, curves, _ = fake
    none = pd.DataFrame(columns=["config", "seed", "measure", "layer", "key", "value"])
    for figure in (
        study_plots.quality(curves.assign(step=curves.tokens), runs.drop(columns="training_flops")),
        study_plots.positions(none),
        study_plots.experts(none, curves, ["hybrid"], 0.1),
    ):
        plt.close(figure)
