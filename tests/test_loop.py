"""The loop, in this process: it learns, resumes exactly, keeps the best, and stops for what is not finite."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from polyprompt import checkpoint, loop, router_health
from polyprompt.batches import Batches
from polyprompt.errors import TrainingError
from polyprompt.loop import TrainState
from polyprompt.methods.made import MadeByTask
from polyprompt.optim import Optim
from polyprompt.plan import build
from polyprompt.recipe import check
from polyprompt.worker import Job, Outcome, train
from polyprompt.workers import Workers

Table = dict[str, Any]


class Stopped(Exception):
    """Stands for a death of the process right after a bundle."""


def go(table: Mapping[str, Any], folder: Path, stop_at: int | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)

    def announce(metrics: Mapping[str, float], bundle: Path) -> None:
        if metrics["step"] == stop_at:
            raise Stopped

    return train(Job(check(table), folder, handle=None), torch.device("cpu"), announce)


def final_tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    newest = checkpoint.newest_whole(folder / "bundles")
    assert newest is not None
    return checkpoint.read(newest).tensors


def test_a_stopped_run_goes_on_to_the_very_same_end(small_run: Table, tmp_path: Path) -> None:
    unbroken = go(small_run, tmp_path / "a")
    for step in (4, 8):
        with pytest.raises(Stopped):
            go(small_run, tmp_path / "b", stop_at=step)
    resumed = go(small_run, tmp_path / "b")
    assert resumed.state.loss_curve == unbroken.state.loss_curve
    assert resumed.state.sequence == unbroken.state.sequence
    assert resumed.state.evaluations == unbroken.state.evaluations
    assert resumed.state.examples_seen == unbroken.state.examples_seen
    before, after = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_between_two_logged_steps_keeps_the_curve(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"logging_steps": 5, "save_steps": 3}
    unbroken = go(small_run, tmp_path / "a")
    with pytest.raises(Stopped):
        go(small_run, tmp_path / "b", stop_at=3)
    assert go(small_run, tmp_path / "b").state.loss_curve == unbroken.state.loss_curve
    assert [step for step, _ in unbroken.state.loss_curve] == [5, 10, 12]


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_newest_bundle_is_passed_over(
    small_run: Table, tmp_path: Path, damage: str, drill: Callable[..., None]
) -> None:
    unbroken = go(small_run, tmp_path / "a")
    with pytest.raises(Stopped):
        go(small_run, tmp_path / "b", stop_at=8)
    file = tmp_path / "b" / "bundles" / "step_00000008" / "optimizer.pt"
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] if damage == "truncated" else content[:half] + b"!" + content[half + 1 :])
    resumed = go(small_run, tmp_path / "b")
    equal = resumed.state.loss_curve == unbroken.state.loss_curve
    drill(f"the newest bundle is {damage}: named, and passed over", lost=8 - 4, equal=equal)
    assert equal
    said = (tmp_path / "b" / "run.log").read_text()
    assert "step_00000008 is damaged: optimizer.pt does not match its sha256" in said


def test_a_finished_run_trains_no_further(small_run: Table, tmp_path: Path) -> None:
    first = go(small_run, tmp_path / "a")
    assert go(small_run, tmp_path / "a").state == first.state


def test_accumulation_and_gradient_checkpointing_change_only_rounding(small_run: Table, tmp_path: Path) -> None:
    small_run["backbone"]["dropout"] = 0.0
    plain = go(small_run, tmp_path / "a").state
    small_run["train"]["gradient_accumulation_steps"] = 2
    small_run["backbone"]["gradient_checkpointing"] = True
    split = go(small_run, tmp_path / "b").state
    assert split.sequence == plain.sequence
    for (_, a), (_, b) in zip(plain.loss_curve, split.loss_curve, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def test_micro_batches_are_cut_by_padded_tokens(small_run: Table) -> None:
    """The largest is no larger than the first of as many pieces of equal rows, which holds the longest."""
    small_run["train"] |= {"batch_size": 24, "num_shards": 1, "gradient_accumulation_steps": 3}
    config = check(small_run)
    model, data = build(config)
    batches = Batches(data, config, model.backbone.tokenizer.pad_token_id, range(1))
    smaller = 0
    for step in range(1, 11):
        (shard,) = batches[step].shards
        assert [len(own) for own in shard.examples] == [len(micro.task_B) for micro in shard.micro_batches]
        sizes = [(m.mask_BT.sum(dim=1) + (m.labels_BS != -100).sum(dim=1)).tolist() for m in shard.micro_batches]
        lengths = [length for own in sizes for length in own]
        assert (len(sizes), len(lengths)) == (3, 24)
        assert lengths == sorted(lengths, reverse=True)
        largest = max(len(own) * own[0] for own in sizes)
        assert largest <= 8 * lengths[0]
        smaller += largest < 8 * lengths[0]
    assert smaller


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_the_number_of_shards_changes_only_rounding(small_run: Table, tmp_path: Path, reduction: str) -> None:
    """The loss is normalised over the whole global batch, however it is cut."""
    small_run["backbone"]["dropout"] = 0.0
    small_run["train"]["loss_reduction"] = reduction
    curves = []
    for shards in (1, 3):
        small_run["train"]["num_shards"] = shards
        curves.append(go(small_run, tmp_path / str(shards)).state.loss_curve)
    for (_, a), (_, b) in zip(*curves, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def test_rows_of_unlike_length_weigh_the_same_where_the_loss_is_a_mean_over_examples(small_run: Table) -> None:
    """Against each row's own mean, one row at a time; and the two reductions differ on these rows."""
    answers = {0: "no", 1: "yes, the first number is the larger one"}
    small_run["tasks"][0] |= {"labels": answers, "choices": list(answers.values())}
    small_run["backbone"]["dropout"] = 0.0
    small_run["train"] |= {"num_shards": 3, "max_grad_norm": None}
    gradients = {}
    for reduction in ("token", "example"):
        small_run["train"]["loss_reduction"] = reduction
        config = check(small_run)
        model, data = build(config)
        batches = Batches(data, config, model.backbone.tokenizer.pad_token_id, range(3))
        workers = Workers(3, "exact")
        workers.start(model, 3 * len(config.tasks))
        loop._gradients(model, batches[1], len(config.tasks), config, workers)
        gradients[reduction] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    micro = [m for shard in batches[1].shards for m in shard.micro_batches]
    assert len({int(length) for batch in micro for length in (batch.labels_BS != -100).sum(dim=1)}) > 1
    for batch in micro:
        for row in range(len(batch.task_B)):
            one = [t[row : row + 1] for t in (batch.input_ids_BT, batch.mask_BT, batch.labels_BS, batch.task_B)]
            loss = model(*one)
            (loss.total / (one[2] != -100).sum() / batches[1].num_rows).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients["example"], wanted, atol=1e-6, rtol=1e-4)
    # Of the largest numbers, so that it is not rounding alone that differs.
    assert any((a - b).abs().max() > 0.1 * b.abs().max() for a, b in zip(gradients["token"], wanted, strict=True))


