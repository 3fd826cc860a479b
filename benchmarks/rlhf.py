"""Samples per second of a GRPO step, ours beside TRL's: same model, prompts, reward and settings.

    python benchmarks/rlhf.py --trl-python VENV/bin/python

TRL is no part of the course's environment: make one for it, for example

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl

Without --trl-python, the environment of the course is tried. The model is Llama-shaped with random
weights, so that answers run to their full length and both do the same amount of work: a step draws
answers in groups, grades them with a plain Python function, and makes one step of AdamW with a KL
penalty to a reference. Samples count as far as they have their full number of tokens. Ours and
TRL's run in turn, each in a process of its own, in float32 and in bfloat16; the better precision
counts for each. PPO of ours is measured beside it. The last line is JSON: `value` is our samples
per second over TRL's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = {"context_length": 128, "d_model": 128, "n_layers": 4, "n_heads": 2}
NEW_TOKENS, BETA, LR = 24, 0.04, 1e-4


def reward_of(text: str) -> float:
    "A plain Python reward: the share of vowels."
    return sum(c in "aeiou" for c in text) / max(1, len(text))


def prepare(folder: Path, batch: int, group: int) -> None:
    "Write weights for both, prompts as ids, and what each id says."
    import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
    import torch
    from llm_course.align.chat import add_chat_tokens, render
    from llm_course.core import asset
    from llm_course.model.block import LLAMA
    from llm_course.model.files import save_model
    from llm_course.model.gpt import GPT, GPTConfig
    from llm_course.world.talk import Talk
    from llm_course.tokens.exchange import load_tokenizer

    tokenizer, _ = add_chat_tokens(load_tokenizer(asset("story.bpe")))
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, **SIZE, style=LLAMA))
    save_model(model, folder / "ours.safetensors")
    prompts = Talk().prompts(400, seed=1)
    rows = [render(tokenizer, p, reply=True).tokens for p in prompts]
    keep = [i for i, row in enumerate(rows) if len(row) <= 48][:200]
    said = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    facts = {
        "prompts": [prompts[i] for i in keep],
        "rows": [rows[i] for i in keep],
        "said": said,
        "end": tokenizer.special_tokens["<|end|>"],
        "vocab": tokenizer.vocab_size,
        "hidden": model.blocks[0].feed_forward.up.weight.shape[0],
        "batch": batch,
        "group": group,
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    torch.save(llama_state(model), folder / "theirs.pt")


def llama_state(model) -> dict:
    "The same weights under the names of transformers' LlamaForCausalLM."
    names = {
        "norm1.weight": "input_layernorm.weight",
        "norm2.weight": "post_attention_layernorm.weight",
        "attention.query.weight": "self_attn.q_proj.weight",
        "attention.key.weight": "self_attn.k_proj.weight",
        "attention.value.weight": "self_attn.v_proj.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        "feed_forward.gate.weight": "mlp.gate_proj.weight",
        "feed_forward.up.weight": "mlp.up_proj.weight",
        "feed_forward.down.weight": "mlp.down_proj.weight",
    }
    top = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".", 2)
        if part[0] == "blocks":
            state[f"model.layers.{part[1]}.{names[part[2]]}"] = tensor
        elif name in top:
            state[top[name]] = tensor
    return state


def ours(folder: Path, steps: int, method: str, precision: str) -> list:
    "Seconds of each step."
    import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
    import torch
    from llm_course.align.policy_tuner import PolicyConfig, PolicyTuner
    from llm_course.align.chat import add_chat_tokens
    from llm_course.core import asset
    from llm_course.model.files import load_model
    from llm_course.tokens.exchange import load_tokenizer
    from llm_course.train.runner import keep_memory

    keep_memory()
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    tokenizer, _ = add_chat_tokens(load_tokenizer(asset("story.bpe")))
    model = load_model(folder / "ours.safetensors")

    def reward(messages, answers):
        return torch.tensor([reward_of(a) for a in answers])

    config = PolicyConfig(
        method, steps + 2, batch_size=facts["batch"], group=facts["group"], passes=1, lr=LR,
        beta=BETA, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    t = PolicyTuner(model, tokenizer, facts["prompts"], reward, config)
    t.dtype = getattr(torch, precision)
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        t.take_step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:], t.history[-1]["length"]


def theirs(folder: Path, steps: int, precision: str) -> list:
    "The same with TRL's GRPOTrainer."
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(facts["vocab"])}, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=numbers, eos_token=str(facts["end"]), pad_token="0", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=facts["vocab"], hidden_size=SIZE["d_model"], intermediate_size=facts["hidden"],
        num_hidden_layers=SIZE["n_layers"], num_attention_heads=SIZE["n_heads"],
        num_key_value_heads=SIZE["n_heads"], max_position_embeddings=SIZE["context_length"],
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
        eos_token_id=facts["end"], bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(torch.load(folder / "theirs.pt"), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    model.save_pretrained(folder / "theirs")  # TRL reads its reference from a folder
    tokenizer.save_pretrained(folder / "theirs")
    model = LlamaForCausalLM.from_pretrained(folder / "theirs")
    lengths, ends = [], []

    def reward(prompts, completions, **_):
        lengths.append(sum(len(c.split()) for c in completions) / len(completions))
        said = facts["said"]
        return [reward_of("".join(said[int(i)] for i in c.split())) for c in completions]

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            output_dir=out, use_cpu=True, bf16=precision == "bfloat16", report_to="none",
            per_device_train_batch_size=facts["batch"], num_generations=facts["group"],
            max_completion_length=NEW_TOKENS, beta=BETA, learning_rate=LR, max_steps=steps + 2,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, num_iterations=1,
            temperature=1.0, gradient_checkpointing=False, loss_type="dapo",
        )  # fmt: skip
        rows = [{"prompt": " ".join(map(str, row))} for row in facts["rows"]]
        GRPOTrainer(
            model=model, reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()],
        ).train()  # fmt: skip
    return [b - a for a, b in zip(ends[1:], ends[2:])], lengths[-1]


def worker(name: str, folder: Path, steps: int, threads: int) -> None:
    "Measure one of them in this process; print seconds and the mean length of answers."
    import torch

    torch.set_num_threads(threads)
    kind, precision = name.split("-")
    if kind == "trl":
        seconds, length = theirs(folder, steps, precision)
    else:
        seconds, length = ours(folder, steps, kind, precision)
    print("RESULT " + json.dumps({"seconds": seconds, "length": length}))


def measure(python: str, name: str, folder: Path, chosen) -> dict:
    "Run a worker; its result. Raises `RuntimeError` with the end of what it said."
    command = [python, __file__, "--worker", name, "--folder", str(folder)]
    command += ["--steps", str(chosen.steps), "--threads", str(chosen.threads)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError((done.stderr or done.stdout).strip()[-2000:])
    return json.loads(found[-1][7:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", default=sys.executable, help="Python that has TRL")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        return worker(chosen.worker, chosen.folder, chosen.steps, chosen.threads)
    names = [f"{kind}-{p}" for p in ("float32", "bfloat16") for kind in ("grpo", "trl", "ppo")]
    rates, reason = {name: [] for name in names}, ""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), chosen.batch, chosen.group)
        for _ in range(chosen.rounds):
            for name in names:
                python = chosen.trl_python if name.startswith("trl") else sys.executable
                try:
                    found = measure(python, name, Path(folder), chosen)
                except RuntimeError as error:
                    reason = str(error)
                    continue
                full = found["length"] / NEW_TOKENS  # a few answers end earlier, by chance
                rate = full * chosen.batch / statistics.median(found["seconds"])
                rates[name].append(rate)
                print(f"{name:15} {rate:7.1f} samples/s, {found['length']:.1f} tokens", flush=True)
    best = {}
    for kind in ("grpo", "ppo", "trl"):
        found = [statistics.median(r) for name, r in rates.items() if name.startswith(kind) and r]
        best[kind] = max(found, default=None)
    result = {"name": "rlhf", "value": None, "unit": "x TRL's samples per second", "bar": 1.0}
    if best["trl"] is None:
        print(f"TRL could not be measured: {reason.splitlines()[-1] if reason else 'no result'}")
    else:
        result["value"] = round(best["grpo"] / best["trl"], 2)
        print(f"GRPO: ours {best['grpo']:.1f}, TRL {best['trl']:.1f} samples per second; "
              f"PPO of ours {best['ppo']:.1f}")  # fmt: skip
    print(json.dumps({**result, "samples_per_second": best, "threads": chosen.threads}))


if __name__ == "__main__":
    main()
