"""Properties of the operator as users call it, whichever backend answers; and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import call, make_inputs, state_of

from pytitans.ops import initial_state, neural_memory, retrieve
from pytitans.ops.naive import naive_memory

BACKENDS = [
    {"backend": "naive"},
    {"backend": "chunk"},
    {"backend": "auto"},
    {"backend": "chunk", "online": True},
]
TOKENS = ("q", "k", "v", "lr", "log_momentum", "log_decay")


def inputs_for(options, **shape):
    return make_inputs(depth=1 if options.get("online") else 2, **shape)


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_future_tokens_do_not_matter(options):
    inputs = inputs_for(options)
    changed = inputs | {
        n: torch.cat([inputs[n][:, :6], inputs[n][:, 6:].flip(1)], dim=1) for n in TOKENS
    }
    before, after = (call(neural_memory, x, chunk_size=4, **options) for x in (inputs, changed))
    torch.testing.assert_close(after["retrieved"][:, :6], before["retrieved"][:, :6])
    assert (after["retrieved"][:, 6:] - before["retrieved"][:, 6:]).abs().min() > 0


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_batch_rows_do_not_mix(options):
    inputs = inputs_for(options)
    norms = ("weight", "bias")
    changed = {
        n: t if n in norms else torch.cat([t[:1], 0.5 * t[1:].detach()]) for n, t in inputs.items()
    }
    before, after = (call(neural_memory, x, chunk_size=4, **options) for x in (inputs, changed))
    for name in ("retrieved", "M0", "S0"):
        torch.testing.assert_close(after[name][0], before[name][0])
        assert (after[name][1] - before[name][1]).abs().max() > 0


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_every_head_has_its_own_memory(options):
    inputs = inputs_for(options)
    changed = inputs | {"k": torch.cat([inputs["k"][:, :, :1], -inputs["k"][:, :, 1:]], dim=2)}
    before, after = (call(neural_memory, x, chunk_size=4, **options) for x in (inputs, changed))
    torch.testing.assert_close(after["M0"][:, 0], before["M0"][:, 0])
    assert (after["M0"][:, 1] - before["M0"][:, 1]).abs().max() > 0


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_the_caller_s_state_is_not_written_to(options):
    inputs = {n: t.detach() for n, t in inputs_for(options).items()}
    kept = {n: t.clone() for n, t in inputs.items()}
    first = call(neural_memory, inputs, chunk_size=4, **options)
    torch.testing.assert_close(inputs, kept, rtol=0, atol=0)
    torch.testing.assert_close(call(neural_memory, inputs, chunk_size=4, **options), first)


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_retrieve_reads_what_the_last_token_read(options):
    inputs = inputs_for(options)
    tokens = [inputs[n] for n in TOKENS]
    out, state = neural_memory(*tokens, state_of(inputs), chunk_size=4, **options)
    torch.testing.assert_close(retrieve(inputs["q"][:, -1:], state), out[:, -1:])


def test_retrieve_with_norm_reads_what_the_last_token_read():
    inputs = make_inputs(V=4, norm=True)
    norm, options = (inputs["weight"], inputs["bias"]), {"activation": "gelu"}
    tokens = [inputs[n] for n in TOKENS]
    out, state = neural_memory(*tokens, state_of(inputs), chunk_size=4, norm=norm, **options)
    torch.testing.assert_close(
        retrieve(inputs["q"][:, -1:], state, norm=norm, **options), out[:, -1:]
    )


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_no_tokens_change_nothing(options):
    inputs = inputs_for(options, T=0)
    got = call(neural_memory, inputs, chunk_size=4, **options)
    assert got["retrieved"].shape == (2, 0, 2, 5)
    torch.testing.assert_close((got["M0"], got["S0"]), (inputs["M0"], inputs["S0"]))


def test_a_sequence_starts_without_surprise():
    state = initial_state((torch.ones(1, 2, 3, 4),))
    assert state.position == 0 and not state.S[0].any() and state.anchor == state.M


LIMITS = [1e-4, 1 - 1e-7]


@pytest.mark.parametrize("momentum", LIMITS)
@pytest.mark.parametrize("decay", LIMITS)
def test_gates_at_their_limits_are_finite_and_exact(decay, momentum):
    """float32 stays close to float64 over thousands of tokens, forward and backward."""
    lr = 1e-7 if momentum * decay > 0.5 else 1e-3  # nothing damps a step that is never forgotten
    x = make_inputs(T=2000, B=1, H=1, lr=lr)
    with torch.no_grad():
        x["log_momentum"].fill_(momentum).log_()
        x["log_decay"].fill_(decay).log_()
        x["S0"].zero_()
        x["S1"].zero_()
    exact = call(neural_memory, x, chunk_size=64)["retrieved"]
    low = {n: t.detach().float().requires_grad_() for n, t in x.items()}
    got = call(neural_memory, low, chunk_size=64)["retrieved"]
    atol = 1e-3 * exact.abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=atol)
    for name, g in zip(
        TOKENS, torch.autograd.grad(got.sum(), [low[n] for n in TOKENS]), strict=True
    ):
        assert g.isfinite().all(), name


def test_a_decayed_memory_is_not_slowed_by_denormals():
    """Weights that decay to zero are zero, not denormal."""
    x = {n: t.detach().float() for n, t in make_inputs(T=512, B=1, H=1).items()}
    x["log_decay"], x["log_momentum"] = (torch.full_like(x["lr"], -0.18) for _ in range(2))
    x["lr"] = torch.zeros_like(x["lr"])
    got = call(neural_memory, x, chunk_size=64)
    tiny = torch.finfo(torch.float32).tiny
    for name in ("M0", "M1", "S0", "S1"):
        assert not ((got[name] != 0) & (got[name].abs() < tiny)).any()


@pytest.mark.parametrize("norm", [False, True])
def test_bfloat16_is_as_good_as_torch(norm):
    """At most twice as far from float64 as the definition run in bfloat16, values and gradients.

    Summed over four texts: with norm these inputs enlarge any rounding a hundredfold, and which of
    two runs is unlucky on one text is chance.
    """
    ours, theirs = {}, {}
    for seed in range(4):
        exact = make_inputs(depth=2, T=64, K=16, V=16, hidden=32, norm=norm, lr=0.01, seed=seed)
        exact = {n: t.detach().bfloat16().double().requires_grad_() for n, t in exact.items()}
        all_low = {n: t.detach().bfloat16().requires_grad_() for n, t in exact.items()}
        mixed = {
            n: t.detach().to(torch.bfloat16 if n in "qkv" else torch.float32).requires_grad_()
            for n, t in exact.items()
        }
        runs = [(neural_memory, mixed), (naive_memory, all_low), (naive_memory, exact)]
        values = [call(op, x, chunk_size=16) for op, x in runs]
        assert values[0]["retrieved"].dtype == torch.bfloat16
        assert all(values[0][n].dtype == torch.float32 for n in ("M0", "S0", "anchor0"))
        for y, (_, x) in zip(values, runs, strict=True):
            found = torch.autograd.grad(y["retrieved"].sum(), [x[n] for n in TOKENS])
            y.update(zip((f"gradient of {n}" for n in TOKENS), found, strict=True))
        got, same_dtype, want = values
        for name in set(want) - {"position"}:
            for total, y in ((ours, got), (theirs, same_dtype)):
                error = (y[name].double() - want[name]).abs().max().item()
                total[name] = total.get(name, 0.0) + error
    for name, error in ours.items():
        assert error <= 2 * theirs[name] + 4e-5, name


REFUSED = {
    "chunk_size=0": {"chunk_size": 0},
    "objective='l3'": {"objective": "l3"},
    "activation='relu'": {"activation": "relu"},
    "backend='cuda'": {"backend": "cuda"},
    "one layer, no norm": {"online": True},
    r"mask is a boolean \(2, 11\)": {"mask": torch.ones(2, 10, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_unknown_options_are_named(message):
    options = {"chunk_size": 4} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        neural_memory_unchecked(make_inputs(), **options)


WRONG = {
    r"\(2, 11, 2, 3\)": {"k": torch.zeros(2, 11, 2, 3)},
    r"\(2, 10, 2, 5\)": {"v": torch.zeros(2, 10, 2, 5)},
    r"maps 4 to 5, the tokens 4 to 6": {"v": torch.zeros(2, 11, 2, 6)},
    r"in a chain; got .*\(2, 2, 7, 5\)": {"M1": torch.zeros(2, 2, 7, 5)},
    r"lr has shape \(2, 11, 3\)": {"lr": torch.zeros(2, 11, 3)},
    r"log_decay has shape \(2, 11, 2, 4\)": {"log_decay": torch.zeros(2, 11, 2, 4)},
    r"norm .* needs K = V; got 4 and 5": {"weight": torch.ones(2, 5), "bias": torch.ones(2, 5)},
    r"k holds NaN": {"k": torch.full((2, 11, 2, 4), torch.nan)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_inputs_are_named(message):
    with pytest.raises(ValueError, match=message):
        neural_memory_unchecked(make_inputs() | WRONG[message], chunk_size=4)


def neural_memory_unchecked(inputs, **options):
    """Past the tests' own shape checker, to what users without it would see."""
    return call(getattr(neural_memory, "__wrapped__", neural_memory), inputs, **options)


def test_a_query_of_another_width_is_named():
    reader = getattr(retrieve, "__wrapped__", retrieve)
    with pytest.raises(ValueError, match=r"q has shape \(1, 2, 3\)"):
        reader(torch.zeros(1, 2, 3), initial_state((torch.ones(1, 2, 3, 4),)))


@pytest.mark.compile
def test_compiles():
    """Run without the jaxtyping hook: dynamo cannot trace through its wrapper."""
    inputs = {n: F.normalize(t.detach(), dim=-1) for n, t in make_inputs().items()}
    want = call(neural_memory, inputs, chunk_size=4)
    got = call(torch.compile(neural_memory, backend="aot_eager"), inputs, chunk_size=4)
    torch.testing.assert_close(got, want)
