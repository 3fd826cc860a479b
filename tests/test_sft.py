"Supervised fine-tuning: what the lesson does not check."

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_course.align.answers import draw_answers
from llm_course.align.chat import (
    CHAT_TOKENS, add_chat_tokens, load_assistant, read_chats, recent_messages, render, render_text)
from llm_course.align.pairs import read_pairs
from llm_course.align.lora import LoRA, add_lora, merge_lora
from llm_course.align.sft import ChatBatches, PackedGPT, render_story, train_sft
from llm_course.core import asset
from llm_course.model.block import GPT2, COURSE
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.world.talk import AnswerPair, Talk
from llm_course.tokens.bpe import BPETokenizer
from llm_course.tokens.text import ByteTokenizer, CharTokenizer, WordTokenizer
from llm_course.train.floor import floor_excess
from llm_course.world import World
from llm_course.world.writers import say

TEXT = "A. Where does Ada live? Ada lives in Duck Row. Ada <|user|>"
TOKENIZERS = [
    ByteTokenizer(),
    CharTokenizer.train(TEXT),
    WordTokenizer.train(TEXT),
    BPETokenizer.train(TEXT, 280),
]
CHAT = say("Where does Ada live?", "Ada lives in Duck Row.")


def small(tokenizer, style=COURSE):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, 96, 16, 1, 2, style=style))


@pytest.mark.parametrize("old", TOKENIZERS, ids=lambda t: t.kind)
def test_every_tokenizer_learns_to_chat(old):
    tokenizer, _ = add_chat_tokens(old)
    assert [tokenizer.special_tokens[name] for name in CHAT_TOKENS] == [
        old.vocab_size + i for i in range(4)
    ]
    assert not set(CHAT_TOKENS) & set(old.special_tokens)
    assert tokenizer.encode(TEXT) == old.encode(TEXT)
    assert add_chat_tokens(tokenizer)[0].special_tokens == tokenizer.special_tokens
    assert tokenizer.decode(render(tokenizer, CHAT).tokens) == render_text(CHAT)


@pytest.mark.parametrize("style", [COURSE, GPT2], ids=["own head", "tied head"])
def test_old_logits_stay(style):
    old = small(TOKENIZERS[0], style)
    tokenizer, new = add_chat_tokens(TOKENIZERS[0], old)
    tokens = torch.tensor([[1, 2, 3]])
    assert new.config.vocab_size == old.config.vocab_size + 4 == tokenizer.vocab_size
    assert torch.allclose(new(tokens)[..., : old.config.vocab_size], old(tokens))
    assert (new.head.weight is new.embed.weight) == style.tied_head
    assert old.embed.weight.shape[0] == old.config.vocab_size
    again = add_chat_tokens(tokenizer, new)[1]
    assert again.config == new.config


def test_a_model_of_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        add_chat_tokens(TOKENIZERS[3], small(TOKENIZERS[0]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text() | st.sampled_from([*CHAT_TOKENS, "<|endoftext|>", "<|", "|>"]), max_size=6)
)
def test_nobody_can_write_a_special_token(parts):
    tokenizer, _ = add_chat_tokens(TOKENIZERS[3])
    messages = say("".join(parts), "Yes.", "".join(parts[::-1]))
    special = [i for i in render(tokenizer, messages).tokens if i >= tokenizer.end_id]
    names = [tokenizer.decode([i]) for i in special]
    assert names == [
        "<|endoftext|>",
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
        "<|end|>",
        "<|user|>",
        "<|end|>",
    ]


@pytest.mark.parametrize(
    "wrong, what",
    [
        ("hello", "list of messages"),
        ([{"role": "user"}], "'content'"),
        (["hi"], "'role'"),
        ([{"role": "robot", "content": ""}], "robot"),
        ([{"role": "user", "content": None}], "text"),
    ],
)
def test_what_is_no_conversation(wrong, what):
    with pytest.raises(ValueError, match=what):
        render(add_chat_tokens(ByteTokenizer())[0], wrong)


def test_batches_hold_every_conversation_once():
    tokenizer, _ = add_chat_tokens(ByteTokenizer())
    texts = [render(tokenizer, say("a" * n, "b" * n)) for n in range(1, 9)]
    texts.append(render_story(tokenizer, "c"))
    for pack in (False, True):
        batches = ChatBatches(texts, 2, 64, pack=pack)
        place, counted = batches.state_dict(), 0
        while batches.place["epoch"] == 0:
            tokens, targets, mask = next(batches)
            counted += int(mask.sum())
            said = bytes(targets[mask][targets[mask] < 256].tolist())
            assert set(said) <= set(b" bc")
        assert counted == sum(sum(t.loss_mask) for t in texts)
        batches.load_state_dict(place)
        assert batches.place == {"epoch": 0, "row": 0}


