"""What every method passes (docs/methods.md) beside the checks of conformance/, then parity with its formula."""

import itertools
import pickle
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from polyprompt import methods
from polyprompt.config import (
    AdapterConfig,
    AttemptConfig,
    DePTConfig,
    FullConfig,
    HyperFormerConfig,
    HyperPromptConfig,
    LoRAConfig,
    MethodConfig,
    MPTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    RoutedHyperPromptConfig,
    SMoPConfig,
)
from polyprompt.errors import ConfigError
from polyprompt.methods.attempt import Attempt
from polyprompt.methods.base import Dims, KeyValues, MadeOnce, Prompts, StackDims
from polyprompt.methods.hyperprompt import StackPrompts
from polyprompt.methods.made import MadeByTask
from polyprompt.methods.routed_hyperprompt import RoutedHyperPrompt
from polyprompt.methods.routing import route, router_logits
from polyprompt.model import PromptedModel
from polyprompt.optim import Optim
from polyprompt.recipe import check
from polyprompt.train_config import TrainConfig

HYPER: dict[str, Any] = {
    "encoder_length": 3,
    "decoder_length": 2,
    "reduction": 4,
    "layer_task_embedding_size": 5,
    "task_embedding_size": 6,
    "mlp_hidden_size": 7,
}
HAS_PEFT = find_spec("peft") is not None
ABSENT = Path("absent")  # tiny.model gives sources of its own
CONFIGS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "prompt_tuning": PromptTuningConfig(length=4),
    "prompt_tuning shared": PromptTuningConfig(length=4, per_task=False),
    "prompt_tuning normal": PromptTuningConfig(length=4, init="normal"),
    "smop": SMoPConfig(length=3),
    "smop top-2": SMoPConfig(length=3, top_k=2, num_prompts=5),
    "smop per task": SMoPConfig(length=3, router="per_task"),
    "smop none": SMoPConfig(length=3, routing="none"),
    "smop gumbel": SMoPConfig(length=3, routing="gumbel"),
    "smop stochastic": SMoPConfig(length=3, routing="stochastic", load_balance=0.1),
    "hyperprompt share": HyperPromptConfig(variant="share", **HYPER),
    "hyperprompt sep": HyperPromptConfig(variant="sep", **HYPER),
    "hyperprompt global": HyperPromptConfig(variant="global", **HYPER),
    "hyperprompt encoder": HyperPromptConfig(variant="global", stacks="encoder", **HYPER | {"decoder_length": 0}),
    "hyperprompt decoder": HyperPromptConfig(variant="share", stacks="decoder", **HYPER | {"encoder_length": 0}),
    "routed_hyperprompt": RoutedHyperPromptConfig(**HYPER),
    "routed_hyperprompt no task": RoutedHyperPromptConfig(task_embedding=False, routing="none", **HYPER),
    "routed_hyperprompt per task": RoutedHyperPromptConfig(variant="share", router="per_task", **HYPER),
    "routed_hyperprompt gumbel": RoutedHyperPromptConfig(
        routing="gumbel", stacks="decoder", **HYPER | {"encoder_length": 0}
    ),
    "prefix_tuning": PrefixTuningConfig(encoder_length=3, decoder_length=2),
    "prefix_tuning mlp": PrefixTuningConfig(
        encoder_length=3, decoder_length=2, reparameterisation="mlp", mlp_hidden_size=7
    ),
    "prefix_tuning shared encoder": PrefixTuningConfig(encoder_length=3, stacks="encoder", per_task=False),
    "prefix_tuning mlp shared decoder": PrefixTuningConfig(
        decoder_length=2, stacks="decoder", per_task=False, reparameterisation="mlp", mlp_hidden_size=7
    ),
    "p_tuning mlp": PTuningConfig(length=4, encoder_hidden_size=7),
    "p_tuning lstm": PTuningConfig(length=4, encoder="lstm", encoder_hidden_size=5, lstm_layers=2),
    "p_tuning shared": PTuningConfig(length=4, per_task=False, encoder_hidden_size=7),
    "dept": DePTConfig(length=4, rank=2, max_positions=7),
    "dept shared": DePTConfig(length=4, rank=2, max_positions=12, per_task=False, init="normal"),
    "dept update alone": DePTConfig(length=0, rank=2, max_positions=7),
    "attempt": AttemptConfig(length=4, sources=[ABSENT], bottleneck=5),
    "attempt shared": AttemptConfig(length=4, sources=[ABSENT], bottleneck=5, per_task=False, temperature=1.0),
    "mpt": MPTConfig(length=4),
    "mpt normal": MPTConfig(length=4, init="normal"),
    "adapter": AdapterConfig(bottleneck=4, init_std=0.3),
    "adapter pfeiffer": AdapterConfig(bottleneck=4, init_std=0.3, variant="pfeiffer", activation="swish"),
    "hyperformer": HyperFormerConfig(reduction=4, task_embedding_size=6, mlp_hidden_size=7, projected_embedding_size=5),
    "adapter shared": AdapterConfig(bottleneck=4, init_std=0.3, per_task=False, activation="relu"),
    **({"lora": LoRAConfig(rank=2)} if HAS_PEFT else {}),
}
ZERO: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "prompt_tuning": PromptTuningConfig(length=0),
    "smop": SMoPConfig(length=0),
    "hyperprompt": HyperPromptConfig(encoder_length=0, decoder_length=0, reduction=4),
    "hyperprompt encoder": HyperPromptConfig(stacks="encoder", encoder_length=0, reduction=4),
    "routed_hyperprompt": RoutedHyperPromptConfig(encoder_length=0, decoder_length=0, reduction=4),
    "prefix_tuning": PrefixTuningConfig(encoder_length=0, decoder_length=0),
    "prefix_tuning mlp": PrefixTuningConfig(stacks="decoder", decoder_length=0, reparameterisation="mlp"),
    "p_tuning": PTuningConfig(length=0),
    "dept": DePTConfig(length=0, rank=0),
    "attempt": AttemptConfig(length=0),
    "mpt": MPTConfig(length=0),
    **({"lora": LoRAConfig(rank=0)} if HAS_PEFT else {}),
    "adapter": AdapterConfig(bottleneck=0),
}
WIDE = Dims(hidden=24, encoder=StackDims(3, 5, 8), decoder=StackDims(2, 5, 8), num_tasks=4)
every_method = pytest.mark.parametrize("name", CONFIGS)
prompting = pytest.mark.parametrize("name", [n for n in CONFIGS if n != "full"])
#: full on a frozen backbone trains nothing.
trained = pytest.mark.parametrize(
    ("name", "train"), [(n, train) for n in CONFIGS for train in (True, False) if train or n != "full"]
)


def strong(config: str | MethodConfig, **keys: Any) -> PromptedModel:
    """A tiny model whose prompts are large enough that a mistake shows. config: or its name in CONFIGS."""
    model = tiny.model(CONFIGS[config] if isinstance(config, str) else config, **keys)
    with torch.no_grad():
        for parameter, weight in model.method.named_parameters():
            if "up_" in parameter or parameter.endswith("scale.weight"):
                weight.mul_(10)
            if parameter == "up_GRH":  # zero at the start
                weight.normal_(generator=torch.Generator().manual_seed(0))
            if parameter.startswith("layers.") and ".up." in parameter:  # LoRA's B, zero at the start
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return model


def tensors(prompts: Prompts) -> dict[str, Tensor]:
    """Everything a method hands over, rows first."""
    found = {} if prompts.inputs_BPH is None else {"inputs": prompts.inputs_BPH}
    if prompts.embeddings_BTH is not None:
        found["embeddings"] = prompts.embeddings_BTH
    for stack in ("encoder", "decoder"):
        made = getattr(prompts, stack)
        if made is not None:
            found |= {
                f"{stack} keys": made.keys_LBNPD.transpose(0, 1),
                f"{stack} values": made.values_LBNPD.transpose(0, 1),
            }
    for stack, adapters in prompts.adapters.items():
        for key, weights in vars(adapters).items():
            if key.startswith(("down", "up", "scale", "shift")) and weights is not None:
                found[f"{stack} {key}"] = weights[:, :, adapters.owner_B].movedim(2, 0)
    return found


def prompts_of(model: PromptedModel, *, task: Tensor | None = None) -> dict[str, Tensor]:
    input_ids, mask, _, task_B = tiny.batch()
    return tensors(model.method.prompts(model.backbone.embed(input_ids), mask, task_B if task is None else task))


