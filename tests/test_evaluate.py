"""evaluate.py: estimators against closed forms, answers that depend on their question alone,
evaluations that go on where they stopped, and tables of whatever a task's judge gives."""

import itertools
import json
import math
import random
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import evaluate
from evaluate import (
    Arm,
    EvaluateConfig,
    all_figures,
    answer_questions,
    arms_of,
    arms_table,
    bootstrap,
    draw_boxes,
    draw_pass_at_k,
    figures_of,
    majority,
    markdown,
    mean_and_error,
    pass_at_k,
    powers,
    prefix_seed,
    read_samples,
    score,
    vote,
)
from prefix import SOURCES, Decoder, Palette, Prefix, Sampling, Source, prompt_of
from rewards import load_task
from sft import Ranks, seed_of
from vae import read_json

# ---- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, correct, k",
    [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 1, 6), (6, 0, 6), (7, 5, 2), (8, 3, 8)],
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct, k):
    right = [i < correct for i in range(n)]
    subsets = list(itertools.combinations(right, k))
    with_a_right_one = [subset for subset in subsets if any(subset)]
    assert pass_at_k(n, correct, k) == pytest.approx(len(with_a_right_one) / len(subsets))


def test_pass_at_k_is_unbiased():
    rng = random.Random(0)
    p, n, k = 0.2, 10, 4
    estimates = []
    for _ in range(20_000):
        right = sum(rng.random() < p for _ in range(n))
        estimates.append(pass_at_k(n, right, k))
    mean, _ = mean_and_error(estimates)
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_pass_at_k_is_unbiased_over_questions_of_different_chances():
    generator = torch.Generator().manual_seed(0)
    n, k = 16, 8
    p = torch.rand(4000, generator=generator)
    right = (torch.rand(4000, n, generator=generator) < p[:, None]).sum(1).tolist()
    mean, error = mean_and_error([pass_at_k(n, correct, k) for correct in right])
    truth = (1 - (1 - p) ** k).mean().item()
    assert mean == pytest.approx(truth, abs=3 * error)
    assert error < 0.01


def test_pass_at_k_needs_enough_samples():
    with pytest.raises(ValueError, match="pass@9 needs at least 9 samples a question, there are 8"):
        pass_at_k(8, 1, 9)


def test_powers_end_in_the_number_itself():
    assert [powers(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 0.0, 0.0, 1.0]) == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    assert mean_and_error([0.3]) == pytest.approx((0.3, 0.0))


def test_benchmarks_weigh_the_same_whatever_their_size():
    mean, _ = mean_and_error([1.0, 1.0, 1.0, 0.0], [0.0, 0.0])
    assert mean == pytest.approx(0.375)

    a = [0.0, 1.0, 1.0, 0.0]
    b = [0.2, 0.9]
    _, error_of_a = mean_and_error(a)
    _, error_of_b = mean_and_error(b)
    _, error = mean_and_error(a, b)
    assert error == pytest.approx(math.hypot(error_of_a, error_of_b) / 2)


def test_the_interval_covers_the_truth_in_about_95_of_100_studies():
    generator = torch.Generator().manual_seed(1)
    studies, questions = 600, 80
    weaker = torch.rand(studies, questions, generator=generator) * 0.8  # the other: better by 0.1
    right_of_better = torch.bernoulli(weaker + 0.1, generator=generator)
    right_of_weaker = torch.bernoulli(weaker, generator=generator)
    differences = (right_of_better - right_of_weaker).tolist()

    covered = 0
    for study, values in enumerate(differences):
        _, low, high = bootstrap(values, resamples=500, seed=study)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / studies <= 0.97


def interval_width(a, b):
    """Of the paired bootstrap of a - b."""
    _, low, high = bootstrap([x - y for x, y in zip(a, b)])
    return high - low


def test_pairing_narrows_the_interval_where_questions_are_hard_for_both_arms():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(200, generator=generator)
    a = (hard + 0.1 * torch.randn(200, generator=generator)).tolist()
    b = (hard + 0.1 * torch.randn(200, generator=generator)).tolist()
    unpaired = random.Random(0).sample(b, 200)
    assert interval_width(a, b) < 0.5 * interval_width(a, unpaired)


def test_the_bootstrap_is_a_function_of_its_seed():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert bootstrap([0.25] * 9) == pytest.approx((0.25, 0.25, 0.25))
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_votes_go_by_equality_of_values():
    votes = vote(["3", "1/2", "0.5", None, "\\frac{1}{2}", "3"])
    assert list(votes.items()) == [("1/2", 3), ("3", 2)]
    assert vote([None, None]) == {}


