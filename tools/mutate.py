"""Change every solution of the exercises in one place, and list the changes that no case notices.

    python tools/mutate.py                 # all lessons: how many changes, which survive
    python tools/mutate.py 22_tokens.bpe   # some

A survivor is a gap in the cases, unless the changed program does the same: those that were looked
at and do the same are in EQUAL. `test_check.py` mutates a sample.
"""

import ast
import copy
import sys

sys.path[:0] = [".", "tools", "tests"]

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}
NAMES = {
    "min": "max", "max": "min", "sum": "max", "any": "all", "all": "any", "floor": "ceil",
    "ceil": "floor", "exp": "log", "log": "exp", "sum_": "mean", "mean": "sum", "sin": "cos",
    "cos": "sin", "argmax": "argmin", "argmin": "argmax", "triu": "tril", "tril": "triu",
}

# Changes (exercise, the changed line) that were looked at and make no difference to any input.
EQUAL = {
    ("ex_top_p", "before = ranked.cumsum(-1) - ranked"),  # rows of one dimension only
    ("ex_top_p", "kept = torch.zeros_like(probs).scatter(-1, order, ranked * (before < p))"),
    ("ex_temperature", "return (logits / temperature).softmax(dim=-0)"),
    ("ex_smooth", "logp = logits.log_softmax(dim=-0)"),
    ("ex_step", "weights = (keys @ q / math.sqrt(len(q))).softmax(dim=-1)"),
    # Two dimensions: the last is number 1.
    ("ex_weights", "return scores.softmax(dim=1)"),
    ("ex_weights", "scores = q @ k.T / math.sqrt(q.shape[1])"),
    ("ex_causal", "return scores.masked_fill(future, -math.inf).softmax(dim=1)"),
    ("ex_rope", "a, b = x.chunk(2, dim=1)"),
    ("ex_rope", "return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)"),
    ("ex_nearest", "cosines[i] = -2"),  # no cosine is below -1
    ("ex_cosine", "if p <= 0.1:"),  # both pieces are 1 there
    ("ex_micro", "while pipeline_bubble(stages, m) >= most + 1e-09:"),  # 1e-9 is there for rounding
    # One part in 1e9 is below the tolerance.
    ("ex_network", "return sent / (gbit / 8 * 1000000001.0)"),
    ("ex_network", "return sent / (gbit / 8 * 999999999.0)"),
    # Any list that tells the four apart is right.
    *(("ex_case", f"return [{a}, {b}, {c}]") for a, b, c in [
        (1, 0, 9), (-1, 0, 9), (0, 1, 9), (0, -1, 9), (0, 0, 10), (0, 0, 8)]),
    ("ex_answer", "probs = logits.softmax(dim=1).gather(1, tokens[:, None])"),  # two dimensions
    ("ex_answer", "log_probs = logits[start - 1:-1].log_softmax(dim=1)"),
    ("ex_answer", "return log_probs.gather(1, tokens[start:, None]).sum()"),
    ("ex_best", "return (reference.log() + reward / beta).softmax(dim=-1)"),  # one dimension
    ("ex_kept", "up_to = torch.cat([torch.zeros(1), probs.cumsum(dim=-1)])"),
    # Where p and q are equal, either will do.
    ("ex_guess", "return p.where(p <= q, q).sum()"),
    ("ex_replacement", "missing = torch.where(p >= q, p - q, 0.0)"),
    # A sign of 1 or -1 is its own inverse, and 0 is not kept.
    ("ex_three", "return torch.where(kept, scale / weight.sign(), torch.zeros_like(weight))"),
    # Rewards of a group differ by rounding or by much more, never by exactly 1e-6.
    ("ex_dead", "return (grouped.amax(dim=1) - grouped.amin(dim=1) <= 1e-06).float().mean()"),
}


def variants(node: ast.AST) -> list:
    "What one node may be changed into."
    made = []
    for field in ("op", "ops"):
        ops = getattr(node, field, None)
        for i, op in enumerate(ops if isinstance(ops, list) else [ops] if ops else []):
            if swap := SWAPS.get(type(op)):
                new = copy.deepcopy(node)
                if isinstance(ops, list):
                    new.ops[i] = swap()
                else:
                    new.op = swap()
                made.append(new)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        made += [ast.Constant(node.value + step) for step in (1, -1)]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        made.append(ast.Constant(not node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        made.append(copy.deepcopy(node.operand))
    if isinstance(node, ast.Name) and node.id in NAMES:
        made.append(ast.Name(NAMES[node.id], node.ctx))
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        made.append(ast.Attribute(node.value, NAMES[node.attr], node.ctx))
    if isinstance(node, ast.IfExp):
        made += [copy.deepcopy(node.body), copy.deepcopy(node.orelse)]
    return made


def mutants(tree: ast.Module) -> list:
    "(changed tree, its changed line) for each single change inside the functions of a cell."
    count = sum(1 for _ in ast.walk(tree))
    found = []
    for k in range(count):
        for n in range(len(variants(nth(tree, k)[0]))):
            new = copy.deepcopy(tree)
            node, parent, field, index = nth(new, k)
            if parent is None:
                continue
            change = variants(node)[n]
            if index is None:
                setattr(parent, field, change)
            else:
                getattr(parent, field)[index] = change
            ast.fix_missing_locations(new)
            before, after = ast.unparse(tree).splitlines(), ast.unparse(new).splitlines()
            line = next((b for a, b in zip(before, after) if a != b), "")
            if line:
                found.append((new, line.strip()))
    return found


def nth(tree: ast.AST, k: int) -> tuple:
    "(node, parent, field, index) of the k-th node, in the order of a walk."
    todo, seen = [(tree, None, "", None)], 0
    while todo:
        at = todo.pop(0)
        if seen == k:
            return at
        seen += 1
        for field, value in ast.iter_fields(at[0]):
            if isinstance(value, ast.AST):
                todo.append((value, at[0], field, None))
            elif isinstance(value, list):
                todo += [(v, at[0], field, i) for i, v in enumerate(value) if isinstance(v, ast.AST)]
    return tree, None, "", None


def survivors(cell, space: dict, exercise, function: str, name: str = "") -> tuple:
    "(number of changes, the changed lines that pass) for the solution in one cell."
    body = [n for n in cell.tree.body if isinstance(n, ast.FunctionDef)]
    all_changes = mutants(ast.Module(body, []))
    passed, seconds = [], exercise.seconds
    exercise.seconds = 0.5
    for tree, line in all_changes:
        inside = dict(space)
        try:
            exec(compile(tree, cell.id, "exec"), inside)
            right = exercise.diagnose(eval(function, inside)) is None
        except Exception:
            continue
        if right and (name, line) not in EQUAL:
            passed.append(line)
    exercise.seconds = seconds
    return len(all_changes), passed


def run(names: list) -> tuple:
    "Mutate the solutions of some lessons: (changes, [(lesson, exercise, line)])."
    import test_exercises as t

    total, left = 0, []
    for lesson in t.LESSONS:
        if names and lesson.name not in names:
            continue
        found = t.Collected(lesson)
        for cell in lesson.code_cells:
            for name, function in t.checks(cell):
                if name in found.exercises and not cell.skipped and not t.defines_exercise(cell):
                    exercise = found.exercises[name]
                    n, lines = survivors(cell, found.space, exercise, function, name)
                    total += n
                    left += [(lesson.name, name, line) for line in lines]
    return total, left


if __name__ == "__main__":
    changes, passing = run(sys.argv[1:])
    for place in passing:
        print(*place, sep="  ")
    print(f"{changes} changes, {len(passing)} survive")
