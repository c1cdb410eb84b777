"""Which layers are divided, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.tensor import TensorParallel, TensorPlan, choose_plan
from meshbolt.tensor.layout import Layout
from meshbolt.tensor.plans import matches

WIDTH = 8


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Perceptron() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)


class LlamaLike(nn.Module):
    """Names of the llama family in modules of one's own."""

    class SelfAttention(nn.Module):
        def __init__(self, heads: int, key_value_heads: int) -> None:
            super().__init__()
            self.num_heads, self.num_key_value_heads = heads, key_value_heads
            self.q_proj = nn.Linear(WIDTH, 2 * heads)
            self.k_proj, self.v_proj = nn.Linear(WIDTH, 2 * key_value_heads), nn.Linear(WIDTH, 2 * key_value_heads)
            self.o_proj = nn.Linear(2 * heads, WIDTH)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
            self.down_proj = nn.Linear(24, WIDTH)

    def __init__(self, *, vocabulary: int = 32, heads: int = 4, key_value_heads: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.attn, self.mlp = self.SelfAttention(heads, key_value_heads), self.Mlp()
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def chosen(module: nn.Module, plan: Any = "auto", *, ranks: int = 2, trace: Any = None, **setting: Any) -> TensorPlan:
    def untraced() -> Any:
        raise AssertionError("nothing is to be traced")

    return choose_plan(module, TensorParallel(ranks, plan=plan, **setting), ranks=ranks, trace=trace or untraced)


def styles(plan: TensorPlan) -> dict[str, str]:
    return {name: entry.style for name, entry in plan.modules.items()}


# Mappings -----------------------------------------------------------------------------------------------------------------


def test_a_mapping_divides_what_its_patterns_match() -> None:
    plan = chosen(Stack(), {"layers.*.up": "colwise", "layers.*.down": "rowwise"})
    assert plan.name == "mapping"
    assert styles(plan) == {f"layers.{n}.{name}": style for n in range(3) for name, style in _PAIR}


_PAIR = (("up", "colwise"), ("down", "rowwise"))


def test_a_plan_is_shown_in_one_line_for_layers_that_are_alike() -> None:
    plan = chosen(Stack(), {"layers.*.up": "colwise", "layers.*.down": "rowwise"})
    assert plan.lines() == ["layers.*.up: colwise (x3)", "layers.*.down: rowwise (x3)"]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layers.3.attn.wq", "layers.*.attn.w?", True),
        ("layers.3.attn.wq", "layers.[0-5].attn.wq", True),
        ("layers.3.attn.wq", "layers.*.wq", False),
        ("layers.3.attn.wq", "*", False),
        ("layers.3.attn.WQ", "layers.*.attn.wq", False),
    ],
)
def test_a_pattern_is_compared_part_by_part(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) == expected


def test_a_pattern_without_a_match_is_refused_with_names_that_are_near() -> None:
    with pytest.raises(
        ConfigError, match=r"'layers\.\*\.upp' matches no module of Stack.*did you mean 'layers\.\*\.up'"
    ):
        chosen(Stack(), {"layers.*.upp": "colwise"})


def test_a_parameter_s_name_is_not_a_module_s() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.0\.up\.weight' matches no module"):
        chosen(Stack(), {"layers.0.up.weight": "colwise"})


def test_two_styles_for_one_module_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.0\.up' two styles, 'colwise' and 'rowwise'"):
        chosen(Stack(), {"layers.*.up": "colwise", "layers.0.up": "rowwise"})


def test_the_same_style_twice_is_none_too_many() -> None:
    assert len(chosen(Stack(), {"layers.*.up": "colwise", "layers.0.up": "colwise"}).modules) == 3


def test_a_module_that_is_to_be_whole_is_left_whole() -> None:
    plan = chosen(Stack(), {"layers.*.up": "colwise", "layers.*.down": "replicate"})
    assert set(styles(plan).values()) == {"colwise"}


def test_a_mapping_that_divides_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="found nothing to divide in Stack"):
        chosen(Stack(), {"layers.*.up": "replicate"})


def test_sizes_that_a_mapping_cannot_divide_are_refused_with_what_would_do() -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.0\.down\.weight has 32 columns.*3 equal parts.*tensor_parallel=\[1, 2, 4"
    ):
        chosen(Stack(), {"layers.*.down": "rowwise"}, ranks=3)


