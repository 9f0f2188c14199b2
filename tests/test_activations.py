"""Hidden states in bfloat16: our kernel against the reference, and the calls that take them."""

import pytest
import torch
from test_api import PROBLEM, REFERENCE, ROUTING, inputs_of, layer_of

from hybrid_moe import fused_moe
from hybrid_moe.kernels import activations, interpreter
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.reference import dequantize_rows, moe_reference, quantize_rows
from hybrid_moe.serving import custom_ops, quantize_input

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def right_conversion():
    if interpreter.interpreting():
        interpreter.repair()


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


def hidden_of(tokens, width=256, seed=0, device="cpu"):
    """Rows and blocks that differ in size by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((tokens, width), dtype=torch.float32, generator=generator)
    size = 10.0 ** torch.randint(-3, 3, (tokens, width // 128), generator=generator).repeat_interleave(128, dim=1)
    return (values * size).bfloat16().to(device)


def assert_quantized(found, hidden):
    """The reference's to the bit in the interpreter; on a GPU its division may round the other way."""
    values, scale = found
    wanted, wanted_scale = quantize_rows(hidden)
    assert (values.dtype, scale.dtype) == (wanted.dtype, wanted_scale.dtype)
    assert values.is_contiguous() and scale.is_contiguous() and scale.shape == wanted_scale.shape
    if interpreter.interpreting():
        assert torch.equal(values.float(), wanted.float()) and torch.equal(scale, wanted_scale)
        return
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(values.float(), wanted.float(), rtol=0.13, atol=2**-9)
    assert float((values.float() != wanted.float()).float().mean()) < 1e-3


def test_hidden_states_in_bfloat16_may_be_the_output_too(weights):
    inputs = inputs_of(weights, 20)
    hidden = hidden_of(20)
    layer = layer_of(inputs, backend=REFERENCE)
    wanted = layer(inputs.routing_logits, hidden)
    kept = hidden.clone()
    assert layer(inputs.routing_logits, hidden, output=hidden) is hidden
    assert torch.equal(hidden, wanted) and not torch.equal(hidden, kept)


@pytest.mark.parametrize("width", [128, 384])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_the_kernel_is_the_reference(tokens, width):
    hidden = hidden_of(tokens, width, seed=tokens, device=DEVICE)
    assert_quantized(activations.quantize_rows(hidden), hidden)


def test_rows_that_lie_apart():
    hidden = hidden_of(20, 512, device=DEVICE)[:, 128:384]
    assert hidden.stride(0) == 512
    assert_quantized(activations.quantize_rows(hidden), hidden)


