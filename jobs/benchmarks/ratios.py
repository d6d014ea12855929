"""What must hold: ratios between cases of one group, each with its bound."""

from typing import Any, Literal

from pydantic import PositiveFloat

from benchmarks.cases import METHODS, Case, Group
from polyprompt.section import Section

#: examples_per_second, step_seconds: median over turns of the quotient within a turn. utilisation: of the numerator's
#: operations per second and the denominator's, a GEMM's. above_backbone_bytes: all tensors at the peak but the frozen
#: weights that are there before training; total_bytes: with them. held_bytes: what lives as the optimizer steps, when
#: no activation does. inference_flops: counted, of one example. score: of validation rows. loss: of every step, the
#: greatest relative difference.
Quantity = Literal[
    "examples_per_second",
    "step_seconds",
    "utilisation",
    "above_backbone_bytes",
    "total_bytes",
    "held_bytes",
    "inference_flops",
    "score",
    "loss",
]


class Ratio(Section):
    """numerator, denominator: names of cases of the group. direction: the side of the bound that is wanted."""

    name: str
    group: str
    numerator: str
    denominator: str
    quantity: Quantity
    direction: Literal["at least", "at most"]
    bound: PositiveFloat


SMOP, HYPERPROMPT, FULL = METHODS["smop"], METHODS["hyperprompt"], METHODS["full"]
#: In fp32 the sums of differently padded blocks differ in the last digits, and a step carries them on.
SAME_CURVE = 1e-3


def groups(quick: bool = False) -> list[Group]:
    """Return the groups behind RATIOS. quick: small ones of the same cases, to try the command out: not for figures."""
    made = [
        _group("platform cost", _cost("t5-base", FULL, "plain", rows=4, shards=2), turns=4),
        _group("platform cost, small steps", _cost("embedded", SMOP, "ours", rows=32, shards=4, batches=2), turns=7),
        _group("utilisation fp32", _utilisation("fp32"), turns=3),
        _group("utilisation bf16", _utilisation("bf16"), turns=3),
        *(
            _group(f"torch.compile, {label}, {precision}", _compiled(method, precision), turns=3)
            for label, method in (("HyperPrompt", HYPERPROMPT), ("SMoP", SMOP))
            for precision in ("fp32", "bf16")
        ),
        _group("SMoP and PEFT prompt tuning", _smop_and_peft(), turns=2),
        _group("HyperPrompt and plain tuning", _hyperprompt_and_full(), turns=4),
        _group("HyperPrompt folded", _folded(), turns=7),
        _group("by length and as drawn", _by_length(), turns=3),
        _group("mixed and single task", _mixed(), turns=7),
        _group("rank and generate", _rank_and_generate(), turns=5),
        _group("trials on one backbone", _trials(), turns=3),
    ]
    return [_quick(group) for group in made] if quick else made


def _group(name: str, cases: list[Case], turns: int) -> Group:
    return Group(name=name, cases=cases, turns=turns)


def _cost(backbone: Any, method: dict[str, Any], bare_side: Any, **size: Any) -> list[Case]:
    common = {"backbone": backbone, "method": method, "lengths": "superglue", **size}
    return [
        Case(name="bare loop", side=bare_side, **common),
        Case(name="main job, tracking off", loop="fit", **common),
        Case(name="main job, tracking on", loop="tracked", **common),
    ]


def _utilisation(precision: Any) -> list[Case]:
    return [
        Case(name="HyperPrompt-Global", loop="fit", method=HYPERPROMPT, precision=precision),
        Case(name="SMoP", loop="fit", method=SMOP, precision=precision),
        Case(name="gemm", kind="gemm", precision=precision),
    ]


def _compiled(method: dict[str, Any], precision: Any) -> list[Case]:
    common: dict[str, Any] = {"loop": "fit", "method": method, "rows": 4, "precision": precision}
    return [Case(name="compiled", compiled=True, **common), Case(name="as it is", **common)]


def _smop_and_peft() -> list[Case]:
    common: dict[str, Any] = {"lengths": "superglue", "rows": 8, "shards": 2, "batches": 2}
    return [
        Case(name="SMoP (k=4, l=5)", loop="fit", method=SMOP, **common),
        Case(name="PEFT prompt tuning (100)", side="peft_prompt_tuning", **common),
    ]


def _hyperprompt_and_full() -> list[Case]:
    common: dict[str, Any] = {"loop": "fit", "lengths": "superglue", "rows": 4, "shards": 2}
    return [
        Case(name="HyperPrompt-Global", method=HYPERPROMPT, **common),
        Case(name="full tuning", method=FULL, **common),
    ]


def _folded() -> list[Case]:
    common: dict[str, Any] = {"kind": "forward", "lengths": "superglue", "rows": 8, "shards": 2}
    return [
        Case(name="HyperPrompt-Global, folded", method=HYPERPROMPT, folded=True, **common),
        Case(name="full tuning", method=FULL, **common),
    ]


def _by_length() -> list[Case]:
    common: dict[str, Any] = {
        "backbone": "embedded", "method": HYPERPROMPT, "lengths": "mixture", "rows": 32, "shards": 4, "batches": 6,
    }  # fmt: skip
    return [
        Case(name="by length", loop="fit", **common),
        Case(name="as drawn", unsorted=True, **common),
    ]