@every_method
def test_shapes_are_as_declared(name: str) -> None:
    config = CONFIGS[name]
    expected: dict[str, tuple[int, ...]] = {}
    if isinstance(config, PromptTuningConfig | SMoPConfig | PTuningConfig | AttemptConfig | MPTConfig):
        expected["inputs"] = (6, config.length, 16)
    if isinstance(config, HyperPromptConfig | RoutedHyperPromptConfig | PrefixTuningConfig):
        if config.stacks != "decoder":
            expected |= dict.fromkeys(("encoder keys", "encoder values"), (6, 3, 3, 3, 4))
        if config.stacks != "encoder":
            expected |= dict.fromkeys(("decoder keys", "decoder values"), (6, 2, 3, 2, 4))
    if isinstance(config, DePTConfig):
        expected |= {"inputs": (6, config.length, 16)} if config.length else {}
        expected["embeddings"] = (6, 9, 16)
    if isinstance(config, AdapterConfig):
        for stack, num_layers in (("encoder", 3), ("decoder", 2)):
            lead = (6, num_layers, 1 if config.variant == "pfeiffer" else 2)
            expected |= {f"{stack} down_LJGHR": (*lead, 16, 4), f"{stack} down_bias_LJGR": (*lead, 4)}
            expected |= {f"{stack} up_LJGRH": (*lead, 4, 16), f"{stack} up_bias_LJGH": (*lead, 16)}
    if isinstance(config, HyperFormerConfig):
        for stack, num_layers in (("encoder", 3), ("decoder", 2)):
            lead = (6, num_layers, 2)
            expected |= {f"{stack} down_LJGHR": (*lead, 16, 4), f"{stack} up_LJGRH": (*lead, 4, 16)}
            expected |= {f"{stack} {k}": (*lead, 16) for k in ("up_bias_LJGH", "scale_LJGH", "shift_LJGH")}
            expected[f"{stack} down_bias_LJGR"] = (*lead, 4)
    model = tiny.model(config)
    assert {k: tuple(v.shape) for k, v in prompts_of(model).items()} == expected
    assert model.method.input_length == (expected["inputs"][1] if "inputs" in expected else 0)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_follows_the_input(name: str, dtype: torch.dtype) -> None:
    model = tiny.model(CONFIGS[name])
    input_ids, mask, _, task = tiny.batch()
    made = model.method.prompts(model.backbone.embed(input_ids).to(dtype), mask, task)
    assert all(t.dtype == dtype for t in tensors(made).values())
    assert all(p.dtype == torch.float32 for p in model.method.parameters())


@every_method
@torch.no_grad()
def test_eval_is_deterministic(name: str) -> None:
    model = strong(name)
    assert torch.equal(model(*tiny.batch()).nll_B, model(*tiny.batch()).nll_B)


@every_method
@torch.no_grad()
def test_task_ids_matter_exactly_when_the_method_is_task_aware(name: str) -> None:
    model, (input_ids, mask, labels, task) = strong(name), tiny.batch()
    same, moved = (model(input_ids, mask, labels, t).nll_B for t in (task, (task + 1) % tiny.NUM_TASKS))
    assert torch.equal(same, moved) != model.method.task_aware
    assert (same != moved).all() == model.method.task_aware


@trained
def test_gradient_reaches_every_declared_parameter_and_no_other(name: str, train: bool) -> None:
    model = strong(name, train=train)
    model(*tiny.batch(12)).total.backward()
    for parameter, weight in model.named_parameters():
        if parameter.startswith("method.") or train:
            assert weight.grad is not None, parameter
            assert weight.grad.any(), parameter
        else:
            assert weight.grad is None, parameter


@pytest.mark.parametrize(
    "name", [n for n in CONFIGS if n.startswith(("hyperprompt", "prompt_tuning", "prefix_tuning", "mpt"))]
)
def test_every_prompt_row_of_every_task_gets_gradient_at_the_first_step(name: str) -> None:
    model = tiny.model(CONFIGS[name], train=False)
    model(*tiny.batch(12)).total.backward()
    for parameter, weight in model.method.named_parameters():
        assert weight.grad is not None
        # D's columns behind a closed ReLU have none; every layer, task and prompt row has some.
        leading = weight.grad.flatten(2 if weight.ndim == 3 else -2) if weight.ndim >= 3 else weight.grad
        assert leading.any(dim=-1).all(), parameter


@every_method
def test_a_batch_without_a_task_gives_zero_gradients_not_none(name: str) -> None:
    model = tiny.model(CONFIGS[name])
    input_ids, mask, labels, task = tiny.batch()
    model(input_ids, mask, labels, torch.zeros_like(task)).total.backward()
    assert all(p.grad is not None for p in model.parameters())


