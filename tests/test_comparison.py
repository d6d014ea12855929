"""Runs side by side: real small runs in a real store, and the page that is made of them."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from polyprompt import checkpoint, comparison, comparison_analysis, comparison_page, comparison_plots
from polyprompt.comparison_sources import Absent, Record, read
from polyprompt.config import METHOD_NAMES
from polyprompt.errors import BundleError, ConfigError, TrackingError
from polyprompt.experiment_view import VIEW
from polyprompt.plan import build
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult
from polyprompt.run_folder import RUN
from polyprompt.run_note import NOTE

ROOT = Path(__file__).parents[1]
SMOP = {"name": "smop", "num_prompts": 3, "length": 4}
HYPERPROMPT = {"name": "hyperprompt", "encoder_length": 3, "decoder_length": 2, "reduction": 4}


@dataclass(frozen=True)
class Demo:
    """Seven finished runs in the experiment `demo`. folders: by method and seed; "other": scored on other rows."""

    root: Path
    uri: str
    folders: Mapping[str, Path]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, migrated_db: Path) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    shutil.copy(migrated_db, root / "mlflow.db")
    uri = f"sqlite:///{root}/mlflow.db"
    table = {
        "backbone": {"name": str(tiny_t5), "trainable": True},
        "tasks": ["embedded/nli", "embedded/wic"],
        "data": {"max_train_examples": 24, "max_validation_examples": 10, "cache_dir": str(root / "cache")},
        "train": {"learning_rate": 1e-3, "max_steps": 4, "batch_size": 6, "num_shards": 2, "logging_steps": 2},
        "evaluate": {"steps": 2},
        "tracking": {"uri": uri, "experiment": "demo", "system_metrics_interval_seconds": None},
    }
    folders = {}
    for method in (SMOP, HYPERPROMPT):
        for seed in (1, 2, 3):
            name = f"{method['name']}-{seed}"
            folders[name] = go({**table, "method": method, "train": {**table["train"], "seed": seed}}, root / name)
    other = {**table, "method": SMOP, "data": {**table["data"], "max_validation_examples": 6}}
    folders["other"] = go(other, root / "other")
    return Demo(root, uri, folders)


def go(table: Mapping[str, Any], out: Path) -> Path:
    run(check(dict(table)), out=out, say=lambda line: None)
    return out


def result_of(folder: Path) -> RunResult:
    return RunResult.read(folder / "result.json")


@pytest.fixture(scope="module")
def records(demo: Demo) -> list[Record]:
    found, absent = read(["experiment=demo"], demo.uri)
    assert absent == []
    return found


def scored(record: Record, seed: int, *, shift: float = 0.0, **config: str) -> Record:
    """The same run under another seed, config and score."""
    values = {task: {**own, "score": own["score"] + shift} for task, own in record.result.eval.items()}
    result = replace(record.result, eval=values, run_id=f"{record.run_id}-{seed}-{config}")
    return replace(
        record, result=result, run_id=result.run_id, config={**record.config, "train.seed": str(seed), **config}
    )


# --- what is read


def test_a_run_is_the_same_from_mlflow_and_from_its_folder(demo: Demo, records: list[Record]) -> None:
    assert [record.result for record in records] == [result_of(folder) for folder in demo.folders.values()]
    folders, absent = read([str(folder) for folder in demo.folders.values()], "sqlite:////nowhere/mlflow.db")
    assert absent == []
    for stored, own in zip(records, folders, strict=True):
        assert (own.config, own.rows, own.bundle) == (stored.config, stored.rows, stored.bundle)
        assert own.run_id == stored.run_id
        assert own.histories == stored.histories
    assert any(key.startswith("router/embedded/wic/") for key in records[0].histories)
    assert len(records[0].history("train/embedded/nli/loss")) == 2


def test_every_kind_of_source_and_each_run_once(demo: Demo) -> None:
    folder = demo.folders["smop-1"]
    result = result_of(folder)
    last = Path(result.last_bundle)
    found, _ = read([str(last), result.run_id, str(folder), "experiment=demo"], demo.uri)
    assert len(found) == len(demo.folders)
    assert found[0].bundle == last
    assert len(read([str(demo.root)], demo.uri)[0]) == len(demo.folders)


def test_a_moved_folder_has_its_bundle_with_it(demo: Demo, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(demo.folders["smop-2"], moved)
    result = json.loads((moved / "result.json").read_text())
    result["bundle"] = result["bundle"].replace(str(demo.root), "/gone")
    (moved / "result.json").write_text(json.dumps(result))
    assert read([str(moved)], demo.uri)[0][0].bundle.parents[1] == moved


def test_what_is_not_finished_is_named(demo: Demo, tmp_path: Path, migrated_db: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(demo.folders["smop-1"] / RUN, begun)
    assert read([str(begun)], demo.uri)[1] == [
        Absent(f"{json.loads((begun / RUN).read_text())['name']} ({begun})", "it has not finished")
    ]
    shutil.copy(migrated_db, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("mixed", artifact_location=str(tmp_path / "artifacts"))
    client.create_run(experiment, run_name="alien")
    client.create_run(experiment, run_name="search", tags={"polyprompt.study": "search"})
    half = client.create_run(experiment, run_name="half")
    client.log_param(half.info.run_id, "train.seed", "1")
    found, absent = read(["experiment=mixed"], uri)
    assert found == []
    assert {run.name.split()[0]: run.reason for run in absent} == {
        "alien": "it is no training run of polyprompt",
        "search": "it is a search; its trials are runs of their own",
        "half": "it has no result.json: its status is running",
    }


def test_sources_that_are_none(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experiment 'dema' is not in the tracking store.*Did you mean 'demo'"):
        read(["experiment=dema"], demo.uri)
    with pytest.raises(ConfigError, match="'0123abcd' is neither a run in the tracking store nor a folder"):
        read(["0123abcd"], demo.uri)
    with pytest.raises(ConfigError, match="runs/absent does not exist"):
        read(["runs/absent"], demo.uri)
    with pytest.raises(ConfigError, match="holds no run"):
        read([str(tmp_path)], demo.uri)
    with pytest.raises(TrackingError):
        read(["experiment=demo"], f"sqlite:///{tmp_path}/absent.db")
    lonely = tmp_path / "lonely"
    shutil.copytree(result_of(demo.folders["smop-1"]).bundle, lonely)
    with pytest.raises(BundleError, match="does not lie in its run's folder"):
        read([str(lonely)], demo.uri)


# --- what is made of it


def test_seeds_are_one_row_and_other_rows_another_table(demo: Demo, records: list[Record]) -> None:
    (first, second), repeated = comparison.compare(records)
    assert repeated == []
    assert {setting.label: len(setting.runs) for setting in first.settings} == {"smop": 3, "hyperprompt": 3}
    assert [setting.label for setting in second.settings] == ["smop"]
    assert second.unlike == "other rows of embedded/nli, embedded/wic"
    smop = next(setting for setting in first.settings if setting.label == "smop")
    scores = [result_of(demo.folders[f"smop-{seed}"]).eval["embedded/wic"]["score"] for seed in (1, 2, 3)]
    assert smop.scores["embedded/wic"].tolist() == scores
    assert smop.score("embedded/wic") == pytest.approx(np.mean(scores))
    assert smop.spread("embedded/wic") == pytest.approx(np.std(scores, ddof=1))
    assert smop.step_seconds > 0


def test_methods_compare_although_their_prompts_leave_inputs_of_other_length(demo: Demo, records: list[Record]) -> None:
    """A prompt before the input takes tokens from it, so the tokens differ; the rows are the same."""
    data = {name: json.loads((folder / RUN).read_text())["data"] for name, folder in demo.folders.items()}
    assert data["smop-1"]["embedded/nli"] != data["hyperprompt-1"]["embedded/nli"]
    rows = {record.result.method: record.rows for record in records[:6]}
    assert rows["smop"] == rows["hyperprompt"] != records[6].rows


def test_other_tasks_are_another_table(records: list[Record]) -> None:
    one = records[0]
    part = replace(
        one,
        run_id="part",
        result=replace(one.result, run_id="part", eval={"embedded/nli": one.result.eval["embedded/nli"]}),
    )
    (_, other), _ = comparison.compare([one, records[1], part])
    assert other.unlike == "without embedded/wic"


def test_a_seed_that_was_run_twice_counts_once(records: list[Record]) -> None:
    again = replace(records[0], run_id="again", name="again", finished_ms=records[0].finished_ms + 1)
    (made,), repeated = comparison.compare([*records[:3], again])
    assert [run.run_id for run in made.settings[0].runs] == ["again", *(record.run_id for record in records[1:3])]
    assert repeated == [Absent(records[0].name, "the same config and seed as again, which is newer")]


def test_labels_say_what_tells_rows_apart(records: list[Record]) -> None:
    smop = [scored(records[0], 1, **{"method.num_prompts": str(n), "train.learning_rate": "0.1"}) for n in (2, 8)]
    (made,), _ = comparison.compare([*smop, records[3]])
    assert {setting.label for setting in made.settings} == {
        "smop (num_prompts=2)",
        "smop (num_prompts=8)",
        "hyperprompt",
    }
    rates = {setting.label: setting.differing["train.learning_rate"] for setting in made.settings}
    assert rates == {"smop (num_prompts=2)": "0.1", "smop (num_prompts=8)": "0.1", "hyperprompt": "0.001"}
    assert not any(key.startswith("method.") for key in made.settings[0].differing)


@pytest.mark.parametrize(("select", "wanted"), [("mean", [0.1, 0.6]), ("last", [0.4, 0.2]), ("task", [0.4, 0.6])])
def test_which_evaluation_counts(records: list[Record], select: Any, wanted: list[float]) -> None:
    table = {"embedded/nli": [0.1, 0.4], "embedded/wic": [0.6, 0.2]}  # at steps 2 and 4; the first is best by mean
    evaluations = [
        {"step": 2 * i + 2, "mean": 0, "tasks": {task: {"score": own[i]} for task, own in table.items()}}
        for i in (0, 1)
    ]
    result = replace(records[0].result, evaluations=evaluations, eval=evaluations[0]["tasks"])
    (made,), _ = comparison.compare([replace(records[0], result=result)], select=select)
    assert made.settings[0].scores.iloc[0].tolist() == pytest.approx([*wanted, sum(wanted) / 2])


# --- significance


def test_same_seeds_are_tested_in_pairs_by_the_formula(records: list[Record]) -> None:
    one, gains = records[3], [0.05, 0.02, 0.03, 0.06]
    base = [scored(one, seed, shift=0.1 * seed) for seed in range(4)]
    better = [scored(one, s, shift=0.1 * s + gain, **{"method.reduction": "8"}) for s, gain in enumerate(gains)]
    (made,), _ = comparison.compare([*base, *better], baseline="hyperprompt (reduction=4)")
    assert made.baseline == made.settings[0].label == "hyperprompt (reduction=4)"
    assert made.settings[0].tests == {}
    test = made.settings[1].tests["embedded/nli"]
    t = np.mean(gains) / (np.std(gains, ddof=1) / math.sqrt(4))
    assert test.name == "paired t"
    # Student's t of 3 degrees of freedom in closed form.
    x = t / math.sqrt(3)
    assert test.p == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))
    cell = comparison_page.cell(made, made.settings[1], "embedded/nli")
    assert (cell.mark, cell.best) == ("▲", True)
    assert "p = " in cell.tip


def test_other_seeds_are_tested_by_welch_and_few_not_at_all(records: list[Record]) -> None:
    one = records[3]
    base = [scored(one, seed, shift=-0.01 * seed) for seed in range(3)]
    worse = [scored(one, 5 + s, shift=-0.5 - 0.01 * s, **{"method.reduction": "8"}) for s in range(3)]
    few = [scored(one, s, **{"method.reduction": "16"}) for s in range(2)]
    (made,), _ = comparison.compare([*base, *worse, *few], baseline=base[0].run_id)
    found = {setting.label: setting for setting in made.settings}
    test = found["hyperprompt (reduction=8)"].tests["mean"]
    assert test.name == "Welch t"
    assert test.p < 0.01
    assert comparison_page.cell(made, found["hyperprompt (reduction=8)"], "mean").mark == "▼▼"
    assert found["hyperprompt (reduction=16)"].tests == {}
    assert comparison_page.cell(made, found["hyperprompt (reduction=16)"], "mean").mark == ""


def test_scores_that_are_all_the_same_are_neither_marked_nor_best(records: list[Record]) -> None:
    one = records[3]
    runs = [scored(one, s, **{"method.reduction": r}) for s in range(3) for r in ("4", "8")]
    (made,), _ = comparison.compare(runs, baseline="hyperprompt (reduction=4)")
    cells = [comparison_page.cell(made, setting, "mean") for setting in made.settings]
    assert [(cell.mark, cell.best) for cell in cells] == [("", False), ("", False)]


def test_a_difference_that_is_the_same_in_each_seed_is_no_certainty(records: list[Record]) -> None:
    one = records[3]
    base = [scored(one, seed, shift=0.1 * seed) for seed in range(3)]
    more = [scored(one, seed, shift=0.1 * seed + 0.05, **{"method.reduction": "8"}) for seed in range(3)]
    other = [scored(one, seed, shift=0.1, **{"method.reduction": "16"}) for seed in range(5, 8)]
    flat = [scored(one, seed, **{"method.reduction": "32"}) for seed in range(3)]
    (made,), _ = comparison.compare([*base, *more], baseline="hyperprompt (reduction=4)")
    (flat_made,), _ = comparison.compare([*flat, *other], baseline="hyperprompt (reduction=32)")
    for comparison_made in (made, flat_made):
        cell = comparison_page.cell(comparison_made, comparison_made.settings[1], "mean")
        assert (cell.mark, cell.best) == ("", True)
        assert cell.tip.endswith("not tested: no spread")
        assert comparison_made.num_tests == 0


def test_a_label_is_no_formula(records: list[Record]) -> None:
    runs = [scored(records[0], 1, **{"method.init_text": text}) for text in ("$\\oops$", "b")]
    (made,), _ = comparison.compare(runs)
    assert comparison_plots.svg(comparison_plots.front(made)).startswith("<svg")


def test_baselines_that_are_none_or_several(records: list[Record]) -> None:
    with pytest.raises(ConfigError, match=r"--baseline smo: no row is it.*hyperprompt.*Did you mean 'smop'"):
        comparison.compare(records, baseline="smo")
    two = [records[0], scored(records[0], 1, **{"method.length": "9"})]
    with pytest.raises(ConfigError, match=r"2 rows are of this method; name one of them: smop \(length=4\)"):
        comparison.compare(two, baseline="smop")
    assert comparison.compare(two, baseline="smop (length=9)")[0][0].baseline == "smop (length=9)"


def test_the_front_is_what_nothing_beats() -> None:
    assert comparison_plots.undominated([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (1, 0.3)]) == [1, 3, 0]
    assert comparison_plots.undominated([(1, 0.5), (2, 0.4), (1, 0.5)]) == [0, 2], "equals do not beat each other"


# --- what models do with their prompts


def test_attention_similarity_and_usage_are_what_the_formulas_say(demo: Demo) -> None:
    bundle = Path(result_of(demo.folders["hyperprompt-1"]).bundle)
    seen = comparison_analysis.analyse(bundle, num_rows=1)
    opened = checkpoint.read(bundle)
    model, data = build(opened.config, opened)
    model.eval()
    assert seen.tasks == ("embedded/nli", "embedded/wic")
    assert seen.usage is None
    with torch.no_grad():
        made = model.method.prompts(torch.zeros(2, 1, 32), torch.ones(2, 1), torch.tensor([0, 1]))
        for stack, own in (("encoder", made.encoder), ("decoder", made.decoder)):
            flat = torch.stack(
                [torch.cat([own.keys_LBNPD[:, k].flatten(), own.values_LBNPD[:, k].flatten()]) for k in (0, 1)]
            )
            assert seen.similarity[stack][0, 1] == pytest.approx(
                float(torch.cosine_similarity(flat[0], flat[1], dim=0))
            )
            np.testing.assert_allclose(np.diag(seen.similarity[stack]), 1)
        for task in (0, 1):
            ids = torch.tensor([data[task].validation.rows([0])[0].input_ids])
            block = model.backbone.model.encoder.block[0].layer[0]
            x = block.layer_norm(model.backbone.embed(ids))
            query, key = (m(x).view(-1, 4, 8).transpose(0, 1) for m in (block.SelfAttention.q, block.SelfAttention.k))
            bias = block.SelfAttention.compute_bias(len(query[0]), len(query[0]))[0]
            on_prompts = query @ made.encoder.keys_LBNPD[0, task].transpose(1, 2)
            weights = torch.cat([on_prompts, query @ key.transpose(1, 2) + bias], dim=2).softmax(dim=2)
            assert seen.attention["encoder"][task, 0] == pytest.approx(float(weights[:, :, :3].sum(2).mean()), rel=1e-5)
            text = weights[:, :, 3:] / weights[:, :, 3:].sum(2, keepdim=True)
            highest = math.log(text.shape[2])
            entropy = float(-(text * text.log()).sum(2).mean()) / highest
            assert seen.entropy["encoder"][task, 0] == pytest.approx(entropy, rel=1e-5)
    assert seen.attention["decoder"].shape == (2, 2)
    assert 0 < seen.even["encoder"] < seen.even["decoder"] < 1
    assert ((seen.entropy["decoder"] > 0) & (seen.entropy["decoder"] <= 1)).all()


def test_usage_counts_the_likeliest_prompts(demo: Demo) -> None:
    bundle = Path(result_of(demo.folders["smop-1"]).bundle)
    seen = comparison_analysis.analyse(bundle, num_rows=10)
    opened = checkpoint.read(bundle)
    model, data = build(opened.config, opened)
    assert seen.similarity == seen.entropy == {}
    assert seen.usage is not None
    for task, own in enumerate(data):
        picked = []
        for row in own.validation.rows(range(10)):
            mean_H = model.backbone.embed(torch.tensor(row.input_ids)).mean(dim=0)
            picked.append(int((mean_H @ model.method.router_GHR[0]).argmax()))
        np.testing.assert_allclose(seen.usage[task], np.bincount(picked, minlength=3) / 10)


def test_what_was_logged_of_a_router(records: list[Record]) -> None:
    found = comparison_analysis.routing(records[0])
    assert found is not None
    assert found.usage.shape == (2, 3)
    np.testing.assert_allclose(found.usage.sum(axis=1), 1)
    last = records[0].history("router/embedded/wic/utilisation_2")[-1][1]
    assert found.usage[1, 2] == pytest.approx(last / 3)
    assert list(found.health.columns) == ["entropy", "margin", "dead_prompts"]
    assert comparison_analysis.routing(records[3]) is None


def test_every_method_that_is_looked_at_exists() -> None:
    assert set(comparison_analysis.METHODS) <= set(METHOD_NAMES)


# --- the page


class Links(HTMLParser):
    """Collects what a page would load or points to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href", "data")]