NETWORKS = {
    "hyperprompt": {},
    "routed_hyperprompt": {},
    "hyperformer": {},
    "prefix_tuning": {"reparameterisation": "mlp"},
    "p_tuning": {},
}


@pytest.mark.parametrize("method", NETWORKS)
def test_networks_of_tasks_run_once_a_step(small_run: Table, method: str) -> None:
    """For three shards of two micro-batches; the gradients are those of the passes apart, but for rounding."""
    small_run["method"] = {"name": method, **NETWORKS[method]}
    small_run["backbone"]["dropout"] = 0.0
    small_run["train"] |= {"num_shards": 3, "gradient_accumulation_steps": 2}
    config = check(small_run)
    model, data = build(config)
    assert isinstance(model.method, MadeByTask)
    made, make = [], model.method.make
    model.method.make = lambda task_U: made.append(task_U.tolist()) or make(task_U)  # type: ignore[method-assign,func-returns-value]
    batch = Batches(data, config, model.backbone.tokenizer.pad_token_id, range(3))[1]
    workers = Workers(3, "exact")
    columns = 3 + router_health.num_columns(model.method.num_routes)
    module = workers.start(model, columns * len(config.tasks))
    model.train()
    loop._gradients(module, batch, len(config.tasks), config, workers)
    assert made == [model.method.known(torch.tensor(sorted(batch.task_rows))).unique().tolist()]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for shard in batch.shards:
        torch.manual_seed(shard.seed)
        for micro in shard.micro_batches:
            loss = model(micro.input_ids_BT, micro.mask_BT, micro.labels_BS, micro.task_B)
            ((loss.total / batch.num_target_tokens) + loss.penalty_B.sum() / batch.num_rows).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("method.") and gradient.any() for name, gradient in wanted.items())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_curve_falls(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"max_steps": 60, "learning_rate": 3e-3, "logging_steps": 10}
    small_run["evaluate"] = {}
    curve = go(small_run, tmp_path / "a").state.loss_curve
    assert curve[-1][1] < 0.7 * curve[0][1]