@trained
def test_one_step_moves_declared_parameters_only(name: str, train: bool) -> None:
    model = strong(name, train=train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own = [p for group in model.named_groups().values() for _, p in group]
    model(*tiny.batch(12)).total.backward()
    torch.optim.SGD(own, lr=0.1).step()
    names = {k for k, p in model.named_parameters() if k.startswith("method.") or train}
    given = {f"method.{k}" for k, _ in model.method.named_buffers()}
    assert set(model.trained_state()) == names | given
    for key, value in model.state_dict().items():
        # Tied entries of the state dict have no parameter name of their own.
        if key in names:
            assert not torch.equal(value, before[key]), key
        elif not train and "lora_" not in key:  # the method's modules, by their name in the backbone
            assert torch.equal(value, before[key]), key


@every_method
def test_parameter_count_equals_the_formula(name: str) -> None:
    config = CONFIGS[name]
    for dims in (WIDE, tiny.load().dims(tiny.NUM_TASKS)):
        built = tiny.build(config, dims, seed=0)
        assert sum(p.numel() for p in built.parameters()) == methods.expected_parameters(config, dims)


@every_method
def test_its_section_states_its_groups(name: str) -> None:
    assert tiny.model(CONFIGS[name], train=False).named_groups().keys() <= CONFIGS[name].groups


@every_method
def test_seed_decides_the_start_and_the_global_stream_is_untouched(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    states = [dict(tiny.model(CONFIGS[name], seed=seed).method.named_parameters()) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    drawn = [k for k in states[0] if len(states[0][k].unique()) > 1]  # a bias or update may start at zero
    assert all(not torch.equal(states[0][k], states[2][k]) for k in drawn)
    assert bool(drawn) == bool(states[0])


@every_method
def test_method_pickles(name: str) -> None:
    model = tiny.model(CONFIGS[name])
    copy = pickle.loads(pickle.dumps(model.method))
    expected = prompts_of(model)
    model.method = copy
    assert all(torch.equal(t, expected[k]) for k, t in prompts_of(model).items())


@pytest.mark.parametrize("name", ZERO)
def test_length_0_has_no_parameters_and_no_tasks(name: str) -> None:
    model = tiny.model(ZERO[name])
    assert methods.expected_parameters(ZERO[name], WIDE) == 0 == sum(p.numel() for p in model.method.parameters())
    assert not model.method.task_aware


@prompting
@torch.no_grad()
def test_prompts_change_the_output(name: str) -> None:
    changed = strong(name)(*tiny.batch()).nll_B != tiny.model(FullConfig())(*tiny.batch()).nll_B
    assert changed.all()


@pytest.mark.parametrize(
    ("table", "field", "value", "allowed"),
    [
        ({"name": "prompt_tuning", "length": -1}, "method.length", "-1", "greater than or equal to 0"),
        ({"name": "smop", "num_prompts": 2, "top_k": 3}, "method.top_k", "3", "at most method.num_prompts=2"),
        ({"name": "smop", "num_prompts": 0}, "method.num_prompts", "0", "greater than 0"),
        ({"name": "smop", "num_prompts": 25}, "method.num_prompts", "25", "between 1 and"),
        ({"name": "smop", "routing": "none", "top_k": 2}, "method.top_k", "2", "belongs to method.routing=top_k"),
        ({"name": "smop", "routing": "random"}, "method.routing", "random", "'top_k', 'none', 'gumbel'"),
        ({"name": "smop", "gate": "batch_sum", "routing": "none"}, "method.gate", "batch_sum", "method.routing=top_k"),
        ({"name": "smop", "load_balance": -1}, "method.load_balance", "-1", "greater than or equal to 0"),
        ({"name": "smop", "gate": "sum"}, "method.gate", "sum", "'probability' or 'batch_sum'"),
        ({"name": "routed_hyperprompt", "reduction": 25}, "method.reduction", "25", "between 1 and"),
        (
            {"name": "routed_hyperprompt", "num_prompts": 25, "reduction": 2},
            "method.num_prompts",
            "25",
            "between 1 and",
        ),
        (
            {"name": "routed_hyperprompt", "variant": "share", "task_embedding": True},
            *("method.task_embedding", "true", "method.variant=global"),
        ),
        ({"name": "hyperprompt", "reduction": 25}, "method.reduction", "25", "between 1 and"),
        ({"name": "hyperprompt", "stacks": "all"}, "method.stacks", "all", "'both', 'encoder' or 'decoder'"),
        ({"name": "prefix_tuning", "encoder_length": -2}, "method.encoder_length", "-2", "greater than or equal to 0"),
        ({"name": "p_tuning", "encoder": "gru"}, "method.encoder", "gru", "'mlp' or 'lstm'"),
        ({"name": "dept", "rank": -1}, "method.rank", "-1", "greater than or equal to 0"),
        ({"name": "attempt"}, "method.sources", "[]", "at least one bundle"),
        ({"name": "mpt", "task_std": 0}, "method.task_std", "0", "greater than 0"),
        ({"name": "hyperformer", "reduction": 25}, "method.reduction", "25", "between 1 and"),
        ({"name": "lora", "rank": -1}, "method.rank", "-1", "greater than or equal to 0"),
        ({"name": "lora", "dropout": 1}, "method.dropout", "1", "less than 1"),
        ({"name": "adapter", "bottleneck": -1}, "method.bottleneck", "-1", "greater than or equal to 0"),
        ({"name": "adapter", "variant": "parallel"}, "method.variant", "parallel", "'houlsby' or 'pfeiffer'"),
        ({"name": "adapter", "activation": "elu"}, "method.activation", "elu", "'gelu', 'gelu_new', 'relu' or 'swish'"),
    ],
)
def test_an_invalid_config_names_field_value_and_range(table: dict, field: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        methods.build(check({"method": table, "tasks": ["a/b"]}).method, WIDE, seed=0)
    message = str(caught.value)
    assert field in message
    assert value in message
    assert allowed in message


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "prompt_tuning", "init_std": 0.1}, r"init_std=0.1 .* drop it .*, or set method.init=normal"),
        ({"name": "smop", "init": "zero", "init_std": 2.0}, r"init_std=2.0 .* or set method.init=normal"),
        ({"name": "smop", "gumbel_temperature": 0.5}, "gumbel_temperature=0.5 .* or set method.routing=gumbel"),
        ({"name": "hyperprompt", "stacks": "decoder", "encoder_length": 4}, "encoder_length=4 .* method.stacks=both"),
        ({"name": "prefix_tuning", "stacks": "encoder", "decoder_length": 4}, "decoder_length=4 .* method.stacks=both"),
        ({"name": "prefix_tuning", "mlp_hidden_size": 7}, "mlp_hidden_size=7 .* or set method.reparameterisation=mlp"),
        ({"name": "p_tuning", "lstm_layers": 2}, "lstm_layers=2 .* or set method.encoder=lstm"),
        ({"name": "dept", "rank": 0, "max_positions": 7}, "max_positions=7 .* or set method.rank above 0"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{message}"):
        check({"method": table, "tasks": ["a/b"]})
    # Dropped, the default stands in its place, also in a resolved config that is read again.
    kept = check({"method": {k: table[k] for k in ("name", "init", "stacks", "rank") if k in table}, "tasks": ["a/b"]})
    assert check(kept.model_dump(mode="json")) == kept


def test_a_stack_left_out_may_have_length_0() -> None:
    for name in ("hyperprompt", "prefix_tuning"):
        check({"method": {"name": name, "stacks": "decoder", "encoder_length": 0}, "tasks": ["a/b"]})


def test_encoder_prompts_need_an_encoder() -> None:
    dims = Dims(hidden=24, encoder=None, decoder=StackDims(2, 5, 8), num_tasks=2)
    with pytest.raises(ConfigError, match=r"method.stacks=both.*method.stacks=decoder"):
        methods.build(HyperPromptConfig(reduction=4), dims, seed=0)
    with pytest.raises(ConfigError, match=r"method.stacks=both.*method.stacks=decoder"):
        methods.build(PrefixTuningConfig(), dims, seed=0)
    for config in (HyperPromptConfig(reduction=4, stacks="decoder"), PrefixTuningConfig(stacks="decoder")):
        built = methods.build(config, dims, seed=0)
        assert sum(p.numel() for p in built.parameters()) == methods.expected_parameters(config, dims)


# Prompt tuning


@torch.no_grad()
def test_prompt_tuning_is_the_concatenation_of_embeddings() -> None:
    model, (input_ids, mask, labels, task) = strong("prompt_tuning"), tiny.batch()
    plain = tiny.plain()
    for row in range(6):
        prompt = model.method.get_parameter("prompt_GPH")[task[row]]
        words = input_ids[row, mask[row] == 1]
        target = labels[row, labels[row] != -100]
        x = torch.cat([prompt, plain.shared(words)])
        expected = plain(inputs_embeds=x[None], labels=target[None]).loss * len(target)
        nll = model(*tiny.rows(tiny.batch(), [row])).nll_B[0]
        torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)


def test_vocabulary_start_takes_different_ordinary_pieces_for_each_task() -> None:
    model = tiny.model(PromptTuningConfig(length=20))
    embedding = model.backbone.model.shared.weight
    prompt_GPH = model.method.get_parameter("prompt_GPH")
    pieces = [[(embedding == vector).all(dim=1).nonzero().item() for vector in prompt] for prompt in prompt_GPH]
    assert all(len(set(own)) == 20 and min(own) >= 3 and max(own) < 60 for own in pieces)
    assert pieces[0] != pieces[1]
    longer = tiny.model(PromptTuningConfig(length=70)).method.get_parameter("prompt_GPH")
    assert torch.equal(longer[:, :13], longer[:, 57:])


# SMoP


def slow_smop(model: PromptedModel, row: int, top_k: int, per_task: bool) -> Tensor:
    """[Σ over the top_k of p_j·P_j] of one row, straight from the formula. With top_k = 0: P_c, without its factor."""
    input_ids, mask, _, task = tiny.batch()
    embedding = model.backbone.model.shared.weight
    words = [embedding[i] for i, real in zip(input_ids[row], mask[row], strict=True) if real]
    mean = sum(words[1:], words[0]) / len(words)
    router_HR = model.method.get_parameter("router_GHR")[task[row] if per_task else 0]
    weights = torch.stack([(mean @ router_HR[:, j]).exp() for j in range(router_HR.shape[1])])
    p = weights / weights.sum()
    best = sorted(range(len(p)), key=lambda j: -p[j].item())[: top_k or 1]
    if top_k == 0:
        return model.method.get_parameter("prompts_RPH")[best[0]]
    prompts = [p[j] * model.method.get_parameter("prompts_RPH")[j] for j in best]
    return sum(prompts[1:], prompts[0])


@pytest.mark.parametrize(
    ("name", "top_k"),
    [
        ("smop", 1),
        ("smop top-2", 2),
        ("smop per task", 1),
        ("smop none", 4),
        ("smop gumbel", 0),
        ("smop stochastic", 1),
    ],
)
@torch.no_grad()
def test_smop_is_the_formula(name: str, top_k: int) -> None:
    model = tiny.model(CONFIGS[name])
    made = prompts_of(model)["inputs"]
    for row in range(6):
        expected = slow_smop(model, row, top_k, "task" in name)
        torch.testing.assert_close(made[row], expected, atol=1e-6, rtol=1e-5)


def test_smop_perturbs_in_training_only_and_only_if_asked() -> None:
    def differs(config: SMoPConfig) -> bool:
        model = tiny.model(config, dropout=0.0).train()
        return not torch.equal(prompts_of(model)["inputs"], prompts_of(model)["inputs"])

    assert differs(SMoPConfig(length=3))
    assert not differs(SMoPConfig(length=3, perturbation=False))
    perturbed, clean = tiny.model(SMoPConfig(length=3)), tiny.model(SMoPConfig(length=3, perturbation=False))
    assert torch.equal(prompts_of(perturbed)["inputs"], prompts_of(clean)["inputs"])


@torch.no_grad()
def test_smop_perturbation_multiplies_the_logits() -> None:
    model, (input_ids, mask, _, task) = tiny.model(SMoPConfig(length=3)), tiny.batch()
    config = CONFIGS["smop"]
    assert isinstance(config, SMoPConfig)
    x = model.backbone.embed(input_ids)
    logits = router_logits(config, model.method.get_parameter("router_GHR"), x, mask, task)
    mean = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(logits, mean @ model.method.get_parameter("router_GHR")[0], atol=1e-6, rtol=1e-5)
    clean = route(config, logits, training=False)
    torch.manual_seed(11)
    noisy = route(config, logits, training=True)
    torch.manual_seed(11)
    p = (logits * (1 + torch.randn(6, 4))).softmax(-1)
    assert torch.equal(clean.weight_BC[:, 0], logits.softmax(-1).amax(-1))
    assert torch.equal(noisy.weight_BC[:, 0], p.amax(-1))
    assert torch.equal(noisy.choice_BC[:, 0], p.argmax(-1))
    assert not torch.equal(noisy.choice_BC, clean.choice_BC)
    # The load is of the noisy choice; what prediction would do is told from the clean logits.
    assert torch.equal(noisy.aux["router/load"].argmax(-1), p.argmax(-1))
    for name in ("router/share", "router/probability"):
        assert torch.equal(noisy.aux[name], clean.aux[name])


def test_smop_reports_routing_and_trains_the_chosen_prompts_only() -> None:
    model = tiny.model(CONFIGS["smop"], train=False)
    loss = model(*tiny.batch())
    loss.total.backward()
    probability, load = loss.aux["router/probability"], loss.aux["router/load"]
    choice = load.argmax(dim=1)
    assert not probability.requires_grad
    assert not load.requires_grad
    assert torch.equal(load, loss.aux["router/share"])
    assert torch.equal(load, torch.nn.functional.one_hot(choice, 4).float())
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(6))
    assert torch.equal(choice, probability.argmax(dim=1))
    grad = model.method.get_parameter("prompts_RPH").grad
    assert grad is not None
    assert {j for j in range(4) if grad[j].any()} == set(choice.tolist())
    assert len(set(choice.tolist())) > 1


@torch.no_grad()
def test_smop_router_starts_orthogonal() -> None:
    for router_HR in tiny.model(CONFIGS["smop per task"]).method.get_parameter("router_GHR"):
        torch.testing.assert_close(router_HR.T @ router_HR, torch.eye(4), atol=1e-5, rtol=0)


@torch.no_grad()
def test_smop_batch_sum_multiplies_with_the_prompts_chosen_in_the_batch() -> None:
    paper, oddity = tiny.model(SMoPConfig(length=3)), tiny.model(SMoPConfig(length=3, gate="batch_sum"))
    input_ids, mask, _, task = tiny.batch()
    made = paper.method.prompts(paper.backbone.embed(input_ids), mask, task)
    p, choice = made.aux["router/probability"], made.aux["router/load"].argmax(dim=1)
    total = sum(paper.method.get_parameter("prompts_RPH")[c] for c in choice)
    expected = torch.stack([p[row, choice[row]] * total for row in range(6)])
    torch.testing.assert_close(prompts_of(oddity)["inputs"], expected, atol=1e-5, rtol=1e-5)
    batch = tiny.batch()
    assert not torch.allclose(oddity(*batch).nll_B[:1], oddity(*tiny.rows(batch, [0])).nll_B)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.1, 0.2, 3.0], [1.0, 1.1, 0.9, 0.8]])


