"""evaluate.py: estimators against closed forms and enumeration, and answers that depend on their question alone."""
import itertools
import json
import math
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
from evaluate import (all_figures, answer, arms_of, arms_table, bootstrap, figures_of, majority, markdown, mean_and_error,
                      neighbourhood_mean, pass_at_k, prefix_seed, read_samples, score, vae_of_right, vote)
from prefix import Decoder, Palette, Sampling
from rewards import tiny_task
from sft import Ranks


@pytest.mark.parametrize("n, correct, k", [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 1, 6), (6, 0, 6), (7, 5, 2), (8, 3, 8)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct, k):
    right = [i < correct for i in range(n)]
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    rng, p, n, k = random.Random(0), 0.2, 10, 4
    mean = sum(pass_at_k(n, sum(rng.random() < p for _ in range(n)), k) for _ in range(20_000)) / 20_000
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_pass_at_k_needs_enough_samples():
    with pytest.raises(ValueError, match="pass@9 needs at least 9 samples a question, there are 8"):
        pass_at_k(8, 1, 9)


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 0.0, 0.0, 1.0]) == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    assert mean_and_error([0.3]) == pytest.approx((0.3, 0.0))


def test_an_answer_depends_on_its_question_alone(model, tokenizer, vae):
    task, decoder = tiny_task(4, 6), Decoder(model, slots=3)
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", 4)
    sampling = Sampling(1.0, max_new_tokens=10)
    whole = answer(decoder, tokenizer, task, task.test, palette, sampling, 3, seed=1)
    assert len(whole) == 18 and {sample["sample"] for sample in whole} == {0, 1, 2}
    part = answer(decoder, tokenizer, task, task.test[:2:-1], palette, sampling, 3, seed=1)
    key = lambda sample: (sample["question"], sample["sample"])
    expected = {key(sample): sample for sample in whole}
    assert all({**sample, "row": 0} == {**expected[key(sample)], "row": 0} for sample in part)
    assert answer(decoder, tokenizer, task, task.test, palette, sampling, 3, seed=2) != whole


def test_every_sample_has_a_latent_of_its_own_and_the_tokens_of_its_own(model, tokenizer, vae, monkeypatch):
    task, drawn = tiny_task(1, 2), []
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", 4)
    original = palette.draw
    palette.draw = lambda seeds: drawn.append(seeds) or original(seeds)
    samples = answer(Decoder(model), tokenizer, task, task.test, palette, Sampling(1.0, max_new_tokens=10), 4, seed=1)
    assert len(set(drawn[0])) == 8
    alone = answer(Decoder(model), tokenizer, task, task.test, None, Sampling(1.0, max_new_tokens=10), 4, seed=1)
    for found in (samples, alone):
        assert len({sample["completion"] for sample in found if sample["row"] == 0}) > 1


def test_greedy_accuracy_asks_the_first_test_questions_greedily_without_prefix(model, tokenizer, monkeypatch):
    task, asked = tiny_task(5, 9), {}
    monkeypatch.setattr(evaluate, "answer", lambda decoder, tokenizer, task, rows, palette, sampling, samples, *_:
                        asked.update(rows=rows, palette=palette, sampling=sampling, samples=samples) or [{"accuracy": 1.0}, {"accuracy": 0.0}])
    args = SimpleNamespace(eval_questions=4, max_new_tokens=7, prompt="auto")
    assert evaluate.greedy_accuracy(None, tokenizer, task, args, Ranks(0, 1, torch.device("cpu"))) == 0.5
    assert asked == {"rows": task.test[:4], "palette": None, "sampling": Sampling(0.0, max_new_tokens=7), "samples": 1}


