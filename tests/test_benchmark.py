"""The benchmark: what it counts is what is there, sides that must agree do, and its ratios follow from its numbers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "jobs"))

from benchmarks import cases, meter, ratios, report, results, rows, subjects  # noqa: E402
from benchmarks.cases import Case, Group  # noqa: E402
from benchmarks.child import facts  # noqa: E402
from benchmarks.results import Measured, Results  # noqa: E402
from benchmarks.setting import SHAPES, Setting  # noqa: E402

from polyprompt.config import FullConfig, SMoPConfig  # noqa: E402
from polyprompt.costs import training_flops  # noqa: E402
from polyprompt.errors import ConfigError, DataError  # noqa: E402

SMALL_T5 = {
    **SHAPES["t5-small"], "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2,
    "num_decoder_layers": 2, "vocab_size": 8192,
}  # fmt: skip
SMALL_LLAMA = {
    **SHAPES["smollm2"], "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8192,
}  # fmt: skip


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Small shapes under the names of the large ones."""
    monkeypatch.setitem(SHAPES, "t5-small", SMALL_T5)
    monkeypatch.setitem(SHAPES, "smollm2", SMALL_LLAMA)
    return Setting(tmp_path, tmp_path / "absent", threads=1, device="cpu")


def case(**changes: Any) -> Case:
    return Case(**{"name": "a case", "backbone": "t5-small", "lengths": 12, "rows": 4, "shards": 2, **changes})


# --- counts


@pytest.mark.parametrize("method", [FullConfig(), SMoPConfig(num_prompts=3, length=2)], ids=lambda m: m.name)
def test_fused_attention_is_counted_as_its_products(method: Any) -> None:
    """torch's counter alone misses it on CPUs."""
    inputs = tiny.batch(2)

    def counted(attention: Any) -> int:
        model = tiny.model(method, attention=attention)
        with torch.no_grad():
            return meter.count_flops(lambda: model(*inputs))

    assert counted("sdpa") == counted("eager")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_closed_form_of_a_whole_training_step_is_what_is_counted(attention: Any) -> None:
    model = tiny.model(FullConfig(), attention=attention).train()
    input_ids, _, labels, task = tiny.batch(2)
    labels = labels.clamp(min=3)
    mask = torch.ones_like(input_ids)
    counted = meter.count_flops(lambda: model(input_ids, mask, labels, task).total.backward())
    assert counted == 2 * training_flops(model, input_ids.shape[1], labels.shape[1], whole=True)


def test_the_closed_form_of_a_frozen_backbones_step_lacks_attention_only(setting: Setting) -> None:
    found = facts(case(method=cases.METHODS["smop"], lengths=64), _built(setting, "smop", 64), "cpu")
    assert 1.0 < found["step_flops"] / found["closed_step_flops"] < 1.25
    assert found["closed_inference_flops"] == pytest.approx(found["inference_flops"], rel=1e-3)
    assert found["real_tokens"] == found["padded_tokens"] == 4 * (64 + rows.TARGETS)


def _built(setting: Setting, method: str, lengths: int) -> subjects.Subject:
    return subjects.build(case(method=cases.METHODS[method], lengths=lengths), setting)


def test_memory_is_what_tensors_take() -> None:
    weight = torch.ones(1000, 100, requires_grad=True)
    before = meter.live_tensor_bytes()
    kept = torch.ones(500, 100)
    assert meter.live_tensor_bytes() - before == kept.untyped_storage().nbytes() == 200_000
    kept.grad = torch.ones(500, 100)
    assert meter.live_tensor_bytes() - before == 400_000
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        one = weight * 2
        other = one * 2
        del one
        other.sum().backward()
    # Two products at once, then one and the gradients behind it.
    assert 800_000 <= meter._peak(profiled) <= 1_300_000


# --- sides that must agree


@pytest.mark.parametrize("backbone", ["t5-small", "smollm2"])
def test_alternatives_compute_our_loss(backbone: Any, setting: Setting) -> None:
    """The bare loop's model and LoRA as it starts are plain transformers; PEFT's prompt is given our vectors."""
    ours = subjects.build(case(backbone=backbone), setting)
    micros = rows.micro_batches(ours.batches[1])

    def losses(subject: subjects.Subject) -> list[float]:
        subject.module.eval()
        with torch.no_grad():
            return [float(subject.loss(micro)) for micro in micros]

    expected = losses(ours)
    for side in ("plain", "peft_lora"):
        assert losses(subjects.build(case(backbone=backbone, side=side), setting)) == pytest.approx(expected, rel=1e-5)
    prompted = subjects.build(case(backbone=backbone, method=cases.METHODS["prompt_tuning"]), setting)
    theirs = subjects.build(case(backbone=backbone, side="peft_prompt_tuning"), setting)
    vectors = dict(prompted.module.named_parameters())["method.prompt_GPH"][0]
    with torch.no_grad():
        theirs.trained[0].copy_(vectors)
    assert losses(theirs) == pytest.approx(losses(prompted), rel=1e-5)
    assert losses(theirs) != pytest.approx(expected, rel=1e-3)


