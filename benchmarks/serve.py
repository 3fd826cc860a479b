"""Serving: one batch that stays full, beside one text at a time, beside transformers.

    python benchmarks/serve.py [--rounds N] [--size NAME]

Three servers with the same weights behind the same API (FastAPI and uvicorn, each in a process of
its own), and a client that asks all of them alike: completions of prompts of 16 random tokens, 24
to 72 new tokens each, greedy, not streamed, over connections that stay open. The servers: the
course's engine with 64 places; the same with one place; transformers' `generate` behind a lock, as
one writes a first server. 1, 8 and 64 clients, each asks again as soon as it has its answer; the
sides take turns, and the table shows medians of the rounds. The slower sides get fewer requests (a
half; an eighth, in one round), so their waits are rather told too short. Then the same engine
streamed: time to the first token and between tokens. The usual model has 9.4 million parameters; of
one with 1.4 a single text fits into the processor's caches and is nearly as cheap alone (`--size
"1.4 million"`). The last line is JSON; `value` is requests per second with 64 clients, 64 places
over one place, bar 5.
"""
import argparse
import asyncio
import json
import multiprocessing
import statistics
import time

import llm_course  # noqa: F401  before torch: it sets how long waiting threads spin
import torch

from generate import SHAPES, pair
from llm_course.ship.engine import ServedModel
from llm_course.ship.server import Api, make_app, run_server

PROMPT, LOADS = 16, {1: 6, 8: 48, 64: 256}  # clients: requests
SIDES = {"64 places": 1, "one at a time": 2, "transformers": 8}  # gets so much less of them


class Numbers:
    "A tokenizer for random weights: a token is its number."

    def token_bytes(self, token: int) -> bytes:
        return f" {token}".encode()

    def decode(self, ids: list) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()


class Locked:
    "transformers' generate in place of our engine's batch: one request after the other."

    def __init__(self, model):
        self.model, self.lock = model, asyncio.Lock()

    def write(self, prompt: list, new: int) -> list:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                       do_sample=False)[0, len(prompt):].tolist()

    async def answer(self, request):
        from starlette.responses import JSONResponse
        body = await request.json()
        async with self.lock:
            new = await asyncio.to_thread(self.write, body["prompt"], body["max_tokens"])
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(new)}
        choice = {"index": 0, "text": Numbers().decode(new), "finish_reason": "length"}
        return JSONResponse({"object": "text_completion", "choices": [choice], "usage": usage})


def run_side(side: str, size: str, line) -> None:
    "One of the servers, in a process of its own; says its address."
    torch.set_num_threads(1)
    config = SHAPES[size][0]
    ours, theirs = pair(config)
    served = ServedModel(size, ours, Numbers(), None, None, frozenset(), config.context_length)
    app = make_app(Api(served, batch_size=1 if side == "one at a time" else 64))
    if side == "transformers":
        app.router.routes[:] = [r for r in app.router.routes if r.path != "/v1/completions"]
        app.router.add_route("/v1/completions", Locked(theirs).answer, methods=["POST"])
    run_server(app, port=0, ready=line.send)


def request_bytes(i: int, vocabulary: int, stream: bool) -> tuple:
    "A request as bytes, and how many tokens it asks for."
    g = torch.Generator().manual_seed(i)
    prompt = torch.randint(1, vocabulary, (PROMPT,), generator=g).tolist()
    new = torch.randint(24, 73, (1,), generator=g).item()
    body = json.dumps({"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": stream})
    return (f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
            f"\r\ncontent-length: {len(body)}\r\n\r\n{body}").encode(), new


async def read_answer(reader) -> tuple:
    "Body of an answer, and when its pieces came."
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert b" 200 " in head, head
    if b"content-length: " in head:
        size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return await reader.readexactly(size), [time.perf_counter()]
    parts, times = [], []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        times.append(time.perf_counter())
        await reader.readline()
    await reader.readline()
    return b"".join(parts), times


async def ask_all(port: int, asked: list, clients: int) -> list:
    "[(seconds in all, when pieces came, body)] of all requests, from so many clients."
    left, out = list(enumerate(asked)), [None] * len(asked)

    async def client():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left:
            i, (data, _) = left.pop(0)
            begin = time.perf_counter()
            writer.write(data)
            body, times = await read_answer(reader)
            out[i] = times[-1] - begin, [t - begin for t in times], body
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return out