def _mixed() -> list[Case]:
    common: dict[str, Any] = {
        "loop": "fit", "backbone": "t5-small", "method": HYPERPROMPT, "lengths": 128, "rows": 16, "shards": 2,
    }  # fmt: skip
    return [Case(name="eight tasks", tasks=8, **common), Case(name="one task", **common)]


def _rank_and_generate() -> list[Case]:
    common: dict[str, Any] = {
        "backbone": "embedded", "method": HYPERPROMPT, "lengths": "choices", "trained": True, "rows": 64,
    }  # fmt: skip
    return [
        Case(name="rank", kind="evaluate_rank", **common),
        Case(name="generate and match", kind="evaluate_generate", **common),
    ]


def _trials() -> list[Case]:
    common: dict[str, Any] = {"method": SMOP, "lengths": 32, "rows": 4, "trials": 8}
    return [
        Case(name="8 trials in a pack", loop="pack", **common),
        Case(name="8 trials one after another", loop="in_turn", **common),
        Case(name="one trial", loop="in_turn", **common | {"trials": 1}),
    ]


def _quick(group: Group) -> Group:
    def small(case: Case) -> Case:
        lengths = case.lengths if isinstance(case.lengths, str) else min(case.lengths, 32)
        rows = min(case.rows, 8)
        update = {"backbone": "embedded", "lengths": lengths, "rows": rows, "batches": min(case.batches, 2)}
        return case.model_copy(update=update)

    return group.model_copy(update={"cases": [small(case) for case in group.cases], "turns": 2})


def _ratio(name: str, group: str, pair: tuple[str, str], quantity: Quantity, direction: Any, bound: float) -> Ratio:
    return Ratio(
        name=name, group=group, numerator=pair[0], denominator=pair[1], quantity=quantity, direction=direction,
        bound=bound,
    )  # fmt: skip


_OFF, _ON = ("main job, tracking off", "bare loop"), ("main job, tracking on", "bare loop")
_SMOP_PEFT = ("SMoP (k=4, l=5)", "PEFT prompt tuning (100)")
_HYPER_FULL = ("HyperPrompt-Global", "full tuning")
_PACK = "trials on one backbone"
RATIOS: list[Ratio] = [
    *(
        _ratio(f"Main job ÷ bare loop, {what}", group, pair, "examples_per_second", "at least", 0.97)
        for group, label in (("platform cost", "full tuning"), ("platform cost, small steps", "SMoP, small model"))
        for what, pair in ((f"{label}, tracking off", _OFF), (f"{label}, tracking on", _ON))
    ),
    *(
        _ratio(f"Utilisation, {method}, {precision}", f"utilisation {precision}", (method, "gemm"), "utilisation",
               "at least", bound)
        for precision, bound in (("fp32", 0.75), ("bf16", 0.60))
        for method in ("HyperPrompt-Global", "SMoP")
    ),
    _ratio("SMoP ÷ PEFT prompt tuning, training time", "SMoP and PEFT prompt tuning", _SMOP_PEFT, "step_seconds",
           "at most", 0.60),
    _ratio("SMoP ÷ PEFT prompt tuning, memory above the backbone", "SMoP and PEFT prompt tuning", _SMOP_PEFT,
           "above_backbone_bytes", "at most", 0.60),
    _ratio("SMoP ÷ PEFT prompt tuning, inference FLOPs", "SMoP and PEFT prompt tuning", _SMOP_PEFT, "inference_flops",
           "at most", 0.70),
    _ratio("HyperPrompt-Global ÷ full tuning, step time", "HyperPrompt and plain tuning", _HYPER_FULL, "step_seconds",
           "at most", 1.05),
    _ratio("HyperPrompt-Global ÷ full tuning, memory", "HyperPrompt and plain tuning", _HYPER_FULL, "total_bytes",
           "at most", 1.05),
    _ratio("HyperPrompt-Global folded ÷ full tuning, inference time", "HyperPrompt folded",
           ("HyperPrompt-Global, folded", "full tuning"), "step_seconds", "at most", 1.03),
    _ratio("Batches by length ÷ as drawn", "by length and as drawn", ("by length", "as drawn"), "examples_per_second",
           "at least", 1.8),
    _ratio("Batches by length, as drawn: losses differ by", "by length and as drawn", ("by length", "as drawn"), "loss",
           "at most", SAME_CURVE),
    _ratio("Eight tasks mixed ÷ one task", "mixed and single task", ("eight tasks", "one task"), "examples_per_second",
           "at least", 0.95),
    _ratio("Rank scoring ÷ generate and match", "rank and generate", ("rank", "generate and match"),
           "examples_per_second", "at least", 3.0),
    _ratio("Rank scoring ÷ generate and match, mean score", "rank and generate", ("rank", "generate and match"),
           "score", "at least", 1.0),
    _ratio("8 SMoP trials ÷ one, memory without activations", _PACK, ("8 trials in a pack", "one trial"), "held_bytes",
           "at most", 1.6),
    _ratio("8 SMoP trials in a pack ÷ one after another, time", _PACK,
           ("8 trials in a pack", "8 trials one after another"), "step_seconds", "at most", 0.8),
    _ratio("8 SMoP trials in a pack, one after another: losses differ by", _PACK,
           ("8 trials in a pack", "8 trials one after another"), "loss", "at most", 1e-6),
]  # fmt: skip
