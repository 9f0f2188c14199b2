"""Solutions for flashinfer-bench: accepted and built by it, standing alone, and saying what the policy says."""

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.data import Definition, Solution
from test_cli import cli, cli_json, fails
from test_flashinfer_trtllm import B200, fake_flashinfer  # noqa: F401
from test_kernels import SMALL
from test_policy import make_policy, make_regime
from test_traces import trace, trace_of, written

from hybrid_moe import fused_moe
from hybrid_moe.backends import BACKENDS
from hybrid_moe.backends.flashinfer_trtllm import FlashinferTrtllm
from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.flashinfer_bench.bundle import NETWORK, BundleError, bundle, check_sources, third_party_imports
from hybrid_moe.flashinfer_bench.definition import definition_of
from hybrid_moe.flashinfer_bench.runtime import BakedLayer
from hybrid_moe.flashinfer_bench.solution import candidate_solution, dumps_solution, policy_solution, policy_table
from hybrid_moe.flashinfer_bench.traces import candidate_of
from hybrid_moe.inputs import MoEInputs
from hybrid_moe.kernels.grouped_gemm import libraries
from hybrid_moe.learn.learner import learn_from_files
from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.policy.select import choose
from hybrid_moe.policy.store import load_policy
from hybrid_moe.problem import MoEProblem
from hybrid_moe.reference import moe_reference

ROOT = Path(__file__).parents[1]
DEVICES = ("nvidia_b200", "nvidia_h100_80gb_hbm3", "nvidia_h200")
DEPENDENCIES = {
    "nvidia_b200": ["torch", "flashinfer-python", "triton", "sglang-kernel"],
    "nvidia_h100_80gb_hbm3": ["torch", "triton"],
    "nvidia_h200": ["torch", "triton", "sgl-deep-gemm"],
}
TRITON = Candidate("triton_fused", {"gemm": "triton"})
DEEP = Candidate("triton_fused", {"gemm": "deep_gemm"})
CANDIDATES = [Candidate(name, config) for name, backend in BACKENDS.items() for config in backend.configs()]
TRACE_APPLY = json.loads((ROOT / "tests" / "data" / "flashinfer_trace_apply.json").read_text())
CPU_POLICY = make_policy(
    device="cpu", problem=SMALL, definition=SMALL.definition, candidates=[TRITON, DEEP], default=TRITON,
    regimes=[make_regime(5, None, choice=DEEP)],
)  # fmt: skip


def shipped(device):
    return load_policy(ROOT / "policies" / device / f"{MoEProblem().definition}.json")


def sources_of(solution):
    return {source["path"]: source["content"] for source in solution["sources"]}


def literals(solution):
    """The constants of main.py, read without running it."""
    tree = ast.parse(sources_of(solution)["main.py"])
    found = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id in ("PROBLEM", "TABLE", "OTHERWISE"):
            found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found


@pytest.fixture
def fib_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "fib"))
    yield tmp_path / "fib"
    BuilderRegistry.get_instance().cleanup()


# ---- Accepted and built by flashinfer-bench ----


@pytest.mark.parametrize("device", DEVICES)
def test_flashinfer_bench_accepts_and_builds_it(device, fib_cache):
    policy = shipped(device)
    made = Solution.model_validate_json(dumps_solution(policy_solution(policy)))
    assert made.name == f"hybrid_moe_{device}" and made.definition == policy.definition
    assert made.author == "hybrid_moe" and made.spec.language == "triton"
    assert made.spec.dependencies == DEPENDENCIES[device]
    assert made.spec.destination_passing_style is False
    definition = Definition.model_validate(definition_of(policy.problem))
    runnable = BuilderRegistry.get_instance().build(definition, made)
    assert runnable.metadata.build_type == "triton"
    with pytest.raises(TypeError, match="routing_logits: expected"):  # the entry point is there, and looks
        runnable(*[None] * len(definition.inputs))


@pytest.mark.parametrize("choice", CANDIDATES, ids=str)
def test_every_candidate_can_be_a_solution(choice, fib_cache):
    solution = candidate_solution(choice, MoEProblem())
    made = Solution.model_validate(solution)
    assert candidate_of(made.name, {}) == choice  # so `learn` knows its traces
    assert made.spec.dependencies == list(BACKENDS[choice.backend].packages(choice.config))
    assert made.spec.language == ("triton" if "triton" in made.spec.dependencies else "python")
    assert literals(solution)["OTHERWISE"] == ()
    BuilderRegistry.get_instance().build(Definition.model_validate(definition_of(MoEProblem())), made)


