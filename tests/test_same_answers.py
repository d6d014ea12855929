"""Every way to ask a trained model gives the same answers: in-process, a file, MLflow, an export, the endpoint.

The rows are of all embedded tasks and, where they are there, three real ones.

Letters: T input tokens, S target tokens, V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from conftest import SHARED_DATA
from safetensors.torch import load_file
from test_golden import METHODS
from test_serving import client_of, put
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from polyprompt import backbone, batch_prediction, checkpoint, export
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError
from polyprompt.folding import Folded
from polyprompt.loop import TrainState
from polyprompt.model import PromptedModel
from polyprompt.plan import model_of
from polyprompt.predictor import Prediction, Predictor
from polyprompt.recipe import check
from polyprompt.serving_limits import Limits
from polyprompt.tasks import embedded
from polyprompt.tasks.records import GeneratedSource

Table = dict[str, Any]
REAL = ["super_glue/boolq", "super_glue/cb", "glue/sst2"]
TASKS = [*embedded.tasks(), *REAL]
ROWS_EACH = 2
TOLERANCE = 1e-5
#: How far parameters are moved from where they start, by group. Larger ones blow rounding up beyond the tolerance.
SHIFTS: dict[str, float] = {"backbone": 0.02, "hypernetwork": 0.02}


def mixed_rows() -> list[Table]:
    """Rows in the tasks' own fields, without labels, tasks taking turns."""
    rows = []
    for name, task in embedded.tasks().items():
        assert isinstance(task.source, GeneratedSource)
        rows.append([{"task": name, **row} for row in islice(task.source.rows("validation"), ROWS_EACH)])
    for name in REAL if SHARED_DATA.is_dir() else ():
        lines = (SHARED_DATA / name.rpartition("/")[2] / "validation.jsonl").open()
        rows.append([{"task": name, **json.loads(line)} for line in islice(lines, ROWS_EACH)])
    return [{k: v for k, v in own[i].items() if k not in ("label", "idx")} for i in range(ROWS_EACH) for own in rows]


def test_three_real_tasks_are_among_the_rows(shared_data: Path) -> None:
    assert set(REAL) < {row["task"] for row in mixed_rows()} == set(TASKS)


def config_of(method: Table, tiny_t5: Path) -> RunConfig:
    return check(
        {
            "backbone": {"name": str(tiny_t5)},
            "method": method,
            "tasks": TASKS,
            "data": {"max_input_tokens": 48, "max_target_tokens": 8},
        }
    )


def bundle_of(method: Table, tiny_t5: Path, root: Path) -> Path:
    """A bundle as a run would leave it, whose weights are far from where they start."""
    config = config_of(method, tiny_t5)
    model = model_of(config, len(TASKS))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group, members in model.named_groups().items():
            for _, weight in members:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=SHIFTS.get(group, 0.2))
    return checkpoint.write(
        root,
        step=1,
        tensors=model.trained_state(),
        optimizer={},
        state={"train": TrainState(step=1).to_json(), "pending": []},
        config=config,
        backbone=model.backbone.identity(),
        commit="",
    )


@pytest.fixture(scope="module")
def rows() -> list[Table]:
    return mixed_rows()


