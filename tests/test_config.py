"""The config: merged left to right, checked at once, and every fault named with its mend."""

import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from polyprompt import training_defaults
from polyprompt.config import METHOD_NAMES, MethodConfig, RunConfig
from polyprompt.errors import ConfigError
from polyprompt.recipe import check, load
from polyprompt.train_config import TrainConfig

TASKS = ["embedded/nli"]


def recipe(tmp_path: Path, name: str = "r.yaml", **sections: object) -> Path:
    path = tmp_path / name
    path.write_text(yaml.safe_dump({"tasks": TASKS, **sections}))
    return path


def test_recipes_merge_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    first = recipe(tmp_path, "a.yaml", train={"max_steps": 5, "seed": 1}, tasks=["glue/rte", "glue/sst2"])
    second = recipe(tmp_path, "b.yaml", train={"max_steps": 6}, tasks=["glue/cola"])
    config = load([first, second], ["train.learning_rate=3e-4", "compute.num_workers=2"])
    assert (config.train.max_steps, config.train.seed) == (6, 1)
    assert config.train.learning_rate == 3e-4
    assert config.task_names == ["glue/cola"]  # a later list replaces the earlier one
    assert config.compute.num_workers == 2


def test_a_list_of_tasks_can_be_an_override(tmp_path: Path) -> None:
    assert load([recipe(tmp_path)], ["tasks=[glue/rte,embedded/copa]"]).task_names == ["glue/rte", "embedded/copa"]


def test_another_method_starts_a_fresh_table(tmp_path: Path) -> None:
    path = recipe(tmp_path, method={"name": "hyperprompt", "reduction": 8})
    assert load([path], ["method.name=smop", "method.length=3"]).method.model_dump()["length"] == 3
    assert load([path], ["method=full"]).method.name == "full"
    assert load([path], ["method.encoder_length=3"]).method.model_dump()["reduction"] == 8


def test_another_method_keeps_the_rates_of_the_groups_that_it_has(tmp_path: Path) -> None:
    rates = {"prompt": 0.3, "hypernetwork": 0.2, "backbone": 0.1}
    path = recipe(tmp_path, method="hyperprompt", train={"max_steps": 3, "group_learning_rates": rates})
    assert load([path], ["method.reduction=8"]).train.group_learning_rates == rates
    changed = load([path], ["method=smop", "train.group_learning_rates.router=0.4"]).train
    assert changed.group_learning_rates == {"prompt": 0.3, "backbone": 0.1, "router": 0.4}
    assert changed.max_steps == 3


def test_the_short_form_of_an_override_goes_with_its_keys(tmp_path: Path) -> None:
    path = recipe(tmp_path, method={"name": "hyperprompt", "reduction": 8})
    method = load([path], ["method=smop", "method.length=3"]).method.model_dump()
    assert (method["name"], method["length"]) == ("smop", 3)


def test_override_values_are_yaml_as_in_recipes(tmp_path: Path) -> None:
    own = "tasks=[{name: my/x, files: {train: a, validation: b}, input: '{t}', target: l, choices: [yes, no]}]"
    task = load([recipe(tmp_path)], [own]).tasks[0]
    assert not isinstance(task, str)
    assert task.choices == ["yes", "no"]


def test_a_local_backbone_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "t5").mkdir(parents=True)
    names = {name: check({"tasks": TASKS, "backbone": name}).backbone.name for name in ("models/t5", "./x", "t5-base")}
    assert names == {"models/t5": str(tmp_path / "models/t5"), "./x": str(tmp_path / "x"), "t5-base": "t5-base"}


def test_short_forms_mean_the_name(tmp_path: Path) -> None:
    config = load([recipe(tmp_path, backbone="t5-base", method="smop")])
    assert (config.backbone.name, config.method.name) == ("t5-base", "smop")


