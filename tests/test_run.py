"""run(): one call, one complete record; on any number of workers, and after any death, the same curve."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_drill import Losses, Table, go, logged, meanwhile, same, steps_lost, train_workers, until
from mlflow import MlflowClient

from polyprompt import checkpoint
from polyprompt.errors import BundleError, ConfigError, DataError, TrackingError, TrainingError
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.result import RunResult

ROOT = Path(__file__).parents[1]
Drill = Callable[..., None]


@pytest.fixture
def tracked(small_run: Table, tmp_path: Path) -> Table:
    """The small run, tracked in a store of its own."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    return {**small_run, "tracking": {"uri": uri, "experiment": "test", "system_metrics_interval_seconds": 0.2}}


def history(table: Table, result: RunResult, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(table["tracking"]["uri"]).get_metric_history(result.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_a_run_leaves_a_complete_record(tracked: Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(tracked, out)
    assert {f.name for f in out.iterdir()} >= {
        "result.json", "config.yaml", "per_task.csv", "metrics.jsonl", "loss.png", "scores.png", "bundles", "run.json",
    }  # fmt: skip
    table = json.loads((out / "result.json").read_text())
    assert table["num_steps"] == 12
    assert table["method"] == "hyperprompt"
    assert table["num_workers"] == 0
    assert sum(table["examples_seen"].values()) == 12 * 12
    assert [step for step, _ in table["loss_curve"]] == list(range(1, 13))
    assert set(table["eval"]) == {"my/larger", "embedded/nli", "embedded/similarity"}
    assert set(table["eval"]["my/larger"]) == {"accuracy", "macro_f1", "score"}
    assert table["mean"] == pytest.approx(sum(v["score"] for v in table["eval"].values()) / 3)
    assert table["num_trained_parameters"] == table["num_method_parameters"] + table["num_backbone_parameters"]
    assert Path(table["bundle"]).name == checkpoint.folder_name(table["best_step"])
    assert checkpoint.read(Path(table["bundle"])).state["train"]["step"] == table["best_step"]
    for key in ("train_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes"):
        assert table[key] > 0
    with (out / "per_task.csv").open() as file:
        assert {row["task"] for row in csv.DictReader(file)} >= set(table["eval"])


def test_mlflow_has_the_run(tracked: Table, tmp_path: Path) -> None:
    result = go(tracked, tmp_path / "out")
    client = MlflowClient(tracked["tracking"]["uri"])
    found = client.get_run(result.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["method.encoder_length"] == "3"
    assert found.data.params["train.batch_size"] == "12"
    assert {"method", "backbone", "backbone_sha256", "num_trained_parameters"} <= found.data.tags.keys()
    assert len(found.inputs.dataset_inputs) == 6
    assert history(tracked, result, "train/loss") == [(int(s), v) for s, v in result.loss_curve]
    assert [s for s, _ in history(tracked, result, "eval/mean")] == [4, 8, 12]
    for key in ("train/my/larger/loss", "eval/embedded/similarity/pearson", "perf/examples_per_second"):
        assert history(tracked, result, key), key
    assert any(key.startswith("system/") for key in found.data.metrics)
    assert {a.path for a in client.list_artifacts(result.run_id)} >= {
        "config.yaml", "result.json", "per_task.csv", "loss.png", "scores.png",
    }  # fmt: skip
    assert (tmp_path / "mlartifacts").is_dir()


def test_the_same_command_again_returns_the_result(small_run: Table, tmp_path: Path) -> None:
    first = go(small_run, tmp_path / "out")
    assert go(small_run, tmp_path / "out") == first


def test_unnamed_runs_are_new_runs(small_run: Table) -> None:
    table = {**small_run, "train": {**small_run["train"], "max_steps": 1}}
    names = [run(check(table), say=lambda line: None).name for _ in range(2)]
    assert names[1] == f"{names[0]}-2"


def test_a_folder_in_use_is_refused(small_run: Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=f"output folder {out} in use"):
        go(small_run, out)
    (out / "thesis.tex").unlink()
    go(small_run, out)
    other = {**small_run, "train": {**small_run["train"], "learning_rate": 0.5}}
    with pytest.raises(ConfigError, match=r"another config \(train\.learning_rate: 0\.001 there, 0\.5 here\)"):
        go(other, out)
    with pytest.raises(ConfigError, match="in use: it holds the finished run"):
        go(small_run, out, num_workers=1)


def test_a_start_that_failed_can_be_repeated(small_run: Table, tmp_path: Path) -> None:
    bad = {**small_run, "tracking": {"uri": "http://127.0.0.1:9"}}
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        go(bad, tmp_path / "out")
    assert go(small_run, tmp_path / "out").num_steps == 12


def test_a_run_does_not_go_on_with_other_rows(small_run: Table, rows: dict[str, Path], tmp_path: Path) -> None:
    go(small_run, tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()  # as if it had been stopped
    rows["train"].write_text(rows["train"].read_text().replace("1 and 2", "1 and 3"))
    with pytest.raises(DataError, match="begun on other rows of my/larger"):
        go(small_run, tmp_path / "out")


def test_a_finished_named_run_leaves_other_folders_alone(small_run: Table, tmp_path: Path) -> None:
    named = {**small_run, "name": "mine", "train": {**small_run["train"], "max_steps": 1}}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    go(named, tmp_path / "a", storage_path=str(tmp_path / "s"))
    with pytest.raises(ConfigError, match=f"output folder {tmp_path / 'b'} in use"):
        go(named, tmp_path / "b", storage_path=str(tmp_path / "s"))


def test_a_folder_that_cannot_be_written_is_named(small_run: Table) -> None:
    with pytest.raises(ConfigError, match=r"/proc/nothing.* cannot be written"):
        go(small_run, Path("/proc/nothing"))


def test_a_run_of_the_same_name_and_another_config_is_refused(small_run: Table, tmp_path: Path) -> None:
    named = {**small_run, "name": "mine", "train": {**small_run["train"], "max_steps": 1}}
    go(named, tmp_path / "a", storage_path=str(tmp_path / "s"))
    with pytest.raises(ConfigError, match="another config"):
        go({**named, "train": {**named["train"], "seed": 7}}, tmp_path / "b", storage_path=str(tmp_path / "s"))


def test_another_backbone_than_the_bundles_is_refused(small_run: Table, tmp_path: Path, tiny_t5: Path) -> None:
    import safetensors.torch

    folder = tmp_path / "backbone"
    shutil.copytree(tiny_t5, folder)
    table = {**small_run, "backbone": {"name": str(folder)}}
    go(table, tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()  # as if it had been stopped
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["shared.weight"] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BundleError, match="was trained on backbone"):
        go(table, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ["embedded/nil"]}, ConfigError, "Did you mean 'embedded/nli'"),
        ({"tasks": ["super_glue/rte"], "data": {"root": "/nowhere"}}, DataError, "/nowhere does not exist"),
        ({"backbone": {"name": "/no/such/model"}}, ConfigError, "/no/such/model"),
        ({"method": {"name": "prompt_tuning", "length": 600}}, ConfigError, "exceed the limit"),
        ({"method": {"name": "hyperprompt", "reduction": 64}}, ConfigError, "method.reduction"),
        (
            {"method": "smop", "train": {"group_learning_rates": {"hypernetwork": 0.1}}},
            ConfigError,
            "hypernetwork is no group .*; its groups are prompt, router. Drop hypernetwork",
        ),
    ],
)
def test_bad_input_ends_before_anything_is_written(
    small_run: Table, tmp_path: Path, change: Table, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        go({**small_run, **change}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "1 and 2", "label": 0', r"train\.jsonl:65.*not valid JSON"),
        ('{"text": "1 and 2"}', r"train\.jsonl:65.*label"),
        ('{"text": "1 and 2", "label": 7}', r"train\.jsonl:65.*7"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(
    small_run: Table, rows: dict[str, Path], tmp_path: Path, line: str, message: str, drill: Drill
) -> None:
    with rows["train"].open("a") as file:
        file.write(line + "\n")
    small_run["data"].pop("max_train_examples")
    with pytest.raises(DataError, match=message):
        go({**small_run, "tasks": small_run["tasks"][:1]}, tmp_path / "out")
    drill(f"a poisoned row: {line}", lost=0, equal="refused before training, with file and line")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_any_number_of_workers_gives_the_same_curve(self, small_run: Table, tmp_path: Path) -> None:
        """Dropout on, fp32. Not merely within 1e-4: equal, since the gradient sum does not depend on the grouping.

        On 1, 2 and 4 workers: test_faults.py has one run on them in turn.
        """
        alone = go(small_run, tmp_path / "0")
        result = go(small_run, tmp_path / "3", num_workers=3)  # does not divide the 4 shards
        assert result.num_workers == 3
        assert result.sequence == alone.sequence
        assert result.loss_curve == alone.loss_curve
        assert result.eval == alone.eval

    def test_router_noise_and_balance_loss_are_the_same_on_any_number_of_workers(
        self, small_run: Table, tmp_path: Path
    ) -> None:
        small_run["method"] = {"name": "smop", "length": 2, "routing": "gumbel", "load_balance": 0.5}
        alone = go(small_run, tmp_path / "0")
        result = go(small_run, tmp_path / "2", num_workers=2)
        assert (result.loss_curve, result.eval) == (alone.loss_curve, alone.eval)

    @pytest.mark.parametrize("compute", [{"gradient_sum": "ddp"}, {"strategy": "fsdp"}])
    def test_torchs_own_sums_give_the_same_curve_but_for_rounding(
        self, small_run: Table, tmp_path: Path, compute: Table
    ) -> None:
        alone = go(small_run, tmp_path / "0")
        result = go(small_run, tmp_path / "2", num_workers=2, **compute)
        assert result.sequence == alone.sequence
        for (_, a), (_, b) in zip(alone.loss_curve, result.loss_curve, strict=True):
            assert b == pytest.approx(a, abs=1e-4)

    @pytest.mark.faults
    def test_a_killed_worker_costs_nothing(self, tracked: Table, tmp_path: Path, drill: Drill) -> None:
        tracked["train"] |= {"max_steps": 60, "save_steps": 5, "save_total_limit": 100}
        tracked["evaluate"] = {"steps": 30}
        unbroken = go(tracked, tmp_path / "a")
        out = tmp_path / "b"
        losses = Losses(out)

        def kill() -> None:
            until(lambda: logged(out) >= 18)  # between two bundles
            train_workers()[-1].kill()

        killing = meanwhile(kill)
        broken = go(tracked, out, losses, num_workers=2)
        killing.join()
        equal = same(broken, unbroken)
        drill(f"SIGKILL to a worker ({losses.seconds()})", lost=losses.steps[0], equal=equal)
        assert losses.steps[0] <= 5
        assert broken.loss_curve == unbroken.loss_curve
        assert broken.eval == unbroken.eval
        assert len(checkpoint.bundles(out / "bundles")) == 12
        # Nothing twice, nothing missing in MLflow either.
        assert history(tracked, broken, "train/loss") == [(int(s), v) for s, v in broken.loss_curve]

    def test_an_error_of_ours_ends_the_run_at_once(self, small_run: Table, tmp_path: Path) -> None:
        small_run["train"] |= {"learning_rate": 1e30, "max_grad_norm": None, "save_steps": 1}
        with pytest.raises(TrainingError, match=r"at step 2.*last good bundle: .*step_00000001"):
            go(small_run, tmp_path / "out", num_workers=2)

    @pytest.mark.faults
    def test_a_mistake_in_code_is_not_retried(self, small_run: Table, tmp_path: Path, drill: Drill) -> None:
        """A bundle whose state lacks a field, though its manifest is right: only workers read it."""
        small_run["train"] |= {"save_steps": 4}
        go(small_run, tmp_path / "out")
        (tmp_path / "out" / "result.json").unlink()
        newest = checkpoint.bundles(tmp_path / "out" / "bundles")[-1]
        (newest / checkpoint.STATE).write_text("{}")
        manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
        manifest["files"][checkpoint.STATE] = hashlib.sha256(b"{}").hexdigest()
        (newest / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(TrainingError, match=r"a restart cannot mend: KeyError: 'train' \(.*worker\.py:\d+\)"):
            go(small_run, tmp_path / "out", num_workers=2)
        assert not (tmp_path / "out" / "fatal").exists()
        drill("a mistake in code on the workers", lost=0, equal="ended at once, with file and line")


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.own_processes
def test_a_killed_driver_costs_nothing(small_run: Table, tmp_path: Path, drill: Drill) -> None:
    """SIGKILL to the job's own process, with its own Ray; the same command again."""
    small_run["train"] |= {"max_steps": 60, "save_steps": 5, "save_total_limit": 100}
    small_run["evaluate"] = {"steps": 30}
    unbroken = go(small_run, tmp_path / "a")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(check({**small_run, "compute": {"num_workers": 2}}).to_yaml())
    command = [sys.executable, str(ROOT / "jobs" / "multitask.py"), str(recipe), "--out", str(tmp_path / "b")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    until(lambda: logged(tmp_path / "b") >= 18 or first.poll() is not None)
    assert first.poll() is None, "the job ended before it could be killed"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    lost = steps_lost(tmp_path / "b")
    survived = [folder.name for folder in checkpoint.bundles(tmp_path / "b" / "bundles")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    result = RunResult.read(tmp_path / "b" / "result.json")
    drill("SIGKILL to the job's own process, then the same command", lost=lost, equal=same(result, unbroken))
    assert lost <= 5
    assert result.loss_curve == unbroken.loss_curve
    assert result.eval == unbroken.eval
    assert set(survived) <= {folder.name for folder in checkpoint.bundles(tmp_path / "b" / "bundles")}
