"""A password in a tracking address is used, and written nowhere; code that comes with a model is not run."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from polyprompt import backbone
from polyprompt.backbone_config import BackboneConfig
from polyprompt.config import TrackingConfig
from polyprompt.errors import ConfigError, TrackingError
from polyprompt.ray_train import run
from polyprompt.recipe import check, load
from polyprompt.run_folder import runs
from polyprompt.section import mask
from polyprompt.tracking import resolve_uri
from tuning import spaces

ADDRESS = "http://me:sesame@127.0.0.1:5000"
Table = dict[str, Any]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (ADDRESS, "http://***@127.0.0.1:5000"),
        ("postgresql://me:ses@me@host/db", "postgresql://***@host/db"),
        ("postgresql://host/db?user=me&password=sesame&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
    ],
)
def test_what_is_shown_of_an_address(address: str, shown: str) -> None:
    assert mask(address) == shown
    assert mask(shown) == shown


def test_a_config_uses_its_password_and_shows_none(small_run: Table) -> None:
    config = check({**small_run, "tracking": {"uri": ADDRESS}})
    assert resolve_uri(config.tracking) == ADDRESS
    assert resolve_uri(pickle.loads(pickle.dumps(config)).tracking) == ADDRESS  # as workers get it
    for text in (config.to_yaml(), str(config.flat()), str(config.model_dump()), repr(config)):
        assert "sesame" not in text


def test_an_address_that_lost_its_password_says_where_to_give_it(
    small_run: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(check({**small_run, "tracking": {"uri": ADDRESS}}).to_yaml())
    again = load([written])
    with pytest.raises(TrackingError, match=r"has lost its password.*Set MLFLOW_TRACKING_URI"):
        resolve_uri(again.tracking)
    assert resolve_uri(load([written], [f"tracking.uri={ADDRESS}"]).tracking) == ADDRESS
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    assert resolve_uri(again.tracking) == ADDRESS


def test_errors_about_an_address_show_no_password(small_run: Table) -> None:
    with pytest.raises(ConfigError) as error:
        check({**small_run, "tracking": {"uri": [ADDRESS]}})
    assert "sesame" not in str(error.value)
    assert "tracking.uri" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load([], [f"tracking.uri=[{ADDRESS}"])
    assert "sesame" not in str(error.value)


def test_no_file_of_a_run_holds_the_password(
    small_run: Table, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the tracking store; the address is the environment's, so that none need answer at the config's."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    small_run |= {"tracking": {"uri": ADDRESS}, "name": "quiet"}
    small_run["train"]["max_steps"] = 2
    small_run["evaluate"] = {}
    said: list[str] = []
    run(check(small_run), out=tmp_path / "out", say=said.append)
    files = [file for file in [*(tmp_path / "out").rglob("*"), store / "mlflow.db"] if file.is_file()]
    assert {"run.json", "config.yaml", "config.json", "result.json", "mlflow.db"} <= {file.name for file in files}
    for file in files:
        assert b"sesame" not in file.read_bytes(), file
    assert "sesame" not in "\n".join(said)


def test_a_study_uses_the_password_and_records_none(small_run: Table) -> None:
    section = {"searcher": "grid", "space": {"train.learning_rate": {"choice": [0.1, 0.2]}}}
    search = spaces.Search("study", {**small_run, "tracking": {"uri": ADDRESS}}, spaces.SearchConfig(**section))
    assert resolve_uri(search.run.tracking) == ADDRESS
    assert search.base["tracking"] == {"uri": "http://***@127.0.0.1:5000"}
    [first, _] = search.enumerated or []
    assert "sesame" not in spaces.configure(search.base, first, seed=1, name="x").to_yaml()


def test_the_home_of_runs_and_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder; a submitted job's is deleted with it, so there it is a folder of the user's."""

    def home_is(place: Path) -> None:
        assert runs() == place / "runs"
        assert resolve_uri(TrackingConfig()) == f"sqlite:///{place}/mlflow.db"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.delenv("POLYPROMPT_HOME", raising=False)
    home_is(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    home_is(tmp_path / "me" / "polyprompt")
    monkeypatch.setenv("POLYPROMPT_HOME", str(tmp_path / "shared"))
    home_is(tmp_path / "shared")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    model, witness = tmp_path / "model", tmp_path / "witness"
    model.mkdir()
    table = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}}
    (model / "config.json").write_text(json.dumps(table))
    (model / "own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    with pytest.raises(ConfigError, match=r"is not run: backbone\.trust_remote_code is off.*backbone\.revision"):
        backbone.load(BackboneConfig(name=str(model)), train=False, precision="fp32", seed=0)
    assert not witness.exists()
    assert not list(tmp_path.rglob("*.pyc"))
