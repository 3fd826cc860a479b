"""Writing text: our key-value cache beside transformers' generate, on the same weights.

    python benchmarks/generate.py [--rounds N]

One text at a time, greedy: two Llama-shaped models of up to 10 million parameters, and one of
GPT-2's size and shape. The tokens must be the same on both sides. Then many together, as
reinforcement learning needs them: 32 prompts of different lengths, 8 texts each, 16 new tokens;
beside transformers' generate and our own sample_batch without the cache. All sides take
turns in one run, and the table shows medians of the rounds, after a first that does not count. The
last line is JSON; `value` is our tokens per second over transformers' for one text and the model of
the course's own size (1.4 million), bar 3; `larger` the same for 9.4 million, where fetching the
weights takes most of the time on both sides; `gpt2_size` for GPT-2, where the bar is 1.
"""
import argparse
import json
import math
import statistics
import time
import warnings

import llm_course  # before torch: it sets how long waiting threads spin
import torch

from llm_course.generate.write import generate, sample_batch
from llm_course.model.block import GPT2, LLAMA, hidden_width
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.train.runner import keep_memory

PROMPT = 16
SHAPES = {  # configuration, new tokens
    "1.4 million": (GPTConfig(2048, 256, 128, 4, 4, style=LLAMA), 128),
    "9.4 million": (GPTConfig(8192, 256, 256, 7, 8, style=LLAMA), 128),
    "GPT-2 (124 million)": (GPTConfig(50257, 1024, 768, 12, 12, style=GPT2), 32),
}
NAMES = {  # theirs: ours
    "embed_tokens": "embed", "layers": "blocks", "self_attn": "attention", "q_proj": "query",
    "k_proj": "key", "v_proj": "value", "o_proj": "out", "mlp": "feed_forward", "gate_proj": "gate",
    "up_proj": "up", "down_proj": "down", "lm_head": "head", "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2", "wte": "embed", "wpe": "position", "h": "blocks",
    "ln_1": "norm1", "ln_2": "norm2", "ln_f": "norm", "attn": "attention", "c_fc": "up"}


def random_llama(c: GPTConfig):
    "Llama as transformers has it."
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers,
        intermediate_size=hidden_width(c.d_model, "swiglu"), num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads, max_position_embeddings=c.context_length, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None, pad_token_id=0))


def random_gpt2(c: GPTConfig):
    "GPT-2 as transformers has it."
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.d_model,
        n_layer=c.n_layers, n_head=c.n_heads, bos_token_id=None, eos_token_id=None, pad_token_id=0))


def our_name(theirs: str) -> str:
    "For example blocks.0.attention.out.weight."
    writer = "down" if "mlp" in theirs else "out"
    parts = [part for part in theirs.split(".") if part not in ("model", "transformer")]
    return ".".join(writer if part == "c_proj" else NAMES.get(part, part) for part in parts)


def our_weights(theirs: dict) -> dict:
    "Under our names; GPT-2 has queries, keys and values together, and turned matrices."
    state = {}
    for name, weight in theirs.items():
        if ".c_" in name:
            weight = weight.t().contiguous()
        if "c_attn" not in name:
            state[our_name(name)] = weight
            continue
        for ours, piece in zip(("query", "key", "value"), weight.chunk(3)):
            state[our_name(name).replace("c_attn", ours)] = piece
    return state


def pair(config: GPTConfig) -> tuple:
    "Our model and theirs with the same weights, far enough from zero that texts differ."
    torch.manual_seed(0)
    theirs = (random_gpt2 if config.style == GPT2 else random_llama)(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() > 1:
                p.normal_(std=2 / math.sqrt(config.d_model))
    ours = GPT(config).eval()
    ours.load_state_dict(our_weights(theirs.state_dict()))
    return ours, theirs


def take_turns(sides: dict, rounds: int) -> dict:
    "Median seconds of each function; each round calls all of them, the first for warm-up."
    seconds = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def one_text(config: GPTConfig, new: int, rounds: int) -> dict:
    "Seconds of both sides for one text."
    ours, theirs = pair(config)
    g = torch.Generator().manual_seed(1)
    prompt = torch.randint(config.vocab_size, (1, PROMPT), generator=g)
    sides = {
        "ours": lambda: list(generate(ours, prompt[0], new, temperature=0)),
        "transformers": lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
            do_sample=False)[0, PROMPT:].tolist(),
    }
    same = [a == b for a, b in zip(sides["ours"](), sides["transformers"]())]
    assert all(same[:8]), "the two sides do not compute the same"
    return {**take_turns(sides, rounds), "same": sum(same)}


def many_texts(config: GPTConfig, rounds: int) -> dict:
    "Seconds for 256 texts of 32 prompts."
    ours, theirs = pair(config)
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=g).tolist()
               for n in torch.randint(10, 40, (32,), generator=g).tolist()]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    return take_turns({
        "ours": lambda: sample_batch(ours, prompts, 16, n=8),
        "transformers": lambda: theirs.generate(
            padded, attention_mask=(padded > 0).long(), max_new_tokens=16, do_sample=True, top_k=0,
            num_return_sequences=8),
        "no cache": lambda: sample_batch(lambda tokens: ours(tokens), prompts, 16, n=8),
    }, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    keep_memory()
    ratios = {}
    print("one text at a time, tokens per second          ours   transformers")
    for name, (config, new) in SHAPES.items():
        s = one_text(config, new, rounds)
        ratios[name] = s["transformers"] / s["ours"]
        ours, theirs = new / s["ours"], new / s["transformers"]
        print(f"{name:20} {new:4} new tokens {ours:16,.0f} {theirs:14,.0f}   "
              f"{ratios[name]:.2f} times; the first {s['same']} tokens agree", flush=True)
    s = many_texts(SHAPES["1.4 million"][0], max(1, rounds // 3))
    print("256 texts of 16 tokens, 1.4 million parameters: "
          + ", ".join(f"{side} {seconds:.2f} s" for side, seconds in s.items()))
    print(json.dumps({
        "name": "generate", "value": round(ratios["1.4 million"], 2),
        "unit": "our tokens per second over transformers'", "bar": 3,
        "larger": round(ratios["9.4 million"], 2),
        "gpt2_size": round(ratios["GPT-2 (124 million)"], 2),
        "batch_over_transformers": round(s["transformers"] / s["ours"], 2),
        "batch_over_no_cache": round(s["no cache"] / s["ours"], 2),
        "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