def test_a_user_task_as_in_the_readme(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "tasks:\n"
        "  - super_glue/rte\n"
        "  - name: my/topic\n"
        "    files: {train: data/train.jsonl, validation: data/dev.jsonl}\n"
        '    input: "question: {text}"\n'
        '    target: "{label}"\n'
        "    labels: {0: no, 1: yes}\n"
        "    choices: [no, yes]\n"
        "    metrics: [accuracy, macro_f1]\n"
        "    weight: 2.0\n"
    )
    task = load([path]).tasks[1]
    assert not isinstance(task, str)
    assert task.labels == {"0": "no", "1": "yes"}  # YAML 1.1 would read no and yes as booleans
    assert task.choices == ["no", "yes"]
    assert task.files is not None
    assert task.files["train"] == Path.cwd() / "data" / "train.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.max_steps=3", r"^trian: unknown key\. Did you mean 'train'"),
        ("train.max_step=3", r"^train\.max_step: unknown key\. Did you mean 'max_steps'"),
        ("method.lenght=3", r"^method\.lenght: unknown key\. Did you mean 'length'"),
        ("method.name=hyprprompt", r"^method\.name: unknown method 'hyprprompt'.*Did you mean 'hyperprompt'"),
        ("train.max_steps=many", r"^train\.max_steps: .*valid integer.*\(got 'many'\)"),
        ("train.max_steps=0", r"^train\.max_steps: .*greater than 0.*\(got 0\)"),
        ("train.learning_rate=.nan", r"^train\.learning_rate: .*finite"),
        ("train.precision=fp16", r"overflow fp16.*Use train\.precision=bf16"),
        ("method.top_k=9", r"method\.top_k=9 must be at most method\.num_prompts=4"),
        ("compute.num_workers=9", r"compute\.num_workers=9 must be at most train\.num_shards=4"),
        ("compute.num_workers=[2,9]", r"compute\.num_workers=9 must be at most train\.num_shards=4"),
        ("compute.num_workers=[2,2]", r"must be \[fewest, most\], the first below the second"),
        ("compute={num_workers: [1,2], use_gpu: true, gpus_per_worker: 0.5}", r"needs whole GPUs"),
        ("compute.strategy=fsdp", r"compute\.strategy=fsdp needs compute\.num_workers >= 1"),
        ("compute={strategy: fsdp, num_workers: 3}", r"compute\.num_workers=3 must divide train\.num_shards=4"),
        ("compute={strategy: fsdp, num_workers: [2,4]}", r"compute\.num_workers=3 must divide train\.num_shards=4"),
        ("train.batch_size=2", r"train\.num_shards=4 must be at most train\.batch_size=2"),
        ("tasks=[a/b,a/b]", r"a/b listed more than once"),
        ("tasks=[]", r"^tasks: .*at least 1"),
        ("compute.storage_path=s3://bucket/x", r"compute\.storage_path: .*looks like an address"),
        ("evaluate.early_stopping_patience=3", r"needs evaluate\.steps"),
        ("name=a/b", r"^name: "),
        ("mixture.weights={glue/rte: 2}", r"mixture\.weights: glue/rte not among the tasks"),
        ("tasks.0=embedded/nli", r"recipes cannot be merged"),
        ("train.seed", r"override 'train\.seed' is not of the form"),
        ("tasks=[{name: my/x, input: f, target: g}]", r"tasks\.0: give exactly one of `files` and `hub`"),
        ("tasks=[{name: my/x, inptu: f}]", r"tasks\.0\.inptu: unknown key\. Did you mean 'input'"),
    ],
)
def test_a_fault_is_named_with_its_mend(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?m){message}"):
        load([recipe(tmp_path, method={"name": "smop"})], [override])


def test_a_model_that_is_cut_up_is_evaluated_in_batches_of_a_stated_size() -> None:
    with pytest.raises(ConfigError, match=r"needs a number for evaluate\.batch_size"):
        check({"tasks": TASKS, "compute": {"strategy": "fsdp", "num_workers": 2}, "evaluate": {"batch_size": None}})


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check({"tasks": TASKS, "train": {"max_step": 1}, "evaluate": {"mode": "guess"}})
    assert len(str(error.value).splitlines()) == 2


