"""Loss curves that a refactor must keep: tests/golden/<method>.txt, one "step loss" a line.

To write one anew, when a commit means to change it and says why, delete it and run this test.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_source_prompts import finished

from polyprompt.recipe import check
from polyprompt.training_defaults import TRAIN_BACKBONE
from polyprompt.worker import Job, train

GOLDEN = Path(__file__).parent / "golden"
#: Methods that, at the others' learning rate, amplify a processor's last bits to 0.1 within the 8 steps.
AMPLIFYING = (*TRAIN_BACKBONE, "hyperformer")
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "prompt_tuning": {"length": 4},
    "smop": {"length": 2},
    "hyperprompt": {"encoder_length": 3, "decoder_length": 2, "reduction": 4},
    "routed_hyperprompt": {"encoder_length": 3, "decoder_length": 2, "reduction": 4},
    "prefix_tuning": {"encoder_length": 3, "decoder_length": 2},
    "p_tuning": {"length": 4, "encoder_hidden_size": 16},
    "dept": {"length": 3, "rank": 2, "max_positions": 16},
    "attempt": {"length": 3, "bottleneck": 4},
    "mpt": {"length": 3},
    "adapter": {"bottleneck": 4, "init_std": 0.1},
    "hyperformer": {"reduction": 4},
    "lora": {"rank": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_is_as_it_was(small_run: dict[str, Any], tmp_path: Path, method: str) -> None:
    small_run["method"] = {"name": method, **METHODS[method]}
    small_run["tasks"] = small_run["tasks"][:1]  # the suite's text may change, the test's own may not
    if method == "attempt":
        source = finished(small_run, tmp_path / "source", name="prompt_tuning", length=3)
        small_run["method"]["sources"] = [str(source)]
    small_run["train"] |= {"max_steps": 8, "learning_rate": 3e-3 if method in AMPLIFYING else 1e-2}
    small_run["evaluate"] = {}
    state = train(Job(check(small_run), tmp_path, handle=None), torch.device("cpu"), lambda metrics, bundle: None).state
    curve = "".join(f"{step} {loss:.5f}\n" for step, loss in state.loss_curve)
    file = GOLDEN / f"{method}.txt"
    if not file.exists():
        file.write_text(curve)
        pytest.fail(f"{file} was missing and is written now: look at it and commit it")
    for line, expected in zip(curve.splitlines(), file.read_text().splitlines(), strict=True):
        # Processors differ in the last bits, which a few steps amplify: between AVX2 and SSE4.2 to 1e-5.
        assert [float(x) for x in line.split()] == pytest.approx([float(x) for x in expected.split()], abs=1e-4)