def test_steps_in_proportion_to_the_size_of_a_parameter() -> None:
    def step(**options: Any) -> tuple[float, float]:
        small, large = (torch.nn.Parameter(torch.full((4, 4), size)) for size in (0.01, 1.0))
        config = check(
            {"tasks": ["embedded/nli"], "train": {"optimizer": "adafactor", "learning_rate": 1e-2, **options}}
        )
        optim = Optim(config.train, {"backbone": [("small", small), ("large", large)]})
        small.grad = large.grad = torch.full((4, 4), 0.1)
        optim.step()
        return 0.01 - small.mean().item(), 1 - large.mean().item()

    small, large = step()
    assert (small, large) == (pytest.approx(1e-2, rel=1e-3), pytest.approx(1e-2, rel=1e-3))
    small, large = step(scale_parameter=True)
    assert small == pytest.approx(1e-4, rel=1e-3)
    assert large == pytest.approx(1e-2, rel=1e-3)
    small, large = step(scale_parameter=True, optimizer="adamw")
    assert small == pytest.approx(1e-3, rel=1e-3)  # a tenth: 0.1 takes the whole rate
    assert large == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "inverse_sqrt"])
def test_optimizers_and_schedules(small_run: Table, optimizer: str, schedule: str) -> None:
    small_run["train"] |= {
        "optimizer": optimizer,
        "lr_scheduler_type": schedule,
        "warmup_ratio": 0.5,
        "learning_rate": 1e-3,
        "group_learning_rates": {"prompt": 0.1},
        "weight_decay": 0.01,
    }
    config = check(small_run)
    model, _ = build(config)
    optim = Optim(config.train, model.named_groups())
    rates = []
    for _ in range(12):
        rates.append(optim.learning_rates())
        for parameter in optim.parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optim.step()
    assert set(rates[0]) == {"prompt", "hypernetwork", "backbone"}
    curve = [rate["backbone"] for rate in rates]
    assert curve[:6] == pytest.approx([1e-3 * step / 6 for step in range(6)])  # warm-up
    assert curve[6] == pytest.approx(1e-3)
    assert {"constant": curve[-1] == curve[6], "linear": curve[-1] < 0.2e-3, "inverse_sqrt": 1e-4 < curve[-1] < 1e-3}[
        schedule
    ]
    assert all(rate["prompt"] == pytest.approx(100 * rate["backbone"]) for rate in rates)
    decays = {(g["group"], g["weight_decay"]) for g in optim.optimizer.param_groups}
    assert ("backbone", 0.01) in decays
    assert ("backbone", 0.0) in decays  # layer norms


@pytest.mark.parametrize("scaled", [False, True])
def test_the_optimizer_resumes_exactly(small_run: Table, scaled: bool) -> None:
    """Steps in proportion to the size too, which is that of the weights as the run started."""
    small_run["train"] |= {"lr_scheduler_type": "linear", "warmup_ratio": 0.2, "scale_parameter": scaled}
    config = check(small_run)
    ends = []
    for break_at in (None, 5):
        model, _ = build(config)
        optim = Optim(config.train, model.named_groups())
        for step in range(10):
            if step == break_at:
                state, tensors = optim.state_dict(), {k: v.clone() for k, v in model.trained_state().items()}
                model, _ = build(config)
                model.load_trained_state(tensors)
                optim = Optim(config.train, model.named_groups())
                optim.load_state_dict(state)
            for number, parameter in enumerate(optim.parameters):
                parameter.grad = torch.full_like(parameter, 1e-3 * (number + step))
            optim.step()
        ends.append(model.trained_state())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_bundle_goes_on_under_another_configs_rates(small_run: Table, optimizer: str) -> None:
    """As if the new config's values had been set by hand: from the first step, and on its own schedule."""
    small_run["train"] |= {"lr_scheduler_type": "linear", "weight_decay": 0.01, "optimizer": optimizer}
    other = {"learning_rate": 4e-3, "group_learning_rates": {"prompt": 0.1}, "weight_decay": 0.2, "adam_beta2": 0.9}
    ends = []
    for by_hand in (True, False):
        model, _ = build(check(small_run))
        optim = Optim(check(small_run).train, model.named_groups())
        for step in range(6):
            if step == 3 and by_hand:
                for number, group in enumerate(optim.optimizer.param_groups):
                    base = 0.1 if group["group"] == "prompt" else 4e-3
                    decay = 0.2 if group["weight_decay"] else 0.0
                    optim.schedule.base_lrs[number] = base
                    group.update(lr=base * 9 / 12, weight_decay=decay)
                    if "betas" in group:
                        group["betas"] = (0.9, 0.9)
            elif step == 3:
                state = optim.state_dict()
                small_run["train"] |= other
                optim = Optim(check(small_run).train, model.named_groups())
                optim.load_state_dict(state)
                assert optim.learning_rates() == pytest.approx(
                    {"prompt": 0.1 * 9 / 12, "hypernetwork": 3e-3, "backbone": 3e-3}
                )
            for number, parameter in enumerate(optim.parameters):
                parameter.grad = torch.full_like(parameter, 1e-3 * (number + step))
            optim.step()
        ends.append(model.trained_state())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "prompt_tuning", "smop", "hyperprompt", "routed_hyperprompt"])
