"""The endpoint: batches, limits, versions and error answers without Ray, and a few times with it."""

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from polyprompt.predictor import Predictor, find_bundle
from polyprompt.ray_train import run
from polyprompt.recipe import check
from polyprompt.serving_app import make_app, watching
from polyprompt.serving_batches import Batcher
from polyprompt.serving_desk import Desk
from polyprompt.serving_engine import Engine
from polyprompt.serving_limits import Limits, Rate, Refusal, Waiting
from polyprompt.serving_metrics import Metrics
from polyprompt.serving_models import Shelf, locate, named

Table = dict[str, Any]
TOKEN = "open sesame"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
ROWS: list[Table] = [
    {"task": "my/larger", "text": "3 and 5"},
    {"task": "embedded/nli", "premise": "all poets ran", "hypothesis": "some poets ran"},
    {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"},
    {"task": "my/larger", "text": "7 and 1"},
]
LIMITS = Limits(rows=8, characters=500, choices=5, body_bytes=20_000)


def client_of(limits: Limits = LIMITS, *, token: str = TOKEN, uri: str = "") -> TestClient:
    metrics = Metrics()
    desk = Desk(Engine(), uri, limits, metrics)
    return TestClient(make_app(desk, limits, metrics, token=token, lifespan=watching(desk)))


def put(client: TestClient, name: str, source: Path | str) -> Table:
    answer = client.put(f"/admin/models/{name}", json={"source": str(source)}, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def served(trained_run: Path) -> Iterator[TestClient]:
    with client_of() as client:
        put(client, "larger", trained_run)
        yield client


@pytest.fixture(scope="module")
def frozen_runs(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> list[Path]:
    """Two runs of prompts on the same frozen backbone, on tasks of which they share one."""
    root = tmp_path_factory.mktemp("frozen")
    folders = []
    for seed, tasks in enumerate((["embedded/nli", "embedded/sentiment"], ["embedded/nli", "embedded/similarity"])):
        table = {
            "backbone": {"name": str(tiny_t5)},
            "method": {"name": "prompt_tuning", "length": 4},
            "tasks": tasks,
            "data": {
                "max_input_tokens": 48,
                "max_train_examples": 16,
                "max_validation_examples": 4,
                "cache_dir": str(root),
            },
            "train": {"max_steps": 1, "batch_size": 4, "num_shards": 1, "seed": seed, "learning_rate": 1.0},
            "tracking": {"enabled": False},
        }
        folders.append(root / f"run{seed}")
        run(check(table), out=folders[-1], say=lambda line: None)
    return folders


def test_mixed_rows_are_answered_as_the_predictor_does(served: TestClient, trained_run: Path) -> None:
    answer = served.post("/predict", json={"rows": ROWS})
    assert answer.status_code == 200, answer.text
    expected = Predictor(find_bundle(trained_run)).predict(ROWS)
    for found, wanted in zip(answer.json()["answers"], expected, strict=True):
        assert found["prediction"] == wanted.prediction
        assert found["score"] == pytest.approx(wanted.score, abs=1e-5)
        assert found["choice_scores"] == pytest.approx(dict(wanted.choice_scores), abs=1e-5)
        assert (found["task"], found["model"], found["error"]) == (wanted.task, "larger", "")


def test_a_row_that_does_not_fit_stops_no_other(served: TestClient) -> None:
    answer = served.post("/predict", json={"rows": [ROWS[0], {"task": "my/larg", "text": "x"}, {"task": "my/larger"}]})
    assert answer.status_code == 200
    first, unknown, empty = answer.json()["answers"]
    assert not first["error"]
    assert "Did you mean 'my/larger'" in unknown["error"]
    assert unknown["score"] is None
    assert "field 'text' is missing" in empty["error"]


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"{", 422, "does_not_fit", "JSON decode error"),
        (b'{"rows": "\xff"}', 400, "http", "parsing the body"),
        (b"[" * 10_000, 400, "http", "parsing the body"),
        (b'{"rows": []}', 422, "does_not_fit", "body.rows: List should have at least 1 item"),
        (b'{"rows": [{"text": "1"}]}', 422, "does_not_fit", "body.rows.0.task: Field required"),
        (b'{"rows": [{"task": "my/larger"}], "row": 1}', 422, "does_not_fit", "body.row: Extra inputs"),
        (
            b'{"rows": [{"task": "my/larger"}], "model": "x"}',
            404,
            "unknown_model",
            "'x' is not served; there is larger",
        ),
        (b'{"rows": [{"task": "nobody"}]}', 422, "no_row_fits", "task 'nobody' is not one of this model's"),
        (b'{"rows": [{"task": "my/larger", "text": "\\ud800"}]}', 422, "not_text", "surrogate"),
        (b'{"rows": [{"task": "my/larger", "\\udfff": 1}]}', 422, "does_not_fit", "unable to parse raw data"),
        (b'{"rows": [{"task": "my/larger", "text": NaN}]}', 422, "not_a_number", "expected a finite number"),
        (b'{"rows": [{"task": "my/larger", "text": 1e999}]}', 422, "not_a_number", "expected a finite number"),
        (b'{"rows": [{"task": "my/larger", "text": 98765432109876543210}]}', 422, "not_a_number", "send it as text"),
        (b'{"rows": [{"task": "my/larger", "text": %s}]}' % (b"[" * 20 + b"]" * 20), 422, "row_too_deep", "flatten it"),
        (b'{"rows": [{"task": "my/larger", "text": "%s"}]}' % (b"x" * 501), 413, "row_too_long", "at most 500"),
        (
            b'{"rows": [{"task": "embedded/similarity", "input": "x", "choices": ["1","2","3","4","5","6"]}]}',
            413,
            "too_many_choices",
            "at most 5",
        ),
        (b'{"rows": [%s]}' % b",".join([b'{"task": "t"}'] * 9), 413, "too_many_rows", "9 rows in one request"),
        (b" " * 20_001, 413, "body_too_large", "exceeds 20,000 bytes"),
    ],
)
def test_bad_requests_say_what_which_limit_and_how_to_mend_it(
    served: TestClient, body: bytes, status: int, code: str, message: str
) -> None:
    answer = served.post("/predict", content=body, headers={"Content-Type": "application/json"})
    problem = answer.json()
    assert (answer.status_code, problem["error"]["code"]) == (status, code), problem
    assert message in problem["error"]["message"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_a_request_has_an_id(served: TestClient) -> None:
    given = served.get("/healthz", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for odd in ("", "x" * 200, "a b", "<script>"):
        made = served.get("/healthz", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert made != odd
        assert len(made) == 32
    assert served.get("/nowhere").json()["request_id"]


def test_other_addresses_and_methods(served: TestClient) -> None:
    assert served.get("/nowhere").status_code == 404
    refused = served.get("/predict")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"


def test_the_page_loads_nothing_from_elsewhere(served: TestClient) -> None:
    page = served.get("/")
    assert page.status_code == 200
    assert "<form" in page.text
    assert "//" not in page.text.replace("// ", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_models_say_what_they_can_be_asked(served: TestClient) -> None:
    (model,) = served.get("/models").json()["models"]
    tasks = {task["name"]: task for task in model["tasks"]}
    assert tasks["my/larger"] == {"name": "my/larger", "fields": ["text"], "choices": ["no", "yes"]}
    assert len(model["backbone_sha256"]) == 64
    assert not model["shared"], "its backbone was trained"


def test_metrics_count_rows_and_refusals(served: TestClient) -> None:
    served.post("/predict", json={"rows": ROWS})
    served.post("/predict", json={"rows": [{"task": "t"}] * 9})
    text = served.get("/metrics").text
    assert 'polyprompt_requests_total{path="/predict",status="200"}' in text
    assert 'polyprompt_refused_total{code="too_many_rows"}' in text
    assert 'outcome="answered",task="my/larger"' in text
    assert "polyprompt_waiting_rows 0.0" in text


def test_who_may_change_what_is_served(served: TestClient, trained_run: Path) -> None:
    body = {"source": str(trained_run)}
    assert served.put("/admin/models/other", json=body).status_code == 401
    wrong = served.put("/admin/models/other", json=body, headers={"Authorization": "Bearer opensesame"})
    assert wrong.status_code == 401
    assert wrong.headers["www-authenticate"] == "Bearer"
    assert served.delete("/admin/models/larger").status_code == 401
    with client_of(token="") as shut:
        for header in ({}, {"Authorization": "Bearer "}, ADMIN):
            answer = shut.put("/admin/models/other", json=body, headers=header)
            assert answer.status_code == 403
            assert "started without POLYPROMPT_ADMIN_TOKEN" in answer.json()["error"]["message"]


def test_models_come_are_replaced_and_go(trained_run: Path, frozen_runs: list[Path], tmp_path: Path) -> None:
    ask = {"rows": [{"task": "embedded/nli", "premise": "a", "hypothesis": "b"}]}
    with client_of() as client:
        assert client.get("/readyz").status_code == 503
        assert client.post("/predict", json=ask).status_code == 404
        first = put(client, "mine", frozen_runs[0])
        assert client.get("/readyz").status_code == 200
        before = client.post("/predict", json=ask).json()["answers"][0]
        second = put(client, "mine", frozen_runs[1])
        after = client.post("/predict", json=ask).json()["answers"][0]
        assert (before["version"], after["version"]) == (first["version"], second["version"])
        assert before["score"] != after["score"]
        broken = tmp_path / "broken"
        shutil.copytree(find_bundle(frozen_runs[0]), broken)
        (broken / "adapter_model.safetensors").write_bytes(b"not weights")
        for source in (broken, tmp_path / "nothing", "x\0y", "models:/nobody@champion", "models:/nobody"):
            refused = client.put("/admin/models/mine", json={"source": str(source)}, headers=ADMIN)
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "not_loadable"), source
        assert client.post("/predict", json=ask).json()["answers"][0]["version"] == second["version"]
        assert client.delete("/admin/models/other", headers=ADMIN).status_code == 404
        assert client.delete("/admin/models/mine", headers=ADMIN).status_code == 204
        assert client.post("/predict", json=ask).json()["error"]["code"] == "no_model"


def test_models_on_one_frozen_backbone_share_it(frozen_runs: list[Path]) -> None:
    shelf = Shelf()
    first, second = (shelf.get(locate(folder.name, str(folder), "")) for folder in frozen_runs)
    assert first.model.backbone is second.model.backbone
    for predictor, folder in zip((first, second), frozen_runs, strict=True):
        rows = [{"task": name, "input": "nli premise: a hypothesis: b"} for name in predictor.task_names]
        alone = Predictor(find_bundle(folder)).predict(rows)
        assert [answer.score for answer in predictor.predict(rows)] == pytest.approx([a.score for a in alone], abs=1e-5)


def test_a_trained_backbone_is_not_shared(trained_run: Path, tmp_path: Path) -> None:
    shelf, copied = Shelf(), tmp_path / "copied"
    shutil.copytree(find_bundle(trained_run), copied)
    first, second = (shelf.get(locate("a", str(folder), "")) for folder in (trained_run, copied))
    assert first.model.backbone is not second.model.backbone


def test_a_row_goes_to_the_model_that_knows_its_task(frozen_runs: list[Path]) -> None:
    nli = {"task": "embedded/nli", "premise": "a", "hypothesis": "b"}
    rows = [
        {"task": "embedded/sentiment", "input": "sentiment: good"},
        {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"},
        nli,
        {"task": "nobody"},
    ]
    with client_of() as client:
        infos = [put(client, folder.name, folder) for folder in frozen_runs]
        assert all(info["shared"] for info in infos)
        assert infos[0]["backbone_sha256"] == infos[1]["backbone_sha256"]
        answers = client.post("/predict", json={"rows": rows}).json()["answers"]
        assert [answer["model"] for answer in answers] == ["run0", "run1", "", ""]
        assert "known to run0 and run1; say which is meant" in answers[2]["error"]
        assert "of none of the models" in answers[3]["error"]
        for name in ("run0", "run1"):
            (answer,) = client.post("/predict", json={"rows": [nli], "model": name}).json()["answers"]
            assert answer["model"] == name


def test_what_waits_is_answered_in_one_batch() -> None:
    batches: list[list[int]] = []

    def work(asks: Any) -> list[int]:
        batches.append(list(asks))
        return [ask * ask for ask in asks]

    async def ask() -> list[list[int]]:
        batcher = Batcher[int, int](work, max_rows=10)
        return await asyncio.gather(*(batcher.answer([i, i + 1]) for i in range(0, 24, 2)))

    assert asyncio.run(ask()) == [[i * i, (i + 1) ** 2] for i in range(0, 24, 2)]
    assert [len(batch) for batch in batches] == [10, 10, 4]
    assert [ask for batch in batches for ask in batch] == list(range(24))


def test_who_goes_away_is_not_worked_for() -> None:
    seen: list[int] = []

    def work(asks: Any) -> list[int]:
        seen.extend(asks)
        if 7 in asks:
            raise ValueError(7)
        return list(asks)

    async def ask() -> None:
        batcher = Batcher[int, int](work, max_rows=10)
        left = asyncio.create_task(batcher.answer([1, 2]))
        stays = asyncio.create_task(batcher.answer([3]))
        await asyncio.sleep(0)
        left.cancel()
        assert await stays == [3]
        with pytest.raises(ValueError, match="7"):
            await batcher.answer([7])
        assert await batcher.answer([8]) == [8]

    asyncio.run(ask())
    assert seen == [3, 7, 8]


def test_a_row_that_breaks_the_model_goes_alone(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Predictor._example

    def breaks(self: Predictor, row: Any) -> Any:
        if row.get("text") == "9 and 9":
            raise RuntimeError("no such thing")
        return real(self, row)

    monkeypatch.setattr(Predictor, "_example", breaks)
    with client_of() as client:
        put(client, "larger", trained_run)
        broken = client.post("/predict", json={"rows": [{"task": "my/larger", "text": "9 and 9"}]})
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "broken")
        assert "no such thing" not in broken.text
        assert client.post("/predict", json={"rows": ROWS}).status_code == 200


def test_the_rate_is_held() -> None:
    now = 0.0
    rate = Rate(2, clock=lambda: now)
    rate.take()
    rate.take()
    with pytest.raises(Refusal) as refused:
        rate.take()
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    now = 0.5
    rate.take()
    with pytest.raises(Refusal):
        rate.take()
    now = 100.0
    rate.take()
    rate.take()
    with pytest.raises(Refusal):
        rate.take()
    Rate(0).take()


def test_waiting_rows_are_counted_and_bounded() -> None:
    now = 0.0
    waiting = Waiting(10, clock=lambda: now)
    with waiting.hold(6):
        with pytest.raises(Refusal) as refused, waiting.hold(5):
            pass
        assert (refused.value.status, refused.value.code) == (503, "overloaded")
        assert waiting.rows == 6
        with waiting.hold(4):
            now = 2.0
        assert waiting.seconds() == pytest.approx(6 * 2 / 4)
    assert waiting.rows == 0


def test_requests_over_the_rate_come_back_later(trained_run: Path) -> None:
    with client_of(replace(LIMITS, requests_per_second=1)) as client:
        put(client, "larger", trained_run)
        statuses = [client.post("/predict", json={"rows": ROWS[:1]}) for _ in range(6)]
        refused = [answer for answer in statuses if answer.status_code == 429]
        assert refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_more_rows_than_may_wait_are_refused(trained_run: Path) -> None:
    with client_of(replace(LIMITS, waiting_rows=3)) as client:
        put(client, "larger", trained_run)
        refused = client.post("/predict", json={"rows": ROWS})
        assert (refused.status_code, refused.json()["error"]["limit"]) == (503, 3)
        assert "retry-after" in refused.headers
        assert client.post("/predict", json={"rows": ROWS[:3]}).status_code == 200


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("runs/mine", ("mine", "runs/mine")),
        ("runs/mine/bundles/step_00000004", ("mine", "runs/mine/bundles/step_00000004")),
        ("best=runs/mine", ("best", "runs/mine")),
        ("models:/support@champion", ("support", "models:/support@champion")),
        ("new=models:/support/3", ("new", "models:/support/3")),
    ],
)
def test_what_a_source_is_called(argument: str, expected: tuple[str, str]) -> None:
    assert named(argument) == expected


def test_scores_are_json_numbers(served: TestClient) -> None:
    answer = served.post("/predict", json={"rows": ROWS, "mode": "generate"})
    for line in json.loads(answer.text)["answers"]:
        assert math.isfinite(line["score"])
        assert line["choice_scores"] == {}