@pytest.mark.parametrize(
    "answers, gold, expected",
    [
        (["7", "7", "3"], "7", 1.0),
        (["7", "3", "3"], "7", 0.0),
        (["7", "3"], "7", 0.5),
        (["3", "7"], "7", 0.5),
        (["1", "2", "7"], "7", 1 / 3),
        (["1", "2"], "7", 0.0),
        ([None, None], "7", 0.0),
        ([None, None, "7"], "7", 1.0),
    ],
)
def test_the_majority_and_its_ties(answers, gold, expected):
    assert majority(vote(answers), gold) == pytest.approx(expected)


# ---- answering questions -------------------------------------------------------------------------


def small_task(questions):
    """The tiny world's first test questions."""
    task = load_task("tiny", splits=("test",))
    return replace(task, test=task.test[:questions])


def table_of(model):
    return model.get_input_embeddings().weight.detach()


def test_an_answer_depends_on_its_question_alone(model, reader, vae):
    task = small_task(6)
    decoder = Decoder(model, slots=3)
    palette = Palette(vae, table_of(model), "prior", 4)
    sampling = Sampling(1.0, max_new_tokens=10)
    answers = answer_questions(decoder, reader, task, task.test, palette, sampling, 3, seed=1)
    assert len(answers) == 18
    assert {answer["sample"] for answer in answers} == {0, 1, 2}

    by_question = {}
    for answer in answers:
        answer.pop("row")
        by_question[answer["question"], answer["sample"]] = answer
    some = task.test[:2:-1]  # others beside them, and another order
    for answer in answer_questions(decoder, reader, task, some, palette, sampling, 3, seed=1):
        answer.pop("row")
        assert answer == by_question[answer["question"], answer["sample"]]

    others = answer_questions(decoder, reader, task, task.test, palette, sampling, 3, seed=2)
    assert [a["completion"] for a in others] != [a["completion"] for a in answers]


class SpyDecoder:
    """A Decoder that remembers what it was asked for."""

    def __init__(self, model):
        self.decoder = Decoder(model)

    def embed(self, prompts, prefixes):
        self.prompts = prompts
        self.prefixes = prefixes
        return self.decoder.embed(prompts, prefixes)

    def generate(self, rows, sampling, seeds, progress):
        self.sampling = sampling
        self.seeds = seeds
        return self.decoder.generate(rows, sampling, seeds, progress)


def test_seeds_are_functions_of_the_question_or_its_id_and_the_samples_number(model, reader, vae):
    task = small_task(2)
    rows = [task.test[0], {**task.test[0], "id": "again"}]  # the same text under a name of its own
    palette = Palette(vae, table_of(model), "prior", 4)
    decoder = SpyDecoder(model)
    sampling = Sampling(1.0, max_new_tokens=3)
    answers = answer_questions(decoder, reader, task, rows, palette, sampling, 2, seed=5)

    names = [rows[0]["question"], "again"]
    assert [answer["question"] for answer in answers] == [names[0], names[0], names[1], names[1]]
    seeds = []
    prefixes = []
    for name in names:
        for sample in range(2):
            seeds.append(seed_of(5, "token", name, sample))
            prefixes.append(palette.draw(seed_of(5, "prefix", name, sample)).embeddings)
    assert decoder.seeds == seeds
    assert torch.equal(torch.stack(decoder.prefixes), torch.stack(prefixes))
    assert len(set(seeds)) == 4
    assert len({prefix.sum().item() for prefix in prefixes}) == 4


def test_the_judge_and_the_extraction_are_told_how_a_completion_ended(model, reader, monkeypatch):
    task = small_task(2)
    monkeypatch.setattr(task, "judge", lambda text, row, finish: {"accuracy": finish == "length"})
    monkeypatch.setattr(task, "extract", lambda text, row, finish: f"{row['answer']} {finish}")
    sampling = Sampling(0.0, max_new_tokens=3)
    answers = answer_questions(Decoder(model), reader, task, task.test, None, sampling, 1, seed=1)
    for answer, row in zip(answers, task.test):
        assert answer["tokens"] == 3
        assert answer["finish"] == "length"
        assert answer["accuracy"]
        assert answer["answer"] == f"{row['answer']} length"


def test_samples_differ_by_their_latent_or_by_their_tokens(model, reader, vae):
    task = small_task(1)
    palette = Palette(vae, table_of(model), "prior", 4)
    decoder = Decoder(model)
    for source, temperature in ((palette, 0.0), (None, 1.0)):
        sampling = Sampling(temperature, max_new_tokens=10)
        answers = answer_questions(decoder, reader, task, task.test, source, sampling, 8, seed=1)
        assert len({answer["completion"] for answer in answers}) > 1