def test_an_old_conversation_is_forgotten_from_its_beginning():
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer()))
    long = say(*["12345678"] * 9, system="S")
    kept = recent_messages(tokenizer, long, 60)
    assert kept[0]["role"] == "system" and kept[1]["role"] == "user"
    assert kept[1:] == long[-len(kept) + 1 :]
    with pytest.raises(ValueError, match="too long"):
        recent_messages(tokenizer, say("x" * 100), 60)
    assert len(draw_answers(model, tokenizer, [long, CHAT[:1]], 1, 8).answers) == 2


def test_it_learns_an_answer_by_heart():
    torch.manual_seed(0)
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer()))
    train_sft(
        model,
        tokenizer,
        [say("a?", "yes"), say("b?", "no")] * 8,
        40,
        batch_size=4,
        lr=0.01,
        lr_matrix=0.03,
        pack=False,
        watch=None,
    )
    said = draw_answers(model, tokenizer, [say("a?"), say("b?")], 1, 8, temperature=0).answers
    assert said == ["yes", "no"]


@pytest.mark.parametrize("style", [COURSE, GPT2], ids=["own head", "tied head"])
def test_lora_starts_as_nothing_and_merges(style):
    torch.manual_seed(0)
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer(), style))
    tokens = torch.tensor([render(tokenizer, CHAT).tokens])
    before, names = model(tokens).detach(), list(model.state_dict())
    add_lora(model, rank=2, alpha=4.0)
    assert torch.equal(model(tokens), before)
    assert isinstance(model.head, LoRA) != style.tied_head
    frozen = {k: v.clone() for k, v in model.state_dict().items() if ".up" not in k[-4:]}
    train_sft(model, tokenizer, [CHAT] * 8, 5, batch_size=2, lr=0.01, watch=None)
    now = model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in frozen.items() if not k.endswith(".down"))
    after = model(tokens).detach()
    assert (after - before).abs().max() > 1e-3
    merge_lora(model)
    assert (model(tokens) - after).abs().max() < 1e-5 * after.abs().max()
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_lora_is_that_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5))
    ours = LoRA(copy.deepcopy(plain[0]), rank=3, alpha=12.0)
    torch.nn.init.normal_(ours.up)
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["0"])
    theirs = peft.get_peft_model(plain, config)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data = ours.down.data.clone()
    layer.lora_B["default"].weight.data = ours.up.data.clone()
    x = torch.randn(4, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    merged = merge_lora(torch.nn.Sequential(ours))
    assert torch.allclose(merged[0].weight, theirs.merge_and_unload()[0].weight, atol=1e-6)


def test_a_batch_without_answers_changes_nothing():
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    progress = train_sft(model, tokenizer, [say("Hi"), say("Ho")], 3, watch=None)
    assert progress.history[-1]["train"] == 0.0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("style", [COURSE, GPT2], ids=["shift", "learned positions"])
def test_packing_changes_no_gradient(style):
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer(), style))
    texts = [render(tokenizer, say("a" * n, "b" * n)) for n in (3, 9, 5, 7)]
    gradients = []
    for pack in (True, False):
        batches = ChatBatches(texts, 4, 64, pack=pack)
        tokens, targets, mask = next(batches)
        whole = PackedGPT(model, tokenizer.end_id) if pack else model
        logits = whole(tokens)
        model.zero_grad()
        targets = targets.masked_fill(~mask, -100)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).backward()
        gradients.append(model.blocks[0].feed_forward.up.weight.grad.clone())
    assert len(tokens) == 4 and batches.plan(0)[1].tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(*gradients, atol=1e-5)