def test_a_missing_recipe_is_named_with_a_near_one(tmp_path: Path) -> None:
    recipe(tmp_path, "embedded.yaml")
    with pytest.raises(ConfigError, match=r"embeded\.yaml does not exist\. Did you mean 'embedded\.yaml'"):
        load([tmp_path / "embeded.yaml"])


def test_a_recipe_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must be a table"):
        load([tmp_path / "r.yaml"])
    (tmp_path / "r.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load([tmp_path / "r.yaml"])


def test_config_round_trips_and_pickles(tmp_path: Path) -> None:
    config = load([recipe(tmp_path, method={"name": "smop"}, train={"group_learning_rates": {"prompt": 0.3}})])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load([tmp_path / "again.yaml"]) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_identity_is_of_what_shapes_the_result() -> None:
    base = check({"tasks": TASKS})
    same = [{"name": "x"}, {"compute": {"num_workers": 2}}, {"tracking": {"experiment": "y"}}]
    other = [{"train": {"seed": 1}}, {"method": "full"}, {"data": {"max_input_tokens": 9}}]
    assert {check({"tasks": TASKS, **c}).identity() for c in same} == {base.identity()}
    assert len({check({"tasks": TASKS, **c}).identity() for c in other} | {base.identity()}) == 4


def test_flat_names_every_key_once() -> None:
    flat = check({"tasks": TASKS, "method": "smop"}).flat()
    assert flat["method.num_prompts"] == "4"
    assert flat["train.learning_rate"] == "0.4"
    assert not any("hyper" in key for key in flat)
    assert all(isinstance(value, str) for value in flat.values())


def test_the_backbone_is_trained_as_the_paper_does() -> None:
    trained = {
        name: check({"tasks": TASKS, "method": name}).train_backbone
        for name in METHOD_NAMES
        if name != "attempt"  # needs sources
    }
    assert {name for name, yes in trained.items() if yes} == {"full", "hyperprompt", "routed_hyperprompt"}
    assert not check({"tasks": TASKS, "backbone": {"trainable": False}}).train_backbone
    with pytest.raises(ConfigError, match="full trains the backbone"):
        check({"tasks": TASKS, "method": "full", "backbone": {"trainable": False}})


def test_a_method_is_trained_at_its_own_rates_unless_the_recipe_states_one() -> None:
    def train(method: str, stated: dict[str, Any], **backbone: Any) -> TrainConfig:
        return check({"tasks": TASKS, "method": method, "train": stated, "backbone": backbone}).train

    own = train("smop", {})
    assert (own.learning_rate, own.group_learning_rates, own.scale_parameter) == (0.4, {"router": 0.01}, False)
    assert train("smop", {"learning_rate": None, "group_learning_rates": {"router": 0.5}}).group_learning_rates == {
        "router": 0.5
    }
    assert train("smop", {"learning_rate": 0.3}) == TrainConfig(learning_rate=0.3)
    whole = train("prompt_tuning", {"max_steps": 7}, trainable=True)
    assert (whole.learning_rate, whole.group_learning_rates) == (0.05, {"backbone": 0.001})
    assert (whole.scale_parameter, whole.max_steps) == (True, 7)
    assert not train("full", {"scale_parameter": False}).scale_parameter
    resolved = check({"tasks": TASKS, "method": "smop"})
    assert check(resolved.model_dump(mode="json")) == resolved


def test_every_method_has_rates_of_groups_that_it_has() -> None:
    sections = {c.model_fields["name"].default: c for c in get_args(get_args(MethodConfig)[0])}
    assert training_defaults.TRAINING.keys() == sections.keys()
    for name, training in training_defaults.TRAINING.items():
        assert training.get("group_learning_rates", {}).keys() <= sections[name].groups


def test_config_is_frozen() -> None:
    config = RunConfig(tasks=["embedded/nli"])
    with pytest.raises(ValueError, match="frozen"):
        config.train = config.train  # type: ignore[misc]
