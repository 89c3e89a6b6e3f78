"""The built-in plan, and what may be changed in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenformer.errors import TokenFormerError
from tokenformer.language.byte_level import BYTE_END_ID
from tokenformer.quickstart.plan import RUNS, QuickstartPlan, load_plan, parse_plan

OUT = Path("runs/quickstart")


@pytest.fixture(scope="module")
def plan() -> QuickstartPlan:
    return load_plan()


def test_every_run_is_one_valid_stage_with_its_name(plan: QuickstartPlan) -> None:
    for name in RUNS:
        config = plan.run_config(name, OUT)
        (stage,) = config.resolve()
        assert stage.name == name
        assert stage.steps > 0
        assert config.data.path == "runs/quickstart/data"
        assert (config.model is None, config.init_from) == (
            (True, "runs/quickstart/grown-start") if name == "grown" else (False, None)
        )
        if config.model is not None:
            assert config.model.vocab_size > BYTE_END_ID
            assert config.data.sequence_length <= config.model.max_position_embeddings


def test_the_sizes_that_the_comparison_needs(plan: QuickstartPlan) -> None:
    sizes = {name: plan.model_of(name).num_parameters() for name in RUNS}
    assert 3 <= sizes["grown"] / sizes["small"] <= 4
    assert sizes["large"] == sizes["grown"]
    assert sizes["transformer"] == pytest.approx(sizes["large"], rel=0.01)
    grown, large = plan.model_of("grown"), plan.model_of("large")
    assert [grown.parameter_counts(), grown.flops_per_token(256)] == [
        large.parameter_counts(),
        large.flops_per_token(256),
    ]


def test_every_side_has_the_same_compute_within_a_step(plan: QuickstartPlan) -> None:
    flops, one_step = {}, {}
    for name in RUNS:
        config, model = plan.run_config(name, OUT), plan.model_of(name)
        (stage,) = config.resolve()
        one_step[name] = stage.data.batch_tokens * model.flops_per_token(stage.data.sequence_length)
        flops[name] = stage.steps * one_step[name]
    budget = flops["small"] + flops["grown"]
    for name in ("large", "transformer"):
        assert abs(flops[name] - budget) <= one_step[name] / 2


def test_only_what_is_compared_differs_between_the_runs(plan: QuickstartPlan) -> None:
    configs = [plan.run_config(name, OUT) for name in RUNS]
    for section in ("data", "precision", "parallel", "evaluation", "checkpoint", "logging", "seed"):
        assert len({repr(getattr(config, section)) for config in configs}) == 1
    assert {config.optimizer.weight_decay for config in configs} == {configs[0].optimizer.weight_decay}


def test_a_plan_is_what_its_text_says(plan: QuickstartPlan) -> None:
    assert parse_plan(plan.to_yaml()) == plan
    changed = load_plan(["runs.small.steps=7", "grow.factor=2", "corpus=[a.txt, b/]"])
    assert changed.run_config("small", OUT).resolve()[0].steps == 7
    assert changed.grow.factor == 2
    assert changed.corpus == ("a.txt", "b/")
    assert parse_plan(changed.to_yaml()) == changed
    assert changed.steps_from_scratch("large", OUT) < plan.steps_from_scratch("large", OUT)


def test_a_length_in_tokens(plan: QuickstartPlan) -> None:
    tokens = load_plan(["runs.small.steps=null", "runs.small.tokens=10240"])
    assert tokens.run_config("small", OUT).resolve()[0].steps == 10
    assert tokens.steps_from_scratch("large", OUT) < plan.steps_from_scratch("large", OUT)


def check_whole(override: str) -> None:
    plan = load_plan([override])
    for name in RUNS:
        plan.run_config(name, OUT)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runs.small.stepz=3", "quickstart: runs.small.stepz: unknown field; did you mean 'steps'?"),
        ("runs.small.steps=0", "quickstart: runs.small.steps: found 0; input should be greater than 0"),
        (
            "runs.small.steps=null",
            "quickstart: runs.small: found none of them, expected exactly one of steps",
        ),
        ("shared.optimizer.lrr=1", "quickstart: runs.small.optimizer.lrr: unknown field; did you mean 'lr'?"),
        (
            "runs.large.model.hidden=1",
            "quickstart: runs.large.model.hidden: unknown field; did you mean 'hidden_",
        ),
        ("runs.transformer.model.num_attention_heads=7", "7 does not divide hidden_size 136"),
        ("runs.large.steps=3", "quickstart: runs.large.steps: not to be set, the quickstart decides it"),
        ("runs.small.stages=[]", "quickstart: runs.small.stages: not to be set"),
        ("runs.smal.steps=3", "found 'smal'; input should be 'small', 'grown', 'large' or 'transformer'"),
        ("shared.data=0", "quickstart: runs.small.data: found 0"),
        ("grow.factor=0.5", "quickstart: grow"),
        (
            "grow.init=copies",
            "quickstart: grow: qkv: found 224, but init 'copies' needs a whole multiple of the 64",
        ),
        ("new_token=3", "quickstart: new_token: unknown field; did you mean 'new_tokens'?"),
        ("evaluation_tokens=0", "quickstart: evaluation_tokens: found 0"),
    ],
)
def test_wrong_fields_are_named_as_they_are_written(override: str, message: str) -> None:
    with pytest.raises(TokenFormerError) as failure:
        check_whole(override)
    assert message in str(failure.value)
