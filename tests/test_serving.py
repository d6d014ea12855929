"""The endpoint: batches, limits, versions and error answers without Ray, and a few times with it."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from starlette.testclient import TestClient
from test_registry import in_store

from polyprompt import checkpoint, registry, serving, serving_desk, serving_models, tracking_store
from polyprompt.errors import ConfigError
from polyprompt.predictor import Predictor, find_bundle
from polyprompt.ray_train import run
from polyprompt.reading import read_rows
from polyprompt.recipe import check
from polyprompt.serving_app import TOKEN_VARIABLE, make_app, watching
from polyprompt.serving_batches import Batcher
from polyprompt.serving_desk import Desk
from polyprompt.serving_engine import Engine, Engines
from polyprompt.serving_http import Frame
from polyprompt.serving_limits import Limits, Rate, Refusal, Waiting
from polyprompt.serving_metrics import Metrics
from polyprompt.serving_models import Loaded, Shelf, Spec, locate, named
from polyprompt.tasks import catalog

ROOT = Path(__file__).parents[1]
Table = dict[str, Any]
TOKEN = "open sesame"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
ROWS: list[Table] = [
    {"task": "my/larger", "text": "3 and 5"},
    {"task": "embedded/nli", "premise": "all poets ran", "hypothesis": "some poets ran"},
    {"task": "embedded/similarity", "input": "similarity sentence1: a sentence2: b"},
    {"task": "my/larger", "text": "7 and 1"},
]
EMBEDDED_TASKS = [
    f"embedded/{name}"
    for name in ("sentiment", "acceptability", "nli", "paraphrase", "similarity", "wic", "boolq", "copa")
]
LIMITS = Limits(rows=8, characters=500, choices=5, body_bytes=20_000)


def app_of(limits: Limits = LIMITS, *, token: str = TOKEN, uri: str = "", engines: Engines | None = None) -> Any:
    metrics = Metrics()
    desk = Desk(engines or Engine(), uri, limits, metrics)
    return make_app(desk, limits, metrics, token=token, lifespan=watching(desk))


def client_of(limits: Limits = LIMITS, **settings: Any) -> TestClient:
    return TestClient(app_of(limits, **settings))


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


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Path:
    """A run on all embedded tasks."""
    root = tmp_path_factory.mktemp("eight")
    table = {
        "backbone": {"name": str(tiny_t5)},
        "method": {"name": "hyperprompt", "encoder_length": 3, "decoder_length": 2, "reduction": 4},
        "tasks": EMBEDDED_TASKS,
        "data": {"max_train_examples": 8, "max_validation_examples": 4, "cache_dir": str(root)},
        "train": {"max_steps": 1, "batch_size": 8, "num_shards": 1},
        "tracking": {"enabled": False},
    }
    run(check(table), out=root / "run", say=lambda line: None)
    return root / "run"


def mixed_rows(count: int) -> list[Table]:
    """So many validation rows of each embedded task, taking turns."""
    each = []
    for name in EMBEDDED_TASKS:
        rows = read_rows(catalog.of_split(name, None, "validation"), "validation")
        each.append([{**next(rows)[1], "task": name} for _ in range(count)])
    return [row for rows in zip(*each, strict=True) for row in rows]


def test_mixed_rows_are_answered_as_the_predictor_does(served: TestClient, trained_run: Path) -> None:
    answer = served.post("/predict", json={"rows": ROWS})
    assert answer.status_code == 200, answer.text
    expected = Predictor(find_bundle(trained_run)).predict(ROWS)
    for found, wanted in zip(answer.json()["answers"], expected, strict=True):
        assert found["prediction"] == wanted.prediction
        assert found["score"] == pytest.approx(wanted.score, rel=1e-6, abs=1e-5)
        assert found["choice_scores"] == pytest.approx(dict(wanted.choice_scores), rel=1e-6, abs=1e-5)
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
    assert served.get("/admin/models/larger").headers["allow"] == "DELETE, PUT"


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
        batcher = Batcher[int, int](work, lambda ask: None, max_rows=10)
        return await asyncio.gather(*(batcher.answer([i, i + 1]) for i in range(0, 24, 2)))

    assert asyncio.run(ask()) == [[i * i, (i + 1) ** 2] for i in range(0, 24, 2)]
    assert [len(batch) for batch in batches] == [10, 10, 4]
    assert [ask for batch in batches for ask in batch] == list(range(24))


def test_rare_kinds_gather_but_do_not_wait_for_ever() -> None:
    batches: list[list[int]] = []

    def work(asks: Any) -> list[int]:
        batches.append(list(asks))
        return list(asks)

    async def ask() -> None:
        batcher = Batcher[int, int](work, lambda ask: ask % 10 == 0, max_rows=2)
        assert await batcher.answer([1, 2, 3, 4, 10, 5, 6, 7, 8, 9]) == [1, 2, 3, 4, 10, 5, 6, 7, 8, 9]

    asyncio.run(ask())
    assert batches == [[1, 2], [3, 4], [5, 6], [10], [7, 8], [9]]


def test_what_is_slow_gathers_and_then_goes_with_others() -> None:
    batches: list[list[int]] = []

    def work(asks: Any) -> list[int]:
        batches.append(list(asks))
        return list(asks)

    async def ask() -> None:
        batcher = Batcher[int, int](work, lambda ask: ask > 100, slow=lambda ask: ask % 10 == 0, max_rows=4)
        await batcher.answer([*range(1, 10), 10, *range(11, 20), 20, 110, 111])

    asyncio.run(ask())
    assert batches == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 11, 12, 13], [10, 20, 14, 15], [110, 111], [16, 17, 18, 19]]


def test_of_many_kinds_none_starves() -> None:
    order: list[int] = []

    def work(asks: Any) -> list[int]:
        order.extend(ask % 6 for ask in asks)
        return list(asks)

    async def ask() -> None:
        await Batcher[int, int](work, lambda ask: ask % 6, max_rows=1).answer(list(range(30)))

    asyncio.run(ask())
    for start in range(0, 30, 6):
        assert sorted(order[start : start + 6]) == list(range(6))


def test_who_goes_away_is_not_worked_for() -> None:
    seen: list[int] = []

    def work(asks: Any) -> list[int]:
        seen.extend(asks)
        if 7 in asks:
            raise ValueError(7)
        return list(asks)

    async def ask() -> None:
        batcher = Batcher[int, int](work, lambda ask: None, max_rows=10)
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
    with waiting.hold(1):
        now = 12.0
        with pytest.raises(TimeoutError), waiting.hold(4):
            raise TimeoutError
        assert waiting.seconds() == 1.0, "nothing was answered yet"


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


def test_names_that_requests_cannot_use_are_refused(frozen_runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be called 'a b'.*NAME="):
        locate("a b", str(frozen_runs[0]), "")


def test_models_stay_as_long_as_they_are_wanted(frozen_runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However long one takes to load, and whether or not there are requests."""
    monkeypatch.setattr(serving_models, "LINGER_SECONDS", 0.0)
    row = {"task": "embedded/nli", "premise": "a", "hypothesis": "b"}

    class Asked(Engine):
        """Is asked for another model between loading one and its use."""

        async def load(self, spec: Spec, wanted: frozenset[Spec]) -> Loaded:
            loaded = await super().load(spec, wanted)
            if len(desk.models()):
                await desk.ask([row], "a", None)
            assert self._shelf.holds(spec)
            return loaded

    engine = Asked()
    desk = Desk(engine, "", LIMITS, Metrics())

    async def change() -> None:
        for name, number in (("a", 0), ("b", 1), ("a", 1), ("c", 0)):
            await desk.put(name, str(frozen_runs[number]))

    asyncio.run(change())
    assert not engine._shelf.holds(locate("a", str(frozen_runs[0]), ""))
    assert engine._shelf.holds(locate("a", str(frozen_runs[1]), ""))