@pytest.fixture(scope="module", params=METHODS)
def bundle(request: pytest.FixtureRequest, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "lora":
        pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
    root = tmp_path_factory.mktemp(request.param)
    method: Table = {"name": request.param, **METHODS[request.param]}
    if request.param == "attempt":
        source = bundle_of({"name": "prompt_tuning", "length": method["length"]}, tiny_t5, root / "source")
        method["sources"] = [str(source)]
    return bundle_of(method, tiny_t5, root)


@pytest.fixture(scope="module")
def answers(bundle: Path, rows: list[Table]) -> list[Prediction]:
    """What all others are held against."""
    found = Predictor(bundle).predict(rows)
    assert not [answer.error for answer in found if answer.error]
    # Prompts matter here: a way that left them out would be seen.
    assert len({answer.score for answer in found}) == len(rows)
    return found


def same(found: Sequence[Table], answers: Sequence[Prediction]) -> None:
    for answer, line in zip(answers, found, strict=True):
        assert not line["error"]
        assert line["prediction"] == answer.prediction
        assert line["score"] == pytest.approx(answer.score, abs=TOLERANCE)
        assert line["choice_scores"] == pytest.approx(dict(answer.choice_scores), abs=TOLERANCE)


def test_rows_one_by_one(bundle: Path, rows: list[Table], answers: list[Prediction]) -> None:
    predictor = Predictor(bundle)
    same([vars(answer) for row in rows for answer in predictor.predict([row])], answers)


def test_a_file(bundle: Path, rows: list[Table], answers: list[Prediction], tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = batch_prediction.Work(bundle, source, tmp_path / "answers.jsonl", part_rows=7)
    predictor = Predictor(bundle)
    num_parts = batch_prediction.cut(work)
    for part in batch_prediction.missing(work, num_parts):
        batch_prediction.answer(work, part, predictor, batch_size=4)
    assert batch_prediction.join(work, num_parts) == (len(rows), 0)
    same([json.loads(line) for line in work.output.read_text().splitlines()], answers)


def test_a_model_of_mlflow(bundle: Path, rows: list[Table], answers: list[Prediction], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    mlflow.pyfunc.save_model(
        folder, loader_module="polyprompt.pyfunc", data_path=str(bundle), pip_requirements=["polyprompt"]
    )
    found = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame(rows)).to_dict("records")
    same([{**line, "choice_scores": json.loads(line["choice_scores"])} for line in found], answers)


def test_the_endpoint(bundle: Path, rows: list[Table], answers: list[Prediction]) -> None:
    """Its batches are what waits together: here the rows of one request, task by task as they come."""
    with client_of(Limits()) as client:
        put(client, "it", bundle)
        found = client.post("/predict", json={"rows": rows})
    assert found.status_code == 200, found.text
    same(found.json()["answers"], answers)


def test_what_is_folded(bundle: Path, rows: list[Table], answers: list[Prediction], tmp_path: Path) -> None:
    name = checkpoint.read(bundle).config.method.name
    if name in ("smop", "routed_hyperprompt", "attempt", "lora"):
        with pytest.raises(ConfigError, match=r"cannot be folded|--format hf"):
            export.folded(bundle, tmp_path / "folded")
        return
    found = Predictor(export.folded(bundle, tmp_path / "folded")).predict(rows)
    same([vars(answer) for answer in found], answers)


def test_a_folder_of_peft(bundle: Path, answers: list[Prediction], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: it is in the dev extra")
    opened = checkpoint.read(bundle)
    if opened.config.method.name not in ("prompt_tuning", "p_tuning", "mpt", "lora"):
        with pytest.raises(ConfigError):
            export.peft_folder(bundle, tmp_path / "peft")
        return
    out = export.peft_folder(bundle, tmp_path / "peft")
    models: dict[str, Any] = {}

    def logits(task: str, ids_1T: Tensor, labels_1S: Tensor) -> Tensor:
        folder = out if opened.config.method.name == "lora" else out / task.replace("/", "_")
        if task not in models:
            plain = AutoModelForSeq2SeqLM.from_pretrained(opened.config.backbone.name)
            models[task] = peft.PeftModel.from_pretrained(plain, folder).eval()
        # PEFT does not carry logits_to_keep and its like; the labels make the decoder's input.
        return models[task](input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), labels=labels_1S).logits

    same_scores(bundle, answers, logits)


def test_a_folder_of_transformers(bundle: Path, answers: list[Prediction], tmp_path: Path) -> None:
    config = checkpoint.read(bundle).config
    if config.method.name == "routed_hyperprompt" or (not config.train_backbone and config.method.name != "lora"):
        with pytest.raises(ConfigError, match=r"cannot be folded|on a frozen backbone"):
            export.hub_folder(bundle, tmp_path / "hf")
        return
    out = export.hub_folder(bundle, tmp_path / "hf")
    plain = AutoModelForSeq2SeqLM.from_pretrained(out).eval()

    def of_network(task: str, ids_1T: Tensor, labels_1S: Tensor) -> Tensor:
        return plain(input_ids=ids_1T, labels=labels_1S).logits

    if not (out / export.PROMPTS).is_file():
        same_scores(bundle, answers, of_network)
        return
    order = json.loads((out / export.TABLES).read_text())
    network = backbone.load(BackboneConfig(name=str(out)), train=False, precision="fp32", seed=0)
    prompted = PromptedModel(network, Folded(load_file(out / export.PROMPTS), order["texts"])).eval()

    def of_both(task: str, ids_1T: Tensor, labels_1S: Tensor) -> Tensor:
        task_1 = torch.tensor([order["tasks"].index(task)])
        return prompted.logits(ids_1T, torch.ones_like(ids_1T), labels_1S, task_1)

    same_scores(bundle, answers, of_both)


@torch.no_grad()
def same_scores(bundle: Path, answers: Sequence[Prediction], logits: Callable[[str, Tensor, Tensor], Tensor]) -> None:
    """Score every choice of every row that has some with other software's logits [1, S, V]."""
    predictor = Predictor(bundle)
    tokenizer = predictor.model.backbone.tokenizer
    compared = 0
    for answer in answers:
        ids = tokenizer(answer.input, truncation=True, max_length=predictor.max_input_tokens)["input_ids"]
        for choice, score in answer.choice_scores.items():
            labels_1S = torch.tensor([tokenizer(choice)["input_ids"]])
            logits_1SV = logits(answer.task, torch.tensor([ids]), labels_1S)
            found = logits_1SV.log_softmax(dim=-1).gather(2, labels_1S[:, :, None]).sum().item()
            assert found == pytest.approx(score, abs=TOLERANCE), (answer.task, choice)
            compared += 1
    assert compared > len(answers)