def lines(path, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row, what",
    [
        ("{", "no JSON"),
        ("[1]", "braces"),
        ({"text": "x"}, "no 'messages'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "not a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, what):
    path = lines(tmp_path / "mine.jsonl", {"messages": CHAT}, "", row)
    with pytest.raises(ValueError, match=f"mine.jsonl, line 3.*{what}"):
        read_chats(path)


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"messages": []}\n{"messages": "\xff"}')
    with pytest.raises(ValueError, match="line 2"):
        read_chats(path)


def test_conversations_that_are_left_out_or_cut(tmp_path):
    tokenizer, _ = add_chat_tokens(ByteTokenizer())
    fits = {"messages": CHAT, "source": "me"}
    long = {"messages": say("1", "2", "x" * 90, "4")}
    found = read_chats(
        lines(
            tmp_path / "c.jsonl",
            fits,
            long,
            {"messages": say("x" * 90, "y")},
            {"messages": say("x", "")},
            {"messages": []},
        ),
        tokenizer,
        64,
    )
    assert found.items == [CHAT, say("1", "2")]
    assert [note.split("line ")[1] for note in found.notes] == [
        "2: too long, cut behind an answer",
        "3: too long, left out",
        "4: an empty answer, left out",
        "5: the assistant says nothing, left out",
    ]
    assert str(found).splitlines()[0] == "usable: 2"


def test_pairs_in_their_formats(tmp_path):
    tokenizer, _ = add_chat_tokens(ByteTokenizer())
    text = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}
    chat = {
        "prompt": say("Hi"),
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "Go."}],
    }
    whole = {"chosen": say("Hi", "Hello!"), "rejected": say("Hi", "Go.")}
    found = read_pairs(lines(tmp_path / "p.jsonl", text, chat, whole))
    assert found.items == [AnswerPair(say("Hi"), "Hello!", "Go.")] * 3 and not found.notes
    found = read_pairs(
        lines(
            tmp_path / "p.jsonl",
            text,
            {**text, "rejected": " "},
            {**text, "rejected": "Hello! "},
            {**text, "prompt": "x" * 99},
        ),
        tokenizer,
        64,
    )
    assert len(found.items) == 1 and len(found.notes) == 3
    for wrong in (
        {"prompt": "Hi", "chosen": "x"},
        {"chosen": "x", "rejected": "y"},
        {**whole, "rejected": say("Ho", "Go.")},
        {**text, "chosen": say("Hi")},
    ):
        with pytest.raises(ValueError, match="p.jsonl, line 1"):
            read_pairs(lines(tmp_path / "p.jsonl", wrong))


@pytest.mark.parametrize("style", [COURSE, GPT2], ids=["shift", "learned positions"])
def test_a_run_goes_on_where_it_was_stopped(tmp_path, style):
    def run(folder, stop=None):
        tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer(), style))
        chats = [say("a" * n, "b" * n) for n in range(1, 20)]

        def watch(trainer):
            if trainer.progress.step == stop:
                raise RuntimeError("the power went off")

        train_sft(
            model, tokenizer, chats, 3, batch_size=2, folder=folder, eval_every=2, watch=watch
        )
        return model.state_dict()

    whole = run(tmp_path / "a")
    with pytest.raises(RuntimeError):
        run(tmp_path / "b", stop=6)
    again = run(tmp_path / "b")
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_one_budget_and_no_other(tmp_path):
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer()))
    with pytest.raises(ValueError, match="give the budget as either .*steps=2.*minutes=1"):
        train_sft(model, tokenizer, [CHAT], steps=2, minutes=1, watch=None)
    assert train_sft(model, tokenizer, [CHAT] * 8, steps=3, watch=None).step == 3
    assert train_sft(model, tokenizer, [CHAT] * 8, minutes=0.01, watch=None).step >= 1
    settings = dict(steps=2, batch_size=2, watch=None, folder=tmp_path)
    train_sft(model, tokenizer, [CHAT] * 8, **settings)
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        train_sft(model, tokenizer, [CHAT] * 8, seed=5, **settings)


def test_the_assistant_that_ships():
    model, tokenizer = load_assistant()
    world = World(seed=0)
    talk = Talk(world)
    asked = [r for r in talk.requests("held-out", "fact")][::4]
    said = draw_answers(model, tokenizer, [say(r.text) for r in asked], temperature=0).answers
    right = [talk.reward(r.text, text).correct == 1 for r, text in zip(asked, said)]
    assert sum(right) > 0.85 * len(asked)
    assert floor_excess(model, tokenizer, world, world.sample(32, seed=31)).excess < 0.08


def recorded():
    return json.loads(asset("sft.json").read_text(encoding="utf-8"))["ways"]


def test_the_recorded_table_says_what_the_lesson_says():
    rows = recorded()
    assert all([row["seed"] for row in way] == [0, 1, 2] for way in rows.values())
    mixed, plain, every, lora = (
        rows[name]
        for name in (
            "all weights, with stories",
            "all weights",
            "all weights, with stories, loss on all text",
            "LoRA, rank 16, with stories",
        )
    )
    assert max(row["excess"] for row in mixed) < 0.1 < 1 < min(row["excess"] for row in plain)
    assert max(row["facts"] for row in lora) < min(row["facts"] for row in mixed)
    assert lora[0]["megabytes"] < 0.2 * mixed[0]["megabytes"]
    assert sum(row["facts"] for row in every) < sum(row["facts"] for row in mixed)


@pytest.mark.slow
def test_a_recorded_run_comes_out_again(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import sft

    name = "all weights, with stories"
    row, new = recorded()[name][0], sft.measure(sft.WAYS[name], 0)
    assert abs(new["facts"] - row["facts"]) < 0.15
    assert abs(new["excess"] - row["excess"]) < 0.05
