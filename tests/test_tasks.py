"Scores of benchmarks: equal to the field's own, on a thousand random pairs and on nasty files."

import json
import math
import random
import string

import pytest
import torch

from llm_course.core import asset
from llm_course.evaluate.people import (
    blind_pairs,
    expected_best,
    judge_report,
    rate_models,
    weighted_kappa,
)
from llm_course.evaluate.harness import harness_model, run_harness, write_harness_task
from llm_course.evaluate.scores import (
    Task,
    TaskItem,
    bleu_score,
    chrf_score,
    encode_pair,
    exact_match,
    read_task,
    rouge_score,
    run_tasks,
    score_continuations,
    task_item,
    wilson_interval,
    write_task,
)
from llm_course.evaluate.tasks import as_letters, named_choice, village_tasks
from llm_course.model.files import load_model
from llm_course.tokens.exchange import load_tokenizer
from llm_course.tokens.text import ByteTokenizer
from llm_course.world import World

WORDS = "the a cat dog's sat on mat. 3.5 1,000 self-made 9-10 (well) &amp; &quot;x&quot; é—ü ! ,".split()


def text(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randrange(12))
    if rng.random() < 0.2:
        words.append("".join(rng.choices(string.printable, k=8)))
    return rng.choice([" ", " ", "  ", "\n"]).join(words)


def pairs(n: int = 1000) -> list:
    "Texts and one to three references, many of them near."
    rng = random.Random(0)
    made = []
    for _ in range(n):
        ref = text(rng)
        near = " ".join(w for w in ref.split() if rng.random() < 0.8)
        made.append((rng.choice([near, text(rng), ref]), [ref, *(text(rng) for _ in range(rng.randrange(3)))]))
    return made


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    made = pairs()
    for ours, refs in made:
        want = sacrebleu.sentence_bleu(ours, refs).score
        assert bleu_score([ours], [refs], each=True) == pytest.approx(want, abs=1e-6), (ours, refs)
        want = sacrebleu.sentence_chrf(ours, refs).score
        assert chrf_score([ours], [refs]) == pytest.approx(want, abs=1e-6), (ours, refs)
    for at in range(0, 1000, 50):
        some = made[at : at + 50]
        texts, refs = [ours for ours, _ in some], [(r * 3)[:3] for _, r in some]
        turned = list(zip(*refs))
        assert bleu_score(texts, refs) == pytest.approx(sacrebleu.corpus_bleu(texts, turned).score, abs=1e-6)
        assert chrf_score(texts, refs) == pytest.approx(sacrebleu.corpus_chrf(texts, turned).score, abs=1e-6)


def test_rouge_is_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    kinds = ["rouge1", "rouge2", "rouge3", "rougeL"]
    theirs = scorer.RougeScorer(kinds)
    for ours, refs in pairs():
        want = theirs.score(refs[0], ours)
        for kind in kinds:
            assert rouge_score(ours, refs[0], kind) == pytest.approx(tuple(want[kind]), abs=1e-6)


@pytest.fixture(scope="module")
def story():
    return load_model(asset("story.safetensors")), load_tokenizer(asset("story.bpe"))


def test_batches_change_nothing(story):
    model, tokenizer = story
    rng, pairs = random.Random(1), []
    for _ in range(40):
        prompt = [tokenizer.end_id, *rng.choices(range(500), k=rng.randrange(30))]
        pairs.append((prompt, rng.choices(range(500), k=rng.randrange(1, 6))))
    together = score_continuations(model, pairs, batch_size=16)
    for pair, score in zip(pairs, together):
        (alone,) = score_continuations(model, [pair], batch_size=1)
        assert alone.log_prob == pytest.approx(score.log_prob, abs=1e-4)
        logits = model(torch.tensor([sum(pair, [])[:-1]]))[0, -len(pair[1]) :]
        best = logits.argmax(dim=-1).tolist() == pair[1]
        assert best == score.greedy


def test_no_probability_is_lost_at_the_border(story):
    _, tokenizer = story
    whole = "One day, Ada the weaver had lost a hat."
    for cut in range(len(whole)):
        prompt, rest = encode_pair(tokenizer, whole[:cut], whole[cut:])
        assert prompt + rest == [tokenizer.end_id, *tokenizer.encode(whole)]
        assert rest


