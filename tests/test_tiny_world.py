"""tutorials/tiny_world.py: questions, answers in styles, the task, documents, pretraining."""

import dataclasses
import json
import random

import pytest
import torch

import sft
import tiny_world
from evaluate import EvaluateConfig
from grpo import GRPOConfig
from prefix import completion_logprobs, load_policy, prompt_of
from rewards import load_task, world_defaults, world_of
from sft import SFTConfig
from tiny_world import ANSWER, END, PAD, QUESTION, STYLES, VOCABULARY


def solve(text):
    """An independent solver that reads the question as a person would."""
    words = text.split()
    if words[0] == "calc":
        value = int(words[1])
        for sign, amount in zip(words[2:-1:2], words[3:-1:2]):
            if sign == "+":
                value += int(amount)
            else:
                value -= int(amount)
        return str(value % 10)

    a, b, c = map(int, words[2:5])
    for operation in words[6:-1]:
        if operation == "rev":
            a, b, c = c, b, a
        elif operation == "rot":
            a, b, c = b, c, a
        else:
            change = {"inc": 1, "dec": -1}[operation]
            a, b, c = (a + change) % 10, (b + change) % 10, (c + change) % 10
    return f"{a} {b} {c}"


def judge(completion, gold, finish="stop"):
    return tiny_world.judge(completion, {"answer": gold, "finish": finish})


# ---- questions and answers ----------------------------------------------------------------------


def test_gold_answers_are_right_and_every_style_states_them():
    rng = random.Random(0)
    for _ in range(500):
        question = tiny_world.make_question(rng)
        assert question.answer == solve(question.text)
        for style in STYLES:
            text = tiny_world.write_answer(rng, question, style)
            words = text.split()
            assert set(words) <= set(VOCABULARY)
            assert len(words) <= 33  # with the end token 34, DEFAULTS' max_new_tokens
            assert tiny_world.style(text) == style
            assert words[0] in tiny_world.OPENINGS[style]
            assert judge(text, question.answer)["accuracy"] == 1.0


def test_written_out_arithmetic_is_right_line_by_line():
    rng = random.Random(1)
    for _ in range(50):
        question = tiny_world.make_question(rng, "arith")
        words = tiny_world.write_answer(rng, question, "math").split()
        for start in range(0, 28, 7):
            _, we, left, sign, right, equals, result = words[start : start + 7]
            assert (we, equals) == ("we", "=")
            assert result == solve(f"calc {left} {sign} {right} ?")


def test_written_out_lists_are_right_line_by_line():
    rng = random.Random(1)
    for _ in range(50):
        question = tiny_world.make_question(rng, "list")
        words = tiny_world.write_answer(rng, question, "code").split()
        digits = " ".join(question.text.split()[2:5])
        for start in range(0, 28, 7):
            _, operation, assign, *result, semicolon = words[start : start + 7]
            assert (assign, semicolon) == (":=", ";")
            assert " ".join(result) == solve(f"take list {digits} do {operation} ?")
            digits = " ".join(result)


def test_the_family_of_a_question_may_be_chosen():
    rng = random.Random(2)
    for family, first_word in (("arith", "calc"), ("list", "take")):
        questions = [tiny_world.make_question(rng, family) for _ in range(20)]
        assert {question.family for question in questions} == {family}
        assert {question.text.split()[0] for question in questions} == {first_word}
    count = 0
    for _ in range(400):
        count += tiny_world.make_question(rng).family == "arith"
    assert 150 < count < 250


def test_style_words_do_not_overlap():
    words = []
    for style in STYLES:
        words += tiny_world.STYLE_WORDS[style]
    assert len(words) == len(set(words))
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 131


def test_a_completion_without_style_words_has_no_style():
    assert tiny_world.style("hello room 3") == "none"
    assert tiny_world.style("so we say i") == "math"  # two words against one


def test_traces_take_the_domains_in_turn():
    traces = tiny_world.make_traces(6, seed=0)
    assert [trace["domain"] for trace in traces] == [*STYLES, *STYLES]
    for trace in traces:
        assert tiny_world.style(trace["answer"]) == trace["domain"]
        assert judge(trace["answer"], solve(trace["question"]))["accuracy"] == 1.0
    assert traces != tiny_world.make_traces(6, seed=1)


