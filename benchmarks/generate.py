"""Writing text: our key-value cache beside transformers' generate, on the same weights.

    python benchmarks/generate.py [--rounds N]

Greedy, with the same tokens on both sides: one text at a time and sixteen together, for Llama-
shaped models of up to 10 million parameters and one of GPT-2's size and shape, all with a context
of 512 (GPT-2: 1,024). Then many together, as reinforcement learning needs them: 32 prompts of
different lengths, 8 texts each, 16 new tokens; beside transformers' generate and our own
sample_batch without the cache. Then what lesson 54 counts, in seconds: how a token's time grows
with the text, beside the growth of its products; guess and check beside one token a pass; 64
requests of mixed lengths in a batch of 16 beside one after the other. All sides take turns in one
run, and the table shows medians of the rounds, after a first that does not count. The last line is
JSON; `value` is our tokens per second over transformers' for one text and the model of the
course's own size (1.4 million), bar 3; `larger` the same for 9.4 million; `gpt2_size` for GPT-2,
where the bar is 1; `sixteen` for sixteen texts (1.4 million, bar 2).
"""
import argparse
import itertools
import json
import math
import statistics
import time
import warnings

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from llm_course.core import asset
from llm_course.generate.draft import PairDraft
from llm_course.generate.fast import speculate
from llm_course.generate.write import TextGenerator, generate, sample_batch
from llm_course.model.block import GPT2, LLAMA, hidden_width
from llm_course.model.files import load_model
from llm_course.model.gpt import GPT, GPTConfig, flops_per_token
from llm_course.tokens.exchange import load_tokenizer
from llm_course.train.meter import take_turns
from llm_course.train.runner import keep_memory
from llm_course.world import World

PROMPT = 16
SHAPES = {  # configuration, new tokens
    "1.4 million": (GPTConfig(2048, 512, 128, 4, 4, style=LLAMA), 128),
    "9.4 million": (GPTConfig(8192, 512, 256, 7, 8, style=LLAMA), 128),
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


def greedy_texts(config: GPTConfig, n: int, new: int, rounds: int) -> dict:
    "Seconds of both sides for n texts, greedy, and how many tokens of the first agree."
    ours, theirs = pair(config)
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, config.vocab_size, (n, PROMPT), generator=g)

    def write():
        writer = TextGenerator(ours, batch_size=n)
        texts = [writer.add(prompt, new, temperature=0) for prompt in prompts]
        writer.run()
        return texts[0].tokens

    sides = {"ours": write, "transformers": lambda: theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new,
        do_sample=False)[0, PROMPT:].tolist()}
    same = [a == b for a, b in zip(sides["ours"](), sides["transformers"]())]
    assert all(same[:8]), "the two sides do not compute the same"
    return {**take_turns(sides, rounds), "same": sum(same)}


def growth(config: GPTConfig, rounds: int) -> dict:
    "Time of a token late in the context over early: measured, and by counting products."
    model, T = GPT(config).eval(), config.context_length

    def step(filled):
        reader = TextGenerator(model, 1)
        text = reader.add([1] * filled, 24, temperature=0)
        reader.step()
        start = time.perf_counter()
        list(text)
        return (time.perf_counter() - start) / 23

    early, late = ([step(n) for _ in range(rounds + 1)][1:] for n in (16, T - 32))
    flops = [flops_per_token(config, n, training=False) for n in (28, T - 20)]
    return {"measured": statistics.median(late) / statistics.median(early),
            "predicted": flops[1] / flops[0]}


def speculation(rounds: int) -> dict:
    "The story model with a table of pairs that guesses, beside one token a pass."
    world, tokenizer = World(seed=0), load_tokenizer(asset("story.bpe"))
    model, end = load_model(asset("story.safetensors")), tokenizer.end_id
    texts = [[end, *tokenizer.encode(story), end] for story in world.sample(1000, seed=1)]
    draft = PairDraft(texts, tokenizer.vocab_size)
    told = speculate(model, draft, [end], 150, 4, end, temperature=0)
    seconds = take_turns({
        "guess and check": lambda: speculate(model, draft, [end], 150, 4, end, temperature=0),
        "one by one": lambda: list(generate(model, [end], 150, end, temperature=0))}, rounds)
    return {**seconds, "tokens_per_pass": len(told.tokens) / told.passes}


def mixed_requests(config: GPTConfig, rounds: int) -> dict:
    "64 requests of 8 to 128 new tokens."
    model, g = GPT(config).eval(), torch.Generator().manual_seed(4)
    lengths = torch.randint(8, 129, (64,), generator=g).tolist()

    def write(places):
        writer = TextGenerator(model, places)
        for i, n in enumerate(lengths):
            writer.add([1 + i, 2, 3], n, seed=i)
        writer.run()

    return take_turns({"together": lambda: write(16), "one by one": lambda: write(1)}, rounds)


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
    print("greedy, tokens per second              texts         ours   transformers")
    for (name, (config, new)), n in itertools.product(SHAPES.items(), (1, 16)):
        s = greedy_texts(config, n, new, rounds if n == 1 else max(1, rounds // 2))
        ratios[name, n] = s["transformers"] / s["ours"]
        ours, theirs = n * new / s["ours"], n * new / s["transformers"]
        print(f"{name:20} {new:4} new tokens {n:5} {ours:13,.0f} {theirs:14,.0f}   "
              f"{ratios[name, n]:.2f} times; the first {s['same']} tokens agree", flush=True)
    few = max(1, rounds // 3)
    config = SHAPES["1.4 million"][0]
    s = many_texts(config, few)
    print("256 texts of 16 tokens, 1.4 million parameters: "
          + ", ".join(f"{side} {seconds:.2f} s" for side, seconds in s.items()))
    more, guesses, mixed = growth(config, rounds), speculation(few), mixed_requests(config, few)
    print(f"a token at the end of the context over one at its beginning: {more['measured']:.2f} "
          f"times as long, its products {more['predicted']:.2f} times as many")
    gain = guesses["one by one"] / guesses["guess and check"]
    print(f"guess and check: {guesses['tokens_per_pass']:.2f} tokens a pass, {gain:.2f} times")
    lift = mixed["one by one"] / mixed["together"]
    print(f"64 requests of mixed lengths in a batch of 16: {lift:.2f} times one after the other")
    print(json.dumps({
        "name": "generate", "value": round(ratios["1.4 million", 1], 2),
        "unit": "our tokens per second over transformers'", "bar": 3,
        "larger": round(ratios["9.4 million", 1], 2),
        "gpt2_size": round(ratios["GPT-2 (124 million)", 1], 2),
        "sixteen": round(ratios["1.4 million", 16], 2),
        "larger_sixteen": round(ratios["9.4 million", 16], 2),
        "batch_over_transformers": round(s["transformers"] / s["ours"], 2),
        "batch_over_no_cache": round(s["no cache"] / s["ours"], 2),
        "speculation": round(gain, 2), "continuous_over_one_by_one": round(lift, 2),
        "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
