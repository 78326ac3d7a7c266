"""A study end to end on a toy: resumed after a kill, unfair runs refused by name, tables from the results alone."""

import copy
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train_gpt2
from gpt2.config import load_config
from gpt2.errors import UserError
from study import report, states
from study.arms import ARMS
from study.plan import NAMES, load_plan, problems
from study.run import circumstances, main, outcome, parse, read_results, run_all, run_one, table, take_over
from tests.conftest import ROOT

PLAN = """
from study.data import Text
title = "toy"
text = Text("toy", ("toy.txt",), {sha256!r}, ("--tokenizer=char", "--val_tokens=4_000"))
base = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=8, gradient_accumulation_steps=1, max_iters=24,
            learning_rate=1e-2, warmup_iters=2, eval_interval=8, eval_iters=8, checkpoint_interval=12, prune_interval=4,
            device="cpu")
arms = {{
    "dense": {{}},
    "magnitude": dict(criterion="magnitude", target_sparsity=0.9),
    "random": dict(criterion="random", target_sparsity=0.9),
    **{{name: dict(criterion="variance_quarter", target_sparsity=0.5, change=(name, {{}})) for name in {changes!r}}},
}}
seeds = (0, 1, 2)
pairs = [("random", "magnitude"), ("magnitude", "dense")]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and the plan about it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "data").mkdir()
    draw = random.Random(0)
    words = ["the lamp ", "was lit ", "by hand ", "and the door ", "stood open "]
    text = "".join(draw.choices(words, k=4000)).encode()
    (folder / "data" / "toy.txt").write_bytes(text)
    (folder / "toy.py").write_text(PLAN.format(sha256=hashlib.sha256(text).hexdigest(), changes=sorted(ARMS)))
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    return load_plan(folder / "toy.py")


def arguments(folder, results, *more):
    return parse(
        [str(folder / "toy.py"), f"--results={folder / results}", f"--work={folder / 'work' / results}", *more]
    )


@pytest.fixture(scope="module")
def results(folder, plan):
    """The results of three arms with three seeds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        args = arguments(folder, "results")
        for arm in ("dense", "magnitude", "random"):
            for seed in plan.seeds:
                run_one(plan, arm, seed, args)
    return read_results(plan, folder / "results")


def test_a_result_holds_all_that_repeats_it(results, plan, folder, monkeypatch):
    result = results["magnitude-seed1.json"]
    assert result["sparsity"] == pytest.approx(0.9, abs=1 / result["prunable"])
    assert result["tokens"] == 24 * 8 * 16 and [point["step"] for point in result["curve"]] == [8, 16, 24]
    assert result["config"]["seed"] == 1 and result["config"]["dtype"] == "float32"
    assert sum(result["layer_sparsity"].values()) / 4 == pytest.approx(0.9, abs=0.08)
    assert {"commit", "versions", "machine", "data", "epochs", "seconds", "parameters"} <= result.keys()
    assert not (folder / "work" / "results" / "toy" / "magnitude-seed1" / "run").exists()
    assert problems(plan, results) == []
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}
    assert run_all(plan, arguments(folder, "results", "--arms", "^(dense|magnitude|random)$")) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}
    assert "1.6" not in table(plan, {}) and f"{result['val_loss']:.4f}" in table(plan, results)