def framed(app: Any, messages: list[Any], limits: Limits = LIMITS) -> list[Any]:
    """Send a request through Frame alone, or one given; return what comes back.

    messages: what the server hears, None for silence.
    """
    sent: list[Any] = []
    hear = iter(messages)

    async def receive() -> Any:
        message = next(hear, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/predict", "headers": []}
    frame = app if isinstance(app, Frame) else Frame(app, limits, Metrics(), lambda path: None)
    asyncio.run(frame(scope, receive, send))
    return sent


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("there is no request yet")

    part = {"type": "http.request", "body": b"{", "more_body": True}
    start, body = framed(app, [part], replace(LIMITS, timeout_seconds=0.05))
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "body_too_slow"


def test_bodies_are_bounded_together_and_freed() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    limits = replace(LIMITS, held_bytes=10)
    frame = Frame(app, limits, Metrics(), lambda path: None)
    for _ in range(3):  # one after the other they have room
        assert framed(frame, [{"type": "http.request", "body": b"12345678"}])[0]["status"] == 200
    start, _ = framed(frame, [{"type": "http.request", "body": b"12345678901"}])
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert framed(frame, [{"type": "http.request", "body": b"1234567890"}])[0]["status"] == 200


def test_a_caller_that_goes_away_frees_its_place() -> None:
    freed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        freed.append((await receive())["body"].decode())
        try:
            await asyncio.Event().wait()
        finally:
            freed.append("freed")

    assert framed(app, [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]) == []
    assert freed == ["{}", "freed"]


def test_scores_are_json_numbers(served: TestClient) -> None:
    answer = served.post("/predict", json={"rows": ROWS, "mode": "generate"})
    for line in json.loads(answer.text)["answers"]:
        assert math.isfinite(line["score"])
        assert line["choice_scores"] == {}


# Requests made up by machines.

NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
TEXTS = st.text(st.characters(), max_size=20) | st.sampled_from(["a", "-1", "²", "nan", "1e400", "\0", "no", "\ud800"])
VALUES = st.recursive(
    NUMBERS | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
FIELDS = st.sampled_from(
    ["input", "text", "choices", "premise", "hypothesis", "sentence1", "sentence2", "label", "idx"]
)
MADE_ROWS = st.builds(
    lambda task, fields: {**fields, "task": task},
    st.sampled_from([*EMBEDDED_TASKS, "nobody"]),
    st.dictionaries(FIELDS | TEXTS, VALUES | st.lists(TEXTS, max_size=3), max_size=6),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(MADE_ROWS, min_size=1, max_size=3), mode=st.sampled_from([None, "rank", "generate", "x"]))
def test_no_odd_row_breaks_the_server(all_tasks: TestClient, rows: list[Table], mode: str | None) -> None:
    body = json.dumps({"rows": rows, "mode": mode})
    answer = all_tasks.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 413, 422), answer.text
    assert answer.json()["request_id"]


@pytest.fixture(scope="module")
def all_tasks(eight: Path) -> Iterator[TestClient]:
    with client_of(Limits()) as client:
        put(client, "eight", eight)
        yield client


@pytest.fixture(scope="module")
def address(eight: Path) -> Iterator[str]:
    """A server with the model, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app_of(), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    request = urllib.request.Request(
        f"{url}/admin/models/eight",
        json.dumps({"source": str(eight)}).encode(),
        {**ADMIN, "Content-Type": "application/json"},
        method="PUT",
    )
    urllib.request.urlopen(request).close()
    yield url
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_made_up_requests_get_what_the_document_says(address: str, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for operation in (found.ok() for found in document.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # it takes nothing that could be wrong

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            # With the token a made-up DELETE might end the model.
            answer = case.call(headers=ADMIN if case.method == "PUT" else {})
            described = {*case.operation.definition.raw["responses"], "405"}
            assert str(answer.status_code) in described, answer.text
            assert answer.status_code < 500 or case.path == "/readyz", answer.text

        ask()


# Versions that change, in this process and on Ray.


@pytest.fixture(scope="module")
def on_ray(ray_cluster: None) -> Iterator[serving.Replicas]:
    endpoint = serving.Endpoint({}, "", port=os.getpid(), cpus=0.5, limits=Limits(timeout_seconds=120))
    with serving.replicas(endpoint, [], Metrics()) as engines:
        yield engines


@pytest.fixture(params=["in this process", pytest.param("on Ray", marks=pytest.mark.ray)])
def engines(request: pytest.FixtureRequest) -> Engines:
    return Engine() if request.param == "in this process" else request.getfixturevalue("on_ray")


def test_a_mixed_file_of_all_embedded_tasks_is_answered_as_in_process(engines: Engines, eight: Path) -> None:
    rows = mixed_rows(6)
    expected = Predictor(find_bundle(eight)).predict(rows)
    with client_of(Limits(timeout_seconds=120), engines=engines) as client:
        put(client, "eight", eight)
        found = client.post("/predict", json={"rows": rows}).json()["answers"]
    assert len(found) == len(rows) == 48
    for answer, wanted in zip(found, expected, strict=True):
        assert (answer["task"], answer["prediction"], answer["error"]) == (wanted.task, wanted.prediction, "")
        assert answer["score"] == pytest.approx(wanted.score, rel=1e-6, abs=1e-5)
        assert answer["choice_scores"] == pytest.approx(dict(wanted.choice_scores), rel=1e-6, abs=1e-5)


def test_a_moved_alias_is_served_and_no_request_is_lost(
    engines: Engines, frozen_runs: list[Path], store: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{store}/mlflow.db"
    recorded = []
    for folder in frozen_runs:
        shutil.copytree(folder, tmp_path / folder.name)
        recorded.append(in_store(tmp_path / folder.name, uri))
    registry.register(recorded[0], "mine", uri)
    ask = {"rows": [{"task": "embedded/nli", "premise": "a", "hypothesis": "b"}]}
    answers: list[Any] = []
    with client_of(Limits(timeout_seconds=120), engines=engines, uri=uri) as client:
        assert put(client, "mine", "models:/mine@candidate")["version"] == "1"
        over = threading.Event()

        def keep_asking() -> None:
            while not over.is_set():
                answers.append(client.post("/predict", json=ask))

        asking = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in asking:
            thread.start()
        try:
            registry.register(recorded[1], "mine", uri)
            while client.get("/models").json()["models"][0]["version"] != "2":
                time.sleep(0.05)
            last = client.post("/predict", json=ask)
        finally:
            over.set()
            for thread in asking:
                thread.join()
        assert {answer.status_code for answer in answers} == {200}
        lines = [answer.json()["answers"][0] for answer in [*answers, last]]
        assert {line["version"] for line in lines} == {"1", "2"}
        assert lines[-1]["version"] == "2"
        for version, folder in zip("12", frozen_runs, strict=True):
            (wanted,) = Predictor(find_bundle(folder)).predict(ask["rows"])
            scores = [line["score"] for line in lines if line["version"] == version]
            assert scores == pytest.approx([wanted.score] * len(scores), abs=1e-4)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(
    frozen_runs: list[Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_desk, "WATCH_SECONDS", 0.02)
    loads: list[str] = []

    class Counting(Engine):
        async def load(self, spec: Spec, wanted: frozenset[Spec]) -> Loaded:
            loads.append(spec.version)
            return await super().load(spec, wanted)

    uri = f"sqlite:///{store}/mlflow.db"
    shutil.copytree(frozen_runs[0], tmp_path / "run")
    registry.register(in_store(tmp_path / "run", uri), "mine", uri)
    with client_of(uri=uri, engines=Counting()) as client:
        registry.promote("mine", uri)
        put(client, "mine", "models:/mine@champion")
        whole = set(store.rglob(checkpoint.TENSORS))
        second = registry.register(tmp_path / "run", "mine", uri)
        (weights,) = set(store.rglob(checkpoint.TENSORS)) - whole
        weights.write_bytes(b"not weights")
        tracking_store.client_of(uri).set_registered_model_alias("mine", registry.CHAMPION, second.number)
        while not (model := client.get("/models").json()["models"][0])["error"]:
            time.sleep(0.05)
        assert "is damaged" in model["error"]
        assert model["version"] == "1"
        assert client.post("/predict", json={"rows": [{"task": "embedded/nli", "input": "x"}]}).status_code == 200
        time.sleep(0.3)
        assert loads == ["1", "2"], "it is not copied and loaded again at each look"


@pytest.mark.ray
def test_a_killed_replica_takes_no_answer_with_it(on_ray: serving.Replicas, eight: Path) -> None:
    rows = mixed_rows(8)
    expected = Predictor(find_bundle(eight)).predict(rows)
    metrics = on_ray._metrics

    async def load() -> list[Any]:
        desk = Desk(on_ray, "", Limits(timeout_seconds=300), Metrics())
        await desk.put("eight", str(eight))

        async def ask(row: Table) -> list[Any]:
            found = []
            for _ in range(6):
                found.append((await desk.ask([row], None, None))[0])
                answering.set()
            return found

        answering = asyncio.Event()
        asking = [asyncio.create_task(ask(row)) for row in rows]
        await answering.wait()  # so that the replica has requests in hand
        while desk.waiting.rows < 32:
            await asyncio.sleep(0)
        os.kill(replica_pid(), signal.SIGKILL)
        return await asyncio.gather(*asking)

    before = metrics.retries._value.get()
    for _ in range(3):  # on a busy machine the replica may die before it has any request in hand
        for found, wanted in zip(asyncio.run(load()), expected, strict=True):
            assert {answer.prediction for answer in found} == {wanted.prediction}
            assert [answer.score for answer in found] == pytest.approx([wanted.score] * 6, abs=1e-4)
        if metrics.retries._value.get() > before:
            break
    assert metrics.retries._value.get() > before


def replica_pid() -> int:
    start = f"ray::ServeReplica:polyprompt-{os.getpid()}:"
    (found,) = [process.pid for process in psutil.process_iter() if " ".join(cmdline(process)).startswith(start)]
    return found


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.ray
@pytest.mark.own_processes
def test_from_the_command_line_to_sigterm(eight: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--model", f"mine={eight}", "--port", "0"]
    environment = {**os.environ, TOKEN_VARIABLE: TOKEN}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        while "serving at" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        url = said.rpartition("serving at ")[2].strip()
        body = json.dumps({"rows": mixed_rows(1)}).encode()
        request = urllib.request.Request(f"{url}predict", body, {"Content-Type": "application/json"})
        answers = json.loads(urllib.request.urlopen(request).read())["answers"]
        assert [answer["task"] for answer in answers] == EMBEDDED_TASKS
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        (["--model", "nowhere"], 1, "holds no trained model"),
        (["--model", "runs/a", "other/a"], 1, "two models are called a"),
        (["--model", "models:/a"], 1, "names no version"),
        (["--model", "two words"], 1, "cannot be called 'two words'"),
        (["--model", "a", "--max-waiting", "9"], 2, "a request of --max-rows 64 would never be taken"),
    ],
)
def test_what_cannot_be_served_is_refused_before_ray_starts(
    arguments: list[str],
    expected: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job_here: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, said = job_here("serve", *arguments)
    assert (status, message in said) == (expected, True), said