def measure(port: int, clients: int, vocabulary: int, stream: bool = False, seed: int = 0,
            share: int = 1) -> dict:
    "Requests per second, and the seconds that half and 99 of 100 do not exceed."
    n = max(2, LOADS[clients] // share)
    asked = [request_bytes(1000 * seed + i, vocabulary, stream) for i in range(n)]
    begin = time.perf_counter()
    rows = asyncio.run(ask_all(port, asked, clients))
    seconds = time.perf_counter() - begin
    if not stream:
        got = [json.loads(body)["usage"]["completion_tokens"] for _, _, body in rows]
        assert got == [new for _, new in asked], "a request got another number of tokens"
    took = sorted(row[0] for row in rows)
    gaps = sorted(b - a for row in rows for a, b in zip(row[1], row[1][1:]))
    first = sorted(row[1][0] for row in rows)
    at = lambda row, share: row[min(len(row) - 1, int(share * len(row)))] if row else 0
    return {"rate": n / seconds, "tokens": sum(new for _, new in asked) / seconds,
            "p50": at(took, 0.5), "p99": at(took, 0.99), "first": at(first, 0.5),
            "first99": at(first, 0.99), "gap": at(gaps, 0.5), "gap99": at(gaps, 0.99)}


def same_texts(ports: dict, vocabulary: int) -> int:
    "How many of 8 texts all three sides write alike: the same weights, greedy."
    asked = [request_bytes(i, vocabulary, False) for i in range(8)]
    texts = [[json.loads(body)["choices"][0]["text"] for _, _, body in
              asyncio.run(ask_all(port, asked, 8))] for port in ports.values()]
    return sum(len(set(rows)) == 1 for rows in zip(*texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=[*SHAPES], default="9.4 million")
    options = parser.parse_args()
    vocabulary = SHAPES[options.size][0].vocab_size
    context = multiprocessing.get_context("spawn")
    ports, processes = {}, []
    try:
        for side in SIDES:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=run_side, args=(side, options.size, theirs)))
            processes[-1].start()
            ports[side] = int(ours.recv().rsplit(":", 1)[1])
            time.sleep(1)
        print(f"{options.size} parameters; {same_texts(ports, vocabulary)} of 8 texts are the same "
              "on all three sides")
        print("clients  server          requests/s  tokens/s    p50 s    p99 s")
        rates = {}
        for clients in LOADS:
            found = {side: [] for side in SIDES}
            for seed in range(options.rounds):
                for side, share in SIDES.items():
                    if side != "transformers" or not seed:
                        found[side].append(measure(ports[side], clients, vocabulary, seed=seed,
                                                   share=share))
            for side in SIDES:
                row = {k: statistics.median(r[k] for r in found[side]) for k in found[side][0]}
                rates[side, clients] = row["rate"]
                print(f"{clients:7}  {side:14}{row['rate']:12.1f}{row['tokens']:10.0f}"
                      f"{row['p50']:9.3f}{row['p99']:9.3f}", flush=True)
        streamed = {c: measure(ports["64 places"], c, vocabulary, stream=True, share=2)
                    for c in LOADS}
        for clients, row in streamed.items():
            print(f"streamed, {clients:2} clients, 64 places: {row['rate']:.1f} requests/s; first "
                  f"token p50 {row['first']:.3f} s, p99 {row['first99']:.3f}; between tokens p50 "
                  f"{row['gap']:.4f} s, p99 {row['gap99']:.4f}")
    finally:
        for process in processes:
            process.terminate()
            process.join(20)
    over = {n: rates["64 places", n] / rates["one at a time", n] for n in LOADS}
    print(json.dumps({
        "name": "serve", "value": round(over[64], 2), "bar": 5,
        "unit": "requests per second with 64 clients, a full batch over one at a time",
        "eight_clients": round(over[8], 2), "one_client": round(over[1], 2),
        "over_transformers": round(rates["64 places", 64] / rates["transformers", 64], 2),
        "requests_per_second": round(rates["64 places", 64], 1), "size": options.size,
        "threads": 1}))


if __name__ == "__main__":
    main()