def test_the_rl_table_shows_start_end_and_spread(tmp_path):
    for seed, end in enumerate((0.4, 0.8)):
        (tmp_path / f"s{seed}").mkdir()
        rows = [{"step": 0, "eval_accuracy": 0.1}, {"step": 1}, {"step": 2, "eval_accuracy": end}]
        (tmp_path / f"s{seed}" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = evaluate.rl_table(tmp_path, "grpo-prior", {"linear": [tmp_path / "s0", tmp_path / "s1"]})
    assert text.splitlines()[-1] == "| grpo-prior linear | 0.100 | 0.400, 0.800 | 0.600 | 0.283 | 0.350 |"
    assert json.loads((tmp_path / "grpo-prior.json").read_text())["linear"]["end"] == pytest.approx([0.4, 0.8])


def test_pass_at_k_is_unbiased_when_simulated_with_many_questions():
    generator, n, k = torch.Generator().manual_seed(0), 16, 8
    p = torch.rand(4000, generator=generator)                                   # each question has a chance of its own
    right = (torch.rand(4000, n, generator=generator) < p[:, None]).sum(1).tolist()
    mean, error = mean_and_error([pass_at_k(n, c, k) for c in right])
    assert mean == pytest.approx((1 - (1 - p) ** k).mean().item(), abs=3 * error) and error < 0.01


def test_mean_and_error_weighs_benchmarks_alike():
    assert mean_and_error([1.0, 1.0, 1.0, 0.0], [0.0, 0.0])[0] == pytest.approx(0.375)
    a, b = [0.0, 1.0, 1.0, 0.0], [0.2, 0.9]
    assert mean_and_error(a, b)[1] == pytest.approx(math.hypot(mean_and_error(a)[1], mean_and_error(b)[1]) / 2)


def test_the_interval_covers_the_truth_in_about_95_of_100_studies():
    generator, questions, studies = torch.Generator().manual_seed(1), 80, 600
    chance = torch.rand(studies, questions, generator=generator) * 0.8          # of the weaker arm; the other is better by 0.1
    draw = lambda p: torch.bernoulli(p, generator=generator)
    differences = (draw(chance + 0.1) - draw(chance)).tolist()
    covered = 0
    for study, values in enumerate(differences):
        _, low, high = bootstrap(values, resamples=500, seed=study)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / studies <= 0.97


def test_pairing_narrows_the_interval_where_questions_are_hard_for_both_arms():
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(200, generator=generator)
    a, b = ((hard + 0.1 * torch.randn(200, generator=generator)).tolist() for _ in range(2))
    width = lambda x, y: (lambda mean, low, high: high - low)(*bootstrap([i - j for i, j in zip(x, y)]))
    assert width(a, b) < 0.5 * width(a, random.Random(0).sample(b, 200))
    assert bootstrap([0.25] * 9) == pytest.approx((0.25, 0.25, 0.25))
    assert bootstrap(a, seed=1) == bootstrap(a, seed=1) != bootstrap(a, seed=2)


def test_votes_go_by_equality_of_values():
    assert vote(["1/2", "3", "0.5", None, "\\frac{1}{2}", "3"]) == [("1/2", 3), ("3", 2)]
    assert vote([None, None]) == []


@pytest.mark.parametrize("answers, gold, expected", [
    (["7", "7", "3"], "7", 1.0), (["7", "3", "3"], "7", 0.0), (["7", "3"], "7", 0.5), (["3", "7"], "7", 0.5),
    (["1", "2", "7"], "7", 1 / 3), (["1", "2"], "7", 0.0), ([None, None], "7", 0.0), ([None, None, "7"], "7", 1.0)])
def test_the_majority_and_its_ties(answers, gold, expected):
    assert majority(vote(answers), gold) == pytest.approx(expected)


def samples_of(pattern, **extra):
    """pattern: {question: string of answers}; the right answer is always 1."""
    return [{"row": q, "question": "the same for all", "gold": "1", "sample": i, "accuracy": float(c == "1"), "answered": 1.0, "undecided": 0.0,
             "tokens": 10, "completion": c, "answer": c, "style": "math", **extra} for q, row in pattern.items() for i, c in enumerate(row)]


def test_score_by_hand():
    columns = score(samples_of({"a": "1023", "b": "0000"}), [1, 2, 4])
    assert columns["pass@1"] == [0.25, 0.0] and columns["pass@2"] == [0.5, 0.0] and columns["pass@4"] == [1.0, 0.0]
    assert columns["answers"] == [4, 1] and columns["majority"] == [0.25, 0.0] and columns["samples"] == [4, 4]
    assert columns["style math"] == [1.0, 1.0] and "follows" not in columns
    assert score(samples_of({"a": "11"}, domain="code"), [1])["follows"] == [0.0]
    assert score(samples_of({"a": "1", "b": "0"}), [1, 8])["pass@8"] == [1.0, 0.0]                           # greedy: one sample


def test_questions_are_compared_by_their_row_whatever_their_order_in_the_file():
    one, other = samples_of({0: "1000", 1: "0000"}), samples_of({1: "0000", 0: "1000"})
    figures = figures_of({"a": [score(one, [1])], "b": [score(other, [1])]}, "a")
    assert figures["b"]["difference"]["pass@1"] == (0.0, 0.0, 0.0) and "difference" not in figures["a"]


def test_figures_of_families_and_of_several_benchmarks():
    arith, lists = samples_of({0: "11", 1: "10"}, family="arith"), samples_of({2: "00"}, family="list")
    results = {"tiny": {"sampling": arith + lists, "latent": samples_of({0: "11", 1: "11"}, family="arith") + lists},
               "gsm8k": {"sampling": samples_of({0: "00"}), "latent": samples_of({0: "10"})}}
    figures = all_figures(results, [1, 2])
    assert list(figures) == ["tiny", "tiny/arith", "tiny/list", "gsm8k", "average"]
    assert figures["tiny/arith"]["sampling"]["pass@1"][0] == 0.75 and figures["tiny/list"]["latent"]["pass@2"][0] == 0.0
    assert figures["average"]["latent"]["pass@1"][0] == pytest.approx((2 / 3 + 0.5) / 2)
    assert figures["average"]["latent"]["difference"]["pass@1"][0] == pytest.approx((1 / 6 + 0.5) / 2)
    table = arms_table(figures["tiny"], "sampling")
    assert table[0][:4] == ["arm", "pass@1", "pass@2", "pass@2 against sampling [95%]"] and all(len(row) == len(table[0]) for row in table)
    assert markdown(table).splitlines()[-1].startswith("| latent | 0.667 | 0.667 | +0.000 [+0.000, +0.000] |")


def test_arms():
    arms = arms_of(["all"], ["code", "math"], 0.8)
    assert arms == {"greedy": ("none", 0.0), "sampling": ("none", 0.8), "noise": ("noise", 0.0), "gauss": ("gauss", 0.0),
                    "shuffled": ("shuffled", 0.0), "latent": ("prior", 0.0), "noise + sampling": ("noise", 0.8),
                    "gauss + sampling": ("gauss", 0.8), "latent + sampling": ("prior", 0.8), "code": ("code", 0.0), "math": ("math", 0.0)}
    assert list(arms_of(["all"], [], 1.0, with_vae=False)) == ["greedy", "sampling", "noise", "noise + sampling"]
    assert list(arms_of(["greedy", "noise"], [], 1.0)) == ["greedy", "noise"]
    with pytest.raises(ValueError, match="unknown arm 'poetry'"):
        arms_of(["poetry"], [], 1.0)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, policy_folder, vae):
    """One small evaluation of every arm: (its command line but for --out, its folder, its figures)."""
    pytest.importorskip("matplotlib", reason='the pictures need the extra "plots"')
    root = tmp_path_factory.mktemp("evaluation")
    vae.save(root / "vae")
    argv = ["--model", str(policy_folder), "--vae", str(root / "vae"), "--questions", "4", "--samples", "8", "--max-new-tokens", "6"]
    return argv, root / "out", evaluate.main([*argv, "--out", str(root / "out"), "--analyse"])