@pytest.mark.parametrize(
    "line, why",
    [
        ("[1]", "line 2: expected an object"),
        ('{"context": "a"', "line 2: this is no JSON"),
        ('{"context": "a"}', "line 2: no field 'answer'; a question has context, answer"),
        ('{"question": "a", "answerKey": "A"}', "no field 'choices'; a question of ARC has"),
        ('{"question": "a", "choices": ["x", "y"]}', "no field 'answer'; a question of MMLU has"),
        ('{"endings": ["x"], "label": 0}', "no field 'ctx'; a question of HellaSwag has"),
        ('{"mc1_targets": {"choices": [], "labels": []}}', "a question of TruthfulQA has"),
        ('{"question": "a", "mc1_targets": {"choices": ["x", "y"]}}', "not in the format of TruthfulQA"),
        ('{"context": "a", "choices": ["x", "y"], "answer": "x"}', "is not a number from 0 to 1"),
        ('{"context": "a", "choices": ["x", "y"], "answer": true}', "is not a number from 0 to 1"),
        ('{"context": "a", "choices": ["x", "y"], "answer": -1}', "is not a number from 0 to 1"),
        ('{"context": 3, "answer": "x"}', "must be text"),
        ('{"context": "a", "answer": "x", "parse": "sum"}', "parse is 'sum'"),
        ('{"context": "a", "choices": ["x", ""], "answer": 0}', "none of them empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, why):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"context": "a", "answer": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_task(path)
    assert why in str(error.value) and "mine.jsonl" in str(error.value)


def test_a_task_comes_back_as_it_was_written(tmp_path):
    items = [
        TaskItem("é\n", ("a", " b"), (1,), "hard"),
        TaskItem("q", ("a", "b", "c"), (0, 2)),
        TaskItem("1 + 1 =", (), ("2",), "", "number"),
        TaskItem("", (), ("x",)),
    ]
    task = Task("some", items)
    write_task(task, tmp_path / "some.jsonl")
    assert read_task(tmp_path / "some.jsonl") == task


NASTY = {
    ("The answer is 42, not 41.", "number", "41"): True,  # the last number counts, whatever it means
    ("", "number", "0"): False,
    ("1,000", "number", "1000"): True,
    ("½", "number", "0.5"): False,
    ("(C)\n\n(D)", "letter", "C"): False,
    ("The answer is **(C)**", "letter", "C"): True,
    ("AN ANSWER", "", "answer"): True,
    ("an_swer", "", "answer"): True,
    ("answer\u00a0", "", "answer"): True,
    ("not the answer", "", "answer"): False,
    ("...", "", "..."): False,
}


@pytest.mark.parametrize("case", NASTY, ids=str)
def test_nasty_answers(case):
    said, parse, answer = case
    assert exact_match(said, [answer], parse) is NASTY[case]


def test_a_model_of_no_use_gets_what_chance_gives():
    rng = random.Random(0)
    items = [TaskItem("q", tuple("abcd"), (rng.randrange(4),)) for _ in range(400)]
    tokenizer, g = ByteTokenizer(), torch.Generator().manual_seed(0)
    table = torch.randn(257, 257, generator=g)
    (found,) = run_tasks(lambda tokens: table[tokens], tokenizer, [Task("chance", items)])
    assert found.scores["acc"].low < 0.25 < found.scores["acc"].high
    assert found.scores["acc"] == wilson_interval(int(sum(found.values["acc"])), 400)


def test_a_broken_model_is_no_right_one():
    nan = lambda tokens: torch.full((*tokens.shape, 257), math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        run_tasks(nan, ByteTokenizer(), [Task("t", [TaskItem("q", ("a", "b"), (0,))])])


def test_the_harness_agrees(story, tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = story
    known = "weaver baker miller smith teacher".split()
    rng, items = random.Random(2), []
    for _ in range(25):
        choices = rng.sample(known, 3)
        items.append(TaskItem("One day, " + rng.choice(["Ada", "Otto", "Nobody"]) + " the", tuple(choices), (1,)))
    several = [item._replace(right=(0, 2)) for item in items]
    tasks = [Task("one", items), Task("many", several)]
    ours = run_tasks(model, tokenizer, tasks)
    theirs = run_harness(model, tokenizer, [write_harness_task(task, tmp_path) for task in tasks])
    for a, b in zip(ours, theirs, strict=True):
        shared = a.values.keys() & b.values.keys()
        assert {"acc", "acc_norm", "acc_bytes"} <= shared
        for name in shared:
            assert a.values[name] == b.values[name], name
        for x, y in zip(a.log_probs, b.log_probs, strict=True):
            assert x == pytest.approx(y[: len(x)], abs=1e-4)


def test_the_harness_reads_whole_texts_as_we_do(story, tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = story
    text = "One day, Ada the weaver had lost a hat. " * 60
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    settings = {
        "task": "long", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": data.as_posix()}, "cache_dir": (tmp_path / "c").as_posix()},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "long.yaml").write_text(json.dumps(settings), encoding="utf-8")
    (found,) = run_harness(model, tokenizer, [tmp_path / "long.yaml"])
    ids, longest = [tokenizer.end_id, *tokenizer.encode(text)], model.config.context_length
    nats, done = 0.0, 0
    while done < len(ids) - 1:  # each window predicts what is new, with as much before it as fits
        end = min(done + longest, len(ids) - 1)
        row = torch.tensor([ids[max(0, end - longest) : end + 1]])
        new = model(row[:, :-1])[0].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        nats -= new[-(end - done) :].sum().item()
        done = end
    bits = nats / math.log(2) / len(text.encode())
    assert len(ids) > 2 * longest
    assert found.scores["bits_per_byte"].share == pytest.approx(bits, rel=1e-4)


def test_the_harness_runs_alone(story):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model, tokenizer = story
    lm = harness_model(model, tokenizer)
    ask = lambda kind, args: Instance(kind, {}, args, 0)
    ((log_prob, greedy),) = lm.loglikelihood([ask("loglikelihood", ("One day, Ada the", " weaver"))])
    (score,) = score_continuations(model, [encode_pair(tokenizer, "One day, Ada the", " weaver")])
    assert (log_prob, greedy) == (pytest.approx(score.log_prob, abs=1e-4), score.greedy)
    ((empty, _),) = lm.loglikelihood([ask("loglikelihood", ("", " weaver"))])
    (score,) = score_continuations(model, [encode_pair(tokenizer, "", " weaver")])
    assert empty == pytest.approx(score.log_prob, abs=1e-4)
    how = {"until": [" had"], "max_gen_toks": 8, "do_sample": False}
    wanted = lm.generate_until([ask("generate_until", ("One day, Ada the", how))])
    assert wanted[0].startswith(" weaver") and " had" not in wanted[0]


def test_the_four_formats():
    question = {"question": "a", "mc2_targets": {"choices": ["x", "y", "z"], "labels": [1, 0, 1]}}
    assert task_item(question).right == (0, 2)
    mmlu = {"question": "a", "choices": list("wxyz"), "answer": "C"}
    assert task_item(mmlu).right == (2,) and task_item(mmlu).choices == tuple("ABCD")


@pytest.mark.parametrize("seed", [0, 7])
def test_the_benchmark_of_any_village_is_sound(seed):
    world = World(seed=seed)
    for task in village_tasks(world, n=160, seed=seed):
        right = [item.right[0] for item in task.items]
        assert all(20 <= right.count(place) <= 60 for place in range(4))  # no place gives it away
        for item in task.items:
            assert len(set(item.choices)) == 4
            assert as_letters(item).right == item.right
            answer = item.choices[item.right[0]]
            if task.name in ("near", "question", "hop"):
                assert all(c in {f[item.level] for f in world.facts.values()} for c in item.choices)
            assert named_choice(f"It is {answer}.", item.choices) == answer


def test_intervals_of_a_ranking_hold_what_they_promise():
    g = torch.Generator().manual_seed(0)
    true = torch.tensor([1.0, 0.3, 0.0, -1.3], dtype=torch.float64)
    names, held = list("abcd"), 0
    chance = (true[:, None] - true).sigmoid()
    for _ in range(100):
        wins = torch.binomial(torch.full((4, 4), 40.0, dtype=torch.float64), chance, generator=g).triu(1)
        wins = wins + (40 - wins.mT).tril(-1)
        found = {m.name: m for m in rate_models(wins, names)}
        held += sum(found[n].low <= t <= found[n].high for n, t in zip(names, true.tolist()))
    assert 0.92 < held / 400 < 0.98


def test_a_ranking_without_a_finite_score_is_refused():
    with pytest.raises(ValueError, match="c never beat a"):
        rate_models(torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]]), list("abc"))
    with pytest.raises(ValueError, match="never beat"):
        rate_models(torch.zeros(2, 2), ["a", "b"])
    (a, b, c) = rate_models(torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]), list("abc"))
    assert abs(a.score) + abs(b.score) + abs(c.score) < 1e-9  # a circle: nobody leads


def test_two_biases_that_cancel_are_seen():
    g = torch.Generator().manual_seed(0)
    truth, pull = torch.randn(4000, generator=g), torch.randn(4000, generator=g)
    report = judge_report(truth + pull, truth - pull, truth, torch.ones(4000))
    assert report.first.low < 0.5 < report.first.high and report.same.high < 0.75
    one_way = judge_report(truth + 1, truth - 1, truth, torch.ones(4000))
    assert one_way.first.low > 0.7
    fair = judge_report(truth, truth, truth, -truth)
    assert (fair.agrees.share, fair.first.share, fair.same.share, fair.longer.share) == (1, 0.5, 1, 0)


def test_weighted_kappa_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.randint(1, 5) for _ in range(12)] for _ in range(2))
        for power, weights in ((0, None), (1, "linear"), (2, "quadratic")):
            want = metrics.cohen_kappa_score(a, b, labels=range(1, 6), weights=weights)
            assert weighted_kappa(a, b, power) == pytest.approx(want, abs=1e-9)


def test_every_two_writers_meet_and_no_side_is_favoured():
    plan = blind_pairs(list("abcde"), 30, 1000)
    left = [bout.left for bout in plan]
    assert all(160 < left.count(name) < 240 for name in "abcde")
    assert all(bout.left != bout.right and 0 <= bout.prompt < 30 for bout in plan)


def test_the_best_of_equals():
    assert expected_best(1, 50, 0.3) == pytest.approx(0.3)
    assert expected_best(5, 50, 0.0) == 0 and expected_best(5, 50, 1.0) == pytest.approx(1)
    rising = [expected_best(k, 50, 0.3) for k in (1, 2, 5, 20, 100)]
    assert rising == sorted(rising) and rising[-1] < 0.6
