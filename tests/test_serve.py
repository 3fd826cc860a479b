"""The server as strangers meet it: OpenAI's client, a crowd, a browser, and people who mean no good."""

import asyncio
import http.client
import http.server
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_browser import CHROMIUM, FLAGS
from typer.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from llm_course import cli
from llm_course.align.answers import answer_chat
from llm_course.align.chat import load_assistant
from llm_course.core import asset
from llm_course.generate.write import generate
from llm_course.model.files import load_model
from llm_course.ship.engine import served_model
from llm_course.ship.server import Api, Rules, make_app, serving
from llm_course.tokens.exchange import load_tokenizer
from llm_course.world.writers import say

ROOT = Path(__file__).resolve().parent.parent
MODEL, TOKENIZER = load_assistant("assistant")
HELPER = served_model("helper", MODEL, TOKENIZER)
ASK = {"messages": say("Where does Ada live?"), "temperature": 0}
RECORDS = []


@pytest.fixture(scope="module")
def server():
    "Address and `Api` of a running server."
    api = Api(HELPER, Rules(log=RECORDS.append), batch_size=16)
    with serving(make_app(api)) as url:
        yield url, api


def ask(url, path="/v1/chat/completions", body=ASK, method="POST", **headers):
    "Status and what was said, as JSON where it is."
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, json.loads(said) if said[:1] == b"{" else said.decode()


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def check_error(answer, status, code=None):
    "An error in OpenAI's form."
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert error["message"] and error["type"] and set(error) == {"message", "type", "param", "code"}
    assert code in (None, error["code"]), error


# --- OpenAI's client ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_chat_whole_and_streamed(client):
    want = answer_chat(MODEL, TOKENIZER, ASK["messages"], temperature=0)
    whole = client.chat.completions.create(model="helper", **ASK)
    assert whole.choices[0].message.content == want
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    parts = list(client.chat.completions.create(
        model="helper", **ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == want
    assert parts[-1].usage == whole.usage and parts[-2].choices[0].finish_reason == "stop"


def test_openai_n_seed_and_temperature(client):
    make = lambda **how: [c.message.content for c in client.chat.completions.create(
        model="helper", messages=say("Tell me a story."), max_tokens=24, **how).choices]
    one, two = make(n=4, seed=7, temperature=1.5), make(n=4, seed=7, temperature=1.5)
    assert one == two and len(set(one)) > 1 and make(n=4, seed=8, temperature=1.5) != one
    assert len(set(make(n=3, temperature=0))) == 1
    assert make(seed=7, temperature=1.5, top_p=1e-6) == make(temperature=0)


def test_openai_stop_and_length(client):
    free = client.chat.completions.create(model="helper", **ASK).choices[0].message.content
    word = free.split()[2]
    cut = client.chat.completions.create(model="helper", **ASK, stop=[word, "zzz"]).choices[0]
    assert cut.message.content == free[:free.index(word)] and cut.finish_reason == "stop"
    streamed = client.chat.completions.create(model="helper", **ASK, stop=word, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in streamed) == cut.message.content
    short = client.chat.completions.create(model="helper", **ASK, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_openai_logprobs(client):
    told = client.chat.completions.create(model="helper", **ASK, logprobs=True, top_logprobs=3)
    for token in told.choices[0].logprobs.content:
        best = token.top_logprobs
        assert len(best) == 3 and best[0].logprob == max(b.logprob for b in best)
        assert token.token == best[0].token and -20 < token.logprob <= 0
        assert sum(math.exp(b.logprob) for b in best) <= 1.001
    text = "".join(t.token for t in told.choices[0].logprobs.content)
    assert text.strip() == told.choices[0].message.content
    streamed = list(client.chat.completions.create(
        model="helper", **ASK, logprobs=True, top_logprobs=3, stream=True))
    pieces = [t for p in streamed if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert [t.token for t in pieces] == [t.token for t in told.choices[0].logprobs.content]


def test_openai_completions(client):
    tokenizer, model = load_tokenizer(asset("story.bpe")), load_model(asset("story.safetensors"))
    served = served_model("story", model, tokenizer)
    import openai
    with serving(make_app(Api(served))) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            told = client.completions.create(model="story", prompt=["One day", "Ada"], logprobs=2,
                                             max_tokens=20, temperature=0)
            for text, choice in zip(("One day", "Ada"), told.choices):
                ids = list(generate(model, served.prompt_ids(text), 20, served.stops, temperature=0))
                assert choice.text == tokenizer.decode(ids)
                assert choice.logprobs.tokens == [tokenizer.decode([i]) for i in ids]
            parts = client.completions.create(model="story", prompt="One day", max_tokens=20,
                                              temperature=0, stream=True)
            assert "".join(p.choices[0].text for p in parts) == told.choices[0].text
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="story", messages=say("Hi"))
            assert caught.value.code == "no_chat_model"


def test_openai_models_and_errors(client):
    import openai
    assert [m.id for m in client.models.list()] == ["helper"]
    assert client.models.retrieve("helper").owned_by == "llm-course"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=say("Hi"))
    for wrong in ({"temperature": 3}, {"n": 0}, {"stop": ["a"] * 17}, {"presence_penalty": 1},
                  {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"seed": -1}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="helper", messages=say("Hi"), **wrong)
        assert caught.value.param == next(iter(wrong))


# --- A crowd ------------------------------------------------------------------------------------


async def talk(port, body):
    "One request over a connection of its own; the text of the answer."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body)
    writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                 f"content-length: {len(data)}\r\n\r\n{data}".encode())
    said = await reader.read()
    writer.close()
    head, _, rest = said.partition(b"\r\n\r\n")
    assert b" 200 " in head, said[:300]
    return json.loads(rest)["choices"][0]["text"]