def test_the_command_writes_table_samples_and_picture(evaluation):
    _, out, figures = evaluation
    arms = read_samples(out)["tiny"]
    assert set(figures["tiny"]) == set(arms) and {arm: len(samples) for arm, samples in arms.items()} == {
        arm: 4 if arm == "greedy" else 32 for arm in arms}
    saved = json.loads((out / "results.json").read_text())
    assert saved["arms"]["latent"]["pass@4"] == list(mean_and_error(score(arms["latent"], [4])["pass@4"]))
    assert set(saved["benchmarks"]) == {"tiny", "tiny/arith", "tiny/list"}
    assert (out / "results.md").read_text().count("\n| ") == 12 and (out / "pass_at_k.png").stat().st_size > 1000


def test_a_stored_sample_rebuilds_its_latent(evaluation, vae, model, tokenizer):
    _, out, _ = evaluation
    table = model.get_input_embeddings().weight.detach()
    sample = read_samples(out)["tiny"]["math"][5]
    rows, latents = Palette(vae, table, "math", 8).draw([prefix_seed(0, sample["question"], sample["sample"])])
    assert torch.equal(vae.decode(latents[0]).expand(8, -1), rows[0])
    task = tiny_task()
    ids = evaluate.prompt_of(sample, tokenizer, task.instruction)
    again = Decoder(model).generate([ids], rows, Sampling(0.0, max_new_tokens=6))[0]
    assert tokenizer.decode(again.ids, skip_special_tokens=True) == sample["completion"]


