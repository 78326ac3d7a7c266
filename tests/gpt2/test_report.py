"""The report: numbers of the table, and the page as a browser without a network shows it."""

import html
import json
import re
import shutil
import subprocess

import pytest

from gpt2 import picture, report

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def write_run(folder, loss, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"criterion": "none", "learning_rate": 1e-3, "n_layer": 2} | config))
    lines = []
    for step in range(10, 1010, 10):
        line = {"step": step, "train_loss": loss + 5 / step, "grad_norm": 1 / step, "learning_rate": 1e-3 / step}
        line |= {"tokens_per_second": 1000 + step, "step_ms": 100.0, "tokens": step * 64}
        if config.get("criterion"):
            line["sparsity"] = step / 2000
        if step % 100 == 0:
            line["val_loss"] = loss + 6 / step
            names = [f"transformer.h.{layer}.mlp.c_fc.weight" for layer in range(2)]
            line["layer_sparsity"] = {name: step / 2000 + layer / 10 for layer, name in enumerate(names)}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "sample.txt").write_text("In the beginning <b>was</b> </script> & more")
    return folder


@pytest.fixture
def two_runs(tmp_path):
    return write_run(tmp_path / "dense", 3.0), write_run(tmp_path / "b" / "pruned", 3.1, criterion="bitter7")


def test_the_table_is_of_the_last_values(two_runs, command):
    code, out, err = command(report, *two_runs)
    assert code == 0, err
    head, dense, pruned = out.splitlines()
    assert head.split() == [
        "run",
        "step",
        "train_loss",
        "val_loss",
        "perplexity",
        "sparsity",
        "tokens_per_second",
        "time",
    ]
    assert dense.split() == ["dense", "1,000", "3.0050", "3.0060", "20.21", "1,505", "1:40"]
    assert pruned.split()[:6] == ["pruned", "1,000", "3.1050", "3.1060", "22.33", "50.00%"]


def page_of(tmp_path, command, *folders):
    code, _, err = command(report, *folders, "--to", tmp_path / "report.html")
    assert code == 0, err
    return tmp_path / "report.html"


def test_the_page_asks_for_nothing(two_runs, command, tmp_path):
    text = page_of(tmp_path, command, *two_runs).read_text()
    assert not re.findall(r"(?:src|href)\s*=|@import|url\((?!#)|fetch\(|https?://(?!www\.w3\.org/)", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert [run["name"] for run in data["runs"]] == ["dense", "pruned"]
    assert data["runs"][0]["progress"][-1] == [1000, 64_000, pytest.approx(100 / 3600)]
    assert data["runs"][0]["curves"]["val_loss"][-1] == [1000, pytest.approx(3.006)]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("axis", ["step", "hours"])
def test_a_browser_draws_it(two_runs, command, tmp_path, axis):
    page = page_of(tmp_path, command, *two_runs)
    with open(page, "a") as file:
        file.write(f"<script>document.querySelector('[data-axis={axis}]').click()</script>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path / 'c'}",
    ]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120
    )
    dom = done.stdout
    assert 'data-ready="yes"' in dom, done.stderr[-2000:]
    for curve in report.CURVES:
        figure = re.search(rf'<figure[^>]*data-curve="{curve}".*?</figure>', dom, re.S)[0]
        drawn = re.findall(r'<path d="M([^"]+)"[^>]*class="curve"', figure)
        assert len(drawn) == (1 if curve == "sparsity" else 2), curve
        numbers = [float(n) for path in drawn for n in re.findall(r"-?[\d.]+", path)]
        assert len(numbers) > 20 and "NaN" not in figure
        assert max(numbers[::2]) == pytest.approx(536, abs=1) and min(numbers[::2]) > 58
    assert f'aria-pressed="true" data-axis="{axis}"' in dom
    assert (">200</text>" in dom) == (axis == "step")
    assert dom.count('class="cell"') == 2 * 2 * 10  # runs, layers, evaluations
    assert dom.count('class="best"') == 4 and "losses do not compare" not in dom.partition("<script")[0]
    assert "h.0.mlp.c_fc" in dom and "60.0 %" in dom
    assert 'class="differs"' in re.search(r'<tr data-option="criterion">.*?</tr>', dom)[0]
    assert html.escape("In the beginning <b>was</b> </script> & more", quote=False) in dom


def test_a_real_run_without_its_data(finished_run, command, tmp_path):
    """Layers from the checkpoint's weights, a sample from its model; NaN and a cut line in the metrics do no harm."""
    shutil.copytree(finished_run("char"), tmp_path / "moved")
    with open(tmp_path / "moved" / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "train_loss": NaN}\n{"step": 3')
    text = page_of(tmp_path, command, tmp_path / "moved").read_text()
    (run,) = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["runs"]
    if not run["layers"]["steps"][1:]:
        assert len(run["layers"]["names"]) == 8 and run["layers"]["steps"] == [30]
    assert sum(share[-1] for share in run["layers"]["shares"]) > 2 and len(run["sample"]) > 100


ODD = ("NaN", '"3.1"', "true", "null", "[1]", "{}", '{"h": "x"}', "1e999", "1" + "0" * 400)


def test_what_is_no_number_is_left_out(tmp_path, command):
    """Lines of metrics and options that other hands have changed, alone and among sound ones."""
    out_dir = write_run(tmp_path / "run", 3.0, criterion="bitter7")
    names = ("step", *report.CURVES, "step_ms", "layer_sparsity")
    lines = [f'{{"step": 2000, "{name}": {value}}}' for name in names for value in ODD]
    lines += [f'{{"step": 2000, "layer_sparsity": {{"h": {value}}}}}' for value in ODD]
    lines += ["[]", "3", '{"step": -1}', '{"step": 1e3}']
    sound, code = page_of(tmp_path, command, out_dir).read_text(), 0
    with open(out_dir / "metrics.jsonl", "a") as file:
        file.write("\n".join(lines) + "\n")
    of = lambda text: json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["runs"][0]
    before, after = of(sound), of(page_of(tmp_path, command, out_dir).read_text())
    assert after["curves"] == before["curves"] and after["layers"] == before["layers"]
    assert after["summary"] | {"step": 1000} == before["summary"]
    config = (out_dir / "config.json").read_text()
    (out_dir / "config.json").write_text(config.replace("0.001", "Infinity"))
    assert of(page_of(tmp_path, command, out_dir).read_text())["config"]["learning_rate"] == "inf"
    code, _, err = command(picture, out_dir)
    assert code == 0, err


@pytest.mark.parametrize("text", ["", "{}\n", '{"step": 3}\n', '{"step": 3, "val_loss": "low"}\n[3]\n'])
def test_no_picture_is_drawn_of_nothing(tmp_path, command, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    code, _, err = command(picture, tmp_path)
    assert code == 2 and "no loss" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "training.png").exists()


@pytest.mark.parametrize(
    "what, words",
    [
        ("nothing", "not the out_dir of a run"),
        ("empty", "holds no line of numbers yet"),
        ("list", "holds no options"),
        ("deep", "nested too deep"),
    ],
)
def test_no_run_is_one_line(command, tmp_path, what, words):
    if what != "nothing":
        (tmp_path / "config.json").write_text("[" * 100_000 if what == "deep" else "[]" if what == "list" else "{}")
    code, _, err = command(report, tmp_path)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_names_tell_runs_apart(tmp_path):
    assert report.names_of(["a/x/run", "a/y/run"]) == ["x/run", "y/run"]