def test_greedy_accuracy_asks_the_first_test_questions_without_prefix(model, reader, monkeypatch):
    task = small_task(9)
    decoder = SpyDecoder(model)
    accuracies = iter([1.0, 0.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr(task, "judge", lambda *_: {"accuracy": next(accuracies)})
    config = SimpleNamespace(eval_questions=5, max_new_tokens=7, prompt="auto")
    accuracy = evaluate.greedy_accuracy(decoder, reader, task, config, Ranks.alone())
    assert accuracy == 0.6
    assert decoder.prompts == [prompt_of(row, reader, task.instruction) for row in task.test[:5]]
    assert decoder.prefixes == [None] * 5
    assert decoder.sampling == Sampling(0.0, max_new_tokens=7)


def test_greedy_accuracy_of_several_ranks_is_that_of_all_questions(model, reader):
    task = small_task(5)
    config = SimpleNamespace(eval_questions=5, max_new_tokens=4, prompt="auto")
    asked = []

    class Rank(Ranks):
        def all_reduce_sum(self, numbers):
            asked.append(numbers)
            return [3.0, 5.0]  # with what the other rank has

    rank = Rank(1, 2, torch.device("cpu"))
    assert evaluate.greedy_accuracy(Decoder(model), reader, task, config, rank) == 0.6
    assert [count for _, count in asked] == [2]


# ---- from answers to figures ---------------------------------------------------------------------


def samples_of(pattern, **extra):
    """pattern: {question: string of answers, one a sample}; the right answer is always 1."""
    samples = []
    for row, answers in pattern.items():
        for number, answer in enumerate(answers):
            sample = {"row": row, "question": "the same for all", "gold": "1", "sample": number}
            sample.update(accuracy=float(answer == "1"), answered=1.0, undecided=0.0, tokens=10)
            sample.update(completion=answer, answer=answer, style="math", **extra)
            samples.append(sample)
    return samples


STYLES = ("math", "code", "qa")


def test_score_by_hand():
    columns = score(samples_of({"a": "1023", "b": "0000"}), [1, 2, 4], STYLES)
    assert columns["pass@1"] == [0.25, 0.0]
    assert columns["pass@2"] == [0.5, 0.0]
    assert columns["pass@4"] == [1.0, 0.0]
    assert columns["answers"] == [4, 1]
    assert columns["majority"] == [0.25, 0.0]
    assert columns["samples"] == [4, 4]
    assert columns["style math"] == [1.0, 1.0]
    assert columns["style code"] == [0.0, 0.0]
    assert "follows" not in columns


def test_follows_is_the_share_in_the_style_of_the_latents_domain():
    code = samples_of({"a": "11"}, domain="code")
    math_and_code = samples_of({"a": "1"}, domain="math") + samples_of({"a": "1"}, domain="code")
    assert score(code, [1], STYLES)["follows"] == [0.0]
    assert score(math_and_code, [1], STYLES)["follows"] == [0.5]
    elsewhere = samples_of({"a": "1"}, domain="poetry")  # a domain that the task does not know
    assert "follows" not in score(elsewhere, [1], STYLES)


def test_one_greedy_sample_has_the_same_pass_at_every_k():
    assert score(samples_of({"a": "1", "b": "0"}), [1, 8])["pass@8"] == [1.0, 0.0]


def test_questions_are_compared_by_their_row_whatever_their_order_in_the_file():
    one = samples_of({0: "1000", 1: "0000"})
    other = samples_of({1: "0000", 0: "1000"})
    figures = figures_of({"a": [score(one, [1])], "b": [score(other, [1])]}, "a")
    assert figures["b"]["difference"]["pass@1"] == (0.0, 0.0, 0.0)
    assert "difference" not in figures["a"]


def test_figures_of_families_and_of_several_benchmarks():
    lists = samples_of({2: "00"}, family="list")
    sampling = samples_of({0: "11", 1: "10"}, family="arith") + lists
    latent = samples_of({0: "11", 1: "11"}, family="arith") + lists
    results = {
        "tiny": {"sampling": sampling, "latent": latent},
        "gsm8k": {"sampling": samples_of({0: "00"}), "latent": samples_of({0: "10"})},
    }
    figures = all_figures(results, [1, 2], "sampling", {"tiny": (), "gsm8k": ()})
    assert list(figures) == ["tiny", "tiny/arith", "tiny/list", "gsm8k", "average"]
    assert figures["tiny/arith"]["sampling"]["pass@1"][0] == 0.75
    assert figures["tiny/list"]["latent"]["pass@2"][0] == 0.0

    average = figures["average"]["latent"]
    assert average["pass@1"][0] == pytest.approx((2 / 3 + 0.5) / 2)
    assert average["difference"]["pass@1"][0] == pytest.approx((1 / 6 + 0.5) / 2)


def test_the_table_of_arms():
    sampling = samples_of({0: "11", 1: "10", 2: "00"})
    latent = samples_of({0: "11", 1: "11", 2: "00"}, domain="math")
    results = {"x": {"sampling": sampling, "latent": latent}}
    figures = all_figures(results, [1, 2], "sampling", {"x": STYLES})
    head, first, last = arms_table(figures["x"], "sampling")
    assert head == [
        "arm",
        "pass@1",
        "pass@2",
        "pass@2 against sampling [95%]",
        "majority",
        "answers",
        "tokens",
        "no answer",
        "undecided",
        "style math / code / qa",
        "follows domain",
    ]
    assert first[:4] == ["sampling", "0.500", "0.667", ""]
    assert first[-2:] == ["1.00 / 0.00 / 0.00", ""]
    assert last[:4] == ["latent", "0.667", "0.667", "+0.000 [+0.000, +0.000]"]
    assert last[-1] == "1.00"
    assert markdown([head, last]).splitlines()[-1].startswith("| latent | 0.667 | 0.667 | +0.000 [")


def test_the_table_without_its_reference_has_no_differences():
    figures = all_figures({"x": {"noise": samples_of({0: "10"})}}, [1, 2], "sampling", {"x": ()})
    head, row = arms_table(figures["x"], "sampling")
    assert "against" not in " ".join(head)
    assert len(row) == len(head)


def test_styles_stand_in_the_order_of_the_task():
    samples = samples_of({0: "10"})
    for styles in (STYLES, STYLES[::-1]):
        figures = all_figures({"x": {"sampling": samples}}, [1], "sampling", {"x": styles})
        head = arms_table(figures["x"], "sampling")[0]
        assert head[-1] == "style " + " / ".join(styles)


# ---- arms ----------------------------------------------------------------------------------------


def test_arms():
    arms = arms_of(["code", "math"], 0.8)
    assert arms == {
        "greedy": Arm("none", 0.0),
        "sampling": Arm("none", 0.8),
        "noise": Arm("noise", 0.0),
        "gauss": Arm("gauss", 0.0),
        "shuffled": Arm("shuffled", 0.0),
        "latent": Arm("prior", 0.0),
        "noise + sampling": Arm("noise", 0.8),
        "gauss + sampling": Arm("gauss", 0.8),
        "latent + sampling": Arm("prior", 0.8),
        "code": Arm("code", 0.0),
        "math": Arm("math", 0.0),
    }
    without_vae = ["greedy", "sampling", "noise", "noise + sampling"]
    assert list(arms_of([], 1.0, with_vae=False)) == without_vae


def test_the_arms_that_are_asked_for(vae):
    config = EvaluateConfig(arms=["math", "greedy"], temperature=0.8)
    chosen = evaluate.choose_arms(config, vae)
    assert list(chosen.items()) == [("math", Arm("math", 0.0)), ("greedy", Arm("none", 0.0))]
    assert len(evaluate.choose_arms(EvaluateConfig(), vae)) == 9 + 3
    with pytest.raises(ValueError, match="unknown arm 'poetry'"):
        evaluate.choose_arms(replace(config, arms=["poetry"]), vae)


def draw_ones(palette, seed, draws):
    return Prefix(torch.full((draws, palette.width), 1e-3 * (seed % 7)))


def test_a_source_added_in_prefix_is_an_arm_here(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "ones", Source(draw_ones, needs_vae=False, arm="constant"))
    arms = ["constant", "constant + sampling"]
    config = replace(evaluation.config, arms=arms, questions=2, out=str(tmp_path))
    assert list(evaluate.evaluate(config)["tiny"]) == arms
    assert "constant + sampling" in arms_of([], 1.0, with_vae=False)


# ---- settings ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_world():
    tiny = EvaluateConfig()
    assert (tiny.model, tiny.task, tiny.vae) == ("tiny", ["tiny"], "runs/tiny/vae")
    assert (tiny.out, tiny.max_new_tokens) == ("runs/tiny/evaluation", 34)
    pictures = EvaluateConfig(model="tiny-vl")
    assert (pictures.task, pictures.vae) == (["tiny-vl"], "runs/tiny-vl/vae")
    assert (pictures.out, pictures.max_new_tokens) == ("runs/tiny-vl/evaluation", 14)
    after_rl = EvaluateConfig(model="runs/x/grpo-none-s0", task=["tiny-vl"])
    assert (after_rl.vae, after_rl.max_new_tokens) == ("runs/tiny-vl/vae", 14)
    assert EvaluateConfig(model="Qwen/Qwen3-0.6B", task=["gsm8k"]).max_new_tokens == 512
    assert (
        EvaluateConfig(task=["tiny", "gsm8k"]).max_new_tokens == 34
    )  # what the model has room for
    assert EvaluateConfig(max_new_tokens=5).max_new_tokens == 5


def test_a_task_may_name_the_source_of_its_test_rows():
    config = EvaluateConfig(task=["gsm8k", "mine=a=b.jsonl"])
    assert config.sources() == {"gsm8k": None, "mine": "a=b.jsonl"}


def test_the_command_line_and_the_dataclass_are_the_same(monkeypatch):
    configs = []
    monkeypatch.setattr(evaluate, "evaluate", configs.append)
    argv = ["--task", "a", "b=x.jsonl", "--arms", "greedy", "latent + sampling", "--top-p", "0.9"]
    evaluate.main([*argv, "--independent", "--vae", "none", "--resume"])
    arms = ["greedy", "latent + sampling"]
    expected = EvaluateConfig(task=["a", "b=x.jsonl"], arms=arms, top_p=0.9, vae="none")
    assert configs == [replace(expected, independent=True, resume=True)]
    assert configs[0].arms == arms


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"temperature": math.nan}, "--temperature must be at least 0, not nan"),
        ({"temperature": math.inf}, "--temperature must be at least 0 and finite, not inf"),
        ({"questions": 0}, "--questions must be at least 1, not 0"),
        ({"length": -1}, "--length must be at least 0, not -1"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"task": ["a", "a"]}, "--task a: each benchmark once"),
        ({"task": ["a", "a=b.jsonl"]}, "--task a: each benchmark once"),
        ({"task": ["a/own.py", "b/own.py"]}, "--task b/own.py: each benchmark once"),
        ({"task": ["tiny", "average"]}, "none called average"),
    ],
)
def test_settings_that_cannot_be_right(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvaluateConfig(**settings)


def test_a_flag_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--test-data", "x.jsonl"])
    assert "unrecognized arguments: --test-data" in capsys.readouterr().err


def test_the_vae_of_a_world_is_trained_where_it_is_missing(tmp_path, monkeypatch, vae):
    trained = []

    def train(config):
        trained.append((config.model, config.out))
        vae.save(config.out)

    monkeypatch.setattr(evaluate.vae_stage, "resolve_world", lambda config: config)
    monkeypatch.setattr(evaluate.vae_stage, "train", train)
    folder = str(tmp_path / "vae")
    for _ in range(2):
        loaded = evaluate.load_vae(EvaluateConfig(vae=folder))
        assert loaded.domains == vae.domains
    assert trained == [("tiny", folder)]

    elsewhere = str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="elsewhere"):
        evaluate.load_vae(EvaluateConfig(model="Qwen/Qwen3-0.6B", vae=elsewhere))
    assert evaluate.load_vae(EvaluateConfig(vae="none")) is None


