"""Stages: what a rank keeps, backwards in two parts, and which message goes where in which order."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from soma.train import loss
from soma.train.parallel.pipeline.execute import PipelineStep
from soma.train.parallel.pipeline.heads import LanguageHead
from soma.train.parallel.pipeline.lower import forward_only
from soma.train.parallel.pipeline.schedule import layers_of_stages
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.split import SplitExperts, SplitLinear
from soma.train.parallel.pipeline.stage import StageWorker, cut, holders
from soma.train.parallel.pipeline.transfers import channels, made_by, needed_by
from soma.train.parallel.watch import limit_operations
from tests.train.pipeline_case import Case, batches, make_model, parts
from tests.train.pool import Pool

PLAN = SCHEDULES["zb-h1"](1, 8)


def make_worker(case: Case, split: bool, compiled: bool = False) -> tuple[torch.nn.Module, StageWorker]:
    """The whole model as one stage."""
    model = make_model(case)
    (stage,) = cut(model, PLAN, 0)

    def head(x_ND: Tensor, targets_N: Tensor) -> Tensor:
        return loss.cross_entropy_sum(model.logits(x_ND), targets_N)

    worker = StageWorker(
        stage, LanguageHead(head), nullcontext, split=range(8) if split else (), recompute=False, compiled=compiled
    )
    worker.microbatches = parts(case, batches(case)[0])
    worker.scale, worker.aux_scale = torch.tensor(0.01), torch.tensor(0.1)
    return model, worker


@pytest.mark.parametrize("name", ["dense", "gpt2", "moe"])
def test_backward_in_two_parts(name: str) -> None:
    """Together they are autograd's gradients; the first leaves the matrices alone, the second touches nothing else."""
    case = Case(model=name)
    model, worker = make_worker(case, split=False)
    for index in (0, 1):
        worker.forward(index, None)
        worker.backward(index, None)
        worker.weight(index)
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model, worker = make_worker(case, split=True)
    for index in (0, 1):
        worker.forward(index, None)
    for index in (0, 1):
        worker.backward(index, None)
    matrices = {
        f"{key}.{own}"
        for key, module in model.named_modules()
        if isinstance(module, SplitLinear | SplitExperts)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
    assert len(matrices) > 40
    first = {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
    assert {key for key, grad in first.items() if grad is None} == matrices
    for index in (0, 1):
        worker.weight(index)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=0)
        assert key in matrices or torch.equal(parameter.grad, first[key])


def test_head_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a microbatch that is too long for one piece gives the gradients of one that is not."""
    found = []
    for size in (512, 5):  # a microbatch has 24 positions
        monkeypatch.setitem(loss.CHUNK, "cpu", size)
        model, worker = make_worker(Case(), split=False)
        worker.total = torch.zeros(())
        for index in (0, 7):  # the last has few targets
            worker.forward(index, None)
            worker.backward(index, None)
        found.append((worker.total, {key: parameter.grad for key, parameter in model.named_parameters()}))
    (whole, expected), (pieces, gradients) = found
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-6)
        assert expected[key].abs().max() > 1e-4, key


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backward_in_two_parts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents, experts, MLA: one graph for all microbatches, the gradients of the eager stage."""
    graphs = []

    def compile_(function: Callable, **options: object) -> Callable:
        def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        return whole(function, backend=count, fullgraph=True, **options)

    whole = torch.compile
    torch._dynamo.reset()
    case = Case(model="moe", layers=3)
    results = []
    for compiled in (False, True):
        monkeypatch.setattr(torch, "compile", compile_)
        model, worker = make_worker(case, split=True, compiled=compiled)
        for index in range(3):
            worker.forward(index, None)
        for index in range(3):
            worker.backward(index, None)
            worker.weight(index)
        results.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert len(graphs) == 1
    for key, gradient in results[1].items():
        assert (gradient - results[0][key]).norm() <= 1e-5 * results[0][key].norm(), key


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_message_has_one_sender_and_one_reader(name: str) -> None:
    """In a channel's order; and what needs nothing from elsewhere is on no channel."""
    plan = SCHEDULES[name](4, 8)
    sent = [(channel, message) for channel, order in channels(plan).items() for message in order]
    assert len({message for _, message in sent}) == len(sent)
    wanted = set()
    for rank in range(4):
        made = [made_by(action) for action in plan.actions(rank)]
        for channel, order in channels(plan).items():
            if channel[0] == rank:
                places = [made.index(message) for message in order]
                assert places == sorted(places)
        for action in plan.actions(rank):
            need = needed_by(plan, action)
            if need is not None and plan.rank_of(need.stage, need.microbatch) != rank:
                wanted.add(((plan.rank_of(need.stage, need.microbatch), rank), need))
    assert wanted == set(sent)
    assert all(action.kind == "F" for rank in range(4) for action in forward_only(plan).actions(rank))


def test_cut_keeps_names() -> None:
    plan = SCHEDULES["zb-v"](4, 8)
    whole = dict(make_model(Case(tied=False)).named_parameters())
    seen: dict[str, int] = {}
    for rank in range(4):
        model = make_model(Case(tied=False))
        cut(model, plan, rank)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, whole[name])
            seen[name] = seen.get(name, 0) + 1
            assert holders(plan, layers_of_stages(10, 8), name, tied=False) == (rank,)
    assert seen == dict.fromkeys(whole, 1)