def test_peft_prefix_tuning_trains_its_prefix_alone(setting: Setting) -> None:
    subject = subjects.build(case(side="peft_prefix_tuning"), setting)
    subject.loss(rows.micro_batches(subject.batches[1])[0]).backward()
    assert [p.grad is not None for p in subject.trained] == [True] * len(subject.trained)
    assert sum(p.numel() for p in subject.trained) < 10_000


def test_padded_rows_are_the_same_rows(setting: Setting, shared_data: Path) -> None:
    own = Setting(setting.out, shared_data, threads=1, device="cpu")
    sorted_, drawn = (
        subjects.build(case(lengths="superglue", rows=8, shards=4, unsorted=unsorted), own)
        for unsorted in (False, True)
    )
    one, other = sorted_.batches[1], drawn.batches[1]
    assert (one.digest, one.num_input_tokens, one.num_rows) == (other.digest, other.num_input_tokens, other.num_rows)
    assert rows.num_padded_tokens(one) < rows.num_padded_tokens(other)
    sorted_.module.eval()
    with torch.no_grad():
        totals = [sum(float(sorted_.loss(m)) for m in rows.micro_batches(batch)) for batch in (one, other)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)
    assert [len(choices) for choices in rows.choices_of(one, sorted_.data)] == [
        len(micro.task_B) for micro in rows.micro_batches(one)
    ]


# --- ratios and what is written


def measured(name: str, seconds: list[float], **facts: float) -> Measured:
    rates = [2e9] * len(seconds) if name == "gemm" else []
    known = {"rows": 4.0, "backbone_bytes": 100.0, "method_bytes": 20.0, "peak_step_bytes": 80.0, **facts}
    own = Case(name=name, kind="gemm" if name == "gemm" else "train")
    return Measured(case=own, facts=known, seconds=[[s] for s in seconds], rates=rates, losses=[[1.0, seconds[0]]])