def test_killed_and_started_again_it_ends_the_same(results, folder, plan, monkeypatch):
    monkeypatch.chdir(folder)
    args = arguments(folder, "killed")
    command = [sys.executable, "-m", "study.run", str(folder / "toy.py"), f"--results={args.results}"]
    command += [f"--work={args.work}", "--one", "magnitude", "1"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = Path(args.work) / "toy" / "magnitude-seed1" / "run" / "checkpoints"
    while process.poll() is None and not list(work.glob("step-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_one(plan, "magnitude", 1, args)
    again = read_results(plan, args.results)["magnitude-seed1.json"]
    assert again["val_loss"] == results["magnitude-seed1.json"]["val_loss"]
    assert [point["step"] for point in again["curve"]] == [8, 16, 24]


@pytest.mark.parametrize("step", [8, 24])
def test_stopped_in_an_evaluation_and_started_again_it_ends_the_same(step, results, folder, plan, monkeypatch):
    monkeypatch.chdir(folder)
    args, evaluate, left = arguments(folder, f"stopped-{step}"), train_gpt2.evaluate, [step // 8]

    def stopped(*given):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given)

    monkeypatch.setattr(train_gpt2, "evaluate", stopped)
    run_one(plan, "magnitude", 1, args)
    assert not read_results(plan, args.results)
    run_one(plan, "magnitude", 1, args)
    again, before = read_results(plan, args.results)["magnitude-seed1.json"], results["magnitude-seed1.json"]
    assert [(point["step"], point["val_loss"], point["tokens"]) for point in again["curve"]] == [
        (point["step"], point["val_loss"], point["tokens"]) for point in before["curve"]
    ]


@pytest.mark.parametrize(
    "changed", [[], {"curve": None}, {"curve": []}, {"val_loss": "x"}, {"val_loss": math.nan}, {"val_loss": 0.5}]
)
def test_a_damaged_result_is_one_line_that_names_it(changed, results, plan, tmp_path):
    result = results["magnitude-seed1.json"]
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "magnitude-seed1.json").write_text(json.dumps(changed and result | changed))
    with pytest.raises(UserError, match="magnitude-seed1.json: is no result of a run"):
        read_results(plan, tmp_path)


def test_a_processor_with_avx512_makes_its_runs_with_avx2(folder, plan, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_all(plan, arguments(folder, "held", "--arms", "^dense$", "--seeds", "0")) == 0
    machine = read_results(plan, folder / "held")["dense-seed0.json"]["machine"]
    assert machine["capability"] != "AVX512" and machine["threads"] == 1


def test_what_another_plan_has_made_is_taken_over_and_what_differs_is_not(results, folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "results", folder / "shared")
    shutil.rmtree(folder / "shared" / "report", ignore_errors=True)
    twin = folder / "twin.py"
    arms = """arms = {
        "twin": dict(criterion="magnitude", target_sparsity=0.9),
        "shorter": dict(criterion="magnitude", target_sparsity=0.9, prune_end=16),
        "sparser": dict(criterion="magnitude", target_sparsity=0.95),
    }
pairs = []
seeds = (0, 1)"""
    twin.write_text((folder / "toy.py").read_text() + arms)
    args = parse([str(twin), f"--results={folder / 'shared'}", f"--work={folder / 'work' / 'shared'}"])
    plan = load_plan(twin)
    assert take_over(plan, plan.runs(), args.results) == [run for run in plan.runs() if run[0] != "twin"]
    taken = read_results(plan, args.results)
    assert sorted(taken) == ["twin-seed0.json", "twin-seed1.json"] and problems(plan, taken) == []
    assert taken["twin-seed1.json"]["made_as"] == "toy/magnitude-seed1"
    assert taken["twin-seed1.json"]["curve"] == results["magnitude-seed1.json"]["curve"]


def test_a_run_repeats_from_its_result_and_one_that_does_not_is_told(results, folder, plan, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "results", folder / "again")
    args = arguments(folder, "again", "--repeat")
    run_one(plan, "magnitude", 0, args)
    assert "+0.00000 from the one kept" in capsys.readouterr().out
    path = plan.path("magnitude", 0, args.results)
    path.write_text(json.dumps(results[path.name] | {"val_loss": results[path.name]["val_loss"] - 0.01}))
    with pytest.raises(UserError, match="magnitude seed 0: repeated, it ends \\+0.0100 from"):
        run_one(plan, "magnitude", 0, args)


@pytest.mark.parametrize(
    "place, value, named",
    [
        (("config", "prune_end"), 20, "prune_end is 20 there, 18 in the plan"),
        (("config", "learning_rate"), 0.5, "learning_rate is 0.5 there, 0.01 in the plan"),
        (("config", "dtype"), "bfloat16", "dtype is bfloat16 there, float32 in the plan"),
        (("config", "batch_size"), 4, "batch_size is 4 there"),
        (("config", "seed"), 5, "seed is 5 there, 1 in the plan"),
        (("config", "schedule"), "cubic", "schedule is cubic there, gmp in the plan"),
        (("curve", -1, "tokens"), 99, "tokens is 99 there, 3072 in the plan"),
        (("data", "text"), "0" * 64, "text is 0000"),
        (("data", "shards", "more.bin"), "0", "shards is"),
        (("evaluation",), "0" * 16, "evaluation set is 0000"),
        (("batches",), "0" * 16, "batch order is 0000"),
        (("initial_weights",), "0" * 16, "initial weights is 0000"),
        (("versions", "torch"), "1.0", "torch version is 1.0"),
        (("sparsity",), 0.5, "final sparsity is 0.5 there, 0.9 in the plan"),
        (("change",), ["regrow", {}], "change is ['regrow', {}] there, None in the plan"),
        (("arm",), "magnitud", "arm 'magnitud' with seed 1 is not in the plan"),
        (("seed",), 2, "belongs in magnitude-seed2.json"),
    ],
)
def test_what_is_not_fair_is_refused_by_name(place, value, named, results, plan):
    smuggled = copy.deepcopy(results)
    where = smuggled["magnitude-seed1.json"]
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    found = [line for line in problems(plan, smuggled) if line.startswith("magnitude-seed1.json")]
    assert any(named in line for line in found), found


def test_a_run_given_out_as_another_seed_is_refused(results, plan):
    smuggled = copy.deepcopy(results)
    twin = copy.deepcopy(smuggled["dense-seed1.json"])
    twin["seed"] = twin["config"]["seed"] = 2
    smuggled["dense-seed2.json"] = twin
    assert any("seed 2 has the initial weights of seed 1" in line for line in problems(plan, smuggled))


def report_of(folder, results, plan_file, monkeypatch):
    """The bytes of every table and the names of the figures that `python -m study.report` makes."""
    monkeypatch.setattr(report, "plan_files", lambda: [plan_file])
    report.main(["--results", str(results), "--documents"])
    out = results / "report"
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_report_is_a_function_of_the_results(results, folder, monkeypatch, capsys):
    mine = folder / "report-results"
    shutil.copytree(folder / "results", mine)
    first = report_of(folder, mine, folder / "toy.py", monkeypatch)
    assert first == report_of(folder, mine, folder / "toy.py", monkeypatch)
    assert "toy_differences.png" in first
    pairs = first["toy_pairs.md"].decode()
    assert "| random − magnitude | 3 |" in pairs and "higher" in pairs.splitlines()[2]
    (mine / "toy" / "random-seed2.json").unlink()
    fewer = report_of(folder, mine, folder / "toy.py", monkeypatch)
    assert "| random − magnitude | 2 |" in fewer["toy_pairs.md"].decode()
    path = mine / "toy" / "magnitude-seed0.json"
    result = json.loads(path.read_text())
    result["config"]["prune_begin"] += 1
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="2"):
        report_of(folder, mine, folder / "toy.py", monkeypatch)
    assert "magnitude-seed0.json: prune_begin is 7 there, 6 in the plan" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(ARMS))
def test_each_change_runs_and_goes_on_exactly(name, folder, plan, monkeypatch):
    """Twelve steps, then the rest from the checkpoint, against all at once."""
    monkeypatch.chdir(folder)
    whole, parts = (arguments(folder, f"{name}-{kind}") for kind in ("whole", "parts"))
    kept = []
    monkeypatch.setattr("study.run.shutil.rmtree", lambda path: kept.append(Path(path)))
    run_one(plan, name, 0, whole)
    target = Path(parts.work) / "toy" / f"{name}-seed0" / "run"
    shutil.copytree(kept[0], target)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    shutil.rmtree(target / "checkpoints" / "step-00000024")
    run_one(plan, name, 0, parts)
    losses = [read_results(plan, args.results)[f"{name}-seed0.json"]["val_loss"] for args in (whole, parts)]
    assert losses[0] == losses[1]


def test_without_git_a_result_says_no_commit(monkeypatch, tmp_path):
    config = load_config(["--device=cpu"], NAMES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert circumstances(config)["commit"] == "" and circumstances(config)["machine"]["threads"]


def test_wrong_plans_are_named(folder):
    source = (folder / "toy.py").read_text()
    for change, named in (
        (("max_iters", "max_iter"), "unknown option 'max_iter' \\(did you mean max_iters?"),
        (('("magnitude", "dense")', '("magnitud", "dense")'), "no arm 'magnitud' \\(did you mean magnitude"),
        (("n_head=2", "n_head=3"), "n_embd=32 is not divisible"),
        (("seeds = (", "seeds = (" * 2), "SyntaxError"),
        (('device="cpu"', 'device="cpu", dtype="auto"'), "dtype=auto: say which"),
        (("seeds =", "seed ="), "lacks seeds"),
    ):
        path = folder / "wrong.py"
        path.write_text(source.replace(*change))
        with pytest.raises(UserError, match=named):
            load_plan(path)
    with pytest.raises(UserError, match="did you mean small"):
        load_plan("smal")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seeds", "one"], "--seeds: invalid whole_numbers value"),
        (["--arms", "("], r"--arms \(: is no regular expression"),
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
        (["--minutes", "nan"], "--minutes nan: expected at least 0"),
        (["--arms", "nothing"], "no run has these --seeds and --arms"),
        (["--results", "toy.py"], "toy.py/toy/dense-seed0.json: cannot be written"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, words, folder, plan, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=words):
        run_all(plan, parse([str(folder / "toy.py"), *options]))


def test_runs_for_a_device_that_is_not_here_are_refused_before_the_first(folder, plan, monkeypatch):
    monkeypatch.chdir(folder)
    elsewhere = replace(plan, base=plan.base | {"device": "cuda"})
    monkeypatch.setattr("study.run.start", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(UserError, match="device=cuda: not on this machine"):
        run_all(elsewhere, arguments(folder, "gpu"))


def test_no_minutes_are_none(folder, plan, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("study.run.start", lambda *_: pytest.fail("a run was started"))
    assert run_all(plan, arguments(folder, "none", "--minutes", "0")) == 0


@pytest.mark.parametrize(
    "module, options, words",
    [
        (states, ["--results", "toy.py"], "toy.py/states.json: cannot be written"),
        (states, ["--work", "toy.py"], "toy.py"),
        (report, ["--documents", "missing.md"], "--documents missing.md: no such file"),
    ],
)
def test_what_cannot_be_written_is_one_line_before_the_work(module, options, words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_gpt2, "train", lambda *_: pytest.fail("it was trained"))
    plan = ["--plan", "toy.py"] if module is states else []
    with pytest.raises(SystemExit, match="2"):
        module.main([*plan, *options])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_states_of_a_run_that_was_stopped_are_not_written(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    train = train_gpt2.train
    monkeypatch.setattr(train_gpt2, "train", lambda config, watch: train(replace(config, max_hours=1e-9), watch))
    with pytest.raises(SystemExit, match="2"):
        states.main(["--plan", "toy.py", "--results", str(tmp_path)])
    assert "stopped on the way: nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_of_a_run_that_died_without_a_word_the_exit_code_is_told(folder, plan, tmp_path):
    (tmp_path / "log").write_text("\n")
    said = outcome(plan, ("dense", 0), -9, arguments(folder, "results"), tmp_path / "log")
    assert said == f"FAILED, see {tmp_path / 'log'}: exit code -9, and no word"


@pytest.mark.parametrize("one", [("denze", "0"), ("dense", "9"), ("dense", "zero")])
def test_a_run_that_is_not_in_the_plan_is_refused(one, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        main([str(folder / "toy.py"), "--one", *one])
    assert f"--one {one[0]} {one[1]}: no run of toy" in capsys.readouterr().err


def test_another_text_is_refused(folder, plan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="toy.txt is not here; put it at data/toy.txt"):
        run_all(plan, arguments(folder, "other"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy.txt").write_text("another text")
    with pytest.raises(UserError, match="the plan is about"):
        run_all(plan, arguments(folder, "other"))


def test_the_sources_recipes_are_valid_and_their_ramp_is_the_published_one():
    recipes = [path for path in sorted((ROOT / "config" / "source").glob("*.py")) if path.stem != "common"]
    configs = {path.stem: load_config([str(path)], NAMES) for path in recipes}
    assert len(configs) == 13 and configs["magnitude"].optimizer == "adamwspam"
    with open(ROOT / "results" / "study" / "source" / "validation.csv") as file:
        points = [(row["run"], int(row["step"]), float(row["sparsity"])) for row in csv.DictReader(file)]
    compared = 0
    for name in ("magnitude", "bitter7", "bitter8", "bitter9"):
        config = configs[name]
        for run, step, sparsity in points:
            if f"_{name}_" in run and config.prune_begin < step <= config.prune_end:
                progress = (step - config.prune_begin) / (config.prune_end - config.prune_begin)
                assert config.target_sparsity * progress**3 == pytest.approx(sparsity, abs=0.0015)
                compared += 1
    assert compared > 20


def test_the_committed_report_is_what_the_committed_results_give():
    study = report.load_study(ROOT / "results" / "study")
    out = ROOT / "results" / "study" / "report"
    made = report.blocks(study, out)
    for name, text in made.items():
        assert (out / f"{name}.md").read_text() == text + "\n", name
    for path in report.DOCUMENTS:
        assert report.filled(ROOT / path, made, out) == (ROOT / path).read_text(), path
    for path in (out / "figures.md", *(ROOT / path for path in report.DOCUMENTS)):
        for link in re.findall(r"!\[.*\]\((.*)\)", path.read_text()):
            assert (path.parent / link).is_file(), f"{path}: {link}"