def test_copies_lie_where_they_are_summed() -> None:
    layers = layers_of_stages(10, 4)
    straight, dual = SCHEDULES["1f1b"](4, 8), SCHEDULES["dualpipe"](4, 8)
    assert holders(straight, layers, "embed_tokens.weight", tied=True) == (0, 3)
    assert holders(straight, layers, "norm.weight", tied=True) == (3,)
    assert holders(dual, layers, "layers.4.mlp.up_proj.weight", tied=False) == (1, 2)
    assert holders(dual, layers, "lm_head.weight", tied=False) == (0, 3)
    assert holders(SCHEDULES["zb-v"](4, 8), layers_of_stages(10, 8), "embed_tokens.weight", tied=True) == (0,)


@pytest.mark.parametrize("layers", [[[0, 1], [2, 3]], [[*range(5)], [*range(4, 10)]], [[*range(10)], []]])
def test_wrong_layers_are_named(layers: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="layers of stages: expected 0 to 9 in order"):
        cut(make_model(Case()), SCHEDULES["1f1b"](2, 4), 0, layers)
    with pytest.raises(ValueError, match="3 stages are given, 1f1b has 2"):
        cut(make_model(Case()), SCHEDULES["1f1b"](2, 4), 0, [[*range(4)], [*range(4, 8)], [8, 9]])


def evaluate(rank: int, world_size: int, case: Case) -> tuple[float, str, str]:
    pipeline = PipelineStep(make_model(case), case.plan())
    microbatches = parts(case, batches(case)[0])
    pipeline.model.eval()
    total = float(pipeline.evaluate(microbatches))
    assert all(parameter.grad is None for parameter in pipeline.model.parameters())
    messages = []
    for wrong in (lambda: pipeline.step(microbatches[:-1], 1.0, 1.0), lambda: wrong_ranks(case)):
        with pytest.raises(ValueError) as error:
            wrong()
        messages.append(str(error.value))
    pipeline.model.train()
    pipeline.step(microbatches, 1.0, 1.0)
    timeline = pipeline.timeline()
    assert all(0 <= span.start <= span.end for row in timeline.spans for span in row)
    assert [span.step for span in timeline.spans[rank]] == case.plan().actions(rank)
    assert timeline.peak <= case.plan().activations  # type: ignore[operator]
    return total, messages[0], messages[1]


def wrong_ranks(case: Case) -> None:
    PipelineStep(make_model(case), SCHEDULES["1f1b"](3, 8))


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "dualpipe"])
def test_evaluation_timeline_and_mistakes(pool: Pool, name: str) -> None:
    case = Case(name, "moe")
    model = make_model(case).eval()
    expected = 0.0
    with torch.no_grad():
        for part in parts(case, batches(case)[0]):
            logits_BTV = model(part.tokens, part.positions, part.document_ids)
            expected += float(loss.cross_entropy_sum(logits_BTV.flatten(0, 1), part.targets.flatten()))
    for total, few, other in pool.run(evaluate, 4, case):
        assert total == pytest.approx(expected, rel=1e-6)
        assert few == f"schedule {name} is for 8 microbatches, got 7"
        assert other == "schedule 1f1b is for 3 ranks, the pipeline has 4"


def without_receives_ahead(rank: int, world_size: int, case: Case) -> bool:
    """As over NCCL: a receive is posted when it is needed; with the same gradients as posted ahead."""
    pipeline = PipelineStep(make_model(case), case.plan())
    gradients = []
    for when_needed in (True, False):
        pipeline.transport.when_needed = when_needed
        pipeline.model.zero_grad(set_to_none=True)
        pipeline.step(parts(case, batches(case)[0]), 1.0, 1.0)
        gradients.append({name: parameter.grad for name, parameter in pipeline.model.named_parameters()})
    return all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_need_not_be_posted_ahead(pool: Pool, name: str) -> None:
    assert all(pool.run(without_receives_ahead, 4, Case(name, layers=8)))


def wait_for_nobody(rank: int, world_size: int) -> str:
    """Rank 1 never takes part."""
    case = Case("1f1b", ranks=2, microbatches=2, layers=2)
    pipeline = PipelineStep(make_model(case), case.plan())
    limit_operations(1.0)
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as error:
        pipeline.step(parts(case, batches(case)[0]), 1.0, 1.0)
    return str(error.value)


def test_a_rank_that_is_missing_is_named() -> None:
    own = Pool()
    assert own.run(wait_for_nobody, 2)[0].startswith("pipeline rank 0 waits for B1.0 of rank 1: ")
    own.close()