def test_a_hundred_clients_lose_nothing(server):
    url, api = server
    bodies = [{"prompt": f"Day {i % 50}", "max_tokens": 3 + i % 9, "seed": i} for i in range(100)]
    crowd = lambda: asyncio.gather(*(talk(int(url.rsplit(":", 1)[1]), b) for b in bodies))

    async def both():
        return await crowd()
    got = asyncio.run(both())
    for i in range(0, 100, 7):  # each as it would come alone
        assert ask(url, "/v1/completions", bodies[i])[1]["choices"][0]["text"] == got[i]
    assert len(got) == 100 and not api.engine.open


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(server, stream):
    url, api = server
    body = {"prompt": "One day", "max_tokens": 200, "temperature": 1.5, "stream": stream, "n": 40}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                  b"content-length: %d\r\n\r\n" % len(data) + data)
        wait_until(lambda: api.engine.writing() > 0)
    wait_until(lambda: not api.engine.open)
    wait_until(lambda: api.engine.writing() == 0 and api.engine.waiting() == 0)
    wait_until(lambda: RECORDS[-1]["status"] == 499)
    assert ask(url)[0] == 200


def test_a_full_line_and_a_limit_say_when_to_come_back():
    api = Api(HELPER, Rules(admit=lambda who: 2.5), line=1)
    with serving(make_app(api)) as url:
        check_error(ask(url), 429, "rate_limit_exceeded")
        api.rules.admit = None
        check_error(ask(url, body={**ASK, "n": 5}), 503, "server_busy")
        wait_until(lambda: not api.engine.open)
        assert ask(url)[0] == 200


# --- Bad requests, a bad model ------------------------------------------------------------------