# ---- whole evaluations ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, policy_folder, vae):
    """One small evaluation of every arm: its settings, its folder, its figures."""
    pytest.importorskip("matplotlib", reason='the pictures need the extra "plots"')
    root = tmp_path_factory.mktemp("evaluation")
    vae.save(root / "vae")
    config = EvaluateConfig(
        model=str(policy_folder),
        vae=str(root / "vae"),
        questions=4,
        samples=8,
        max_new_tokens=6,
        device="cpu",
        out=str(root / "out"),
    )
    figures = evaluate.evaluate(config)
    return SimpleNamespace(config=config, out=root / "out", figures=figures)


def write_questions(path, rows):
    """Rows (question, answer) as a JSONL file."""
    lines = []
    for question, answer in rows:
        lines.append(json.dumps({"question": question, "answer": answer}) + "\n")
    path.write_text("".join(lines))


def test_an_evaluation_writes_samples_tables_and_a_picture(evaluation):
    arms = read_samples(evaluation.out)["tiny"]
    assert set(evaluation.figures["tiny"]) == set(arms)
    for arm, samples in arms.items():
        assert len(samples) == (4 if arm == "greedy" else 32)

    saved = json.loads((evaluation.out / "results.json").read_text())
    mean, error = mean_and_error(score(arms["latent"], [4])["pass@4"])
    assert saved["arms"]["latent"]["pass@4"] == [mean, error]
    assert set(saved["benchmarks"]) == {"tiny", "tiny/arith", "tiny/list"}
    assert saved["benchmarks"]["tiny"] == saved["arms"]
    assert (evaluation.out / "results.md").read_text().count("\n| ") == 12
    assert (evaluation.out / "pass_at_k.png").stat().st_size > 1000


