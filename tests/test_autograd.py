"""Our engine for gradients beside torch's, on expressions that a computer makes up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.model.autograd import Node, as_node, mean_nats, nodes_in_order

SHAPES = [(3, 4), (4,), (3, 1), (1, 1), (1,), ()]
UNARY = ["exp", "log", "tanh", "relu", "square", "root", "inverse", "minus", "softmax"]
BINARY = ["add", "subtract", "multiply", "divide", "product", "pick", "reshape"]

expressions = st.recursive(
    st.tuples(st.just("leaf"), st.integers(0, len(SHAPES) - 1)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(UNARY), inner),
        st.tuples(st.sampled_from(BINARY), inner, inner),
    ),
    max_leaves=8,
)


def safe(x):
    "Positive and not too large, in nodes and in tensors alike."
    return x.tanh() * 0.5 + 1.0


def whole(x):
    "As a (3, 4) matrix, by broadcasting."
    return x + torch.zeros(3, 4, dtype=torch.float64)


def compute(expression, leaves, ours: bool):
    "The value of an expression, by `Node`s or by torch."
    kind, *parts = expression
    if kind == "leaf":
        return leaves[parts[0]]
    x, *more = [compute(part, leaves, ours) for part in parts]
    y = more[0] if more else None
    if kind == "softmax":
        x = whole(x)
        return x.log_softmax() if ours else x.log_softmax(dim=-1)
    if kind == "product":
        return whole(x).tanh() @ whole(y).tanh().reshape(4, 3) @ whole(x).tanh().exp()
    if kind == "pick":
        at = torch.tensor([0, 2, 0])
        return whole(x)[at] * whole(y).sum(1, keepdim=True)
    if kind == "reshape":
        return (whole(x).reshape(4, 3) @ whole(y)).sum(0)
    return {
        "exp": lambda: x.tanh().exp(),
        "log": lambda: safe(x).log(),
        "tanh": lambda: x.tanh(),
        "relu": lambda: x.relu(),
        "square": lambda: x.tanh() ** 2,
        "root": lambda: safe(x) ** 0.5,
        "inverse": lambda: 1.0 / safe(x) if not ours else as_node(1.0) / safe(x),
        "minus": lambda: 2.0 - x,
        "add": lambda: x + y,
        "subtract": lambda: x - y,
        "multiply": lambda: x * y,
        "divide": lambda: x / safe(y),
    }[kind]()


@given(expressions, st.integers(0, 10_000))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_gradients_are_those_of_torch(expression, seed):
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]
    nodes = [Node(v) for v in values]
    leaves = [v.clone().requires_grad_() for v in values]
    mine, other = compute(expression, nodes, True), compute(expression, leaves, False)
    torch.testing.assert_close(mine.data, other.detach(), rtol=1e-9, atol=1e-9)
    mine.tanh().sum().backward()
    other.tanh().sum().backward()
    for node, leaf in zip(nodes, leaves):
        if leaf.grad is None:
            assert node.grad is None
        else:
            torch.testing.assert_close(node.grad, leaf.grad, rtol=1e-6, atol=1e-6)
            assert node.grad.shape == leaf.grad.shape


def test_backward_twice_adds_the_same_gradient_twice():
    x = Node(torch.tensor([2.0, 3.0]))
    loss = (x * x * x).sum()
    loss.backward()
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)


def test_a_long_chain_needs_no_recursion():
    x = y = Node(1.0)
    for _ in range(20_000):
        y = y * 1.0
    y.backward()
    assert x.grad.item() == 1 and len(nodes_in_order(y)) == 40_001


def test_mean_nats_is_cross_entropy_for_huge_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [3.0, 3.0, 3.0]], dtype=torch.float64)
    targets = torch.tensor([1, 2])
    node, leaf = Node(logits), logits.clone().requires_grad_()
    loss, right = mean_nats(node, targets), torch.nn.functional.cross_entropy(leaf, targets)
    loss.backward()
    right.backward()
    torch.testing.assert_close(loss.data, right.detach())
    torch.testing.assert_close(node.grad, leaf.grad)