def test_wrong_bodies_are_answered_in_form(server):
    url, _ = server
    large = json.dumps({"messages": say("x" * 10_000_000)}).encode()
    check_error(ask(url, body=large), 413, "request_too_large")
    for body in (b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} {'):
        check_error(ask(url, body=body), 400, "invalid_json")
    for body in (b"[]", b"null", b"3"):
        check_error(ask(url, body=body), 400)
    check_error(ask(url, body={"messages": say("so " * 300)}), 400, "context_length_exceeded")
    check_error(ask(url, "/v1/completions", {"prompt": "so " * 300}), 400,
                "context_length_exceeded")
    check_error(ask(url, "/v1/completions", {"prompt": [10**9]}), 400)
    half = ask(url, body=b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert half[0] in (200, 400), half  # half of a letter that UTF-16 writes in two
    check_error(ask(url, body=b'{"messages": [{"role": "user", "content": "a"}], '
                              b'"temperature": NaN}'), 400)
    check_error(ask(url, "/v1/nothing"), 404)
    check_error(ask(url, method="DELETE"), 405)
    assert ask(url)[0] == 200


def test_a_broken_model_is_an_error_and_health_says_so():
    broken = load_assistant()[0]
    with torch_no_grad():
        broken.head.weight.fill_(math.nan)
    with serving(make_app(Api(served_model("broken", broken, TOKENIZER)))) as url:
        check_error(ask(url), 500, "model_failed")
        status, said = ask(url, body={**ASK, "stream": True})
        assert status == 200 and json.loads(said.split("\n\n")[1][6:])["error"]["message"]
        assert ask(url, "/healthz", None, "GET")[0] == 503


def torch_no_grad():
    import torch
    return torch.no_grad()


def test_a_text_that_takes_too_long_is_ended():
    with serving(make_app(Api(HELPER, seconds=-1))) as url:
        check_error(ask(url), 504, "timeout")


def test_filters_stop_what_is_asked_and_what_is_said():
    api = Api(HELPER, Rules(before=lambda text: "secret" in text))
    with serving(make_app(api)) as url:
        check_error(ask(url, body={"messages": say("A secret?")}), 400, "content_filter")
        said = ask(url)[1]["choices"][0]["message"]["content"]
        word = said.split()[1]
        api.rules.after = lambda text: word in text
        for stream in (False, True):
            told = ask(url, body={**ASK, "stream": stream})[1]
            text = json.dumps(told) if stream is False else told
            assert word not in text and '"content_filter"' in text


def test_health_metrics_and_a_log_without_words(server):
    url, _ = server
    assert ask(url, "/healthz", None, "GET") == (200, {"status": "ok", "why": None})
    ask(url)
    said = ask(url, "/metrics", None, "GET")[1]
    assert 'llm_course_requests_total{endpoint="chat",status="200"}' in said
    for line in said.splitlines():
        assert line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0, line
    assert "Ada" not in json.dumps(RECORDS) and "127.0.0.1" not in json.dumps(RECORDS)


# --- Who may ask --------------------------------------------------------------------------------


def test_names_origins_and_keys(server):
    url, _ = server
    check_error(ask(url, Host="evil.example"), 403, "host_not_allowed")
    check_error(ask(url, Origin="http://evil.example"), 403, "origin_not_allowed")
    check_error(ask(url, "/", None, "GET", Host="evil.example:80"), 403)
    assert ask(url, Origin=url)[0] == 200
    with serving(make_app(Api(HELPER, Rules(api_key="k3y", origins=("http://a.example",))))) as url:
        check_error(ask(url), 401, "invalid_api_key")
        check_error(ask(url, "/metrics", None, "GET"), 401)
        assert ask(url, Authorization="Bearer k3y", Origin="http://a.example")[0] == 200
        assert ask(url, "/", None, "GET")[0] == 200


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        rebound = "--host-resolver-rules=MAP evil.example 127.0.0.1"
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, rebound])
        yield browser
        browser.close()


STEAL = """async url => {
    const body = JSON.stringify({messages: [{role: "user", content: "Hi"}]});
    try { return await (await fetch(url + "/v1/chat/completions", {method: "POST", body})).text(); }
    catch (error) { return "blocked"; } }"""


def test_a_web_page_of_others_gets_nothing_in_a_browser(server, browser):
    "A page of another origin, and one that has rebound its name to this machine."
    url, _ = server
    port = url.rsplit(":", 1)[1]

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<title>A harmless page</title>")

        def log_message(self, *args):
            pass

    other = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    n = len(RECORDS)
    page = browser.new_page()
    page.goto(f"http://evil.example:{other.server_port}/")
    assert page.evaluate(STEAL, url) == "blocked"
    rebound = page.goto(f"http://evil.example:{port}/")  # the same name, now ours
    assert rebound.status == 403
    assert "host_not_allowed" in page.evaluate(STEAL, f"http://evil.example:{port}")
    page.close()
    other.shutdown()
    other.server_close()
    assert len(RECORDS) == n, "the model was asked"


# --- The command --------------------------------------------------------------------------------


def start(*arguments):
    "`llm-course serve` as a process of its own, and its address."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "llm_course", "serve", *arguments], env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    return process, line.split()[1] if line else process.communicate()[1]