def test_a_stored_sample_rebuilds_its_latent_and_its_completion(evaluation, vae, model, reader):
    sample = read_samples(evaluation.out)["tiny"]["math"][5]
    seed = prefix_seed(0, sample["question"], sample["sample"])
    prefix = Palette(vae, table_of(model), "math", 8).draw(seed)
    assert torch.equal(vae.decode(prefix.latent[0]).expand(8, -1), prefix.embeddings)
    assert sample["domain"] == prefix.domain == "math"

    decoder = Decoder(model)
    rows = decoder.embed([prompt_of(sample, reader)], [prefix.embeddings])
    completion = decoder.generate(rows, Sampling(0.0, max_new_tokens=6))[0]
    text = reader.tokenizer.decode(completion.ids, skip_special_tokens=True)
    assert text == sample["completion"]
    assert sample["tokens"] == len(completion.ids)


def test_several_benchmarks_in_one_call(evaluation, tmp_path):
    for name in "ab":
        rows = [(f"calc {i} + 1 ?", f"{i + 1}") for i in range(3)]
        write_questions(tmp_path / f"{name}.jsonl", rows)
    config = replace(
        evaluation.config,
        task=["tiny", f"a={tmp_path}/a.jsonl", f"b={tmp_path}/b.jsonl"],
        arms=["greedy", "sampling"],
        against="greedy",
        out=str(tmp_path / "out"),
    )
    figures = evaluate.evaluate(config)
    assert list(figures) == ["tiny", "tiny/arith", "tiny/list", "a", "b", "average"]
    assert "difference" in figures["a"]["sampling"]
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"pass_at_k-{name}.png" for name in ("tiny", "a", "b", "average")}
    text = (tmp_path / "out" / "results.md").read_text()
    titles = [line for line in text.split("\n") if line.isidentifier()]
    assert titles == ["tiny", "a", "b", "average"]