# Registered plans -----------------------------------------------------------------------------------------------------------


def test_a_family_s_layers_are_found_wherever_they_stand() -> None:
    plan = chosen(nn.ModuleDict({"inner": LlamaLike()}))
    assert plan.name == "llama"
    assert styles(plan) == {
        "inner.embed_tokens": "rowwise",
        "inner.attn.q_proj": "colwise",
        "inner.attn.k_proj": "colwise",
        "inner.attn.v_proj": "colwise",
        "inner.attn.o_proj": "rowwise",
        "inner.mlp.gate_proj": "colwise",
        "inner.mlp.up_proj": "colwise",
        "inner.mlp.down_proj": "rowwise",
        "inner.lm_head": "colwise_gather",
    }


def test_a_registered_plan_is_found_by_name() -> None:
    assert chosen(LlamaLike(), "llama").name == "llama"


def test_a_registered_plan_that_the_module_is_not_of_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found nothing to divide in Stack .plan 'gpt2'."):
        chosen(Stack(), "gpt2")


def test_an_unknown_plan_is_refused_with_a_name_that_is_near() -> None:
    with pytest.raises(ConfigError, match=r"no registered plan 'lama' \(did you mean 'llama'"):
        chosen(LlamaLike(), "lama")


@pytest.mark.parametrize("tied", [False, True])
def test_ends_whose_vocabulary_does_not_divide_stay_whole_and_say_why(tied: bool) -> None:
    plan = chosen(LlamaLike(vocabulary=33, tied=tied))
    assert "attn.q_proj" in plan.modules
    assert set(plan.left_out) == {"embed_tokens", "lm_head"}
    assert "33 rows, which cannot be divided into 2" in plan.left_out["lm_head"]
    assert any("lm_head: whole" in line and "33 rows" in line for line in plan.lines())


def test_tied_ends_are_divided_alike() -> None:
    plan = chosen(LlamaLike(tied=True))
    assert plan.modules["embed_tokens"].layouts == plan.modules["lm_head"].layouts == {"weight": Layout(0)}


def test_ends_that_are_tied_to_what_stays_whole_stay_whole() -> None:
    module = nn.ModuleDict({"model": LlamaLike(tied=True), "other": nn.Embedding(32, WIDTH)})
    module["other"].weight = module["model"].lm_head.weight
    plan = chosen(module)
    assert set(plan.left_out) == {"model.embed_tokens", "model.lm_head"}
    assert "also other.weight" in plan.left_out["model.lm_head"]


def test_a_head_s_bias_that_is_also_elsewhere_stays_whole() -> None:
    module = LlamaLike()
    module.lm_head = nn.Linear(WIDTH, 32)
    module.bias = module.lm_head.bias
    assert chosen(module).modules["lm_head"].layouts == {"weight": Layout(0)}


def test_an_end_of_another_width_is_not_the_model_s() -> None:
    module = nn.ModuleDict({"model": LlamaLike(), "lm_head": nn.Linear(WIDTH + 2, 32)})
    assert "lm_head" not in chosen(module).modules


def test_ends_alone_are_not_a_plan() -> None:
    found = {"up": "colwise"}
    module = nn.ModuleDict({"lm_head": nn.Linear(WIDTH, 32), "up": nn.Linear(WIDTH, WIDTH)})
    assert styles(chosen(module, trace=lambda: (found, {"lm_head": "why"}))) == found


def test_what_nothing_is_known_of_is_traced() -> None:
    plan = chosen(Stack(), trace=lambda: ({"layers.0.up": "colwise"}, {"layers.1.up": "a reason"}))
    assert plan.name == "traced"
    assert plan.left_out == {"layers.1.up": "a reason"}
    assert "layers.*.up: whole, a reason" in plan.lines()


def test_tracing_can_be_asked_for() -> None:
    plan = chosen(LlamaLike(), "traced", trace=lambda: ({"mlp.up_proj": "colwise"}, {}))
    assert styles(plan) == {"mlp.up_proj": "colwise"}


def named(kind: str, **children: nn.Module) -> nn.Module:
    """Make a module of a class of this name."""
    made = type(kind, (nn.Module,), {})()
    for name, child in children.items():
        setattr(made, name, child)
    return made