FAST = measured("fast", [1.0, 2.0, 4.0], step_flops=1e9, inference_flops=5.0, held_bytes=60.0)
SLOW = measured("slow", [2.0, 8.0, 4.0], step_flops=1e9, inference_flops=10.0, held_bytes=30.0, peak_step_bytes=180.0)
GEMM = measured("gemm", [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("quantity", "pair", "expected"),
    [
        ("step_seconds", ("fast", "slow"), (0.5, 0.25, 1.0)),  # 1/2, 2/8, 4/4
        ("examples_per_second", ("fast", "slow"), (2.0, 1.0, 4.0)),
        ("utilisation", ("fast", "gemm"), (0.25, 0.125, 0.5)),
        ("above_backbone_bytes", ("fast", "slow"), (0.5, 0.5, 0.5)),
        ("total_bytes", ("fast", "slow"), (2 / 3, 2 / 3, 2 / 3)),
        ("held_bytes", ("fast", "slow"), (2.0, 2.0, 2.0)),
        ("inference_flops", ("fast", "slow"), (0.5, 0.5, 0.5)),
        ("loss", ("fast", "slow"), (0.5, 0.5, 0.5)),
    ],
)
def test_ratios_follow_from_what_was_measured(quantity: Any, pair: tuple[str, str], expected: Any) -> None:
    group = Group(name="a group", cases=[one.case for one in (FAST, SLOW, GEMM)], turns=3)
    groups = {"a group": (group, [FAST, SLOW, GEMM])}
    ratio = ratios.Ratio(
        name="a ratio", group="a group", numerator=pair[0], denominator=pair[1], quantity=quantity,
        direction="at most", bound=0.5,
    )  # fmt: skip
    found = results.found(ratio, groups)
    assert found is not None
    assert found.value == pytest.approx(expected)
    assert found.met == (expected[0] <= 0.5)
    assert results.found(ratio, {}) is None
    upward = ratio.model_copy(update={"direction": "at least"})
    turned = results.found(upward, groups)
    assert turned is not None
    assert turned.met == (expected[0] >= 0.5)


def test_every_ratio_has_its_cases_in_one_group() -> None:
    for quick in (False, True):
        known = {group.name: {one.name for one in group.cases} for group in ratios.groups(quick)}
        for ratio in ratios.RATIOS:
            assert {ratio.numerator, ratio.denominator} <= known[ratio.group], ratio.name
    assert len({ratio.name for ratio in ratios.RATIOS}) == len(ratios.RATIOS)


def test_report_files(tmp_path: Path) -> None:
    group = ratios.groups()[0]
    found = [measured(one.name, [1.0, 1.1], real_tokens=50.0, step_flops=1e9) for one in group.cases]
    made = Results(machine=results.Machine.here(1, "cpu"), groups={}, tables={})
    made = made.with_group(group, found).with_table("Further", ["a", "b"], [["1", "2"]])
    written = report.write(made, tmp_path, "the command")
    assert [path.name for path in written] == ["results.json", "benchmark.md", "benchmark.png"]
    assert Results.read(written[0]) == made
    assert made.has(group)
    assert not made.has(group.model_copy(update={"turns": 9}))
    text = written[1].read_text()
    assert "| Main job ÷ bare loop, full tuning, tracking off | 1 |" in text
    assert "    the command" in text
    assert "| 1 | 2 |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into_page(page, text)
    assert page.read_text() == f"before\n{report.BEGIN}\n{text}{report.END}\nafter\n"
    with pytest.raises(ConfigError, match="needs the marks"):
        report.into_page(tmp_path / "other.md", text)
    written[0].write_text("{}")
    with pytest.raises(DataError, match="is not of this version"):
        Results.read(written[0])


# --- the command line

Job = Callable[..., tuple[int, str, str]]


def test_unknown_names_and_missing_rows_are_refused(job_here: Job, tmp_path: Path, setting: Setting) -> None:
    status, _, said = job_here("benchmark", "--cases", "trian/*", "--out", str(tmp_path))
    assert status == 1
    assert "--cases trian/*: no case has such a name; --list shows them" in said
    with pytest.raises(ConfigError, match=r"--data .*absent does not exist; 'a case' reads real rows"):
        subjects.build(case(lengths="superglue"), setting)


def test_list_names_the_grid(job_here: Job) -> None:
    status, said, _ = job_here("benchmark", "--list")
    assert status == 0
    lines = [line.strip() for line in said.splitlines()]
    assert {"train/t5-base/fp32/256/smop", "generate/smollm2/bf16/glue/lora", "utilisation fp32"} <= set(lines)
    chosen = cases.chosen(list(cases.grid()), ["train/t5-small/fp32/64/*"])
    assert all(len(group.cases) <= cases.AT_ONCE + 1 and group.cases[-1].kind == "gemm" for group in chosen)


def test_figures_of_other_code_are_not_mixed_in(job_here: Job, tmp_path: Path) -> None:
    other = results.Machine.here(1, "cpu").model_copy(update={"commit": "another"})
    Results(machine=other, groups={}, tables={}).write(tmp_path / "results.json")
    status, _, said = job_here("benchmark", "--cases", "mixed*", "--threads", "1", "--out", str(tmp_path))
    assert status == 1
    assert "figures of one file must compare. Give another --out" in said


@pytest.mark.slow
@pytest.mark.own_processes
def test_quick(tmp_path: Path, shared_data: Path) -> None:
    """Every loop; a second call measures nothing again."""
    names = ["platform cost, small steps", "SMoP and*", "trials*"]
    command = [sys.executable, str(ROOT / "jobs" / "benchmark.py"), "--quick", "--threads", "1", "--cases", *names]
    command += ["--out", str(tmp_path / "out"), "--data", str(shared_data)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = Results.read(tmp_path / "out" / "results.json")
    assert len(made.groups) == len(names)
    found = {one.ratio.name: one for one in report.ratios(made)}
    assert len(found) == 8
    assert found["8 SMoP trials in a pack, one after another: losses differ by"].met
    for what in ("memory above the backbone", "inference FLOPs"):
        # 95 tokens fewer a row.
        assert found[f"SMoP ÷ PEFT prompt tuning, {what}"].value.median < 0.9
    packed = made.groups["trials on one backbone"][1][0]
    assert len(packed.losses) == 8
    assert all(len(curve) >= 3 for curve in packed.losses)
    assert packed.facts["held_bytes"] > 10**7
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == before