def test_a_benchmark_may_have_any_name(evaluation, tmp_path):
    write_questions(tmp_path / "x.jsonl", [("calc 1 + 1 ?", "2")])
    task = ["tiny", f"../up|={tmp_path}/x.jsonl"]
    out = tmp_path / "deep" / "out"
    config = replace(evaluation.config, task=task, arms=["greedy"], out=str(out))
    evaluate.evaluate(config)
    assert (out / "pass_at_k-.._up|.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "deep"}


def test_without_a_vae_four_arms_remain(evaluation, tmp_path):
    config = replace(evaluation.config, vae="none", questions=1, out=str(tmp_path))
    figures = evaluate.evaluate(config)["tiny"]
    assert list(figures) == ["greedy", "sampling", "noise", "noise + sampling"]
    with pytest.raises(ValueError, match="unknown arm 'latent'"):
        evaluate.evaluate(replace(config, arms=["latent"]))


def test_an_arm_or_a_reference_that_is_not_there_is_refused_before_the_model_is_loaded(
    evaluation, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_policy", None)
    out = tmp_path / "out"
    config = replace(evaluation.config, arms=["greedy"], against="poetry", out=str(out))
    with pytest.raises(ValueError, match="--against poetry is not among the arms: greedy"):
        evaluate.evaluate(config)
    config = replace(evaluation.config, arms=["poetry"], out=str(out))
    with pytest.raises(ValueError, match="unknown arm 'poetry'"):
        evaluate.evaluate(config)
    assert not out.exists()


def test_questions_that_the_model_cannot_read_are_refused_before_any_work(evaluation, tmp_path):
    write_questions(tmp_path / "x.jsonl", [("Welche Farbe hat der Himmel?", "blau")])
    out = tmp_path / "out"
    config = replace(evaluation.config, task=[f"x={tmp_path}/x.jsonl"], out=str(out))
    with pytest.raises(ValueError, match="unknown to this model's tokenizer"):
        evaluate.evaluate(config)
    with pytest.raises(ValueError, match="more than the .* positions of this model"):
        evaluate.evaluate(replace(evaluation.config, max_new_tokens=10**6, out=str(out)))
    assert not out.exists()


# ---- tasks with a judge of their own -------------------------------------------------------------

OWN_TASK = """
def load(split, seed=0):
    return [{"question": "calc 1 + 2 ?", "id": f"row {i}"} for i in range(3)]

def judge(completion, row):
    return {"accuracy": len(completion) % 2, "letters": len(completion)}
"""


@pytest.fixture
def own_task(evaluation, tmp_path):
    """An evaluation of a task file: rows with an id, the same question in all, a judge alone."""
    file = tmp_path / "own.py"
    file.write_text(OWN_TASK)
    arms = ["greedy", "sampling", "latent"]
    return replace(evaluation.config, task=[str(file)], arms=arms, out=str(tmp_path / "out"))


def test_what_a_judge_leaves_out_is_left_out_of_the_table(own_task):
    figures = evaluate.evaluate(own_task)["own"]
    for missing in ("answered", "undecided", "majority", "style math", "follows"):
        assert missing not in figures["latent"]
    text = (evaluate.Path(own_task.out) / "results.md").read_text()
    head = [column.strip() for column in text.split("\n")[0].strip("|").split("|")]
    assert head[:3] == ["arm", "pass@1", "pass@8"]
    assert head[4:] == ["answers", "tokens"]
    samples = read_samples(own_task.out)["own"]["sampling"]
    for sample in samples:
        assert sample["letters"] == len(sample["completion"])
        assert sample["accuracy"] == len(sample["completion"]) % 2


# ---- going on where an evaluation stopped --------------------------------------------------------


def spy_on_answers(monkeypatch, stop_at=None):
    """Lets answer_questions note its rows; it is interrupted at call number `stop_at`."""
    calls = []
    original = evaluate.answer_questions

    def spy(decoder, reader, task, rows, *others):
        calls.append([row["question"] for row in rows])
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(decoder, reader, task, rows, *others)

    monkeypatch.setattr(evaluate, "answer_questions", spy)
    return calls


@pytest.mark.parametrize("stop_at, arm", [(1, "greedy"), (3, "noise")])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    stop_at, arm, evaluation, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    config = replace(evaluation.config, out=str(out))
    calls = spy_on_answers(monkeypatch, stop_at)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config)
    with open(out / "samples.jsonl", "a") as file:  # a part of an arm, and a torn line
        file.write(json.dumps({"benchmark": "tiny", "arm": arm, "row": 0}) + "\n")
        file.write('{"arm": "noise')

    figures = evaluate.evaluate(replace(config, resume=True))
    assert figures == evaluation.figures
    assert len(calls) == 12 + 1
    uninterrupted = (evaluation.out / "samples.jsonl").read_text()
    assert (out / "samples.jsonl").read_text() == uninterrupted


def test_an_evaluation_that_is_done_is_not_run_again(evaluation, tmp_path, monkeypatch):
    config = replace(evaluation.config, resume=True)
    before = (evaluation.out / "samples.jsonl").read_text()
    calls = spy_on_answers(monkeypatch)
    assert evaluate.evaluate(config) == evaluation.figures
    fewer = evaluate.evaluate(replace(config, arms=["latent", "sampling"]))
    assert list(fewer["tiny"]) == ["latent", "sampling"]
    assert calls == []
    assert (evaluation.out / "samples.jsonl").read_text() == before  # arms not asked for are kept
    evaluate.evaluate(config)


def test_an_evaluation_of_rows_with_an_id_goes_on_too(own_task, monkeypatch):
    """The question of such a sample is the id: pictures may share their question."""
    figures = evaluate.evaluate(own_task)
    path = evaluate.Path(own_task.out) / "samples.jsonl"
    samples = path.read_text()
    assert {sample["question"] for sample in read_samples(own_task.out)["own"]["latent"]} == {
        "row 0",
        "row 1",
        "row 2",
    }
    calls = spy_on_answers(monkeypatch)
    assert evaluate.evaluate(replace(own_task, resume=True)) == figures
    assert calls == []
    assert path.read_text() == samples


def test_drawn_scenes_are_found_finished(tmp_path):
    task = load_task("tiny-vl", splits=("test",))
    config = EvaluateConfig(model="tiny-vl", questions=3, samples=2, out=str(tmp_path))
    samples = []
    for number, row in enumerate(task.test[:3]):
        for sample in range(2):
            question = {"row": number, "question": row["id"], "gold": row["answer"]}
            samples.append({**question, "sample": sample})
    evaluate.add_samples(tmp_path, "tiny-vl", "latent", samples)
    evaluate.add_samples(tmp_path, "tiny-vl", "noise", samples[:-1])
    assert evaluate.finished_arms(config, [task]) == {"tiny-vl": {"latent": samples}}


def test_an_evaluation_of_other_settings_is_not_gone_on_with(evaluation, tmp_path):
    config = replace(evaluation.config, arms=["greedy"], out=str(tmp_path))
    evaluate.evaluate(config)
    samples = (tmp_path / "samples.jsonl").read_text()
    with pytest.raises(ValueError, match="another seed"):
        evaluate.evaluate(replace(config, seed=5, resume=True))
    assert (tmp_path / "samples.jsonl").read_text() == samples

    evaluate.evaluate(replace(config, seed=5))  # anew: what was there is not lost
    assert (tmp_path / "samples.before.jsonl").read_text() == samples


def test_settings_that_change_no_answer_may_differ(evaluation, tmp_path, monkeypatch):
    config = replace(evaluation.config, arms=["sampling"], out=str(tmp_path))
    evaluate.evaluate(config)
    calls = spy_on_answers(monkeypatch)
    changed = replace(config, slots=3, against="greedy", arms=["greedy", "sampling"], resume=True)
    evaluate.evaluate(changed)
    assert len(calls) == 1


def test_answers_to_questions_that_have_changed_are_not_taken_over(
    evaluation, tmp_path, monkeypatch
):
    calls = spy_on_answers(monkeypatch)
    config = replace(
        evaluation.config,
        task=[f"x={tmp_path}/x.jsonl"],
        arms=["greedy", "sampling"],
        resume=True,
        out=str(tmp_path / "out"),
    )
    for last in ("calc 2 + 1 ?", "calc 2 + 1 ?", "calc 3 + 1 ?"):  # twice the same: nothing to do
        write_questions(tmp_path / "x.jsonl", [("calc 1 + 2 ?", "3"), (last, "3")])
        evaluate.evaluate(config)
    before = ["calc 1 + 2 ?", "calc 2 + 1 ?"]
    after = ["calc 1 + 2 ?", "calc 3 + 1 ?"]
    assert calls == [before, before, after, after]
    samples = read_samples(tmp_path / "out")["x"]["greedy"]
    assert [sample["question"] for sample in samples] == after


def test_samples_of_another_version_are_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"arm": "noise", "completion": "7"}\n')
    with pytest.raises(ValueError, match="of another version"):
        read_samples(tmp_path)