# ---- the task -----------------------------------------------------------------------------------

NOTHING = {"accuracy": 0.0, "answered": 0.0, "format": 0.0, "undecided": 0.0}


def test_a_wrong_answer_is_told_apart_from_none_and_from_one_that_was_cut_off():
    wrong = {**NOTHING, "answered": 1.0, "format": 1.0}
    assert judge("i think simply maybe is 3", "4") == wrong
    assert judge("i think simply maybe is 4", "4", finish="length") == NOTHING
    assert judge("hello room", "4") == NOTHING
    assert judge("thus 4 we", "4") == NOTHING  # the answer stands at the end


def test_answers_are_compared_letter_by_letter():
    assert judge("thus 2 3", "2 3")["accuracy"] == 1.0
    assert judge("thus 1 2 3", "2 3")["accuracy"] == 0.0  # more digits than were asked for
    assert judge("thus 3", "1 2 3")["accuracy"] == 0.0
    permuted = judge("i think answer maybe is 4 1 3", "3 1 4")
    assert permuted == {"accuracy": 0.0, "answered": 1.0, "format": 1.0, "undecided": 0.0}


def test_the_answer_of_a_completion_is_what_votes_count():
    row = {"finish": "stop"}
    assert tiny_world.answer("x := 3 ; return 4 1 3", row) == "4 1 3"
    assert tiny_world.answer("hello room", row) is None
    assert tiny_world.answer("thus 4", {"finish": "length"}) is None


def test_train_and_test_questions_are_distinct_right_and_fixed_by_the_seed():
    train = tiny_world.load("train", seed=3)
    test = tiny_world.load("test", seed=3)
    assert (len(train), len(test)) == (4096, 512)
    assert len({row["question"] for row in train + test}) == 4608
    for row in train + test:
        assert row["answer"] == solve(row["question"])
    assert test == tiny_world.load("test", seed=3)
    assert test != tiny_world.load("test", seed=4)


def test_both_families_are_asked_equally_often():
    for split in ("train", "test"):
        families = [row["family"] for row in tiny_world.load(split)]
        assert families.count("arith") == families.count("list") == len(families) // 2


def test_the_scripts_reach_this_world_by_its_short_name():
    assert world_of("tiny").make_policy is tiny_world.make_policy
    task = load_task("tiny", seed=3)
    assert task.train == tiny_world.load("train", seed=3)
    assert task.test == tiny_world.load("test", seed=3)
    assert tuple(task.styles) == STYLES
    assert list(task.reward_names) == list(NOTHING)
    row = task.test[0]
    text = f"thus {row['answer']}"
    assert task.judge(text, row)["accuracy"] == 1.0
    assert task.judge(text, row, finish="length") == NOTHING
    assert task.extract(text, row) == row["answer"]
    assert task.style(text) == "math"