def test_stochastic_routing_draws_a_prompt_by_its_probability() -> None:
    config = SMoPConfig(routing="stochastic")
    torch.manual_seed(0)
    many = route(config, LOGITS.repeat(4000, 1), training=True)
    counts = torch.nn.functional.one_hot(many.choice_BC[:, 0], 4).view(4000, 3, 4).float().mean(0)
    torch.testing.assert_close(counts, LOGITS.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(many.weight_BC, LOGITS.softmax(-1).repeat(4000, 1).gather(1, many.choice_BC))


def test_gumbel_routing_draws_one_prompt_and_passes_the_gradient_straight_through() -> None:
    logits = LOGITS.repeat(4000, 1).requires_grad_()
    torch.manual_seed(0)
    made = route(SMoPConfig(routing="gumbel", gumbel_temperature=0.5), logits, training=True)
    assert torch.equal(made.weight_BC.detach(), made.aux["router/load"])
    assert torch.equal(made.weight_BC.detach().amax(-1), torch.ones(12000))
    # Gumbel-max: the prompts are drawn by their probabilities, whatever the temperature.
    shares = made.aux["router/load"].view(4000, 3, 4).mean(0)
    torch.testing.assert_close(shares, LOGITS.softmax(-1), atol=0.03, rtol=0)
    # The gradient is the relaxed sample's: torch's own straight-through estimator under the same noise.
    torch.manual_seed(1)
    made = route(SMoPConfig(routing="gumbel", gumbel_temperature=0.5), logits, training=True)
    torch.manual_seed(1)
    other = logits.detach().clone().requires_grad_()
    expected = torch.nn.functional.gumbel_softmax(other, tau=0.5, hard=True)
    assert torch.equal(made.weight_BC.round(), expected.round())
    values = torch.arange(4.0)
    (made.weight_BC @ values).sum().backward()
    (expected @ values).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_the_load_balance_loss_is_that_of_fedus() -> None:
    """Equation 4: α · N · Σ f_i · P_i; it is α for uniform routing and α·N for a collapsed router."""
    config = SMoPConfig(load_balance=0.3, perturbation=False)
    logits = LOGITS.clone().requires_grad_()
    made = route(config, logits, training=True)
    assert made.penalty_B is not None
    p = LOGITS.softmax(-1)
    f = torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3  # rows 0, 2 and 1 pick prompts 0, 1 and 3
    torch.testing.assert_close(made.penalty_B.mean(), 0.3 * 4 * (f * p.mean(0)).sum())
    made.penalty_B.sum().backward()
    assert logits.grad is not None
    assert logits.grad.any()
    for rows, expected in ((torch.eye(4), 0.3), (torch.tensor([[1.0, 0, 0, 0]] * 4), 1.2)):
        collapsed = route(config, 50 * rows, training=True).penalty_B
        assert collapsed is not None
        assert collapsed.mean().item() == pytest.approx(expected)
    assert route(SMoPConfig(), LOGITS, training=True).penalty_B is None


@pytest.mark.parametrize("routing", ["top_k", "none", "gumbel", "stochastic"])
def test_routing_is_noisy_in_training_where_it_says_so(routing: str) -> None:
    config = SMoPConfig.model_validate({"routing": routing})
    made = [route(config, LOGITS.repeat(20, 1), training=training) for training in (True, True, False, False)]
    train, again, predict, same = (m.aux["router/load"] for m in made)
    assert torch.equal(predict, same)
    assert torch.equal(train, again) == (routing == "none")
    assert torch.equal(train, predict) == (routing == "none")


# HyperPrompt


def slow_hyperprompt(made: StackPrompts, c: int, layer: int, task: int, i: int) -> Tensor:
    """Keys (c = 0) or values (c = 1) of prompt token i for one layer and task: U·ReLU(D·P), by loops."""
    if made.variant == "global":
        joined = torch.cat([made.task_KY[task], made.layer_MY[layer]])
        hidden = torch.stack([(joined * column).sum().clamp(min=0) for column in made.mlp_in.T])
        joint = torch.stack([(hidden * column).sum() for column in made.mlp_out.T])
        down = sum((joint[x] * made.down_CXHE[c, x] for x in range(1, len(joint))), joint[0] * made.down_CXHE[c, 0])
        up = sum((joint[x] * made.up_CXEF[c, x] for x in range(1, len(joint))), joint[0] * made.up_CXEF[c, 0])
    else:
        owner = task if made.variant == "sep" else 0
        down, up = made.down_CMGHE[c, layer, owner], made.up_CMGEF[c, layer, owner]
    prompt = made.prompt_KPH[task, i]
    squeezed = torch.stack([(prompt * down[:, e]).sum().clamp(min=0) for e in range(down.shape[1])])
    return torch.stack([(squeezed * up[:, f]).sum() for f in range(up.shape[1])]).view(3, 4)


@pytest.mark.parametrize("variant", ["share", "sep", "global"])
@torch.no_grad()
def test_hyperprompt_is_the_formula(variant: str) -> None:
    model = strong(f"hyperprompt {variant}")
    _, _, _, task = tiny.batch()
    made = prompts_of(model)
    for stack, num_layers, length in (("encoder", 3, 3), ("decoder", 2, 2)):
        module = getattr(model.method, stack)
        for c, layer, row, i in itertools.product(range(2), range(num_layers), (0, 1, 5), range(length)):
            got = made[f"{stack} {'values' if c else 'keys'}"][row, layer, :, i]
            expected = slow_hyperprompt(module, c, layer, int(task[row]), i)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["share", "sep", "global"])