# ---- pictures ------------------------------------------------------------------------------------


def test_without_matplotlib_a_run_says_how_to_get_pictures_and_goes_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw_pass_at_k({}, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
    assert 'pip install -e ".[plots]"' in capsys.readouterr().out


def colours_at(picture, x, y):
    """The colours within two pixels of a place: lines are two pixels wide."""
    colours = set()
    for dx in (-2, -1, 0, 1, 2):
        for dy in (-2, -1, 0, 1, 2):
            colours.add(picture.getpixel((x + dx, y + dy)))
    return colours


@pytest.mark.parametrize(
    "thousandths, gold", [(False, "(20, 10, 60, 30)"), (True, "[200, 200, 600, 600]")]
)
def test_boxes_lie_where_they_are_in_the_image(thousandths, gold, tmp_path):
    from PIL import Image

    row = {"question": "box of it", "answer": gold, "image": Image.new("RGB", (100, 50), "white")}
    task = SimpleNamespace(test=[row], thousandths=thousandths)
    box = "[700, 400, 900, 800]" if thousandths else "[70, 20, 90, 40]"
    results = {
        "latent": [{"row": 0, "completion": box}, {"row": 0, "completion": "it is on the left"}],
        "greedy": [{"row": 0, "completion": "none"}],
        "noise": [{"row": 0, "completion": box}],
    }
    draw_boxes(task, results, tmp_path / "boxes.png", side=104)
    sheet = Image.open(tmp_path / "boxes.png").convert("RGB")
    assert sheet.size == (110 + 104, 2 * 104)  # the arms of Table 2 that there are: greedy, latent

    red, green = (255, 0, 0), (0, 255, 0)
    for row_of_arm in (0, 1):
        assert green in colours_at(sheet, 110 + 20, 104 * row_of_arm + 40)  # its left edge
    assert red in colours_at(sheet, 110 + 70, 104 + 60)
    assert red not in colours_at(sheet, 110 + 70, 60)


# ---- control -------------------------------------------------------------------------------------


@pytest.fixture
def control_config(tmp_path, policy_folder, vae, traces):
    """The settings of a control measurement on traces that the VAE names as its own."""
    lines = [json.dumps(trace) + "\n" for trace in traces]
    (tmp_path / "traces.jsonl").write_text("".join(lines))
    settings = {"traces": [str(tmp_path / "traces.jsonl")], "limit": 10**9}
    vae.save(tmp_path / "vae", settings=settings)
    return EvaluateConfig(
        model=str(policy_folder),
        vae=str(tmp_path / "vae"),
        out=str(tmp_path / "out"),
        control=True,
        answers=4,
        device="cpu",
    )


def test_control_is_a_table_of_losses_with_paired_intervals(control_config, vae, capsys):
    control = evaluate.evaluate_control(control_config)
    stored = read_json(f"{control_config.out}/control.json")
    sources = ["none", *vae.domains, "prior", "gauss", "noise", "own"]
    for domain, losses in stored["losses"].items():
        assert list(losses) == sources
        for source, figures in losses.items():
            values = control.losses[domain][source]
            assert figures["loss"] == pytest.approx(sum(values) / 4)
            differences = []
            for loss, without in zip(values, control.losses[domain]["none"]):
                differences.append(loss - without)
            assert figures["above_none"] == pytest.approx(bootstrap(differences))
    low, high = stored["cost"][1:]
    assert low <= stored["cost"][0] <= high
    assert stored["cost"] == pytest.approx(bootstrap(*control.costs()))
    assert stored["gain"] == pytest.approx(bootstrap(*control.gains()))

    output = capsys.readouterr().out
    assert f"| loss of | {' | '.join(sources)} |" in output
    assert f"| above none [95%] | {' | '.join(sources[1:])} |" in output
    assert control.verdict() in output
    assert "4 held-out answers a domain, L = 8" in output


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vae": "none"}, "it needs a VAE, not --vae none"),
        ({"traces": ["nowhere.jsonl"]}, "no such file: nowhere.jsonl"),
        ({"limit": 20}, "has no held-out trace: every tenth"),
    ],
)
def test_what_control_cannot_be_measured_on_is_one_sentence(control_config, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate_control(replace(control_config, **changes))


def test_control_needs_prefixes(control_config, tmp_path, vae):
    with pytest.raises(ValueError, match="--length must be at least 1"):
        replace(control_config, length=0)
    vae.save(tmp_path / "silent")
    with pytest.raises(ValueError, match="does not say on which traces: give them by --traces"):
        evaluate.evaluate_control(replace(control_config, vae=str(tmp_path / "silent")))


def test_the_command_line_measures_control_in_place_of_arms(monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_control", lambda config: config.answers)
    assert evaluate.main(["--control", "--answers", "3"]) == 3
