"""What is measured: a case is one way to do one kind of work; the cases of a group take turns.

Letters: T input tokens, S target tokens.
"""

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from polyprompt.errors import ConfigError
from polyprompt.section import Section

Backbone = Literal["t5-base", "t5-small", "smollm2", "embedded"]
Precision = Literal["fp32", "bf16"]
#: Tokens of every input, or whose real rows.
Lengths = PositiveInt | Literal["superglue", "glue", "mixture", "choices"]
#: train: a step of the optimizer. forward: the loss without gradients. rank: the choices' likelihoods. generate: greedy
#: answers. evaluate_…: the same through polyprompt's own evaluation, with scores. gemm: the matrix products of such a
#: model alone.
Kind = Literal["train", "forward", "rank", "generate", "evaluate_rank", "evaluate_generate", "gemm"]
#: ours: polyprompt's model. plain: transformers' own class, all of it trained. peft_…: PEFT's, the backbone frozen.
Side = Literal["ours", "plain", "peft_prompt_tuning", "peft_prefix_tuning", "peft_lora"]
#: bare: forward, backward, clip, step, over batches made before. fit: polyprompt's loop, which makes its batches.
#: tracked: fit with metrics to a file and to MLflow. pack: several trials on one backbone; in_turn: the same trials one
#: after another.
Loop = Literal["bare", "fit", "tracked", "pack", "in_turn"]


class Case(Section):
    """One way to do one kind of work."""

    name: str
    kind: Kind = "train"
    side: Side = "ours"
    loop: Loop = "bare"
    #: As in a recipe; of side=ours.
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "full"})
    backbone: Backbone = "t5-base"
    precision: Precision = "fp32"
    lengths: Lengths = 256
    #: Of the global batch, and what it is cut into. Each shard is computed as one padded block.
    rows: PositiveInt = 8
    shards: PositiveInt = 1
    #: Different global batches, which a turn goes through once.
    batches: PositiveInt = 1
    #: Cut a global batch as its rows were drawn, not by length.
    unsorted: bool = False
    #: Of fixed lengths: over how many tasks the rows are spread. The method knows eight, whatever this is.
    tasks: PositiveInt = 1
    #: Prompts computed once and for all, as they are served.
    folded: bool = False
    trials: PositiveInt = 1
    #: By backbone.compile; of loop=fit.
    compiled: bool = False
    #: Processes that share the global batch; of loop=fit.
    workers: PositiveInt = 1
    #: Of each worker. None: the benchmark's.
    threads: PositiveInt | None = None
    #: Weights that were trained for a moment, so that the model has answers at all.
    trained: bool = False

    @property
    def real(self) -> bool:
        """Are its rows those of benchmarks, from files?"""
        return self.lengths in ("superglue", "glue", "mixture")


class Group(Section):
    """Cases that are held against each other: their processes live at the same time and take turns."""

    name: str
    cases: list[Case] = Field(min_length=1)
    turns: PositiveInt = 5


#: The grid: methods of ours, and others' ways.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "hyperprompt": {"name": "hyperprompt", "variant": "global"},
    "smop": {"name": "smop", "num_prompts": 4, "length": 5},
    "prompt_tuning": {"name": "prompt_tuning", "length": 100, "per_task": False},
    "prefix_tuning": {"name": "prefix_tuning"},
    "lora": {"name": "lora", "rank": 8},
}
ALTERNATIVES: tuple[Side, ...] = ("plain", "peft_prompt_tuning", "peft_prefix_tuning", "peft_lora")
BACKBONES: tuple[Backbone, ...] = ("t5-base", "t5-small", "smollm2", "embedded")
LENGTHS: tuple[Lengths, ...] = (64, 256, 512, "superglue", "glue", "mixture")
KINDS: tuple[Kind, ...] = ("train", "rank", "generate")
#: T5-base at three processes of up to 5 GB each.
AT_ONCE = 3


def grid() -> Iterator[Group]:
    """Yield every combination, as groups named kind/backbone/precision/lengths; a case adds its method or side."""
    for kind, backbone, precision, lengths in itertools.product(KINDS, BACKBONES, ("fp32", "bf16"), LENGTHS):
        name = f"{kind}/{backbone}/{precision}/{lengths}"
        common = {"kind": kind, "backbone": backbone, "precision": precision, "lengths": lengths, "shards": 2}
        cases = [Case(name=f"{name}/{side}", side=side, **common) for side in ALTERNATIVES if kind == "train"]
        loop = "fit" if kind == "train" else "bare"
        for label, method in METHODS.items():
            if backbone == "smollm2" and label in ("hyperprompt", "prefix_tuning"):
                method = {**method, "stacks": "decoder"}
                if label == "hyperprompt":
                    method["encoder_length"] = 16
            cases.append(Case(name=f"{name}/{label}", loop=loop, method=method, **common))
        gemm = Case(name=f"{name}/gemm", kind="gemm", backbone=backbone, precision=precision, lengths=lengths)
        yield Group(name=name, cases=[*cases, gemm])


def chosen(groups: Sequence[Group], patterns: Sequence[str]) -> list[Group]:
    """Return the groups whose name fits a pattern, and of others the cases whose name does, with their GEMM.

    Raises ConfigError for a pattern that nothing fits.
    """
    found: list[Group] = []
    unused = set(patterns)
    for group in groups:
        fitting = []
        for case in group.cases:
            hits = {p for p in patterns if fnmatch.fnmatch(case.name, p) or fnmatch.fnmatch(group.name, p)}
            unused -= hits
            if hits:
                fitting.append(case)
        if any(case.kind != "gemm" for case in fitting):
            gemm = [case for case in group.cases if case.kind == "gemm" and case not in fitting]
            found += pieces(group.model_copy(update={"cases": [*fitting, *gemm]}))
    if unused:
        raise ConfigError(
            f"--cases {' '.join(sorted(unused))}: no case has such a name; --list shows them, and * stands for any text"
        )
    return found


def pieces(group: Group) -> Iterator[Group]:
    """Cut a group into parts with few processes at once, each with the GEMM."""
    gemm = [case for case in group.cases if case.kind == "gemm"]
    others = [case for case in group.cases if case.kind != "gemm"]
    if len(others) <= AT_ONCE:
        yield group
        return
    for number, start in enumerate(range(0, len(others), AT_ONCE), 1):
        part = others[start : start + AT_ONCE]
        yield group.model_copy(update={"name": f"{group.name} ({number})", "cases": [*part, *gemm]})