def test_the_definition_is_that_of_the_data_set():
    definition = Definition.model_validate(definition_of(MoEProblem()))
    assert definition.name == "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
    assert definition.op_type == "moe" and definition.var_axes == ["seq_len"]
    assert tuple(definition.inputs) == MoEInputs._fields and list(definition.outputs) == ["output"]
    shapes = dict(zip(definition.inputs, definition.get_input_shapes({"seq_len": 7}), strict=True))
    assert shapes["hidden_states_scale"] == [56, 7] and shapes["gemm1_weights_scale"] == [32, 32, 56]
    assert shapes["gemm2_weights"] == [32, 7168, 2048] and shapes["local_expert_offset"] is None
    assert definition.get_output_shapes({"seq_len": 7}) == [[7, 7168]]


UNGROUPED = {"n_group": 1, "topk_group": 1}
SOFTMAX = UNGROUPED | {"routing_method": "softmax"}


@pytest.mark.parametrize("changes", [{}, {"gate_first": True}, UNGROUPED, {"topk_group": 4}, SOFTMAX])
def test_the_definitions_reference_is_ours(changes):
    problem = dataclasses.replace(SMALL, **changes)
    namespace = {}
    exec(definition_of(problem)["reference"], namespace)
    inputs = make_inputs(Workload(9, 8), problem, random_weights(problem, "cpu"))
    inputs.routing_logits[:, 3] = inputs.routing_logits[:, 9]  # equal scores
    wanted = moe_reference(inputs, problem)
    assert wanted.norm() > 1 and torch.equal(namespace["run"](*inputs), wanted.bfloat16())


# ---- It says what the policy says ----


@pytest.mark.parametrize("device", DEVICES)
def test_the_table_is_the_policy(device):
    policy = shipped(device)
    constants = literals(policy_solution(policy))
    assert MoEProblem(**constants["PROBLEM"]) == policy.problem
    rows = list(constants["TABLE"])
    assert rows[0][0] == 0 and all(a[1:] != b[1:] for a, b in zip(rows, rows[1:], strict=False))
    row = None
    for tokens in range(20001):
        if rows and rows[0][0] == tokens:
            row = rows.pop(0)
        wanted = choose(policy, policy.problem, DeviceKey(device), tokens).choice
        # T = 0 runs nothing: the row that holds T = 1 begins there.
        assert tokens == 0 or Candidate(*row[1:]) == wanted, tokens
    assert not rows


def test_a_gap_goes_to_the_default():
    policy = make_policy(
        candidates=[TRITON, DEEP], default=DEEP, regimes=[make_regime(4, 8, choice=TRITON), make_regime(9, 9, DEEP)]
    )
    assert policy_table(policy) == ((0, DEEP), (4, TRITON), (9, DEEP))


def test_traces_of_its_candidates_are_learned_to_the_same_choices(tmp_path):
    """The records of the shipped policy, as the candidates' Solutions would have left them."""
    device, hardware = "nvidia_h100_80gb_hbm3", "NVIDIA H100 80GB HBM3"
    records = read_records(ROOT / "benchmarks" / "results" / device / "regenerate_quick.jsonl")
    timed = [record for record in records if record.timing == "cuda_graph" and record.latency_us is not None]
    names = {choice: candidate_solution(choice, MoEProblem())["name"] for choice in {record.choice for record in timed}}
    traces = [trace_of(record).model_copy(update={"solution": names[record.choice]}) for record in timed]
    policy = shipped(device)
    # The policy's own Solution is no candidate: named, not learned from.
    mixed = trace(policy_solution(policy)["name"], 16, 0.001, hardware=hardware)
    path = written(tmp_path, [*traces, mixed])
    options = policy.learner.model_copy(update={"timing": None})
    with pytest.warns(UserWarning, match=f"not learned from.*hybrid_moe_{device}"):
        learned = learn_from_files([path], options)
    assert policy_table(learned) == policy_table(policy) and learned.device == device


# ---- It stands alone ----