@pytest.mark.skipif(os.name == "nt", reason="no Ctrl-C for one process")
def test_the_command_serves_and_ctrl_c_ends_it_quickly(tmp_path):
    log = tmp_path / "log.jsonl"
    process, url = start("--port", "0", "--device", "cpu", "--log", str(log), "--stage", "assistant")
    try:
        said = ask(url)[1]["choices"][0]["message"]["content"]
        assert said == answer_chat(MODEL, TOKENIZER, ASK["messages"], temperature=0)
        assert json.loads(log.read_text(encoding="utf-8"))["status"] == 200
        body = {"prompt": "One day", "max_tokens": 200, "n": 100, "temperature": 1.9}
        slow = threading.Thread(target=lambda: ask(url, "/v1/completions", body))
        slow.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - begin < 8 and process.returncode == 130, errors
        assert "Traceback" not in errors
        slow.join(10)
    finally:
        process.kill()


def test_the_command_refuses_an_open_door_and_a_taken_port():
    call = lambda *words: CliRunner().invoke(cli.app, ["serve", "--device", "cpu", *words])
    result = call("--host", "0.0.0.0")
    assert result.exit_code == 2 and "--api-key" in result.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = call("--port", str(taken.getsockname()[1]))
        assert result.exit_code == 2 and "--port" in result.output


# --- The chat page ------------------------------------------------------------------------------


@pytest.fixture
def chat(server, browser):
    "The chat page, open; fails if it asks anybody else or complains."
    page, asked, complaints = browser.new_page(viewport={"width": 1100, "height": 750}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda m: complaints.append(m.text)
            if m.type == "error" and "status of 400" not in m.text else None)  # too long: it retries
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server[0])
    page.get_by_text("helper", exact=True).wait_for()
    yield page
    assert not complaints
    assert all(url.startswith((server[0], "data:")) for url in asked), asked
    page.close()


def say_to(page, text):
    "Type a line, send it, and wait for the whole answer."
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    page.locator("#send:enabled").wait_for()


def test_chat_page_by_keyboard(chat):
    chat.get_by_label("Temperature").fill("0")
    say_to(chat, "Where does Ada live?")
    want = answer_chat(MODEL, TOKENIZER, ASK["messages"], temperature=0)
    assert chat.locator("li.assistant").inner_text().strip() == want
    assert chat.locator("#spoken").text_content() == want  # what a screen reader says
    chat.get_by_label("Show next-token probabilities").check()
    first = chat.locator("li.assistant .t").first
    first.focus()
    chat.keyboard.press("ArrowRight")
    chat.keyboard.press("ArrowRight")
    rows = chat.locator("#bars tr")
    assert rows.count() >= 10 and chat.locator("#bars tr.drawn").count() == 1
    assert chat.locator(".t[aria-pressed=true]").count() == 1
    percent = [float(t.strip("<% ")) for t in chat.locator("#bars td").all_inner_texts()]
    assert percent[0] == max(percent) and 0 < sum(percent) < 102
    assert not chat.get_by_label("Key of this server").is_visible()
    assert chat.get_by_label("Top p").input_value() == "1"
    say_to(chat, "Thank you!")
    assert chat.locator("li").count() == 4
    chat.get_by_role("button", name="New chat").click()
    assert chat.locator("li").count() == 0


def test_chat_page_stops_and_forgets(chat, server):
    for i in range(8):  # more than the model reads at once
        say_to(chat, f"Please tell me a story about the number {i}, about Ada, and about Bob. " * 2)
    assert chat.locator("li.error").count() == 0
    assert chat.locator("li.forgot").count() == 1
    chat.get_by_label("Temperature").fill("2")
    chat.get_by_label("Message").fill("Tell me a story.")
    chat.keyboard.press("Enter")
    chat.keyboard.press("Escape")
    wait_until(lambda: not server[1].engine.open)
    chat.locator("#send:enabled").wait_for()


def test_chat_page_is_accessible_in_light_dark_and_on_a_phone(chat, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    pictures = Path(os.environ.get("PICTURES", tmp_path))
    chat.get_by_label("Show next-token probabilities").check()
    chat.get_by_label("Seed").fill("5")
    say_to(chat, "Where does Ada live?")
    for name, size, scheme in (("light", (1100, 750), "light"), ("dark", (1100, 750), "dark"),
                               ("phone", (375, 700), "light")):
        chat.set_viewport_size({"width": size[0], "height": size[1]})
        chat.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(chat)
        assert not found.response["violations"], found.generate_report()
        chat.screenshot(path=pictures / f"chat-{name}.png")
        assert chat.evaluate("document.documentElement.scrollWidth <= innerWidth")