def test_rescoring_gives_the_same_and_needs_no_model(evaluation, tmp_path, monkeypatch):
    _, out, figures = evaluation
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    monkeypatch.setattr(evaluate, "load_policy", None)
    monkeypatch.setattr(evaluate, "find_model", None)
    assert evaluate.main(["--rescore", "--out", str(copied)]) == figures
    assert (copied / "samples.jsonl").read_text() == (out / "samples.jsonl").read_text()
    monkeypatch.setattr("rewards.Task.judge", lambda *_: {"accuracy": 1.0, "answered": 1.0, "format": 1.0, "undecided": 0.0})
    assert evaluate.main(["--rescore", "--out", str(copied)])["tiny"]["latent"]["pass@1"] == (1.0, 0.0)
    assert json.loads((copied / "results.json").read_text())["note"].count("judged again") == 1
    with pytest.raises(ValueError, match="no evaluation in"):
        evaluate.main(["--rescore", "--out", str(tmp_path / "nothing")])


def test_the_analysis_compares_on_questions_kept_aside(evaluation):
    _, out, _ = evaluation
    head, *rows = json.loads((out / "analysis.json").read_text())["table"]
    assert [row[0] for row in rows] == ["tiny/arith (1)"] * 4 + ["tiny/list (1)"] * 4 and len({len(row) for row in [head, *rows]}) == 1
    assert [row[1] for row in rows[:4]][0::2] == ["latent", "right answers"] and (out / "reward_map.png").stat().st_size > 1000


def test_questions_to_learn_from_and_questions_kept_aside_are_different_ones():
    parts = evaluate.halves(tiny_task(1, 9), 9)
    assert [name for name, _, _ in parts] == ["tiny/arith", "tiny/list"] and not any(seen & kept for _, seen, kept in parts)
    assert set().union(*(seen | kept for _, seen, kept in parts)) == set(range(9))
    assert all(0 <= len(seen) - len(kept) <= 1 for _, seen, kept in parts)


def test_the_gaussian_of_right_latents_and_the_mean_over_neighbours(vae):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, vae.latent, generator=generator) * 0.3 + 2.0
    z[:, 0] += z[:, 1]                                                      # correlated: a factor may stand the wrong way round
    found = vae_of_right(vae, z)
    factor = found.domain_factor[0]
    assert found.domain_mean[0] == pytest.approx(z.mean(0), abs=0.02) and torch.allclose(factor.T @ factor, torch.cov(z.T), atol=0.03)
    assert vae.domains == ["code", "math", "qa"] and torch.equal(vae_of_right(vae, z[:0]).domain_factor[0], torch.eye(vae.latent))
    assert torch.allclose(vae_of_right(vae, z[:1]).domain_mean, z[:1] / (1 + vae.latent))                   # drawn to the prior
    clusters = torch.cat([torch.zeros(40, 2), torch.full((40, 2), 9.0)])
    assert neighbourhood_mean(clusters, torch.tensor([1.0] * 40 + [0.0] * 40)).tolist() == [1.0] * 40 + [0.0] * 40


