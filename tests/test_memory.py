"""The memory as a layer: its gates, its start, its state."""

import pytest
import torch
import torch.nn.functional as F
from tiny import gates_of

from pytitans.memory import STEP_FLOOR, NeuralMemory, closing_gate, closing_logit
from pytitans.ops import retrieve
from pytitans.ops.gates import chunk_gates


def make(dim=32, heads=2, **options) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(dim, heads, **{"chunk_size": 16, **options})


def test_a_gate_can_do_exactly_nothing_and_almost_everything():
    for floor in (1e-4, 0.03):
        assert closing_gate(torch.tensor(-3.0), floor) == 0
        assert closing_gate(torch.tensor(8.0), floor) > 0.99
        for value in (1e-3, 0.01, 0.5):
            logit = torch.tensor(closing_logit(value, floor))
            torch.testing.assert_close(closing_gate(logit, floor).item(), value)


def test_a_closed_gate_can_learn_to_open_and_stays_closed_otherwise():
    for wanted, moves in ((-1.0, True), (1.0, False)):
        logit = torch.tensor(-4.0, requires_grad=True)
        (wanted * closing_gate(logit, 0.03)).backward()
        assert bool(logit.grad != 0) is moves


@pytest.mark.parametrize("chunk_size", [1, 16, 128])
@pytest.mark.parametrize("momentum", [True, False])
def test_untrained_steps_are_contractive_on_a_repeated_key(chunk_size, momentum):
    """Row sums of C |K K^T| at most about 1 when all keys are one."""
    memory = make(chunk_size=chunk_size, momentum=momentum)
    lr, log_momentum, log_decay = gates_of(memory, torch.randn(1, chunk_size, 32))
    per_layer = [
        None if g is None else g[..., 0].transpose(1, 2) for g in (lr, log_momentum, log_decay)
    ]
    assert chunk_gates(*per_layer).writes.sum(-1).max() < 1.05


def losses_on_a_repeated_token(memory, tokens, heads=slice(None)):
    x = torch.randn(1, 1, 32, dtype=torch.float64).expand(1, tokens, 32)
    (_, k, v), _ = memory.convolve(memory.qkv(x), None, None)
    state, losses = None, []
    for piece in x.split(memory.chunk_size, dim=1):
        _, state = memory(piece, state)
        answer = retrieve(k[:, -1:], state.memory, norm=memory.norm, norm_eps=memory.norm_eps)
        losses.append((answer - v[:, -1:])[:, :, heads].square().sum().item())
    return losses


@pytest.mark.parametrize("depth", [1, 2])
def test_untrained_memory_learns_a_repeated_token(depth):
    """Its loss falls, and does not rise above its start, however long the token repeats: that of
    its last head. The first forgets a third of what it knows at each token, and relearns it."""
    memory = make(depth=depth, norm=False).double()
    losses = losses_on_a_repeated_token(memory, 1024, heads=slice(1, 2))
    assert losses[-1] < 0.5 * losses[0]
    assert max(losses) < 1.05 * losses[0]


@pytest.mark.parametrize("depth", [3, 4])
def test_deeper_memories_without_norm_learn_it_in_the_end(depth):
    """Not monotonically: their features grow while they learn, and with them the step they take."""
    memory = make(depth=depth, norm=False).double()
    losses = losses_on_a_repeated_token(memory, 1024, heads=slice(1, 2))
    assert losses[-1] < 0.5 * losses[0]
    assert max(losses) < 10


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_layer_norm_bounds_the_answer(depth):
    """Its size is LayerNorm's: no value is met exactly; forgetting makes it restless, not large."""
    losses = losses_on_a_repeated_token(make(depth=depth, norm=True).double(), 1024)
    assert min(losses) < losses[0]
    assert max(losses) < 9 * 2  # both heads: |k| + |LayerNorm| + |v|, each about 1, squared


def one_write(memory, x, **logits):
    """Writes x with gates held open, then reads on with step and forgetting shut."""
    heads = memory.num_heads
    with torch.no_grad():
        for i, name in enumerate(memory.gates):
            memory.to_gates.bias[i * heads : (i + 1) * heads] = logits[name]
    _, state = memory(x)
    with torch.no_grad():
        memory.to_gates.bias[:heads] = -12.0
    return memory(torch.randn(1, 200, x.shape[-1], dtype=x.dtype), state)[1]


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("momentum", [-12.0, 2.0])
def test_a_trained_memory_can_write_in_one_shot_and_forget_nothing(chunk_size, momentum):
    """One token stores its value whole, at once or by momentum; 200 others leave it there."""
    memory = make(depth=1, norm=False, conv_size=0, chunk_size=chunk_size).double()
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    once = closing_logit(1 / memory.largest_step, STEP_FLOOR) if chunk_size == 1 else 12.0
    state = one_write(memory, x, lr=once, momentum=momentum, decay=-12.0)
    _, k, v = F.silu(memory.qkv(x)).unflatten(-1, (3, 2, 16)).unbind(2)
    answer = retrieve(F.normalize(k, dim=-1), state.memory)
    torch.testing.assert_close(answer, v, rtol=0, atol=1e-3)
    assert (gates_of(memory, x)[2].exp() > 1 - 1e-7).all()