def test_every_method_trains_in_both_precisions(small_run: Table, tmp_path: Path, method: str, precision: str) -> None:
    lengths = {"prompt_tuning": {"length": 4}, "smop": {"length": 2}, "hyperprompt": small_run["method"]}
    lengths["routed_hyperprompt"] = {k: v for k, v in small_run["method"].items() if k != "name"}
    small_run["method"] = {"name": method, **lengths.get(method, {})}
    small_run["train"] |= {"max_steps": 2, "precision": precision}
    config = check(small_run)
    start = {name: value.clone() for name, value in build(config)[0].trained_state().items()}
    outcome = go(small_run, tmp_path / "run")
    end = final_tensors(tmp_path / "run")
    assert start.keys() == end.keys()
    assert all(value.dtype == torch.float32 for value in end.values())
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert 0 < outcome.state.loss_curve[-1][1] < 20
    if method == "smop":
        assert outcome.peak_memory_bytes > 0


def test_a_loss_that_is_not_finite_stops_the_run(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"learning_rate": 1e30, "max_grad_norm": None}
    small_run["train"]["save_steps"] = 1
    with pytest.raises(TrainingError) as error:
        go(small_run, tmp_path / "a")
    message = str(error.value)
    assert re.search(r"at step 2: loss of \S+, training example \d+.* \(shard \d\)", message)
    assert re.search(r"tasks in the batch: my/larger \(\d+ rows\), embedded/nli", message)
    assert "step_00000001" in message
    assert "lower train.learning_rate" in message
    assert all(torch.isfinite(value).all() for value in final_tensors(tmp_path / "a").values())


def test_early_stopping_and_the_best_bundles_are_kept(small_run: Table, tmp_path: Path) -> None:
    small_run["train"] |= {"max_steps": 200, "save_total_limit": 1, "learning_rate": 1e-9}
    small_run["evaluate"] = {"steps": 2, "early_stopping_patience": 3}
    state = go(small_run, tmp_path / "a").state
    assert state.stopped_early
    assert state.step == state.best_step + 2 * 3  # a rate of 1e-9 never improves on the first score
    kept = {int(folder.name.removeprefix("step_")) for folder in checkpoint.bundles(tmp_path / "a" / "bundles")}
    assert kept == state.kept_steps | {state.step}


def test_best_scores_are_tracked_for_the_mean_and_each_task() -> None:
    state = TrainState()
    for step, (a, b) in enumerate([(0.5, 0.5), (0.9, 0.2), (0.6, 0.6)], start=1):
        state.step = step
        state.take_scores({"x": {"score": a}, "y": {"score": b}})
    assert (state.best_step, state.best_mean) == (3, pytest.approx(0.6))
    assert state.best_tasks == {"x": [2, 0.9], "y": [3, 0.6]}
    assert state.kept_steps == {2, 3}
    assert TrainState.from_json(state.to_json()) == state


def test_every_process_agrees_on_the_whole_batch(small_run: Table) -> None:
    """What a shard holds does not depend on who computes it; together the shards are the global batch."""
    config = check(small_run)
    model, data = build(config)
    pad = model.backbone.tokenizer.pad_token_id
    alone = Batches(data, config, pad, range(4))[3]
    parts = [Batches(data, config, pad, shards)[3] for shards in ([0, 2], [1, 3])]
    assert alone.num_target_tokens == sum(b.num_target_tokens for s in alone.shards for b in s.micro_batches)
    assert sum(alone.task_rows.values()) == alone.num_rows == 12
    for part, shards in zip(parts, ([0, 2], [1, 3]), strict=True):
        assert (part.digest, part.num_target_tokens) == (alone.digest, alone.num_target_tokens)
        for shard, index in zip(part.shards, shards, strict=True):
            assert shard.seed == alone.shards[index].seed
            for a, b in zip(shard.micro_batches, alone.shards[index].micro_batches, strict=True):
                assert torch.equal(a.input_ids_BT, b.input_ids_BT)