def test_a_sweep_changes_one_thing_at_a_time(evaluation, tmp_path, monkeypatch):
    argv, _, _ = evaluation
    asked = []
    original = evaluate.run_arms
    monkeypatch.setattr(evaluate, "run_arms", lambda lab, tasks, args: asked.append((args.length, args.temperature, lab.vae)) or original(lab, tasks, args))
    monkeypatch.setattr(evaluate, "vae_with", lambda folder, out, beta: f"the VAE of beta {beta}" and evaluate.VAE.load(folder))
    evaluate.main([*argv, "--sweep", "length=1,3", "beta=4", "temperature=0.5", "--arms", "latent", "--out", str(tmp_path)])
    assert [point[:2] for point in asked] == [(1, 1.0), (3, 1.0), (8, 1.0), (8, 0.5)]
    assert asked[0][2] is asked[1][2] is asked[3][2] is not asked[2][2]
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert {axis: list(values) for axis, values in saved["points"].items()} == {"length": ["1", "3"], "beta": ["4.0"], "temperature": ["0.5"]}
    assert len(saved["table"]) == 5 and (tmp_path / "sweep.png").stat().st_size > 1000 and (tmp_path / "length-3" / "samples.jsonl").is_file()


def test_a_vae_of_another_beta_keeps_the_other_settings(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"vae": {}, "settings": {"model": "m", "traces": ["a=x", "b=y"], "beta": 1.0, "lr": 0.002}}))
    asked = []
    monkeypatch.setattr(evaluate.vae_stage, "main", asked.append)
    monkeypatch.setattr(evaluate.VAE, "load", lambda folder: folder)
    assert evaluate.vae_with(tmp_path, tmp_path / "new", beta=4.0) == tmp_path / "new"
    assert asked == [["--model", "m", "--traces", "a=x", "b=y", "--beta", "4.0", "--lr", "0.002", "--out", str(tmp_path / "new")]]
    (tmp_path / "config.json").write_text('{"vae": {}}')
    with pytest.raises(ValueError, match="needs a VAE made by vae.py"):
        evaluate.vae_with(tmp_path, tmp_path / "new", beta=4.0)


@pytest.mark.parametrize("argv, sentence", [
    (["--sweep", "width=3"], "--sweep takes AXIS=VALUE,VALUE"), (["--sweep", "length=x"], "--sweep takes AXIS=VALUE,VALUE"),
    (["--analyse", "--independent"], "--analyse needs a VAE and one latent a sample"),
    (["--sweep", "length=2,-1"], "length must be from 0 to 1000000, not -1"), (["--sweep", "top_p=1,1.5"], "top-p must be from 1e-06 to 1, not 1.5"),
    (["--temperature", "nan"], "--temperature: must be at least 0 and finite, not nan"), (["--sweep", "beta=1", "--vae", "none"], "--sweep beta needs a VAE"),
    (["--sweep", "length=1", "--analyse"], "--analyse and --sweep are two jobs"), (["--task", "a", "a"], "each benchmark once"),
    (["--task", "tiny", "average"], "none of them average"),
    (["--task", "a", "b", "--test-data", "x.jsonl"], "--test-data with several tasks takes TASK=SOURCE"),
    (["--task", "a", "--test-data", "x.jsonl", "y.jsonl"], "--test-data with several tasks takes TASK=SOURCE")])
def test_flags_that_cannot_be_right(argv, sentence, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(argv)
    assert sentence in capsys.readouterr().err


def test_several_benchmarks_in_one_call(evaluation, tmp_path):
    argv, _, _ = evaluation
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"question": f"calc {i} + 1 ?", "answer": f"{i + 1}"}) + "\n" for i in range(3)))
    figures = evaluate.main([*argv, "--task", "tiny", "a", "b", "--test-data", f"a={tmp_path}/a.jsonl", f"b={tmp_path}/b.jsonl", "--arms",
                             "greedy", "sampling", "--against", "greedy", "--out", str(tmp_path / "out")])
    assert list(figures) == ["tiny", "tiny/arith", "tiny/list", "a", "b", "average"] and "difference" in figures["a"]["sampling"]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"pass_at_k-{name}.png" for name in ("tiny", "a", "b", "average")}