def test_hyperprompt_starts_close_to_the_plain_backbone(variant: str) -> None:
    config = HyperPromptConfig(variant=variant, reduction=2)  # the default lengths, 16 and 6, beside 9 and 4 tokens
    dims = Dims(hidden=64, encoder=StackDims(4, 4, 16), decoder=StackDims(4, 4, 16), num_tasks=8)
    built = methods.build(config, dims, seed=0)
    made = built.prompts(torch.zeros(8, 1, 64), torch.ones(8, 1), torch.arange(8))
    for tensor in tensors(made).values():
        assert 0.05 < tensor.std().item() < 0.2
    with torch.no_grad():
        loss, plain = tiny.model(config)(*tiny.batch()).total, tiny.model(FullConfig())(*tiny.batch()).total
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0)


@torch.no_grad()
def test_hyperprompt_values_near_zero_only_shrink_a_head() -> None:
    """Zero keys and values take exp(0) of mass each and give nothing: output · Z / (Z + P)."""
    model = tiny.model(FullConfig())
    module = model.backbone.model.encoder.block[0].layer[0].SelfAttention
    x_BTH = torch.randn(1, 5, 16)
    q, k = (getattr(module, name)(x_BTH).view(5, 3, 4).transpose(0, 1) for name in "qk")
    mass_NT = (q @ k.transpose(1, 2) + module.compute_bias(5, 5)[0]).exp().sum(-1)
    zeros = torch.zeros(3, 1, 3, 4, 4)
    o, module.o = module.o, torch.nn.Identity()
    plain, shrunk = (module(x_BTH, prompts=p)[0] for p in (None, Prompts(encoder=KeyValues(zeros, zeros))))
    module.o = o
    factor_TN = (mass_NT / (mass_NT + 4)).T
    expected = plain.view(5, 3, 4) * factor_TN[:, :, None]
    torch.testing.assert_close(shrunk.view(5, 3, 4), expected, atol=1e-5, rtol=1e-5)


def test_hyperprompt_runs_its_hypernetworks_once_for_each_task_of_the_batch() -> None:
    model = tiny.model(CONFIGS["hyperprompt sep"])
    seen: list[int] = []
    assert isinstance(model.method.encoder, StackPrompts)
    model.method.encoder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    model(*tiny.batch(12))
    input_ids, mask, labels, task = tiny.batch(12)
    model(input_ids, mask, labels, task % 2)
    assert seen == [3, 2]


@every_method
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_micro_batches_share_what_is_made_of_their_tasks(name: str, precision: str, rounding: float) -> None:
    """Losses are equal, and gradients but for rounding; the networks run once, for the tasks of all micro-batches."""
    micro_batches = list(zip(*(tensor.split([3, 4, 5]) for tensor in tiny.batch(12)), strict=True))

    def run(model: PromptedModel, task_B: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        losses, autocast = [], torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with ExitStack() as held:
            made = MadeOnce()
            if task_B is not None:
                with autocast:
                    made = held.enter_context(model.made_once(task_B))
            for micro in micro_batches:
                with autocast:
                    loss = model(*micro)
                (loss.total + loss.penalty_B.sum()).backward()
                losses.append(loss.nll_B.detach())
        made.backward()
        return torch.cat(losses), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain, gradients = run(strong(name, train=True).train(), None)
    model = strong(name, train=True).train()
    seen: list[list[int]] = []
    if isinstance(method := model.method, MadeByTask):
        make = method.make
        method.make = lambda task_U: seen.append(task_U.tolist()) or make(task_U)  # type: ignore[method-assign,func-returns-value]
    task_B = tiny.batch(12)[-1]
    shared, again = run(model, task_B)
    if isinstance(method, MadeByTask):
        assert seen == [method.known(task_B).unique().tolist()]
    assert torch.equal(plain, shared)
    assert gradients.keys() == again.keys()
    for key, gradient in gradients.items():
        assert torch.linalg.norm(again[key] - gradient) <= rounding * torch.linalg.norm(gradient) + 1e-9, key


@pytest.mark.parametrize(
    ("size", "variant", "both", "ratio"),
    [
        ("base", "share", True, 1.0085),
        ("base", "sep", True, 1.064),
        ("base", "global", True, 1.043),
        ("base", "global", False, 1.021),
        ("large", "share", True, 1.0088),
        ("large", "sep", True, 1.068),
        ("large", "global", True, 1.023),
    ],
)
def test_hyperprompt_sizes_beside_t5(size: str, variant: str, both: bool, ratio: float) -> None:
    """Eight tasks, lengths 16 and 6, t' = e = t = 64, reduction 32."""
    backbone, hidden, layers, heads = {"base": (222.9e6, 768, 12, 12), "large": (737.7e6, 1024, 24, 16)}[size]
    stack = StackDims(layers, heads, 64)
    config = HyperPromptConfig(variant=variant, stacks="both" if both else "decoder")
    added = methods.expected_parameters(config, Dims(hidden, stack, stack, num_tasks=8))
    assert 1 + added / backbone == pytest.approx(ratio, abs=6e-4)


def test_smop_count_of_the_paper() -> None:
    stack = StackDims(12, 12, 64)
    assert methods.expected_parameters(SMoPConfig(), Dims(768, stack, stack, num_tasks=1)) == 18_432


# RoutedHyperPrompt


def slow_routed(model: PromptedModel, stack: str, c: int, layer: int, row: int, i: int) -> Tensor:
    """Keys (c = 0) or values (c = 1) of one row, layer and prompt token: Σ p_j·U·ReLU(D·P_j) over the routed."""
    method, (input_ids, mask, _, task) = model.method, tiny.batch()
    assert isinstance(method, RoutedHyperPrompt)
    made = getattr(method, stack)
    words = [model.backbone.model.shared.weight[i] for i, m in zip(input_ids[row], mask[row], strict=True) if m]
    mean = sum(words[1:], words[0]) / len(words)
    router_HR = method.router_GHR[task[row] if method.config.router == "per_task" else 0]
    weights = torch.stack([(mean @ router_HR[:, j]).exp() for j in range(4)])
    p = weights / weights.sum()
    which = range(4) if method.config.routing == "none" else [int(p.argmax())]
    owner = int(task[row]) if method.config.hypernetworks_know_task else 0
    total = torch.zeros(3, 4)
    for j in which:
        if made.variant == "global":
            joined = torch.cat([made.task_KY[owner], made.layer_MY[layer]])
            joint = (joined @ made.mlp_in).clamp(min=0) @ made.mlp_out
            down = sum(joint[x] * made.down_CXHE[c, x] for x in range(len(joint)))
            up = sum(joint[x] * made.up_CXEF[c, x] for x in range(len(joint)))
        else:
            down, up = made.down_CMGHE[c, layer, 0], made.up_CMGEF[c, layer, 0]
        # The prompt is weighted before the ReLU here, where one prompt is picked, and after it where all are mixed.
        prompt = made.prompt_KPH[j, i]
        if method.config.routing == "top_k":
            total += (((p[j] * prompt) @ down).clamp(min=0) @ up).view(3, 4)
        else:
            weight = 1.0 if method.config.routing == "gumbel" else p[j]
            total += weight * ((prompt @ down).clamp(min=0) @ up).view(3, 4)
    return total


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("routed_hyperprompt")])
@torch.no_grad()
def test_routed_hyperprompt_is_the_formula(name: str) -> None:
    model = strong(name)
    made = prompts_of(model)
    for stack, num_layers, length in (("encoder", 3, 3), ("decoder", 2, 2)):
        if f"{stack} keys" not in made:
            continue
        for c, layer, row, i in itertools.product(range(2), range(num_layers), range(6), range(length)):
            got = made[f"{stack} {'values' if c else 'keys'}"][row, layer, :, i]
            torch.testing.assert_close(got, slow_routed(model, stack, c, layer, row, i), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["share", "global"])