def test_no_tokens_and_blocks_of_zeros():
    values, scale = activations.quantize_rows(hidden_of(0, device=DEVICE))
    assert values.shape == (0, 256) and scale.shape == (2, 0)
    values, scale = activations.quantize_rows(torch.zeros((3, 256), dtype=torch.bfloat16, device=DEVICE))
    assert torch.count_nonzero(values.float()) == 0 and bool((scale > 0).all()) and bool(scale.isfinite().all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_is_kept_and_spoils_its_block_alone():
    hidden = hidden_of(4, device=DEVICE)
    hidden[2, 130] = torch.nan
    values, scale = activations.quantize_rows(hidden)
    back = dequantize_rows(values, scale)
    assert bool(back[2, 128:].isnan().all())
    back[2, 128:] = 0.0
    assert bool(back.isfinite().all())


def test_nothing_but_the_rows_is_written(monkeypatch):
    """Between guards: the last program has fewer rows than it could take."""
    given = {}
    real_empty = torch.empty

    def empty(shape, **options):
        buffer = real_empty((shape[0] * shape[1] + 64,), **options)
        buffer.view(torch.uint8).fill_(0x7F)
        given[options["dtype"]] = buffer
        return buffer[:-64].view(shape)

    hidden = hidden_of(17, device=DEVICE)
    monkeypatch.setattr(torch, "empty", empty)
    found = activations.quantize_rows(hidden)
    monkeypatch.undo()
    assert_quantized((found[0].clone(), found[1].clone()), hidden)
    for buffer in given.values():
        assert bool((buffer[-64:].view(torch.uint8) == 0x7F).all())


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_calls_take_bfloat16(weights, tokens):
    inputs = inputs_of(weights, tokens)
    hidden = hidden_of(tokens)
    values, scale = quantize_rows(hidden)
    wanted = moe_reference(inputs._replace(hidden_states=values, hidden_states_scale=scale), PROBLEM).bfloat16()
    unquantized = inputs._replace(hidden_states=hidden, hidden_states_scale=None)
    layer = layer_of(inputs, backend=REFERENCE)
    assert torch.equal(fused_moe(*unquantized, **ROUTING, backend=REFERENCE), wanted)
    assert torch.equal(layer(inputs.routing_logits, hidden), wanted)
    output = torch.full_like(wanted, torch.nan)
    assert layer(inputs.routing_logits, hidden, None, output=output) is output
    assert torch.equal(output, wanted)
    assert torch.equal(custom_ops.layer(*unquantized, layer._handle), wanted)
    run = torch.compile(lambda logits, hidden: layer(logits, hidden), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(inputs.routing_logits, hidden), wanted)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_our_kernels_take_bfloat16(weights):
    inputs = inputs_of(weights, 5)
    values, scale = quantize_rows(hidden_of(5))
    layer = layer_of(inputs, backend="triton_fused")
    assert torch.equal(layer(inputs.routing_logits, hidden_of(5)), layer(inputs.routing_logits, values, scale))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.float(),
            TypeError,
            r"expected torch.bfloat16, got torch.float32 without hidden_states_scale",
        ),
        (lambda t: quantize_rows(t)[0], TypeError, "hidden_states: expected hidden_states_scale with it, got"),
        (
            lambda t: t[:, :100],
            ValueError,
            r"hidden_states: expected a last size .* multiple of 128, got shape \[7, 100\]",
        ),
        (lambda t: t[:, :128], ValueError, r"\[7, 128\]|\[4, 256, 128\]"),
        (lambda t: t[0], ValueError, r"hidden_states: expected 2 dimensions, got shape \[256\]"),
        (
            lambda t: t.t().contiguous().t(),
            ValueError,
            "hidden_states: expected a? ?contiguous (tensor|rows), got strides",
        ),
        (lambda t: t[:6], ValueError, r"routing_logits: expected shape \[6, 16\], got \[7, 16\]"),
        (lambda t: t.tolist(), TypeError, "hidden_states: expected a torch.Tensor, got a list"),
    ],
)
def test_what_cannot_be_quantised_is_named(weights, change, error, message):
    inputs = inputs_of(weights, 7)
    layer = layer_of(inputs, backend=REFERENCE)
    hidden = change(hidden_of(7))
    wrong = inputs._replace(hidden_states=hidden, hidden_states_scale=None)
    for run in (
        lambda: layer(inputs.routing_logits, hidden),
        lambda: fused_moe(*wrong, **ROUTING, backend=REFERENCE),
    ):
        with pytest.raises(error, match=message):
            run()


def test_the_quantisation_looks_at_what_it_gets(weights):
    """By itself: who calls it has looked already, so that nothing is quantised before all of a call is right."""
    inputs = inputs_of(weights, 7)._replace(hidden_states_scale=None)
    for hidden, error in ((hidden_of(7).float(), TypeError), (hidden_of(7)[:, :100], ValueError)):
        with pytest.raises(error, match="hidden_states: expected"):
            quantize_input.quantize(inputs._replace(hidden_states=hidden))


def test_bfloat16_beside_scales(weights):
    inputs = inputs_of(weights, 7)
    wrong = inputs._replace(hidden_states=hidden_of(7))
    for run in (
        lambda: layer_of(inputs, backend=REFERENCE)(inputs.routing_logits, hidden_of(7), inputs.hidden_states_scale),
        lambda: fused_moe(*wrong, **ROUTING, backend=REFERENCE),
    ):
        with pytest.raises(
            TypeError, match="hidden_states: expected dtype .* with hidden_states_scale, got torch.bfloat16"
        ):
            run()