@pytest.mark.parametrize("stop_at, left", [(1, "greedy"), (3, "noise")])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(stop_at, left, tmp_path, policy_folder, vae, monkeypatch):
    vae.save(tmp_path / "vae")
    argv = ["--model", str(policy_folder), "--vae", str(tmp_path / "vae"), "--questions", "2", "--samples", "4",
            "--max-new-tokens", "5"]
    whole = evaluate.main([*argv, "--out", str(tmp_path / "whole")])
    original, calls = evaluate.answer, []

    def dying(*arguments):
        calls.append(0)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(evaluate, "answer", dying)
    torn = ["--out", str(tmp_path / "torn")]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*argv, *torn])
    with open(tmp_path / "torn" / "samples.jsonl", "a") as file:
        file.write(f'{{"benchmark": "tiny", "arm": "{left}", "row": 0}}\n{{"arm": "{left}')        # a part of an arm, and a torn line
    assert evaluate.main([*argv, *torn, "--resume"]) == whole
    assert len(calls) == 12 + 1 and (tmp_path / "torn" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    with pytest.raises(ValueError, match="another seed"):
        evaluate.main([*argv, *torn, "--resume", "--seed", "5"])
    monkeypatch.setattr(evaluate, "answer", original)
    evaluate.main([*argv, *torn, "--arms", "greedy", "--seed", "5"])                # anew: what was there is not lost
    assert (tmp_path / "torn" / "samples.before.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_answers_to_questions_that_have_changed_are_not_taken_over(evaluation, tmp_path, monkeypatch):
    argv, _, _ = evaluation
    asked, original = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *a: asked.append([row["question"] for row in a[3]]) or original(*a))
    for last in ("2 + 1", "2 + 1", "3 + 1"):                                # twice the same: nothing to do
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({"question": f"calc {q} ?", "answer": "3"}) + "\n" for q in ("1 + 2", last)))
        evaluate.main([*argv, "--task", "x", "--test-data", f"{tmp_path}/x.jsonl", "--arms", "greedy", "sampling", "--temperature", "0",
                       "--resume", "--out", str(tmp_path / "out")])
    assert asked == [["calc 1 + 2 ?", "calc 2 + 1 ?"]] * 2 + [["calc 1 + 2 ?", "calc 3 + 1 ?"]] * 2
    assert {s["question"] for s in read_samples(tmp_path / "out")["x"]["greedy"]} == {"calc 1 + 2 ?", "calc 3 + 1 ?"}


def test_without_matplotlib_a_run_says_how_to_get_pictures_and_goes_on(tmp_path, monkeypatch, capsys):
    import sys
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.draw_pass_at_k({}, tmp_path / "x.png") is None and evaluate.named(None, "x.png") == ", picture x.png"
    assert 'pip install -e ".[plots]"' in capsys.readouterr().out


def test_learning_curves_are_drawn_from_metrics(tmp_path):
    pytest.importorskip("matplotlib", reason='the picture needs the extra "plots"')
    for name in ("grpo-none-s0", "grpo-linear-s0", "grpo-linear-s1"):
        (tmp_path / name).mkdir()
        rows = [{"step": 0, "eval_accuracy": 0.1}, {"step": 1, "reward_guided": None, "reward_unguided": 0.2, "eval_accuracy": 0.3}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "grpo-none-s0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')                      # a run that goes on may be writing
    path = evaluate.draw_curves(sorted(tmp_path.iterdir()), tmp_path / "curves.png")
    assert path.stat().st_size > 1000


def test_runs_of_two_folders_are_two_lines_and_negative_rewards_are_seen(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason='the picture needs the extra "plots"')
    for out, reward in (("a", -0.8), ("b", 0.5)):
        for seed in (0, 1):
            folder = tmp_path / out / f"grpo-none-s{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward_unguided": reward, "eval_accuracy": 0.3}) + "\n")
    import matplotlib.figure
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    evaluate.draw_curves(sorted(tmp_path.glob("*/*")), tmp_path / "curves.png")
    _, unguided, accuracy = figures[0].axes
    assert [line.get_label() for line in accuracy.lines] == ["a/grpo-none (2 seeds)", "b/grpo-none (2 seeds)"]
    assert unguided.get_ylim()[0] < -0.8 and unguided.get_ylim()[1] >= 1.02