@torch.no_grad()
def test_routed_hyperprompt_with_one_prompt_and_no_task_is_hyperprompt_with_a_shared_prompt(variant: Any) -> None:
    routed = tiny.model(RoutedHyperPromptConfig(num_prompts=1, variant=variant, task_embedding=False, **HYPER))
    loaded = tiny.load()
    # One task for all rows: one global prompt, and one task embedding.
    shared = methods.build(HyperPromptConfig(variant=variant, **HYPER), replace(loaded.dims(1), num_tasks=1), seed=5)
    own = {key: value for key, value in routed.method.state_dict().items() if key != "router_GHR"}
    shared.load_state_dict(own)
    plain = PromptedModel(loaded, shared).eval()
    input_ids, mask, labels, task = tiny.batch()
    expected = plain(input_ids, mask, labels, torch.zeros_like(task)).nll_B
    for training in (False, True):
        routed.method.train(training)
        torch.testing.assert_close(routed(input_ids, mask, labels, task).nll_B, expected, atol=1e-6, rtol=1e-6)


def test_routed_hyperprompt_routes_rows_of_a_task_differently() -> None:
    model = tiny.model(CONFIGS["routed_hyperprompt"])
    loss = model(*tiny.batch(12))
    assert len(set(loss.aux["router/load"].argmax(-1).tolist())) > 1
    assert {model.method.group_of(name) for name, _ in model.method.named_parameters()} == {
        *("prompt", "router", "hypernetwork")
    }


# Prefix tuning


@pytest.mark.parametrize("name", ["prefix_tuning", "prefix_tuning mlp", "prefix_tuning shared encoder"])
@torch.no_grad()
def test_prefix_tuning_is_the_formula(name: str) -> None:
    model = tiny.model(CONFIGS[name])
    _, _, _, task = tiny.batch()
    made = prompts_of(model)
    for stack, num_layers, length in (("encoder", 3, 3), ("decoder", 2, 2)):
        module = getattr(model.method, stack)
        if module is None:
            assert name == "prefix_tuning shared encoder"
            continue
        for row, i in itertools.product((0, 1, 5), range(length)):
            flat = module.prefix_GPW[0 if "shared" in name else task[row], i]
            if "mlp" in name:
                into, _, out = module.mlp
                hidden = [torch.tanh((w * flat).sum() + b) for w, b in zip(into.weight, into.bias, strict=True)]
                flat = sum((out.weight[:, e] * h for e, h in enumerate(hidden)), out.bias)
            numbers = iter(flat.tolist())
            for part in ("keys", "values"):
                for layer, head, d in itertools.product(range(num_layers), range(3), range(4)):
                    got = made[f"{stack} {part}"][row, layer, head, i, d]
                    assert got.item() == pytest.approx(next(numbers), abs=1e-6, rel=1e-5)


@pytest.mark.parametrize("reparameterisation", ["none", "mlp"])
def test_prefixes_start_small(reparameterisation: str) -> None:
    config = PrefixTuningConfig(reparameterisation=reparameterisation)
    dims = Dims(hidden=64, encoder=StackDims(4, 4, 16), decoder=StackDims(4, 4, 16), num_tasks=8)
    made = methods.build(config, dims, seed=0).prompts(torch.zeros(8, 1, 64), torch.ones(8, 1), torch.arange(8))
    for tensor in tensors(made).values():
        assert tensor.std().item() == pytest.approx(config.init_std, rel=0.15)


# P-tuning


