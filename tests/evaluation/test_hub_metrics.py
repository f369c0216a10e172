"""The `evaluate` modules, loaded from their folders without any network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, roc_auc_score

from xmag_hf.evaluation import delong_test

# In a process of its own: evaluate reads its settings when it is imported.
SCRIPT = """
import json, socket, sys

def refuse(*_):
    raise OSError("no network in this test")

socket.socket.connect = refuse
import evaluate

folder, cases = sys.argv[1], json.loads(sys.stdin.read())
said = {}
for name, module, config, data, options in cases:
    try:
        loaded = evaluate.load(f"{folder}/{module}", config)
        said[name] = loaded.compute(**data, **options)
    except ValueError as error:
        said[name] = str(error)
print("SAID" + json.dumps(said))
"""


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    tables = []
    for signal in (1.5, 0.8):
        table = rng.normal(size=(90, 3))
        table[np.arange(90), y] += signal
        tables.append(table)
    return {"y": y, "a": tables[0], "b": tables[1]}


@pytest.fixture(scope="module")
def said(case, project_root: Path, tmp_path_factory) -> dict:
    y, a, b = (case[name] for name in "yab")
    two = (y == 1).astype(int)

    def paired(truth, first, second):
        return {"references": truth, "predictions1": first, "predictions2": second}

    picks = paired(y.tolist(), a.argmax(1).tolist(), b.argmax(1).tolist())
    cases = [
        ("multi-class", "delong", None, paired(y.tolist(), a.tolist(), b.tolist()), {}),
        ("two", "delong", None, paired(two.tolist(), a[:, 1].tolist(), b[:, 1].tolist()), {}),
        ("exact", "mcnemar", None, picks, {"mid_p": False}),
        ("f1", "f1_bootstrap", None, picks, {"clusters": (np.arange(90) // 2).tolist()}),
        ("auc", "bootstrap_interval", "auc", {"references": y.tolist(), "predictions": a.tolist()},
         {"samples": 200}),
        ("weighted", "bootstrap_interval", "weighted_f1",
         {"references": y.tolist(), "predictions": a.argmax(1).tolist()}, {"samples": 50}),
        ("unknown", "bootstrap_interval", "mcc", {}, {}),
        ("one class", "delong", None, paired([1, 1], [0.1, 0.2], [0.1, 0.3]), {}),
    ]  # fmt: skip
    home = tmp_path_factory.mktemp("hf")
    offline = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    offline |= {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(project_root / "xmag_hf/evaluation/hub_metrics")],
        input=json.dumps(cases), capture_output=True, text=True, env=os.environ | offline,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("SAID")[2])


def test_delong(said, case) -> None:
    y, a, b = (case[name] for name in "yab")
    areas = [np.mean([roc_auc_score(y == c, table[:, c]) for c in range(3)]) for table in (a, b)]
    found = said["multi-class"]
    assert [found["estimate_a"], found["estimate_b"]] == pytest.approx(areas, abs=1e-12)
    assert found["p_value"] == pytest.approx(delong_test(y, a, b).p_value, rel=1e-9)
    assert said["two"]["estimate_a"] == pytest.approx(roc_auc_score(y == 1, a[:, 1]), abs=1e-12)


def test_mcnemar(said, case) -> None:
    right_a, right_b = (case[name].argmax(1) == case["y"] for name in "ab")
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert said["exact"]["test"] == "McNemar exact"
    assert said["exact"]["p_value"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)


def test_bootstrap_modules(said, case) -> None:
    macro = f1_score(case["y"], case["a"].argmax(1), average="macro")
    assert said["f1"]["estimate_a"] == pytest.approx(macro, abs=1e-12)
    assert said["f1"]["test"] == "F1 bootstrap (clustered)"
    weighted = f1_score(case["y"], case["a"].argmax(1), average="weighted")
    assert said["weighted"]["estimate"] == pytest.approx(weighted, abs=1e-12)
    assert said["auc"]["low"] < said["auc"]["estimate"] < said["auc"]["high"]
    assert said["auc"]["samples"] == 200


def test_refusals_keep_their_words(said) -> None:
    assert "name one of auc, accuracy" in said["unknown"]
    assert "all 2 rows are class 1" in said["one class"]
