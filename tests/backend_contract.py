"""What every backend promises, as tests to inherit: `Backend` and `Runner` say it in words.

A subclass names a candidate and a place for it to run; `test_contract.py` has one for each.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Iterator

import pytest
import torch
from given_routing import random_choice

from hybrid_moe import HybridMoE, backends
from hybrid_moe.backends import Backend, Runner
from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.inputs import FP8, Inputs, MoEInputs, RoutedInputs
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import Tolerance, check
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import has_local_work, moe_reference, route

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
ACTIVATIONS = ("routing_logits", "hidden_states", "hidden_states_scale")


@functools.cache
def weights_of(problem: MoEProblem, where: str):
    return random_weights(problem, where)


@contextlib.contextmanager
def uninitialised_memory_filled() -> Iterator[None]:
    """`torch.empty` gives bytes of ones, which are NaN in all formats."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class BackendContract:
    """The tests. What a subclass may set:

    Attributes
    ----------
    candidate
        What is tested.
    device
        Where it believes to run; the tensors are at ``where``.
    problem, tolerance
        What is computed, and how close it has to be.
    twin
        Whether the reference quantises the activation between the GEMMs too, as the candidate does.
    takes_routed, takes_gate_first, takes_shared_experts, takes_weight_on_input
        What it can do; it has to refuse what it can't.
    refused
        Devices that it can't run on; none if it runs everywhere.
    library
        Package that may not be imported for those.
    alignment, moved
        Bytes that tensors may have to start at a multiple of, and the tensors that may start anywhere in the tests.
    capturable
        Whether a CUDA graph can hold a call.
    """

    candidate: Candidate
    device = DeviceKey("cpu")
    where = "cpu"
    problem = SMALL
    tolerance = Tolerance(max_relative_l2=0.01)
    twin = True
    takes_routed = True
    takes_gate_first = True
    takes_shared_experts = takes_weight_on_input = True
    refused: tuple[DeviceKey, ...] = (DeviceKey("gpu_of_2020", (8, 0)), DeviceKey("of_no_kind"))
    library: str | None = None
    alignment = 1
    moved = MoEInputs._fields[:8]
    capturable = True
    tokens = (1, 2, 7, 33)

    @pytest.fixture(autouse=True)
    def in_its_place(self, monkeypatch, installed):
        """The device is what the subclass says, and nothing stays memoised."""
        monkeypatch.setattr(DeviceKey, "of", classmethod(lambda cls, device: self.device))
        for memo in (backends.not_supported_reasons, backends.prepare):
            memo.cache_clear()
        yield
        for memo in (backends.not_supported_reasons, backends.prepare):
            memo.cache_clear()

    @pytest.fixture
    def installed(self):
        """What it needs is there; a subclass puts an emulation in place."""

    # -- helpers --

    @property
    def backend(self) -> Backend:
        return backends.get_backend(self.candidate.backend)

    def inputs(self, tokens: int, offset: int = 4, routing: str = "uniform", seed: int = 0) -> MoEInputs:
        workload = Workload(tokens, offset, routing, seed)  # type: ignore[arg-type]
        return make_inputs(workload, self.problem, weights_of(self.problem, self.where))

    def routed(self, tokens: int, offset: int = 4) -> RoutedInputs:
        ids, weights = random_choice(self.problem, tokens, tokens)
        return RoutedInputs(ids.to(self.where), weights.to(self.where), *self.inputs(tokens, offset)[2:])

    def layer(self, inputs: Inputs, **options) -> HybridMoE:
        return HybridMoE.from_inputs(inputs, self.problem, backend=self.candidate, **options)

    def call(self, inputs: Inputs, layer: HybridMoE | None = None, **options) -> torch.Tensor:
        """The result, written between guard rows; what it doesn't write is NaN."""
        guarded = torch.full(
            (inputs.num_tokens + 2, self.problem.hidden_size), torch.nan, dtype=torch.bfloat16, device=self.where
        )
        output = guarded[1:-1]
        layer = layer or self.layer(inputs, **options)
        with uninitialised_memory_filled():
            if isinstance(inputs, RoutedInputs):
                routed = dict(topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights)
                result = layer(None, inputs.hidden_states, inputs.hidden_states_scale, **routed, output=output)
            else:
                result = layer(*(getattr(inputs, name) for name in ACTIVATIONS), output=output)
        assert result is output
        assert bool(guarded[[0, -1]].isnan().all()), "written outside of the output"
        return output

    def assert_right(self, inputs: Inputs, output: torch.Tensor, problem: MoEProblem | None = None) -> None:
        problem = problem or self.problem
        reference = moe_reference(inputs, problem, quantize_intermediate=self.twin)
        verdict = check(output, reference, has_local_work(inputs, problem), self.tolerance)
        assert verdict.failures == (), verdict

    # -- what it says of itself --

    def test_it_can_run_here(self):
        assert list(backends.not_supported_reasons(self.problem, self.device, self.candidate)) == []
        assert isinstance(backends.prepare(self.problem, self.device, self.candidate), Runner)

    def test_its_configurations(self):
        configs = [dict(config) for config in self.backend.configs()]
        assert configs[0] == dict(self.backend.default_config)
        assert dict(self.candidate.config) in configs and backends.complete(self.candidate) == self.candidate
        assert backends.complete(Candidate(self.candidate.backend)).config == self.backend.default_config
        assert "torch" in self.backend.packages(self.candidate.config)

    def test_other_devices_are_refused_before_a_library_is_imported(self, monkeypatch):
        if self.library is not None:
            for name in [name for name in sys.modules if name.partition(".")[0] == self.library]:
                monkeypatch.delitem(sys.modules, name)
        for device in self.refused:
            reasons = self.backend.not_supported_reasons(self.problem, device, self.candidate.config)
            assert any(device.name in reason and "capability" in reason for reason in reasons), reasons
        assert self.library not in sys.modules

    def test_every_reason_is_given_and_prepare_gives_the_same(self):
        device = self.refused[0] if self.refused else self.device
        config = {**self.candidate.config, "colour": "red", "speed": 9}
        reasons = self.backend.not_supported_reasons(self.problem, device, config)
        for wanted in (
            "option 'colour' is unknown",
            "option 'speed' is unknown",
            *([device.name] * bool(self.refused)),
        ):
            assert any(wanted in reason for reason in reasons), (wanted, reasons)
        with pytest.raises(BackendUnsupportedError) as caught:
            self.backend.prepare(self.problem, device, config)
        assert caught.value.reasons == reasons
        assert all(reason in str(caught.value) for reason in reasons)

    def test_what_it_cannot_do_is_refused(self):
        assert bool(self.backend.routed_reasons(self.problem, self.candidate.config)) != self.takes_routed
        gate_first = dataclasses.replace(self.problem, gate_first=True)
        reasons = self.backend.not_supported_reasons(gate_first, self.device, self.candidate.config)
        assert any("gate_first" in reason for reason in reasons) != self.takes_gate_first
        if not self.takes_routed:
            with pytest.raises(BackendUnsupportedError, match="topk_ids"):
                self.layer(self.routed(3))

    # -- results --

    def test_token_counts(self):
        for tokens in self.tokens:
            inputs = self.inputs(tokens, seed=tokens)
            self.assert_right(inputs, self.call(inputs))

    def test_offsets(self):
        last = self.problem.num_experts - self.problem.num_local_experts
        for offset in {0, last // 2 + 1, last}:
            inputs = self.inputs(9, offset, seed=2)
            self.assert_right(inputs, self.call(inputs))

    @pytest.mark.parametrize("routing", ["zipf", "concentrated", "none"])
    def test_routing_loads(self, routing):
        inputs = self.inputs(19, routing=routing)
        output = self.call(inputs)
        self.assert_right(inputs, output)
        assert bool(output.any()) == (routing != "none")

    def test_a_bias_in_float32(self):
        inputs = self.inputs(9)
        inputs = inputs._replace(routing_bias=inputs.routing_bias.float())
        self.assert_right(inputs, self.call(inputs))

    def test_the_gate_first(self):
        if not self.takes_gate_first:
            return
        inputs, half = self.inputs(9), self.problem.intermediate_size
        swapped = inputs._replace(
            gemm1_weights=torch.cat([inputs.gemm1_weights[:, half:], inputs.gemm1_weights[:, :half]], dim=1),
            gemm1_weights_scale=inputs.gemm1_weights_scale.roll(half // self.problem.block, dims=1),
        )
        problem = dataclasses.replace(self.problem, gate_first=True)
        layer = HybridMoE.from_inputs(swapped, problem, backend=self.candidate)
        assert torch.equal(self.call(swapped, layer), self.call(inputs))

    def test_experts_chosen_before_the_call(self):
        if not self.takes_routed:
            return
        for tokens in (1, 26):
            routed = self.routed(tokens)
            self.assert_right(routed, self.call(routed))

    def test_shared_experts(self):
        """Behind the routed ones, which are all local; as chosen ones of weight one they give the same bits."""
        experts = self.problem.num_experts
        sizes = dict(num_local_experts=experts, intermediate_size=256)  # on a GPU DeepSeek-V3's by tensor parallel 8
        problem = dataclasses.replace(self.problem, **sizes, num_shared_experts=1)
        reasons = backends.not_supported_reasons(problem, self.device, self.candidate)
        assert any("num_shared_experts" in reason for reason in reasons) != self.takes_shared_experts
        if not self.takes_shared_experts:
            return
        for tokens in self.tokens:
            inputs = make_inputs(Workload(tokens, seed=tokens), problem, weights_of(problem, self.where))
            layer = HybridMoE.from_inputs(inputs, problem, backend=self.candidate)
            output = self.call(inputs, layer)
            self.assert_right(inputs, output, problem)
        assert torch.equal(self.call(inputs, layer), output)
        inputs = make_inputs(Workload(5), problem, weights_of(problem, self.where))
        ids, weights = route(inputs.routing_logits, inputs.routing_bias, inputs.routed_scaling_factor, problem)
        chosen = RoutedInputs(ids.int(), weights, *inputs[2:])
        output = self.call(chosen, HybridMoE.from_inputs(chosen, problem, backend=self.candidate))
        chosen = chosen._replace(
            topk_ids=torch.nn.functional.pad(chosen.topk_ids, (0, 1), value=experts),
            topk_weights=torch.nn.functional.pad(weights, (0, 1), value=1.0),
        )
        layer = HybridMoE.from_inputs(chosen, problem.all_routed, backend=self.candidate)
        assert torch.equal(self.call(chosen, layer), output)
        self.assert_right(chosen, output, problem.all_routed)

    def test_weights_on_the_input(self):
        """Of one expert of each token, a score as it is."""
        one = dict(top_k=1, n_group=1, topk_group=1, routing_method="sigmoid_no_renorm", weight_on_input=True)
        problem = dataclasses.replace(self.problem, **one)
        reasons = backends.not_supported_reasons(problem, self.device, self.candidate)
        assert any("weight_on_input" in reason for reason in reasons) != self.takes_weight_on_input
        if not self.takes_weight_on_input:
            return
        for tokens in (1, 40):
            inputs = make_inputs(Workload(tokens, 4, seed=tokens), problem, weights_of(problem, self.where))
            scale = inputs.hidden_states_scale.clone()
            layer = HybridMoE.from_inputs(inputs, problem, backend=self.candidate)
            output = self.call(inputs, layer)
            self.assert_right(inputs, output, problem)
            assert torch.equal(self.call(inputs, layer), output)
            assert torch.equal(inputs.hidden_states_scale, scale)

    def test_strides(self):
        inputs = self.inputs(7)
        wanted = self.call(inputs)

        def rows_apart(tensor, by):
            rows, columns = tensor.shape
            wide = torch.full((rows, columns + by), 7.0, device=self.where).to(tensor.dtype)
            wide[:, :columns] = tensor
            return wide[:, :columns]

        scale = inputs.hidden_states_scale
        for changes in (
            dict(hidden_states_scale=scale.t().contiguous().t()),
            dict(hidden_states_scale=scale.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3]),
            dict(hidden_states=rows_apart(inputs.hidden_states, 128)),
            dict(routing_logits=rows_apart(inputs.routing_logits, 16)),
            *(
                (
                    dict(hidden_states=rows_apart(inputs.hidden_states, 3)),
                    dict(routing_logits=rows_apart(inputs.routing_logits, 1)),
                )
                if self.alignment == 1
                else ()
            ),
        ):
            assert not all(tensor.is_contiguous() for tensor in changes.values())
            assert torch.equal(self.call(inputs._replace(**changes)), wanted), changes.keys()

    def test_tensors_at_odd_addresses(self):
        """Right, or an error that names the tensor: never a wrong result."""
        inputs = self.inputs(5)
        wanted = self.call(inputs)
        for name in self.moved:
            tensor = getattr(inputs, name)
            place = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=self.where)[1:].view(tensor.shape)
            moved = inputs._replace(**{name: place.copy_(tensor)})
            if self.alignment == 1:
                assert torch.equal(self.call(moved), wanted), name
                continue
            try:
                assert torch.equal(self.call(moved), wanted), name
            except ValueError as error:
                assert name in str(error) and "16 bytes" in str(error)

    # -- memory --

    def test_the_output_may_be_left_to_it(self):
        inputs = self.inputs(5)
        output = self.layer(inputs)(*(getattr(inputs, name) for name in ACTIVATIONS))
        assert output.shape == (5, self.problem.hidden_size) and output.dtype == torch.bfloat16
        assert torch.equal(output, self.call(inputs))

    def test_inputs_stay_as_they_are(self):
        inputs = self.inputs(5)
        before = copy.deepcopy(inputs)
        self.call(inputs)
        for one, other in zip(inputs[:8], before[:8], strict=True):
            kind = torch.uint8 if one.dtype == FP8 else one.dtype
            assert torch.equal(one.view(kind), other.view(kind))

    def test_no_tokens(self):
        assert self.call(self.inputs(0)).shape == (0, self.problem.hidden_size)

    def test_the_same_bits_again(self):
        inputs, others = self.inputs(17, routing="zipf"), self.inputs(3, seed=5)
        layer = self.layer(inputs)
        wanted = self.call(inputs, layer)
        self.call(others, layer)
        assert torch.equal(self.call(inputs, layer), wanted)
        assert torch.equal(self.call(inputs), wanted)

    def test_memory_that_is_given(self):
        inputs = self.inputs(9)
        runner = self.backend.prepare(self.problem, self.device, self.candidate.config)
        wanted = self.call(inputs)
        reserved = runner.reserved_bytes(9)
        assert 0 <= reserved <= runner.workspace_bytes(9)
        for size in {reserved, reserved // 2, 0}:  # too little is made up for
            memory = torch.full((size,), 255, dtype=torch.uint8, device=self.where)
            output = torch.full_like(wanted, torch.nan)
            runner.run_in(inputs, output, memory)
            assert torch.equal(output, wanted)
        layer = self.layer(inputs, max_num_tokens=9)
        assert layer.planned_bytes >= reserved and torch.equal(self.call(inputs, layer), wanted)

    def test_workspace_bytes(self):
        runner = self.backend.prepare(self.problem, self.device, self.candidate.config)
        sizes = [runner.workspace_bytes(tokens) for tokens in (1, 64, 4096)]
        assert all(type(size) is int for size in sizes) and 0 < sizes[0] <= sizes[1] < sizes[2]

    # -- on a GPU --

    @pytest.mark.gpu
    @pytest.mark.parametrize("tokens", [1, 16, 200, 901])
    def test_a_graph_replays_with_other_data(self, tokens):
        if not self.capturable:
            pytest.skip(f"{self.candidate} says that it can't be captured")
        static = self.inputs(tokens)
        layer = self.layer(static)
        activations = [getattr(static, name) for name in ACTIVATIONS]
        output = torch.empty((tokens, self.problem.hidden_size), dtype=torch.bfloat16, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(*activations, output=output)  # compiles and sets up
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(*activations, output=output)
        for seed, routing in ((3, "uniform"), (4, "concentrated"), (5, "none"), (6, "zipf")):
            fresh = self.inputs(tokens, routing=routing, seed=seed)._replace(routing_bias=static.routing_bias)
            wanted = self.call(fresh)
            for name in ACTIVATIONS:
                getattr(static, name).copy_(getattr(fresh, name))
            output.fill_(torch.nan)
            graph.replay()
            assert torch.equal(output, wanted)
            self.assert_right(fresh, output)

    @pytest.mark.gpu
    def test_the_host_does_not_wait_for_the_device(self):
        if not self.capturable:
            pytest.skip(f"{self.candidate} says that it reads back to the host")
        inputs = self.inputs(80)
        layer, activations = self.layer(inputs), [getattr(inputs, name) for name in ACTIVATIONS]
        layer(*activations)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = layer(*activations)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        self.assert_right(inputs, output)

    @pytest.mark.gpu
    def test_streams_at_once(self):
        cases = [self.inputs(80, seed=seed) for seed in range(4)]
        layers = [self.layer(inputs) for inputs in cases]
        wanted = [self.call(inputs, layer) for inputs, layer in zip(cases, layers, strict=True)]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in cases], []
        for _ in range(5):
            for stream, inputs, layer in zip(streams, cases, layers, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer(*(getattr(inputs, name) for name in ACTIVATIONS)))
        torch.cuda.synchronize()
        assert all(torch.equal(result, wanted[number % 4]) for number, result in enumerate(results))