def compare(demo: Demo, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "compare.py"), *arguments, "--uri", demo.uri, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_job_leaves_a_page_that_needs_nothing_else(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compare(demo, out, "experiment=demo", "--baseline", "smop", "--rows", "2")
    assert done.returncode == 0, done.stderr
    page = (out / "compare.html").read_text()
    links = Links()
    links.feed(page)
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert not {"script", "link", "img", "iframe"} & set(links.tags)
    assert "url(http" not in page
    assert links.tags.count("svg") >= 8
    for text in (
        "Not all runs compare with each other", "other rows of embedded/nli, embedded/wic", "Router of smop",
        "Entropy of attention over the text",
        "Similarity of the tasks&#39; prompts, hyperprompt", "Attention on prompts, hyperprompt", "(baseline)",
        "Learning curves", "Score against cost", "two-sided paired t test",
    ):  # fmt: skip
        assert text in page, text
    table = pd.read_csv(out / "compare.csv")
    assert table["setting"].tolist()[0] == "smop"
    assert sorted(table["num_seeds"]) == [1, 3, 3]
    line = table[table["setting"] == "hyperprompt"].iloc[0]
    means = [result_of(demo.folders[f"hyperprompt-{seed}"]).mean for seed in (1, 2, 3)]
    assert line["mean"] == pytest.approx(np.mean(means))
    assert line["mean std"] == pytest.approx(np.std(means, ddof=1))
    assert line["trained_parameters"] == result_of(demo.folders["hyperprompt-1"]).num_trained_parameters
    markdown = (out / "compare.md").read_text()
    assert f"{100 * np.mean(means):.1f}" in re.findall(r"^\| hyperprompt \|.*$", markdown, re.MULTILINE)[0]
    widths = {
        line.count("|") for line in markdown.splitlines() if line.startswith(("| setting | seeds", "| hyperprompt | 3"))
    }
    assert len(widths) == 1
    assert "| setting | seeds | nli | wic | mean |" in done.stdout
    assert "Router of" not in done.stdout


def test_a_bundle_that_is_gone_is_said_to_be(demo: Demo, records: list[Record], tmp_path: Path) -> None:
    made, absent = comparison.compare([replace(records[3], bundle=tmp_path / "step_00000004")])
    said: list[str] = []
    page = comparison_page.write(made, absent, tmp_path / "out", num_rows=2, store="here", say=said.append)
    assert f"the bundle {tmp_path}/step_00000004 is not on this machine any more" in page.read_text()
    assert "Attention on prompts" not in page.read_text()
    assert said == [f"hyperprompt: looking at the prompts of {tmp_path}/step_00000004"]


def test_without_rows_no_model_is_loaded(records: list[Record], tmp_path: Path) -> None:
    made, absent = comparison.compare(records)
    said: list[str] = []
    page = comparison_page.write(made, absent, tmp_path, num_rows=0, store="here", say=said.append).read_text()
    assert said == []
    assert "Router of smop" in page  # what was logged needs no model
    assert "in prediction" not in page


def test_names_cannot_break_the_page(records: list[Record], tmp_path: Path) -> None:
    nasty = "</td><script>alert(1)</script>|"
    made, _ = comparison.compare([replace(records[0], name=nasty)])
    page = comparison_page.write(made, [Absent(nasty, "no")], tmp_path, num_rows=0, store=nasty, say=print).read_text()
    assert "<script>" not in page


def test_mistakes_are_one_clear_line(demo: Demo, tmp_path: Path, job_here: Callable[..., Any]) -> None:
    for arguments, message in (
        (["experiment=nothing"], "error: experiment 'nothing' is not in the tracking store"),
        (["experiment=demo", "--baseline", "lora"], "error: --baseline lora: no row is it"),
        (["experiment=demo", "--rows", "-1"], "--rows -1: expected 0 or more"),
    ):
        status, _, said = job_here("compare", *arguments, "--uri", demo.uri, "--out", str(tmp_path / "out"))
        assert status != 0
        assert message in said
    assert not (tmp_path / "out").exists()


# --- what MLflow shows of a run


def test_a_run_says_what_it_is(demo: Demo) -> None:
    result = result_of(demo.folders["hyperprompt-2"])
    found = MlflowClient(demo.uri).get_run(result.run_id)
    assert re.fullmatch(r"hyperprompt, seed 2, global, tiny_t5, 2 tasks \([0-9a-f]{6}\)", found.info.run_name)
    note = found.data.tags[NOTE]
    assert note.startswith("**hyperprompt** (global) on **tiny_t5** (trained too), seed 2:")
    assert f"| **mean** | {result.mean:.3f} |" in note
    assert f"--model {result.bundle}" in note
    metrics = found.data.metrics
    assert metrics["cost/trained_parameters"] == result.num_trained_parameters
    assert metrics["cost/peak_memory_bytes"] == result.peak_memory_bytes
    groups = {key.split("/")[0] for key in metrics}
    assert groups == {"train", "eval", "perf", "cost"}


def test_an_experiment_shows_the_columns_that_matter(demo: Demo) -> None:
    client = MlflowClient(demo.uri)
    experiment = client.get_experiment_by_name("demo")
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{VIEW}"])
    columns = [
        re.fullmatch(r"(metrics|params)\.`(.*)`", column) for column in json.loads(view["state"])["selectedColumns"]
    ]
    run = client.search_runs([experiment.experiment_id])[0].data
    assert all(found is not None and found[2] in getattr(run, found[1]) for found in columns)
    assert "jobs/compare.py" in experiment.tags[NOTE]
