"Supervised fine-tuning: what the lesson does not check."

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llm_course.align.sft import (
    CHAT_TOKENS, ChatBatches, add_chat_tokens, answer_batch, fine_tune, recent, render,
    render_story, render_text, say)
from llm_course.model.block import GPT2, COURSE
from llm_course.model.gpt import GPT, GPTConfig
from llm_course.tokens.bpe import BPETokenizer, ByteTokenizer, CharTokenizer, WordTokenizer

TEXT = "A. Where does Ada live? Ada lives in Duck Row. Ada <|user|>"
TOKENIZERS = [ByteTokenizer(), CharTokenizer.train(TEXT), WordTokenizer.train(TEXT),
              BPETokenizer.train(TEXT, 280)]
CHAT = say("Where does Ada live?", "Ada lives in Duck Row.")


def small(tokenizer, style=COURSE):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, 96, 16, 1, 2, style=style))


@pytest.mark.parametrize("old", TOKENIZERS, ids=lambda t: t.kind)
def test_every_tokenizer_learns_to_chat(old):
    tokenizer, _ = add_chat_tokens(old)
    assert [tokenizer.special_tokens[name] for name in CHAT_TOKENS] == [
        old.vocab_size + i for i in range(4)]
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
    assert torch.allclose(new(tokens)[..., :old.config.vocab_size], old(tokens))
    assert (new.head.weight is new.embed.weight) == style.tied_head
    assert old.embed.weight.shape[0] == old.config.vocab_size
    again = add_chat_tokens(tokenizer, new)[1]
    assert again.config == new.config


def test_a_model_of_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        add_chat_tokens(TOKENIZERS[3], small(TOKENIZERS[0]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text() | st.sampled_from([*CHAT_TOKENS, "<|endoftext|>", "<|", "|>"]), max_size=6))
def test_nobody_can_write_a_special_token(parts):
    tokenizer, _ = add_chat_tokens(TOKENIZERS[3])
    messages = say("".join(parts), "Yes.", "".join(parts[::-1]))
    special = [i for i in render(tokenizer, messages).tokens if i >= tokenizer.end_id]
    names = [tokenizer.decode([i]) for i in special]
    assert names == ["<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>",
                     "<|user|>", "<|end|>"]


@pytest.mark.parametrize("wrong, what", [
    ("hello", "list of messages"), ([{"role": "user"}], "'content'"), (["hi"], "'role'"),
    ([{"role": "robot", "content": ""}], "robot"), ([{"role": "user", "content": None}], "text")])
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
    kept = recent(tokenizer, long, 60)
    assert kept[0]["role"] == "system" and kept[1]["role"] == "user"
    assert kept[1:] == long[-len(kept) + 1:]
    with pytest.raises(ValueError, match="too long"):
        recent(tokenizer, say("x" * 100), 60)
    assert len(answer_batch(model, tokenizer, [long, CHAT[:1]], 8)) == 2


def test_it_learns_an_answer_by_heart():
    torch.manual_seed(0)
    tokenizer, model = add_chat_tokens(ByteTokenizer(), small(ByteTokenizer()))
    fine_tune(model, tokenizer, [say("a?", "yes"), say("b?", "no")] * 8, 40, batch_size=4, lr=0.01,
              lr_matrix=0.03, pack=False, watch=None)
    assert answer_batch(model, tokenizer, [say("a?"), say("b?")], 8, temperature=0) == ["yes", "no"]