def test_with_chunks_of_one_token_the_largest_step_turns_around_what_is_stored():
    """I - 2 k k': a token read twice leaves the memory as it was, which counts modulo 2."""
    memory = make(depth=1, norm=False, conv_size=0, chunk_size=1, momentum=False).double()
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        memory.to_gates.bias.copy_(torch.tensor([40.0, 40.0, -12.0, -12.0]))  # steps, forgetting
    (before,), (once,), (twice,) = (
        memory(x.expand(1, tokens, 32))[1].memory.M if tokens else tuple(memory.M_0)
        for tokens in (0, 1, 2)
    )
    assert (once - before).abs().max() > 0.1
    torch.testing.assert_close(twice[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_largest_steps_of_a_chunk_add_up_to_two_over_layers(chunk_size, depth):
    """The limit of stability on a repeated key, whatever the gates have learned."""
    memory = make(depth=depth, chunk_size=chunk_size)
    with torch.no_grad():
        lr, momentum, decay = memory.to_gates.bias.view(3, 2, depth)
        lr.fill_(20.0)  # largest steps
        momentum.copy_(torch.tensor([[-20.0], [2.0]]).expand(2, depth))  # none, much momentum
        decay.fill_(-20.0)  # nothing forgotten
    gates = gates_of(memory, torch.randn(1, chunk_size, 32))
    writes = sum(
        chunk_gates(*[g[..., layer].transpose(1, 2) for g in gates]).writes.sum(-1)
        for layer in range(depth)
    )
    assert writes[:, 0].max() > 2 - 1e-3  # of the head without momentum, all of it
    assert writes.max() <= 2 + 1e-5


def test_each_layer_of_the_memory_has_gates_of_its_own():
    memory = make(depth=3)
    lr, log_momentum, log_decay = gates_of(memory, torch.randn(2, 5, 32))
    assert lr.shape == log_momentum.shape == log_decay.shape == (2, 5, 2, 3)


@pytest.mark.parametrize("cut", [1, 3, 16, 20, 39])
@pytest.mark.parametrize("options", [{}, {"conv_size": 0}, {"decay": False, "momentum": False}])
def test_streaming_equals_one_call(cut, options):
    memory = make(**options).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    want, end = memory(x)
    a, state = memory(x[:, :cut])
    b, state = memory(x[:, cut:], state)
    torch.testing.assert_close(torch.cat([a, b], 1), want)
    torch.testing.assert_close(state, end)


def test_gates_see_what_the_convolution_sees():
    """A token's gates depend on the three before it, and on no token after it."""
    memory = make()
    torch.nn.init.normal_(memory.to_gates.weight)
    x = torch.randn(1, 12, 32, requires_grad=True)
    lr, _, _ = gates_of(memory, x)
    lr[0, 6].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().sum(-1).bool().tolist() == [3 <= t <= 6 for t in range(12)]


def test_gates_are_float32_under_autocast():
    memory = make()
    with torch.autocast("cpu", torch.bfloat16):
        gates = gates_of(memory, torch.randn(1, 4, 32, dtype=torch.bfloat16))
        _, state = memory(torch.randn(1, 4, 32))
    assert all(g.dtype == torch.float32 for g in gates)
    assert all(W.dtype == torch.float32 for W in (*state.memory.M, *state.memory.S))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "heads": 4}, "dim=30"),
        ({"depth": 0}, "depth=0"),
        ({"max_step": 1.0}, "max_step=1.0"),
        ({"forget_start": (1.0, 1e-3)}, "forget_start=.1.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("depth", [1, 2])
def test_memories_of_a_head_share_all_but_their_values(depth):
    """Each is what a layer of one memory a head would have with those values."""
    both = make(per_head=2, depth=depth).double()
    x, D = torch.randn(2, 50, 32, dtype=torch.float64), 32
    with torch.no_grad():
        both.to_gates.weight.normal_(std=0.3)
        both.to_gates.weight[:, 3 * D :] = 0  # which see the values of all
    read, state = both.write(x)
    for i in range(2):
        one = make(depth=depth).double()
        rows = [*range(2 * D), *range((2 + i) * D, (3 + i) * D)]
        with torch.no_grad():
            one.qkv.weight.copy_(both.qkv.weight[rows])
            one.conv.weight.copy_(both.conv.weight[:, rows])
            one.to_gates.weight.copy_(both.to_gates.weight[:, : 4 * D])
            one.to_gates.bias.copy_(both.to_gates.bias)
            for mine, theirs in zip(one.M_0, both.M_0, strict=True):
                mine.copy_(theirs[i::2])
        alone, end = one.write(x)
        torch.testing.assert_close(read[:, :, i::2], alone)
        for mine, theirs in zip(end.memory.M, state.memory.M, strict=True):
            torch.testing.assert_close(theirs[:, i::2], mine)
    assert not torch.allclose(read[:, :, 0::2], read[:, :, 1::2])
    with pytest.raises(ValueError, match="per_head=0"):
        make(per_head=0)