@torch.no_grad()
def test_p_tuning_mlp_is_the_formula() -> None:
    model = tiny.model(CONFIGS["p_tuning mlp"])
    _, _, _, task = tiny.batch()
    made = prompts_of(model)["inputs"]
    layers = [layer for layer in model.method.mlp if isinstance(layer, torch.nn.Linear)]
    for row, i in itertools.product(range(6), range(4)):
        x = model.method.get_parameter("tokens_GPH")[task[row], i]
        for number, layer in enumerate(layers):
            x = torch.stack([(w * x).sum() + b for w, b in zip(layer.weight, layer.bias, strict=True)])
            x = x.clamp(min=0) if number < 2 else x
        torch.testing.assert_close(made[row, i], x, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_p_tuning_lstm_is_the_formula() -> None:
    model = tiny.model(PTuningConfig(length=4, per_task=False, encoder="lstm", encoder_hidden_size=5))
    method, made = model.method, prompts_of(model)["inputs"][0]
    tokens = method.get_parameter("tokens_GPH")[0]

    def one_way(suffix: str, order: range) -> dict[int, Tensor]:
        weights = {
            k: method.get_parameter(f"lstm.{k}_l0{suffix}") for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        h = c = torch.zeros(5)
        states = {}
        for i in order:
            gates = (
                weights["weight_ih"] @ tokens[i] + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]
            )
            into, forget, new, out = gates.split(5)
            c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
            h = out.sigmoid() * c.tanh()
            states[i] = h
        return states

    forward, backward = one_way("", range(4)), one_way("_reverse", range(3, -1, -1))
    first, _, last = method.mlp
    for i in range(4):
        hidden = (first.weight @ torch.cat([forward[i], backward[i]]) + first.bias).relu()
        torch.testing.assert_close(made[i], last.weight @ hidden + last.bias, atol=1e-6, rtol=1e-5)


# DePT


@torch.no_grad()
def test_dept_is_the_formula() -> None:
    model, (input_ids, mask, _, task) = strong("dept"), tiny.batch()
    made = model.method.prompts(model.backbone.embed(input_ids), mask, task)
    prompt, a, b = (model.method.get_parameter(name) for name in ("prompt_GPH", "down_GSR", "up_GRH"))
    assert made.inputs_BPH is not None
    assert made.embeddings_BTH is not None
    for row, own in enumerate(task):
        assert torch.equal(made.inputs_BPH[row], prompt[own])
        for i, word in enumerate(input_ids[row]):
            expected = model.backbone.model.shared.weight[word]
            if i < 7:  # max_positions
                expected = expected + sum(a[own, i, r] * b[own, r] for r in range(2))
            torch.testing.assert_close(made.embeddings_BTH[row, i], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_a_dept_update_of_zero_is_none_bit_for_bit(precision: str) -> None:
    keys: dict[str, Any] = {"train": False, "precision": precision}
    update = tiny.model(DePTConfig(length=0, rank=3), **keys)
    assert torch.equal(update(*tiny.batch()).nll_B, tiny.model(FullConfig(), **keys)(*tiny.batch()).nll_B)
    both, prompt = (tiny.model(DePTConfig(length=4, rank=rank), **keys) for rank in (3, 0))
    assert torch.equal(both(*tiny.batch()).nll_B, prompt(*tiny.batch()).nll_B)
    input_ids, mask, _, task = tiny.batch()
    made = [m.generate(input_ids, mask, task, max_new_tokens=6, num_beams=2) for m in (both, prompt)]
    assert torch.equal(*made)


def test_dept_has_two_learning_rates() -> None:
    model = tiny.model(CONFIGS["dept"], train=False)
    names = {group: {name for name, _ in members} for group, members in model.named_groups().items()}
    assert names == {"prompt": {"method.prompt_GPH"}, "embedding": {"method.down_GSR", "method.up_GRH"}}
    config = TrainConfig(learning_rate=1e-4, group_learning_rates={"prompt": 0.3, "embedding": 5e-4})
    assert Optim(config, model.named_groups()).learning_rates() == {"prompt": 0.3, "embedding": 5e-4}


def test_dept_count_of_the_paper() -> None:
    """T5-base: 60 vectors and rank 30 cost as much as a prompt of 100 vectors."""
    stack = StackDims(12, 12, 64)
    dims = Dims(768, stack, stack, num_tasks=1)
    assert methods.expected_parameters(DePTConfig(), dims) == 76_800 == 100 * 768


# ATTEMPT


@pytest.mark.parametrize("name", ["attempt", "attempt shared"])
@torch.no_grad()
def test_attempt_is_the_formula(name: str) -> None:
    model, (input_ids, mask, _, task) = tiny.model(CONFIGS[name]), tiny.batch()
    method, made = model.method, prompts_of(model)["inputs"]
    assert isinstance(method, Attempt)
    down, _, up, norm = method.attention
    for row in range(6):
        words = model.backbone.model.shared.weight[input_ids[row, mask[row] == 1]]
        largest = torch.stack([column.max() for column in words.T])
        squeezed = down.weight @ largest
        query = up.weight @ (squeezed / (1 + (-squeezed).exp()))
        query = (query - query.mean()) / (query.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
        own = method.get_parameter("prompt_GPH")[0 if "shared" in name else task[row]]
        prompts = [*method.sources_JPH, own]
        temperature = 1.0 if "shared" in name else 16 * 2.718281828
        logits = [(prompt.max(dim=0).values * query).sum() / temperature for prompt in prompts]
        total = sum(logit.exp() for logit in logits)
        expected = own + sum(logit.exp() / total * prompt for logit, prompt in zip(logits, prompts, strict=True))
        torch.testing.assert_close(made[row], expected, atol=1e-5, rtol=1e-5)


def test_attempt_leaves_its_sources_as_they_are() -> None:
    model = tiny.model(CONFIGS["attempt"], train=False)
    assert isinstance(model.method, Attempt)
    before = model.method.sources_JPH.clone()
    model(*tiny.batch()).total.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(model.method.sources_JPH, before)
    assert model.method.sources_JPH.grad is None
    assert torch.equal(model.trained_state()["method.sources_JPH"], before)


# MPT


@torch.no_grad()
def test_mpt_is_the_formula() -> None:
    model, (_, _, _, task) = tiny.model(MPTConfig(length=4, task_std=0.5)), tiny.batch()
    made = prompts_of(model)["inputs"]
    shared, u, v = (model.method.get_parameter(name) for name in ("prompt_PH", "tokens_KP", "features_KH"))
    for row, i, h in itertools.product(range(6), range(4), range(16)):
        expected = shared[i, h] * u[task[row], i] * v[task[row], h]
        torch.testing.assert_close(made[row, i, h], expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_mpt_with_vectors_of_one_is_one_shared_prompt() -> None:
    model, shared = tiny.model(CONFIGS["mpt"]), tiny.model(CONFIGS["prompt_tuning shared"])
    for name in ("tokens_KP", "features_KH"):
        model.method.get_parameter(name).fill_(1.0)
    assert torch.equal(model(*tiny.batch()).nll_B, shared(*tiny.batch()).nll_B)


def test_mpt_has_two_learning_rates() -> None:
    groups = tiny.model(CONFIGS["mpt"], train=False).named_groups()
    names = {group: {name for name, _ in members} for group, members in groups.items()}
    assert names == {"prompt": {"method.prompt_PH"}, "task": {"method.tokens_KP", "method.features_KH"}}


def test_weight_decay_leaves_mpts_tasks_near_the_shared_prompt() -> None:
    """Two steps of decay alone: P* shrinks, u and v stay at 1."""
    model = tiny.model(CONFIGS["mpt"], train=False)
    own = {name: p for members in model.named_groups().values() for name, p in members}
    before = {name: p.detach().clone() for name, p in own.items()}
    optim = Optim(TrainConfig(learning_rate=0.1, weight_decay=0.5), model.named_groups(), model.undecayed())
    assert model.undecayed() <= own.keys()
    for _ in range(2):
        for parameter in own.values():
            parameter.grad = torch.zeros_like(parameter)
        optim.step()
    torch.testing.assert_close(own["method.prompt_PH"].detach(), before["method.prompt_PH"] * 0.95**2)
    for name in model.undecayed():
        assert torch.equal(own[name].detach(), before[name])


def test_mpt_counts_on_t5_base() -> None:
    """100 vectors: 76,800 shared and 868 for each task."""
    stack = StackDims(12, 12, 64)
    config = MPTConfig(length=100)
    one, two = (methods.expected_parameters(config, Dims(768, stack, stack, num_tasks=n)) for n in (1, 2))
    assert (one, two - one) == (76_800 + 868, 868)


# Adapters

SLOW_ACTIVATIONS = {
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "gelu_new": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
    "swish": lambda z: z / (1 + (-z).exp()),
}


def adapter_parts(plain: Any, stack: str) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Self-attention and feed-forward of every layer of transformers' own model."""
    if hasattr(plain, "encoder"):
        return [(b.layer[0].SelfAttention, b.layer[-1].DenseReluDense) for b in getattr(plain, stack).block]
    blocks = plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers
    return [(b.attn if hasattr(b, "attn") else b.self_attn, b.mlp) for b in blocks] if stack == "decoder" else []


def slow_bottleneck(made: dict[str, Tensor], activation: str, y_BTH: Tensor) -> Tensor:
    """The formula for one set of weights, number by number of the added vector."""
    down, up = made["down_LJGHR"], made["up_LJGRH"]
    squeezed = [(y_BTH * column).sum(-1) + b for column, b in zip(down.T, made["down_bias_LJGR"], strict=True)]
    squeezed = [SLOW_ACTIVATIONS[activation](z) for z in squeezed]
    added = made["up_bias_LJGH"] + sum(z[..., None] * row for z, row in zip(squeezed, up, strict=True))
    if "scale_LJGH" in made:
        centred = added - added.mean(-1, keepdim=True)
        added = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * made["scale_LJGH"]
        added = added + made["shift_LJGH"]
    return y_BTH + added


def slow_adapted_nll(model: PromptedModel, row: int, family: str, activation: str, pfeiffer: bool) -> Tensor:
    """The loss of one row by transformers' own model, the row's adapters applied by `slow_bottleneck`."""
    plain, (input_ids, mask, labels, _) = tiny.plain(family), tiny.batch()
    made = {key: weights[row] for key, weights in prompts_of(model).items()}
    for stack in ("encoder", "decoder"):
        for layer, parts in enumerate(adapter_parts(plain, stack)):
            for number, part in enumerate(parts[1:] if pfeiffer else parts):
                own = {k.split()[1]: w[layer, number] for k, w in made.items() if k.startswith(stack)}

                def hook(module: Any, args: Any, output: Any, own: dict[str, Tensor] = own) -> Any:
                    if isinstance(output, tuple):
                        return (slow_bottleneck(own, activation, output[0]), *output[1:])
                    return slow_bottleneck(own, activation, output)

                part.register_forward_hook(hook)
    words, target = input_ids[row, mask[row] == 1], labels[row, labels[row] != -100]
    if family.startswith("t5"):
        return plain(input_ids=words[None], labels=target[None]).loss * len(target)
    unscored = torch.full_like(words, -100)
    ids, scored = torch.cat([words, target]), torch.cat([unscored, target])
    return plain(input_ids=ids[None], labels=scored[None]).loss * len(target)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("adapter")])
@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "gpt2", "llama"])
@torch.no_grad()
def test_adapter_is_the_formula(name: str, family: str) -> None:
    model, config = tiny.model(CONFIGS[name], family), CONFIGS[name]
    assert isinstance(config, AdapterConfig)
    for parameter, weight in model.method.named_parameters():
        if "bias" in parameter:  # zero at the start
            weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    nll = model(*tiny.batch()).nll_B
    assert (nll - tiny.model(FullConfig(), family)(*tiny.batch()).nll_B).abs().min() > 1e-3
    for row in (0, 1, 5):
        expected = slow_adapted_nll(model, row, family, config.activation, config.variant == "pfeiffer")
        torch.testing.assert_close(nll[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adapters_start_near_the_plain_backbone() -> None:
    model = tiny.model(AdapterConfig())
    for name, weight in model.method.named_parameters():
        assert weight.abs().max() <= (0 if "bias" in name else 0.02)
    torch.testing.assert_close(
        model(*tiny.batch()).nll_B, tiny.model(FullConfig())(*tiny.batch()).nll_B, rtol=1e-3, atol=0
    )


def test_adapter_counts_beside_t5_base() -> None:
    """Bottleneck 24 for eight tasks adds 6.5 % to T5-base; 0.83 % a task, layer normalisations among them."""
    stack, norms = StackDims(12, 12, 64), 62 * 768
    dims = Dims(768, stack, stack, num_tasks=8)
    added = methods.expected_parameters(AdapterConfig(bottleneck=24), dims)
    assert 1 + added / 222.9e6 == pytest.approx(1.065, abs=5e-4)
    assert (added / 8 + norms) / 222.9e6 == pytest.approx(0.0083, abs=1e-4)
    assert methods.expected_parameters(AdapterConfig(bottleneck=24, variant="pfeiffer"), dims) * 2 == added


@pytest.mark.parametrize("family", ["t5", "gpt2", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layer_normalisations_alone_can_be_trained_beside_a_method(family: str, precision: str) -> None:
    model = tiny.model(CONFIGS["adapter"], family, train="layer_norms", precision=precision)
    trained = {name for name in model.trained_state() if name.startswith("backbone.")}
    assert trained
    assert all("norm" in name or ".ln_" in name for name in trained)
    assert len(trained) == len([n for n, _ in model.backbone.named_parameters() if "norm" in n or ".ln_" in n])
    assert all(model.trained_state()[name].dtype == torch.float32 for name in trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(*tiny.batch()).total.backward()
    for name, weight in model.backbone.named_parameters():
        assert (weight.grad is not None) == (f"backbone.{name}" in trained), name
    assert set(model.named_groups()) == {"adapter", "backbone"}
    other = tiny.model(CONFIGS["adapter"], family, train="layer_norms", seed=2)
    other.load_trained_state(model.trained_state())


def test_the_recipe_says_that_layer_normalisations_are_trained() -> None:
    config = check({"method": "adapter", "tasks": ["a/b"], "backbone": {"trainable": "layer_norms"}})
    assert config.train_backbone == "layer_norms"
    assert check({"method": "adapter", "tasks": ["a/b"]}).train_backbone is False
    with pytest.raises(ConfigError, match=r"backbone.trainable.*'layer_norms'"):
        check({"method": "adapter", "tasks": ["a/b"], "backbone": {"trainable": "heads"}})


# HyperFormer++


def slow_hyperformer(model: PromptedModel, stack: str, layer: int, place: int, task: int) -> dict[str, Tensor]:
    """The weights of one adapter, from the formula."""
    method = model.method
    weight = {name: parameter for name, parameter in method.named_parameters() if name.startswith(f"stacks.{stack}")}
    own = {name.removeprefix(f"stacks.{stack}."): parameter for name, parameter in weight.items()}
    joined = torch.cat([method.get_parameter("task_KY")[task], own["layer_MY"][layer], own["place_JY"][place]])
    hidden = torch.stack([(joined * w).sum() + b for w, b in zip(own["mlp.0.weight"], own["mlp.0.bias"], strict=True)])
    joint = own["mlp.2.weight"] @ hidden.clamp(min=0) + own["mlp.2.bias"]
    joint = (joint - joint.mean()) / ((joint - joint.mean()).pow(2).mean() + 1e-6).sqrt()
    joint = joint * own["mlp.3.weight"] + own["mlp.3.bias"]

    def made(name: str) -> Tensor:
        pairs = zip(own[f"{name}.weight"], own[f"{name}.bias"], strict=True)
        return torch.stack([(joint * w).sum() + b for w, b in pairs])

    return {
        "down_LJGHR": made("down").view(16, 4), "down_bias_LJGR": made("down_bias"),
        "up_LJGRH": made("up").view(4, 16), "up_bias_LJGH": made("up_bias"),
        "scale_LJGH": made("scale"), "shift_LJGH": made("shift"),
    }  # fmt: skip


@torch.no_grad()
def randomise(model: PromptedModel) -> None:
    """Make everything of the method large, biases included."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.method.parameters():
        weight.normal_(0, 0.5, generator=generator)


@torch.no_grad()
def test_hyperformer_makes_its_adapters_by_the_formula() -> None:
    model, task = tiny.model(CONFIGS["hyperformer"]), tiny.batch()[3]
    randomise(model)
    made = prompts_of(model)
    for stack, num_layers in (("encoder", 3), ("decoder", 2)):
        for layer, place, row in itertools.product(range(num_layers), range(2), (0, 1, 5)):
            for key, expected in slow_hyperformer(model, stack, layer, place, int(task[row])).items():
                torch.testing.assert_close(made[f"{stack} {key}"][row, layer, place], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
@torch.no_grad()
def test_hyperformer_applies_its_adapters_by_the_formula(family: str) -> None:
    config = HyperFormerConfig(reduction=3, task_embedding_size=6, mlp_hidden_size=7, projected_embedding_size=5)
    model = tiny.model(config, family)
    randomise(model)
    nll = model(*tiny.batch()).nll_B
    for row in (0, 1, 5):
        expected = slow_adapted_nll(model, row, family, "gelu_new", pfeiffer=False)
        torch.testing.assert_close(nll[row], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_hyperformer_starts_near_the_plain_backbone_and_is_it_where_scale_and_shift_are_zero() -> None:
    model, plain = tiny.model(CONFIGS["hyperformer"]), tiny.model(FullConfig())(*tiny.batch()).nll_B
    torch.testing.assert_close(model(*tiny.batch()).nll_B, plain, rtol=0.05, atol=0)
    for name, weight in model.method.named_parameters():
        if "scale" in name or "shift" in name:
            weight.zero_()
    assert torch.equal(model(*tiny.batch()).nll_B, plain)


def test_hyperformer_counts_beside_t5_base() -> None:
    """T5-base, eight tasks, reduction 32: 0.29 % a task, the figure of the paper's abstract."""
    stack = StackDims(12, 12, 64)
    added = methods.expected_parameters(HyperFormerConfig(), Dims(768, stack, stack, num_tasks=8))
    assert added == 5_163_440
    assert added / 8 / 222.9e6 == pytest.approx(0.0029, abs=5e-5)


# LoRA

needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed: it is in the dev extra")


@needs_peft
@pytest.mark.parametrize("family", ["t5", "gpt2"])
@torch.no_grad()
def test_lora_is_the_formula(family: str) -> None:
    """W + (alpha / rank)·B·A in the place of W."""
    model, plain = tiny.model(LoRAConfig(rank=2, alpha=6), family), tiny.plain(family)
    layers = dict(model.method.get_submodule("layers").named_children())
    assert len(layers) == (14 if family == "t5" else 2)  # q and v of 3 + 2·2 attentions; c_attn of 2
    for name, layer in layers.items():
        layer.up.weight.normal_()
        update = 3 * layer.up.weight @ layer.down.weight
        weight = plain.get_submodule(name.replace("/", ".")).weight
        weight.add_(update if family == "t5" else update.T)
    input_ids, mask, labels, _ = tiny.batch()
    nll = model(*tiny.batch()).nll_B
    for row in range(6):
        words, target = input_ids[row, mask[row] == 1], labels[row, labels[row] != -100]
        if family == "t5":
            expected = plain(input_ids=words[None], labels=target[None]).loss
        else:
            scored = torch.cat([torch.full_like(words, -100), target])
            expected = plain(input_ids=torch.cat([words, target])[None], labels=scored[None]).loss
        torch.testing.assert_close(nll[row], expected * len(target), atol=1e-4, rtol=1e-4)


@needs_peft
def test_lora_starts_as_the_plain_backbone_and_counts_rank_times_both_sides() -> None:
    model = tiny.model(LoRAConfig(rank=2), train=False)
    torch.testing.assert_close(model(*tiny.batch()).nll_B, tiny.model(FullConfig())(*tiny.batch()).nll_B)
    counts, plain = model.num_parameters(), tiny.model(FullConfig()).num_parameters()
    assert counts.method == counts.trained == 14 * 2 * (16 + 12)
    assert counts.backbone == plain.backbone
    assert set(model.named_groups()) == {"adapter"}
    assert all(name.startswith("method.layers.") for name in model.trained_state())


@needs_peft
def test_lora_takes_target_modules_and_refuses_strangers() -> None:
    named = tiny.model(LoRAConfig(rank=2, target_modules=["wo"]))
    assert len(list(named.method.get_submodule("layers").children())) == 5
    every = tiny.model(LoRAConfig(rank=2, target_modules="all-linear"), "llama")
    assert len(list(every.method.get_submodule("layers").children())) == 14
    with pytest.raises(ConfigError, match=r"method.target_modules=\['c_attn'\].*\[q, v\] for T5"):
        tiny.model(LoRAConfig(rank=2, target_modules=["c_attn"]))


def test_lora_without_peft_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyprompt.method_configs.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"method.name=lora needs the package peft.*pip install 'polyprompt\[peft\]'"):
        check({"method": "lora", "tasks": ["a/b"]})
