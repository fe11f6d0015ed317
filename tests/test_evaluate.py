"""evaluate.py: estimators against closed forms and enumeration, and answers that depend on their question alone."""
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import evaluate
from evaluate import answer, arms_of, markdown, mean_and_error, pass_at_k, score
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
    assert len({sample["completion"] for sample in samples if sample["row"] == 0}) > 1


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
    assert text.splitlines()[-1] == "| grpo-prior linear | 0.100 | 0.400, 0.800 | 0.600 | 0.283 |"
    assert json.loads((tmp_path / "grpo-prior.json").read_text())["linear"]["end"] == pytest.approx([0.4, 0.8])


def samples_of(pattern):
    """pattern: {question: string of 0 and 1}."""
    return [{"row": q, "question": "the same for all", "sample": i, "accuracy": float(c), "answered": 1.0, "tokens": 10, "completion": c, "style": "math"}
            for q, row in pattern.items() for i, c in enumerate(row)]


def test_score_by_hand():
    figures = score(samples_of({"a": "1000", "b": "0000"}), [1, 2, 4])
    assert figures["pass@1"] == pytest.approx((0.125, 0.125)) and figures["pass@2"] == pytest.approx((0.25, 0.25))
    assert figures["pass@4"] == pytest.approx((0.5, 0.5))
    assert figures["distinct"] == pytest.approx((0.5 + 0.25) / 2) and figures["samples"] == 4
    assert figures["styles"] == {"math": 1.0, "code": 0.0, "qa": 0.0}
    assert score(samples_of({"a": "1", "b": "0"}), [1, 8])["pass@8"] == pytest.approx((0.5, 0.5))       # greedy: one sample
    assert "| x | 0.125 ± 0.125 |" in markdown({"x": figures}, [1])


def test_arms():
    arms = arms_of(["all"], ["code", "math"], 0.8)
    assert arms == {"greedy": ("none", 0.0), "sampling": ("none", 0.8), "noise": ("noise", 0.0), "gauss": ("gauss", 0.0),
                    "latent": ("prior", 0.0), "latent + sampling": ("prior", 0.8), "code": ("code", 0.0), "math": ("math", 0.0)}
    assert list(arms_of(["all"], [], 1.0, with_vae=False)) == ["greedy", "sampling", "noise"]
    assert list(arms_of(["greedy", "noise"], [], 1.0)) == ["greedy", "noise"]
    with pytest.raises(ValueError, match="unknown arm 'poetry'"):
        arms_of(["poetry"], [], 1.0)


def test_the_command_writes_table_samples_and_picture(tmp_path, policy_folder, vae, capsys):
    pytest.importorskip("matplotlib", reason='the picture needs the extra "plots"')
    vae.save(tmp_path / "vae")
    out = tmp_path / "out"
    figures = evaluate.main(["--model", str(policy_folder), "--vae", str(tmp_path / "vae"), "--questions", "3", "--samples", "8",
                             "--max-new-tokens", "6", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 + 8 * 8 * 3 and set(figures) == {row["arm"] for row in rows}
    again = score([row for row in rows if row["arm"] == "latent"], [1, 8])
    assert json.loads((out / "results.json").read_text())["arms"]["latent"]["pass@8"] == list(again["pass@8"])
    assert (out / "results.md").read_text().count("\n| ") == 10 - 1 and (out / "pass_at_k.png").stat().st_size > 1000
    assert "| latent + sampling |" in capsys.readouterr().out


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
        file.write(f'{{"arm": "{left}", "row": 0}}\n{{"arm": "{left}')        # a part of an arm, and a torn line
    assert evaluate.main([*argv, *torn, "--resume"]) == whole
    assert len(calls) == 9 + 1 and (tmp_path / "torn" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    with pytest.raises(ValueError, match="another seed"):
        evaluate.main([*argv, *torn, "--resume", "--seed", "5"])


def test_without_matplotlib_a_run_says_how_to_get_pictures_and_goes_on(tmp_path, monkeypatch, capsys):
    import sys
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.draw_pass_at_k({}, tmp_path / "x.png") is None
    assert 'pip install -e ".[plots]"' in capsys.readouterr().out


def test_learning_curves_are_drawn_from_metrics(tmp_path):
    pytest.importorskip("matplotlib", reason='the picture needs the extra "plots"')
    for name in ("grpo-none-s0", "grpo-linear-s0", "grpo-linear-s1"):
        (tmp_path / name).mkdir()
        rows = [{"step": 0, "eval_accuracy": 0.1}, {"step": 1, "reward_guided": None, "reward_unguided": 0.2, "eval_accuracy": 0.3}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = evaluate.draw_curves(sorted(tmp_path.iterdir()), tmp_path / "curves.png")
    assert path.stat().st_size > 1000