@pytest.mark.parametrize(
    ("owner", "found"),
    [("Mlp", True), ("FeedForward", True), ("OPTDecoderLayer", True), ("Head", False), ("Pooler", False)],
)
def test_names_that_anything_may_have_count_where_the_class_says_what_it_is(owner: str, found: bool) -> None:
    module = named(owner, fc1=nn.Linear(WIDTH, 16), fc2=nn.Linear(16, WIDTH))
    nothing: dict[str, str] = {"fc1": "colwise"}
    assert (chosen(module, trace=lambda: (nothing, {})).name != "traced") == found


@pytest.mark.parametrize(("owner", "found"), [("Attention", True), ("WindowAttn", True), ("Reader", False)])
def test_one_projection_counts_in_what_calls_itself_attention(owner: str, found: bool) -> None:
    module = named(owner, qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH))
    assert (chosen(module, trace=lambda: ({"proj": "colwise"}, {})).name == "vit") == found


def test_short_names_count_in_what_calls_itself_attention() -> None:
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "o")}
    assert chosen(named("T5Attention", **layers)).name == "t5"
    assert chosen(named("Mixer", **layers), trace=lambda: ({"q": "colwise"}, {})).name == "traced"


def test_layers_whose_sizes_do_not_fit_together_are_no_family() -> None:
    module = named("Attention", qkv=nn.Linear(WIDTH, 3 * WIDTH + 3), proj=nn.Linear(WIDTH, WIDTH))
    assert chosen(module, trace=lambda: ({"proj": "colwise"}, {})).name == "traced"


def test_a_child_of_another_kind_is_no_family() -> None:
    module = named("Mlp", fc1=nn.Conv1d(WIDTH, 16, 1), fc2=nn.Linear(16, WIDTH))
    assert chosen(module, trace=lambda: ({"fc2": "colwise"}, {})).name == "traced"


def test_torch_s_own_layers_are_divided_by_heads() -> None:
    plan = chosen(nn.TransformerDecoderLayer(WIDTH, 4, 16))
    assert styles(plan) == {
        "self_attn": "heads",
        "multihead_attn": "heads",
        "linear1": "colwise",
        "linear2": "rowwise",
    }


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_sequence_is_where_the_attention_beside_a_layer_has_it(batch_first: bool) -> None:
    plan = chosen(nn.TransformerEncoderLayer(WIDTH, 4, 16, batch_first=batch_first))
    assert plan.modules["linear2"].sequence_dim == (1 if batch_first else 0)


def test_attention_by_itself_is_divided_by_heads() -> None:
    assert styles(chosen(nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, 4)}))) == {"a": "heads"}


def test_attention_that_adds_keys_of_its_own_stays_whole() -> None:
    module = nn.ModuleDict(
        {"a": nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True), "b": nn.MultiheadAttention(WIDTH, 4)}
    )
    assert styles(chosen(module)) == {"b": "heads"}


# Heads ----------------------------------------------------------------------------------------------------------------------


def test_heads_that_the_ranks_do_not_divide_are_refused_with_sizes_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"'attn' has 6 heads, which 4 ranks cannot share.*tensor_parallel=\[1, 3\]"):
        chosen(LlamaLike(heads=6, key_value_heads=3), ranks=4, plan={"attn.q_proj": "colwise"})


def test_key_value_heads_that_the_ranks_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'attn' has 2 key/value heads, which 4 ranks cannot share"):
        chosen(LlamaLike(heads=8, key_value_heads=2), ranks=4)


def test_heads_are_looked_for_in_a_configuration_too() -> None:
    class Configuration:
        num_attention_heads = 3

    module = LlamaLike()
    del module.attn.num_heads, module.attn.num_key_value_heads
    module.attn.config = Configuration()
    with pytest.raises(ConfigError, match="'attn' has 3 heads"):
        chosen(module)


@pytest.mark.parametrize("plan", ["auto", {"self_attn": "heads"}])
def test_heads_of_torch_s_attention_that_the_ranks_do_not_divide_are_refused(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r"'self_attn' has 4 heads, which 3 ranks.*tensor_parallel=\[1, 2, 4\]"):
        chosen(nn.TransformerEncoderLayer(WIDTH, 4, 24), plan, ranks=3)


