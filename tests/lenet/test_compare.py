"""The comparison runs what is missing, and only that; the figures come from the stored metrics."""

import collections
import json
import os
import signal
import subprocess
import time

from lenet import plots
from lenet.compare import matrix
from tests.conftest import ROOT, refused, run, start
from tests.lenet.helpers import write_mnist


def test_the_matrix_is_whole():
    runs = matrix(seeds=3)
    assert len(runs) == 3 * (6 + 5 * 2 * 3 + 4 * 3)
    kinds = collections.Counter(
        (o.optimizer, o.pruning_method, o.adamwprune_variant if o.pruning_method == "state" else "")
        for o in runs.values()
    )
    assert {count for (_, method, _), count in kinds.items() if method == "none"} == {3}
    assert {count for (_, method, _), count in kinds.items() if method != "none"} == {9}
    assert ("adamwprune", "state", "bitter7") in kinds and ("adamwprune", "random", "") in kinds
    assert {o.target_sparsity for o in runs.values() if o.pruning_method == "movement"} == {0.5, 0.7, 0.9}


def compare(tmp_path, *arguments, **options):
    command = (
        "-m lenet.compare",
        "--data-dir",
        tmp_path / "mnist",
        "--out",
        tmp_path / "out",
        "--seeds",
        2,
        "--epochs",
        4,
        "--jobs",
        2,
    )
    return run(*command, *arguments, **options)


def test_runs_figures_and_continuation(tmp_path):
    write_mnist(
        tmp_path / "mnist", 20_000, 100
    )  # 40 steps an epoch: pruning begins with step 101, and ends with step 120
    chosen = ("--runs", "sgd_movement_90*", "adamwprune_baseline*", "adamwprune_bitter7_90*")
    compare(tmp_path, *chosen[:2], "--jobs", 1)
    runs = {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(runs) == 2
    done = compare(tmp_path, *chosen)
    assert "6 runs, of which 2 are done" in done.stdout
    everything = {path.name: path.read_bytes() for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(everything) == 6 and everything | runs == everything
    lines = refused(compare(tmp_path, *chosen, "--epochs", 5, check=False))
    assert len(lines) == 1 and "was run with epochs 4, not 5" in lines[0]

    figures = run("-m lenet.plots", tmp_path / "out").stdout.split()
    expected = {
        "sgd_model_comparison.png",
        "sgd_accuracy_evolution.png",
        "adamwprune_model_comparison.png",
        "adamwprune_accuracy_evolution.png",
        "optimizer_comparison_baseline.png",
        "optimizer_comparison_90_pruning.png",
        "memory_efficiency_summary.png",
        "table.md",
    }
    assert {path.rpartition("/")[2] for path in figures} == expected
    assert all(
        (tmp_path / "out" / name).stat().st_size > (10_000 if name.endswith("png") else 100) for name in expected
    )
    finals = [json.loads(everything[f"adamwprune_bitter7_90_seed{seed}.json"])["final_accuracy"] for seed in (0, 1)]
    assert (
        f"| AdamWPrune | bitter7 |  |  |  | {sum(finals) / 2:.2f} ± {abs(finals[0] - finals[1]) / 2**0.5:.2f} |"
        in (tmp_path / "out" / "table.md").read_text()
    )

    others = tmp_path / "out" / "runs" / "other.json"  # a criterion that has no colour of its own
    one = json.loads(everything["adamwprune_bitter7_90_seed0.json"])
    others.write_text(json.dumps(one | {"config": one["config"] | {"criterion": "bitter3"}}))
    assert run("-m lenet.plots", tmp_path / "out").stdout.split() == figures
    others.unlink()

    run("-m lenet.plot_comparison", *(tmp_path / "out" / "runs").iterdir(), "--out", tmp_path / "c.png")
    run("-m lenet.plot_training", tmp_path / "out" / "runs" / "sgd_movement_90_seed0.json", "--out", tmp_path / "t.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000 and (tmp_path / "t.png").stat().st_size > 10_000

    alone, others = tmp_path / "alone" / "runs", ("sgd_movement_90_seed0.json", "sgd_movement_90_seed1.json")
    alone.mkdir(parents=True)
    (alone / "one.json").write_bytes(everything["adamwprune_bitter7_90_seed0.json"])
    assert "table.md" in run("-m lenet.plots", alone.parent).stdout  # of no method that has a panel of its own
    other = json.loads(everything[others[1]])
    for change in ({"lr": 0.1}, {"target_sparsity": 0.904}, {"seed": 0}):
        differing = "no seed" if "seed" in change else next(iter(change))
        (tmp_path / "changed.json").write_text(json.dumps(other | {"config": other["config"] | change}))
        given = (tmp_path / "out" / "runs" / others[0], tmp_path / "changed.json")
        lines = refused(run("-m lenet.plot_comparison", *given, "--out", tmp_path / "d.png", check=False))
        assert len(lines) == 1 and f"sgd movement 90 % differ in {differing}" in lines[0]


def test_the_committed_table_is_what_the_committed_runs_give():
    folder = ROOT / "results" / "lenet"
    assert plots.table(plots.load(sorted(folder.glob("runs/*.json")))) == (folder / "table.md").read_text()


def test_bad_arguments_are_one_line(tmp_path):
    write_mnist(tmp_path / "mnist", 60, 20)
    for arguments, message in (
        (("--runs", "sdg_*"), "matches no run"),
        (("--jobs", 0), "expected at least 1"),
        (("--out", "/proc/x"), "cannot be written"),
    ):
        lines = refused(compare(tmp_path, *arguments, check=False))
        assert len(lines) == 1 and message in lines[0]
    for arguments in (("",), ("a.json", "--out", ""), (".",)):
        assert len(refused(run("-m lenet.plot_training", *arguments, check=False))) == 1
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "sgd_baseline_seed0.json").write_text("{}")
    for arguments in (
        ("-m lenet.plots", tmp_path / "out"),
        ("-m lenet.plot_training", tmp_path / "out" / "runs" / "sgd_baseline_seed0.json"),
    ):
        lines = refused(run(*arguments, check=False))
        assert len(lines) == 1 and "is not a file of metrics" in lines[0]


def test_interrupted_or_killed_it_leaves_no_process_behind(tmp_path):
    """Started as a shell starts `command &`, where SIGINT is ignored at first."""
    write_mnist(tmp_path / "mnist", 30_000, 100)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        arguments = ("--data-dir", tmp_path / "mnist", "--out", tmp_path / "out", "--jobs", 2)
        process = start("-m lenet.compare", *arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        children = []
        while process.poll() is None and len(children) < 3:  # two workers and multiprocessing's tracker
            time.sleep(0.1)
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        time.sleep(1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and "Traceback" not in errors
        if number == signal.SIGINT:
            assert process.returncode == 130 and "the same command continues" in errors.splitlines()[-1]
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{child}") for child in children):
            assert time.monotonic() < deadline, "a worker lives on"
            time.sleep(0.1)