def test_the_closing_evaluation_samples_as_the_rollouts_did_and_resumes(tmp_path, monkeypatch, policy_folder, vae):
    vae.save(tmp_path / "vae")
    args = SimpleNamespace(
        out=tmp_path, arms=["greedy", "sampling"], vae=str(tmp_path / "vae"), task="tiny", test_data=None, prompt="auto", device="cpu",
        arm_questions=2, arm_samples=2, length=2, slots=8, independent=False, temperature=0.7, top_p=0.9, top_k=9, max_new_tokens=4,
        resume=True,
        algorithm="grpo", source="prior", steps=1, prompts=2, group=2)
    monkeypatch.setattr(evaluate, "rl_table", lambda *_: "")
    monkeypatch.setattr(evaluate, "draw_curves", lambda *_: None)
    asked, original = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *a: asked.append((a[5].temperature, a[5].top_p, a[5].top_k)) or original(*a))
    policies = {"none": "nowhere", "linear": str(policy_folder)}            # the one under prefixes is what the arms show
    for temperature in (0.7, 0.7, 0.8):                     # the second time all is there; the third has other settings
        args.temperature = temperature
        evaluate.close_rl(args, {}, policies, "cpu")
    assert asked == [(temperature, 0.9, 9) for temperature in (0.0, 0.7, 0.0, 0.8)]


def curves(folder, ends, steps=6):
    """A finished run's metrics, from 0.1 to the end given."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval_accuracy": 0.1}] + [{"step": step, "reward_guided": step / steps, "reward_unguided": 0.2} for step in range(1, steps)]
    rows += [{"step": steps, "reward_guided": None, "reward_unguided": 0.3, "eval_accuracy": ends}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_command_of_the_reproduction_is_one_its_script_accepts(tmp_path):
    import grpo
    for quick in ([], ["--quick"]):
        args = evaluate.parse_args(["--reproduce", "--out", str(tmp_path), "--seeds", "3", "4", *quick])
        commands = evaluate.reproduce_commands(args)
        assert {section.command for section in evaluate.SECTIONS} <= {"all", *commands}
        for script, *argv in commands.values():
            parsed = {"grpo.py": grpo, "evaluate.py": evaluate}[script].parse_args(argv)
            assert parsed.resume and parsed.out.startswith(str(tmp_path))
    assert commands["rloo"][commands["rloo"].index("--seed") + 1:][:2] == ["3", "4"]


class Page(HTMLParser):
    """Collects tags, checks that they close in order, and keeps every address."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_reproduction_makes_one_self_contained_page_and_skips_what_is_done(evaluation, tmp_path, monkeypatch):
    _, done, _ = evaluation
    ran, argv = [], ["--reproduce", "--seeds", "0", "1", "--out", str(tmp_path)]

    def run(command, stdout, **_):
        ran.append(Path(command[1]).name)
        if "--arms" in command and "evaluate.py" in command[1] or "--analyse" in command:
            shutil.copytree(done, command[command.index("--out") + 1])
        elif "--source" not in command:
            algorithm = "rloo" if "rloo" in command else "grpo"
            for kind, end in (("none", 0.2), ("two-phase", 0.9), ("linear", 0.8), ("two-phase-noise", 0.9), ("linear-noise", 0.2)):
                for seed in range(2):
                    curves(tmp_path / f"{algorithm}-{kind}-s{seed}", end + 0.01 * seed)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(evaluate.subprocess, "run", run)
    evaluate.main(argv)
    assert len(ran) == 6 and ran[0] == "grpo.py"
    text = (tmp_path / "index.html").read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.tags.count("img") == 5 and page.tags.count("table") == 6 and not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    rows = {row[0]: row[-1] for row in json.loads((tmp_path / "results.json").read_text())["sections"][0]["rows"]}
    assert rows["RL with grpo: is two-phase better than none?"] == "for" and rows["RL with rloo: is linear better than linear-noise?"] == "for"
    assert rows["RL with grpo: is two-phase better than two-phase-noise?"] == "no difference shown"
    assert [evaluate.steers({"math": 1.0, "code": a, "shuffled": b}) for a, b in ((0.9, 0.4), (0.8, 0.4), (1.0, 0.9))] == [True, False, False]
    assert [evaluate.verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2), (0.0, 0.1))] == [
        "for", "against", "no difference shown", "no difference shown"]
    evaluate.main(argv)
    assert len(ran) == 6 and (tmp_path / "index.html").read_text() == text
    alone = evaluate.reproduced_tables(tmp_path, [1])[0]                     # of the runs that are there, one
    assert {row[-1] for row in alone if row[0].startswith("RL")} == {"one seed shows nothing"}