def test_heads_that_stay_whole_need_not_divide() -> None:
    chosen(LlamaLike(heads=3, key_value_heads=3), {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"})


def test_a_perceptron_with_a_configuration_that_has_heads_is_no_attention() -> None:
    module = LlamaLike()
    module.mlp.config = type("Configuration", (), {"num_attention_heads": 3})()
    assert "mlp.up_proj" in chosen(module).modules


# Tied parameters ------------------------------------------------------------------------------------------------------------


def test_tied_weights_that_a_mapping_divides_differently_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"embed_tokens.weight by dim 0, lm_head.weight whole.*Give all of them a style"
    ):
        chosen(LlamaLike(tied=True), {"embed_tokens": "rowwise"})


def test_tied_weights_may_be_divided_by_a_mapping_in_all_places() -> None:
    plan = chosen(LlamaLike(tied=True), {"embed_tokens": "rowwise", "lm_head": "colwise_gather"})
    assert set(plan.modules) == {"embed_tokens", "lm_head"}


# The loss -------------------------------------------------------------------------------------------------------------------


def test_a_loss_in_parts_leaves_the_head_s_output_divided() -> None:
    plan = chosen(LlamaLike(), loss_parallel=True)
    assert not plan.modules["lm_head"].gathers
    assert chosen(LlamaLike()).modules["lm_head"].gathers


def test_a_loss_in_parts_needs_a_head() -> None:
    with pytest.raises(ConfigError, match=r"no head of LlamaLike is in the plan.*33 rows"):
        chosen(LlamaLike(vocabulary=33), loss_parallel=True)
    with pytest.raises(ConfigError, match="no head of Stack is in the plan"):
        chosen(Stack(), {"layers.*.up": "colwise"}, loss_parallel=True)


def test_a_loss_in_parts_gathers_what_is_not_the_head() -> None:
    plan = chosen(LlamaLike(), {"mlp.up_proj": "colwise_gather", "lm_head": "colwise"}, loss_parallel=True)
    assert plan.modules["mlp.up_proj"].gathers


# The model's own plan -------------------------------------------------------------------------------------------------------


def own(**plan: str) -> nn.Module:
    module = Stack()
    module._tp_plan = {f"layers.*.{name}": style for name, style in plan.items()}
    return nn.ModuleDict({"model": module})


def test_a_model_s_own_plan_is_translated() -> None:
    plan = chosen(own(up="colwise", down="rowwise", missing="colwise"))
    assert plan.name == "the model's _tp_plan"
    assert styles(plan) == {f"model.layers.{n}.{name}": style for n in range(3) for name, style in _PAIR}


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("colwise_rep", "colwise_gather"),
        ("colwise_gather_output", "colwise_gather"),
        ("rowwise_split_input", "rowwise"),
        ("replicated_with_grad_allreduce", None),
    ],
)
def test_a_style_of_hugging_face_is_known_by_its_own_name(style: str, expected: str | None) -> None:
    plan = chosen(own(up=style, down="rowwise"), "_tp_plan")
    assert styles(plan).get("model.layers.0.up") == expected


def test_an_unknown_style_of_a_model_s_own_plan_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"_tp_plan of Stack gives 'layers\.\*\.up' the style 'moe_tp_experts'"):
        chosen(own(up="moe_tp_experts", down="rowwise"))


def test_layers_that_are_known_are_divided_beside_a_style_that_is_not() -> None:
    module = LlamaLike()
    module._tp_plan = {"experts": "moe_tp_experts"}
    assert chosen(module).name == "llama"


def test_a_model_s_own_plan_adds_what_no_registered_plan_knows() -> None:
    module = nn.ModuleDict({"known": LlamaLike(), "model": Stack()})
    module._tp_plan = {"known.attn.q_proj": "rowwise", "model.layers.*.up": "colwise"}
    plan = chosen(module)
    assert plan.name == "llama + the model's _tp_plan"
    assert styles(plan)["known.attn.q_proj"] == "colwise"
    assert styles(plan)["model.layers.1.up"] == "colwise"


def test_a_plan_that_a_model_does_not_bring_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="Stack holds no model with one"):
        chosen(Stack(), "_tp_plan")


def test_the_plan_leaves_the_module_as_it_was() -> None:
    module = LlamaLike(tied=True)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    chosen(module)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