@pytest.mark.parametrize("device", DEVICES)
def test_same_bytes_in_any_place(device, tmp_path):
    """In another process, folder and order of hashes than this one's."""
    code = "import sys; from hybrid_moe.cli import main; sys.argv[0] = 'hybrid-moe'; main()"
    subprocess.run(
        [sys.executable, "-c", code, "solution", "--device", device, "-o", "s.json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path)},
    )
    text = dumps_solution(policy_solution(shipped(device)))
    assert (tmp_path / "s.json").read_bytes() == text.encode()
    assert dumps_solution(policy_solution(shipped(device))) == text


@pytest.mark.parametrize("device", DEVICES)
def test_it_imports_what_it_declares_and_holds_no_path(device):
    """Looked at apart from `check_sources`, by another way."""
    solution = policy_solution(shipped(device))
    sources = sources_of(solution)
    known = {"sglang-kernel": "sgl_kernel", "sgl-deep-gemm": "deep_gemm", "flashinfer-python": "flashinfer"}
    allowed = {known.get(name, name) for name in solution["spec"]["dependencies"]}
    text = "\n".join(sources.values())
    named = re.findall(r"^\s*(?:import|from) ([a-z_]\w*)|(?:import_module|find_spec)\(\"([a-z_]\w*)", text, re.M)
    imported = {a or b for a, b in named} - {"up"}
    assert imported - set(sys.stdlib_module_names) == allowed
    assert not imported & NETWORK
    for place in (str(ROOT), str(Path.home()), "/tmp", "http"):
        assert place not in text
    assert text.isascii() and all(source.strip() for source in sources.values())
    assert list(sources) == sorted(sources)
    # Every relative import is of something in it.
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = Path(path).parents[node.level - 1].joinpath(*(node.module or "").split("."))
                for alias in node.names:
                    assert {f"{base}.py", f"{base / alias.name}.py"} & set(sources), (path, ast.unparse(node))


def test_what_is_not_chosen_is_left_out():
    sources = sources_of(candidate_solution(TRITON, MoEProblem()))
    assert not any("libraries" in path or "backends/flashinfer" in path for path in sources)
    assert "Left out" in sources["hybrid_moe/kernels/grouped_gemm/sgl.py"]
    assert "def problem_of_definition" not in sources["hybrid_moe/problem.py"]  # nothing there names it
    assert (
        "Sgl" not in sources_of(candidate_solution(DEEP, MoEProblem()))["hybrid_moe/kernels/grouped_gemm/libraries.py"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy", "a.py imports numpy; declared: torch"),
        ("def f():\n    from deep_gemm.x import y", "imports sgl-deep-gemm"),
        ("import importlib\nimportlib.util.find_spec('sgl_kernel')", "imports sglang-kernel"),
        ("import importlib as i\ni.import_module(name)", "a.py, line 2: expected an import by a literal"),
        ("__import__('o' + 's')", "expected an import by a literal"),
        ("import urllib.request", "imports urllib, by which it could use the network"),
        ("x = '/home/someone/file'", "holds the path '/home/someone/file'"),
        ("x = 'C:\\\\file'", "holds the path"),
        ("# see https" + "://example.org", "holds a URL"),
        ("x = '\u00b5s'", "not ASCII|aren't ASCII"),
    ],
)
def test_check_sources(text, message):
    with pytest.raises(BundleError, match=re.escape(message) if "|" not in message else message):
        check_sources({"a.py": text}, ["torch"])
    check_sources({"a.py": "import os\nimport torch.nn\nfrom . import b\nx = '/usr/local/cuda'\n"}, ["torch"])


def test_bundle_keeps_what_is_named():
    sources = bundle({"candidate": ["BackendUnsupportedError"]})
    assert list(sources) == ["candidate.py"]
    names = {n.name for n in ast.parse(sources["candidate.py"]).body if hasattr(n, "name")}
    assert names == {"Candidate", "BackendUnsupportedError"}  # the error's annotation names Candidate
    assert (
        "PEER_PREFIX" not in sources["candidate.py"] and "# Of the backends of records" not in sources["candidate.py"]
    )
    assert third_party_imports("candidate.py", sources["candidate.py"]) == set()
    with pytest.raises(BundleError, match="imports .* from an __init__"):
        bundle({"api": ["fused_moe"]})


# ---- It runs ----


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The CPU policy's Solution, in a process without this package: fewer tokens and more than its bound."""
    folder = tmp_path_factory.mktemp("solution")
    weights = random_weights(SMALL, "cpu")
    inputs = [make_inputs(Workload(tokens, 4, seed=tokens), SMALL, weights) for tokens in (3, 24)]
    (folder / "solution.json").write_text(dumps_solution(policy_solution(CPU_POLICY)))
    (folder / "definition.json").write_text(json.dumps(definition_of(SMALL)))
    options = {name: getattr(SMALL, name) for name in ("top_k", "n_group", "topk_group")}
    torch.save({"inputs": [i._asdict() for i in inputs], "options": options}, folder / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "solution_process.py", folder],
        cwd=folder, capture_output=True, text=True,
        env=environment | {"TRITON_INTERPRET": "1", "FIB_CACHE_PATH": str(folder / "fib")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return inputs, torch.load(folder / "outputs.pt"), json.loads(result.stdout)


@pytest.mark.interpreter
def test_built_solution_is_right_without_this_package(ran):
    inputs, outputs, report = ran
    assert report["build_type"] == "triton"
    assert any(name.endswith(".main.kernels.pipeline") for name in report["modules"])
    assert report["left"] == []  # flashinfer-bench's cleaning up finds all of its modules
    for given, built, reference in zip(inputs, outputs["built"], outputs["reference"], strict=True):
        wanted = moe_reference(given, SMALL)
        assert built.dtype == torch.bfloat16 and built.shape == wanted.shape
        assert (built.float() - wanted).norm() <= 0.04 * wanted.norm()
        assert torch.equal(reference, wanted.bfloat16())  # the Definition's own
        assert torch.equal(built, fused_moe(*given, top_k=4, n_group=4, topk_group=2, backend="triton_fused"))


@pytest.mark.interpreter
def test_by_keyword_and_without_a_package_it_is_the_same(ran):
    _, outputs, _ = ran
    for built, keywords in zip(outputs["built"], outputs["keywords"], strict=True):
        assert torch.equal(built, keywords)


@pytest.mark.interpreter
def test_what_cannot_run_is_replaced_once_and_said(ran):
    _, _, report = ran
    assert len(report["warnings"]) == 2  # one for each of the two that loaded it
    assert re.match(
        r"triton_fused\[gemm=deep_gemm\] can't run here \(device cpu: expected compute capability 9.0, got none\): "
        r"triton_fused\[gemm=triton\] runs in its place",
        report["warnings"][0],
    )


def baked(problem, table, otherwise=()):
    return BakedLayer(dataclasses.asdict(problem), table, otherwise, list(BACKENDS.values()))


class Named:
    """A backend that writes which of its configurations ran, and refuses some."""

    name = "named"

    def __init__(self, *refused):
        self.refused, self.ran = refused, []

    def prepare(self, problem, device, config):
        which = config["which"]
        if which in self.refused:
            raise BackendUnsupportedError(Candidate(self.name, config), [f"no {which} here"])
        return self._Runner(which, self.ran)

    @dataclasses.dataclass
    class _Runner:
        which: str
        ran: list

        def run(self, inputs, output):
            self.ran.append(self.which)


def baked_of(backend, table, otherwise=""):
    rows = [(first, "named", {"which": which}) for first, which in table]
    return BakedLayer(dataclasses.asdict(SMALL), rows, [("named", {"which": which}) for which in otherwise], [backend])


def test_a_row_of_the_table_holds_from_its_first_t_up_to_the_next_ones():
    layer = baked_of(backend := Named(), [(0, "a"), (4, "b"), (5, "c"), (9, "a")])
    weights = random_weights(SMALL, "cpu")
    for tokens in (0, 1, 3, 4, 5, 8, 9, 10):
        layer.run(make_inputs(Workload(tokens, 4), SMALL, weights), {})
    assert backend.ran == ["a", "a", "b", "c", "c", "a", "a"]  # nothing runs at T = 0


@pytest.mark.parametrize(
    ("refused", "wanted"),
    [("", "abc"), ("c", "abb"), ("b", "aac"), ("a", "bbc"), ("bc", "aaa"), ("ab", "ccc"), ("ac", "bbb")],
)
def test_what_runs_in_place_of_a_choice_is_the_first_that_can_in_the_given_order(refused, wanted):
    """Of b, a and c, in this order, which is not that of the table."""
    layer = baked_of(backend := Named(*refused), [(0, "a"), (2, "b"), (3, "c")], otherwise="bac")
    weights = random_weights(SMALL, "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tokens in (1, 2, 3):
            layer.run(make_inputs(Workload(tokens, 4), SMALL, weights), {})
    assert "".join(backend.ran) == wanted
    assert [str(w.message).partition(" can't run here")[0] for w in caught] == [
        f"named[which={which}]" for which in "abc" if which in refused
    ]


def test_where_nothing_can_run_every_reason_is_said():
    layer = baked_of(Named(*"abc"), [(0, "a"), (2, "b")], otherwise="bc")
    with pytest.raises(BackendUnsupportedError) as caught:
        layer.run(make_inputs(Workload(1, 4), SMALL, random_weights(SMALL, "cpu")), {})
    for which in "abc":
        assert f"named[which={which}]: no {which} here" in str(caught.value)


def test_the_order_of_what_runs_instead_is_the_policys():
    """The default first, then the candidates in their order; what no regime runs is left out."""
    cutlass = Candidate("flashinfer_cutlass")
    policy = make_policy(
        candidates=[cutlass, DEEP, Candidate("torch_reference"), TRITON], default=TRITON,
        regimes=[make_regime(5, 9, choice=DEEP), make_regime(10, None, choice=cutlass)],
    )  # fmt: skip
    constants = literals(policy_solution(policy))
    assert [Candidate(*row) for row in constants["OTHERWISE"]] == [TRITON, cutlass, DEEP]
    assert [row[0] for row in constants["TABLE"]] == [0, 5, 10]


def test_one_candidate_raises_where_it_cannot_run():
    inputs = make_inputs(Workload(3, 4), SMALL, random_weights(SMALL, "cpu"))
    layer = baked(SMALL, [(0, "triton_fused", {"gemm": "deep_gemm"})])
    for _ in range(2):
        with pytest.raises(BackendUnsupportedError, match="gemm=deep_gemm.*expected compute capability 9.0"):
            layer.run(inputs, {})


def test_the_b200_table_without_sgl_kernel(fake_flashinfer, monkeypatch):  # noqa: F811
    """Its T = 14-32 go to flashinfer, the policy's default, and a warning says why; the emulation stands for it."""
    fake_flashinfer()
    monkeypatch.setattr(DeviceKey, "of", classmethod(lambda cls, device: B200))
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    libraries._sgl_load_reasons.cache_clear()
    constants = literals(policy_solution(shipped("nvidia_b200")))
    small = dataclasses.replace(SMALL, intermediate_size=128)
    layer = baked(small, constants["TABLE"], constants["OTHERWISE"])
    weights = random_weights(small, "cpu")
    with pytest.warns(RuntimeWarning) as caught:
        for tokens in (13, 14, 33):
            inputs = make_inputs(Workload(tokens, 4), small, weights)
            wanted = moe_reference(inputs, small)
            assert (layer.run(inputs, {}).float() - wanted).norm() <= 0.08 * wanted.norm()
    libraries._sgl_load_reasons.cache_clear()
    (message,) = [str(w.message) for w in caught if "in its place" in str(w.message)]  # once, not at every call
    assert message.startswith("triton_fused[gemm=sgl_kernel] can't run here (sgl_kernel")
    assert message.endswith("flashinfer_trtllm runs in its place")


def test_options_are_checked_and_no_tokens_give_nothing():
    weights = random_weights(SMALL, "cpu")
    layer = baked(SMALL, [(0, "torch_reference", {})])
    inputs = make_inputs(Workload(3, 4), SMALL, weights)
    assert torch.equal(layer.run(inputs, {"top_k": 4}), moe_reference(inputs, SMALL).bfloat16())
    with pytest.raises(ValueError, match="top_k: expected 4, got 8"):
        layer.run(inputs, {"top_k": 8})
    with pytest.raises(ValueError, match="gemm1_alpha: expected no such option, got 1.0"):
        layer.run(inputs, {"gemm1_alpha": 1.0})
    with pytest.raises(TypeError, match="hidden_states: expected dtype"):
        layer.run(inputs._replace(hidden_states=inputs.hidden_states.float()), {})
    assert layer.run(make_inputs(Workload(0, 4), SMALL, weights), {}).shape == (0, 256)


# ---- flashinfer.trace_apply ----


def test_trace_apply_can_call_it_and_fused_moe():
    """It gives every input that isn't None by keyword, and takes a Solution's or a callable's return value."""
    assert TRACE_APPLY["definition"] == MoEProblem().definition
    given = [name for name, optional in TRACE_APPLY["optional"].items() if not optional]
    inspect.signature(fused_moe).bind(**dict.fromkeys(given))
    main = ast.parse(sources_of(policy_solution(shipped("nvidia_b200")))["main.py"])
    (run,) = [node for node in main.body if isinstance(node, ast.FunctionDef)]
    assert tuple(a.arg for a in run.args.args) == MoEInputs._fields and run.args.kwarg
    constants = literals(policy_solution(shipped("nvidia_b200")))
    assert set(given) - set(MoEInputs._fields) <= set(constants["PROBLEM"])


def test_the_flashinfer_backend_does_not_call_itself(fake_flashinfer):  # noqa: F811
    fake_flashinfer(
        """
        import functools
        import trtllm_emulation

        @functools.wraps(trtllm_emulation.trtllm_fp8_block_scale_moe)
        def trtllm_fp8_block_scale_moe(*args, **kwargs):
            raise RecursionError

        trtllm_fp8_block_scale_moe._trace_apply = True
        """
    )
    small = dataclasses.replace(SMALL, intermediate_size=128)
    runner = FlashinferTrtllm().prepare(small, B200, {})
    inputs = make_inputs(Workload(5, 4), small, random_weights(small, "cpu"))
    output = torch.empty(5, 256, dtype=torch.bfloat16)
    runner.run(inputs, output)
    wanted = moe_reference(inputs, small)
    assert (output.float() - wanted).norm() <= 0.08 * wanted.norm()


# ---- The command ----


def test_the_command(tmp_path):
    output, definition = tmp_path / "new" / "s.json", tmp_path / "d.json"
    result = cli_json("solution", "--device", "nvidia_b200", "-o", output, "--definition", definition)
    assert result["path"] == str(output) and result["spec"]["dependencies"] == DEPENDENCIES["nvidia_b200"]
    assert json.loads(output.read_text()) == policy_solution(shipped("nvidia_b200"))
    assert json.loads(definition.read_text()) == definition_of(MoEProblem())
    shown = cli("solution", "--device", "nvidia_b200", "-o", output, "--name", "mine", "--author", "me").stdout
    assert "T = 14-32: triton_fused[gemm=sgl_kernel]" in shown and "flashinfer-python" in shown
    made = json.loads(output.read_text())
    assert (made["name"], made["author"]) == ("mine", "me")


def test_the_command_for_a_candidate_and_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli("solution", "--candidate", "triton_fused", "--hidden-size", 256)
    made = json.loads((tmp_path / "hybrid_moe_triton_fused_gemm_triton.json").read_text())
    assert literals(made)["TABLE"] == ((0, "triton_fused", {"gemm": "triton"}),)
    assert made["definition"].endswith("_h256_i2048")
    path = ROOT / "policies" / "nvidia_h200" / f"{MoEProblem().definition}.json"
    cli("solution", "--policy", path, "-o", "h200.json")
    assert json.loads((tmp_path / "h200.json").read_text()) == policy_solution(shipped("nvidia_h200"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nvidia_x"], "no policy for device nvidia_x"),
        (["--candidate", "fast"], "backend: expected one of"),
        (
            ["--candidate", "triton_fused[gemm=x]"],
            "candidate: expected one of triton_fused[",
        ),
        (["--candidate", "triton_fused", "--device", "nvidia_b200"], "leave out the others"),
        (["--device", "nvidia_b200", "--name", "a/b"], "name: expected letters, digits"),
        (["--device", "nvidia_b200", "--name", "triton_fused"], "the candidate triton_fused[gemm=triton] is called"),
        (["--candidate", "triton_fused", "--name", "flashinfer_trtllm"], "not triton_fused[gemm=triton]"),
        (["--device", "nvidia_b200", "--author", " "], "author: expected a name, got ' '"),
        (["--device", "nvidia_b200", "--policy", "missing.json"], "policy file missing.json doesn't exist"),
        (["--device", "nvidia_b200", "--definition", "s.json"], "--definition is s.json, which is --output as well"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails("solution", *arguments, "-o", "s.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [{"gemm": "future"}, {"gem": "triton"}, {"gemm": 7}])
def test_a_policy_of_a_configuration_that_is_not_known(config):
    policy, other = shipped("nvidia_h200"), Candidate("triton_fused", config)
    unknown = policy.model_copy(update={"default": other, "candidates": (other,), "regimes": ()})
    with pytest.raises(ValueError, match=r"candidate: expected one of .*, got triton_fused\["):
        policy_solution(unknown)


def test_no_half_written_file(tmp_path):
    assert "expected a file name, got a folder" in fails("solution", "--device", "nvidia_b200", "-o", tmp_path)
    assert list(tmp_path.iterdir()) == []