def test_a_failed_stage_of_the_reproduction_is_one_sentence_and_is_run_again(tmp_path, monkeypatch):
    def fail(command, stdout, **_):
        stdout.write("much before\ngrpo.py: the disk is full\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(evaluate.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"failed \(grpo.py: the disk is full\); see .*grpo.txt"):
            evaluate.main(["--reproduce", "--out", str(tmp_path)])


def test_a_benchmark_may_have_any_name_and_the_analysis_is_one_table(evaluation, tmp_path):
    argv, _, _ = evaluation
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"question": f"calc {i} + 1 ?", "answer": f"{i + 1}"}) + "\n" for i in range(2)))
    evaluate.main([*argv, "--task", "tiny", "../up|", "--test-data", f"../up|={tmp_path}/x.jsonl", "--arms", "latent", "--analyse",
                   "--out", str(tmp_path / "deep" / "out")])
    assert (tmp_path / "deep" / "out" / "pass_at_k-.._up|.png").is_file() and len([*tmp_path.iterdir()]) == 2
    head, *rows = json.loads((tmp_path / "deep" / "out" / "analysis.json").read_text())["table"]
    assert "follows domain" not in head and head[-1].startswith("style") and all(len(row) == len(head) for row in rows)
    assert {row[0]: bool(row[-1]) for row in rows} == {"tiny/arith (1)": True, "tiny/list (1)": True, "../up| (1)": False}
    with pytest.raises(ValueError, match="--analyse needs at least two questions of arith"):
        evaluate.main([*argv, "--questions", "1", "--analyse", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_rescoring_an_interrupted_evaluation_leaves_out_what_is_not_complete(evaluation, tmp_path):
    _, out, figures = evaluation
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    arms, samples = read_samples(out)["tiny"], tmp_path / "samples.jsonl"
    part = {"sampling": arms["sampling"], "noise": arms["noise"][:20], "latent": arms["latent"][:30]}
    evaluate.write_samples(tmp_path, {"tiny": part, "b": {"sampling": arms["sampling"]}})
    rescored = evaluate.rescore(evaluate.parse_args(["--rescore", "--out", str(tmp_path)]))
    assert list(rescored["tiny"]) == ["sampling"] == list(rescored["average"]) and rescored["tiny"]["sampling"] == figures["tiny"]["sampling"]
    assert read_samples(tmp_path)["tiny"] == part                           # all samples are kept
    evaluate.write_samples(tmp_path, {"tiny": {"noise": arms["noise"][:7]}})
    with pytest.raises(ValueError, match="no arm is complete on tiny"):
        evaluate.main(["--rescore", "--out", str(tmp_path)])
    samples.write_text('{"arm": "noise", "completion": "7"}\n')
    with pytest.raises(ValueError, match="written by another version"):
        evaluate.main(["--rescore", "--out", str(tmp_path)])


def test_a_reference_arm_that_is_not_there(evaluation, tmp_path):
    argv, _, figures = evaluation
    with pytest.raises(ValueError, match="--against poetry is not among the arms: greedy"):
        evaluate.main([*argv, "--arms", "greedy", "--against", "poetry", "--out", str(tmp_path)])
    alone = {"noise": figures["tiny"]["noise"]}
    assert "against" not in " ".join(arms_table(alone, "sampling")[0]) and len(set(map(len, arms_table(alone, "sampling")))) == 1