@pytest.mark.parametrize("world", ["tiny", "tiny-vl"])
def test_every_default_of_a_world_is_a_setting_of_some_script(world):
    names = {"sft"}
    for config in (GRPOConfig, EvaluateConfig):
        names |= {field.name for field in dataclasses.fields(config)}
    defaults = world_defaults(world)
    assert set(defaults) <= names
    of_warm_up = {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(defaults["sft"]) == {"prior", "posterior"}
    for settings in defaults["sft"].values():
        assert set(settings) <= of_warm_up


# ---- documents ----------------------------------------------------------------------------------


def answers_of(document):
    """The complete answers in a document, without what it begins with."""
    parts = " ".join(document.words).split(ANSWER)[1:]
    return [part.split(END)[0] for part in parts if END in part]


def test_documents_have_their_length_and_only_known_words():
    rng = random.Random(2)
    for length in (20, 80):
        for _ in range(100):
            document = tiny_world.make_document(rng, length)
            assert len(document.words) == length
            assert set(document.words) <= set(VOCABULARY)


def test_a_document_keeps_one_style():
    rng = random.Random(2)
    for _ in range(300):
        document = tiny_world.make_document(rng, 80)
        for answer in answers_of(document):
            assert tiny_world.style(answer) == document.style
        begins_with_an_answer = document.n_title == 0 and document.words[0] != QUESTION
        if begins_with_an_answer:
            cut_off = " ".join(document.words).split(END)[0]
            assert tiny_world.style(cut_off) in (document.style, "none")


def test_titles_are_common_and_not_long():
    rng = random.Random(2)
    titled = 0
    for _ in range(300):
        document = tiny_world.make_document(rng, 80)
        assert document.n_title <= 8
        titled += document.n_title > 0
    assert 100 < titled < 250


def test_the_title_of_a_topical_document_hints_at_its_style():
    rng = random.Random(2)
    hinting, titled = 0, 0
    for _ in range(600):
        document = tiny_world.make_document(rng, 80)
        if document.style == "qa" or document.n_title == 0:
            continue  # chat has words of no style in front, and is answered as qa
        style_words = set(tiny_world.STYLE_WORDS[document.style])
        titled += 1
        hinting += bool(style_words & set(document.words[: document.n_title]))
    assert titled > 100
    assert hinting / titled > 0.8  # neutral words may push the style word out of a title of eight


def test_without_context_the_good_styles_are_rare():
    rng = random.Random(3)
    styles = []
    for _ in range(3000):
        document = tiny_world.make_document(rng, 80)
        if document.n_title == 0 and document.words[0] == QUESTION:
            styles.append(tiny_world.style(answers_of(document)[0]))
    assert len(styles) > 300
    assert styles.count("qa") >= len(styles) - 2


# ---- what the model reads, and is to learn ------------------------------------------------------


def batch_of_step(model, step, tokenizer):
    config = tiny_world.TinyWorldConfig(batch=16)
    return tiny_world.make_batch(config, step, model, tokenizer)


def test_a_batch_is_a_function_of_its_step(model, tokenizer):
    batch = batch_of_step(model, 0, tokenizer)
    assert batch.ids.shape == batch.weights.shape == (16, 80)
    table = model.get_input_embeddings().weight
    assert torch.equal(batch.embeddings, table[batch.ids])  # words, as a real corpus has: no more
    assert batch.positions is None
    assert torch.equal(batch.ids, batch_of_step(model, 0, tokenizer).ids)
    assert not torch.equal(batch.ids, batch_of_step(model, 1, tokenizer).ids)


def expected_weights(words):
    """What a reader would say of each word behind the first <q>: 1.0 where it is to be learnt."""
    weights, is_inside = [], False
    for word in words:
        if word == QUESTION:
            is_inside = True
            weights.append(1.0)  # that a question follows
        elif is_inside:
            is_inside = word != ANSWER
            weights.append(0.0)
        else:
            weights.append(1.0)
    return weights


def test_questions_titles_and_pads_are_not_to_be_learnt(model, tokenizer):
    batch = batch_of_step(model, 0, tokenizer)
    for ids, weights in zip(batch.ids.tolist(), batch.weights.tolist()):
        words = [VOCABULARY[i] for i in ids]
        after_first = words.index(QUESTION) + 1
        expected = expected_weights(words[after_first - 1 :])[1:]
        assert weights[after_first:] == expected

    documents = [tiny_world.Document("qa", ["room", QUESTION, "?", ANSWER, "i", END], n_title=1)]
    documents.append(tiny_world.Document("qa", [QUESTION, "?", ANSWER, "i"]))
    weights = tiny_world.embed_documents(documents, model, tokenizer).weights
    assert weights.tolist() == [[0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 0]]


def test_the_loss_is_that_of_transformers_on_the_words_to_be_learnt(model, tokenizer):
    batch = batch_of_step(model, 0, tokenizer)
    labels = batch.ids.masked_fill(batch.weights == 0, -100)
    expected = model(inputs_embeds=batch.embeddings, labels=labels).loss
    torch.testing.assert_close(tiny_world.next_word_loss(model, batch), expected)


def test_every_weight_is_trained_by_one_of_the_two_optimizers(model):
    muon, adamw = tiny_world.make_optimizers(model)
    matrices = muon.param_groups[0]["params"]
    others = adamw.param_groups[0]["params"]
    assert {id(p) for p in matrices} & {id(p) for p in others} == set()
    assert len(matrices) + len(others) == len(list(model.parameters()))
    assert {p.ndim for p in matrices} == {2}
    assert any(p is model.get_input_embeddings().weight for p in others)


def test_learning_rates_rise_stay_and_fall(model):
    muon, adamw = tiny_world.make_optimizers(model)
    factors = []
    for step in (0, 14, 29, 300, 720, 899):
        tiny_world.set_learning_rates(muon, adamw, step, steps=900)
        factors.append(muon.param_groups[0]["lr"] / tiny_world.MUON_LR)
        adamw_factor = adamw.param_groups[0]["lr"] / tiny_world.ADAMW_LR
        assert adamw_factor == pytest.approx(factors[-1])
    assert factors == pytest.approx([1 / 30, 0.5, 1.0, 1.0, 0.35, 0.03 + 1.6 / 900])


# ---- the base model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of four steps."""
    config = small_config(tmp_path_factory.mktemp("base"))
    return tiny_world.make_base(config)


def small_config(folder, **settings):
    return tiny_world.TinyWorldConfig(out=str(folder), steps=4, batch=4, save_every=2, **settings)


def test_the_base_is_an_ordinary_folder_with_traces(base):
    model, reader = load_policy(str(base.folder / "policy"))
    assert reader.tokenizer.pad_token == PAD
    assert reader.tokenizer.get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}
    assert model.generation_config.eos_token_id == VOCABULARY.index(END)
    lines = (base.folder / "traces.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == tiny_world.make_traces(3000, seed=0)


@torch.no_grad()
def test_the_base_reports_how_rare_the_good_styles_are(base):
    lines = (base.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    leak = {name: rows[-1][f"leak_{name}"] for name in STYLES}
    assert all(0 < share < 1 for share in leak.values())
    model, reader = load_policy(str(base.folder / "policy"))
    assert tiny_world.style_leak(model, reader.tokenizer) == pytest.approx(leak)

    prompts = []
    for row in tiny_world.load("test"):
        if row["family"] == "arith":
            prompts.append(prompt_of(row, reader))
    opening = [reader.tokenizer.get_vocab()["i"]]
    logprobs, _ = completion_logprobs(model, prompts, [opening] * len(prompts), None)
    assert leak["qa"] == pytest.approx(logprobs.exp().mean().item(), rel=1e-4)


def test_pretraining_resumes_exactly(base, tmp_path, monkeypatch):
    calls = []

    def fail_at_the_fourth(model, optimizers, ranks):
        calls.append(0)
        if len(calls) == 4:
            raise ZeroDivisionError
        return sft.apply_gradients(model, optimizers, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_world, "apply_gradients", fail_at_the_fourth)
        with pytest.raises(ZeroDivisionError):
            tiny_world.make_base(small_config(tmp_path))
    resumed = tiny_world.make_base(small_config(tmp_path, resume=True))

    for name in ("policy/model.safetensors", "metrics.jsonl", "traces.jsonl"):
        assert (resumed.folder / name).read_bytes() == (base.folder / name).read_bytes()


def test_a_finished_base_is_left_alone_and_other_settings_are_refused(base):
    before = (base.folder / "policy" / "model.safetensors").stat().st_mtime_ns
    tiny_world.make_base(small_config(base.folder))
    assert (base.folder / "policy" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="with another seed"):
        tiny_world.make_base(small_config(base.folder, seed=1))


def test_make_policy_takes_its_steps_from_the_defaults(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(tiny_world, "make_base", configs.append)
    tiny_world.make_policy(tmp_path, seed=2)
    tiny_world.make_policy(tmp_path, steps=7)
    first, second = configs
    assert (first.seed, first.steps) == (2, 900)
    assert (second.seed, second.steps) == (0, 7)
    assert first.resume
    assert first.out == str(tmp_path)


def test_the_command_line_shows_examples_and_refuses_what_cannot_be(capsys):
    tiny_world.main(["--show"])
    printed = capsys.readouterr().out
    assert printed.count("question") == 2
    for style in STYLES:
        assert printed.count(f"  {style} ") == 2
    with pytest.raises(ValueError, match="--steps must be at least 1, not 0"):
        tiny_world.main(["--steps", "0"])
