"""grpo.py: the formulas by hand, the invariants of the update, exact resume, one rank against two."""
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
import sft
import vae as vae_script
from grpo import (SCHEDULES, Rollout, advantages, collect, guided_count, policy_loss, rows_of_step, set_advantages, token_weights,
                  train, update)
from prefix import Decoder, Palette, load_policy
from rewards import Task, tiny_task
from sft import Ranks, Run, make_optimizer

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parent.parent


# ---- formulas -----------------------------------------------------------------------------------------------------------

def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    # mean 1/4, sample variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4, so std 1/2
    torch.testing.assert_close(advantages(rewards, "grpo"), torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.0] * 4]), atol=1e-3, rtol=0)
    torch.testing.assert_close(advantages(rewards, "rloo"), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0] * 4]))
    torch.testing.assert_close(advantages(rewards, "dr-grpo"), torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4]))


def test_schedules():
    taus = (0.0, 0.25, 0.49, 0.5, 0.75)
    expected = {"none": (0, 0, 0, 0, 0), "constant": (1, 1, 1, 1, 1), "two-phase": (1, 1, 1, 0, 0), "linear": (1, 0.75, 0.51, 0.5, 0.25)}
    for name, values in expected.items():
        assert [SCHEDULES[name](tau) for tau in taus] == pytest.approx(values)


@pytest.mark.parametrize("rho, group", [(0.0, 8), (1.0, 8), (0.5, 8), (0.3, 8), (0.0625, 8), (1 / 3, 3), (0.9, 7)])
def test_the_share_of_guided_rollouts_is_right_on_average(rho, group):
    counts = [guided_count(rho, group, (i + 0.5) / 1000) for i in range(1000)]
    assert sum(counts) / 1000 == pytest.approx(rho * group, abs=2e-3)
    assert max(counts) - min(counts) <= 1 and max(counts) <= group


def loss_of(ratio, advantage, **options):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, statistics = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), **options)
    loss.backward()
    return loss.item(), logprobs.grad.item(), statistics


def test_the_clipped_surrogate_by_hand():
    assert loss_of(1.0, 2.0)[:2] == pytest.approx((-2.0, -2.0))
    assert loss_of(1.5, 2.0)[:2] == pytest.approx((-2.4, 0.0))              # gain clipped at 1.2
    assert loss_of(1.5, -2.0)[:2] == pytest.approx((3.0, 3.0))              # a loss is not clipped away
    assert loss_of(0.5, 2.0)[:2] == pytest.approx((-1.0, -1.0))
    assert loss_of(0.5, -2.0)[:2] == pytest.approx((1.6, 0.0))
    assert loss_of(1.25, 2.0, clip_high=0.28)[:2] == pytest.approx((-2.5, -2.5))
    assert [loss_of(1.5, a)[2]["clipped"] for a in (2.0, -2.0)] == [1, 0]


def test_the_k3_kl_by_hand():
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    loss, statistics = policy_loss(logprobs, logprobs.detach(), torch.zeros(1), torch.ones(1), reference=torch.tensor([math.log(0.25)]),
                                   kl_weight=0.1)
    assert statistics["kl"] == pytest.approx(0.5 - math.log(0.5) - 1)       # r = 1/2: r - log r - 1
    assert loss.item() == pytest.approx(0.1 * statistics["kl"])
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(0.1 * (1 - 0.5))           # d/dlogp (e^g - g - 1) = 1 - e^g


def fake_rollouts(lengths, values, prompt=0):
    return [Rollout(prompt, [5, 6], [7] * n, [-1.0] * n, "stop", None, None, "", {"accuracy": value}, value)
            for n, value in zip(lengths, values)]


def test_token_weights_sum_to_one():
    rollouts = fake_rollouts([2, 3, 5], [1, 0, 0])
    assert token_weights(rollouts, "token", ALONE, 10) == pytest.approx([0.1] * 3)
    assert token_weights(rollouts, "sequence", ALONE, 10) == pytest.approx([1 / 6, 1 / 9, 1 / 15])
    assert token_weights(rollouts, "constant", ALONE, 10) == pytest.approx([1 / 30] * 3)


def test_groups_without_signal_are_counted_and_exactly_zero():
    args = SimpleNamespace(group=3, algorithm="grpo")
    rollouts = fake_rollouts([1] * 6, [0.7, 0.7, 0.7, 0, 1, 0])            # the float mean of three 0.7 is not 0.7
    assert set_advantages(rollouts, args) == (2, 1)
    assert [r.advantage for r in rollouts[:3]] == [0.0] * 3 and rollouts[4].advantage > 0 > rollouts[3].advantage


def test_an_epoch_shows_every_row_once_and_the_next_one_in_another_order():
    task = Task("t", train=[{"question": str(i), "answer": "1"} for i in range(10)], test=[])
    shown = [row["question"] for step in range(4) for row in rows_of_step(task, step, 5, seed=3)]
    assert sorted(shown[:10]) == sorted(shown[10:]) == sorted(str(i) for i in range(10)) and shown[:10] != shown[10:]
    assert shown[5:10] == [row["question"] for row in rows_of_step(task, 1, 5, seed=3)]          # no state between calls
    assert len(rows_of_step(task, 0, 25, seed=3)) == 25                                           # more than an epoch


# ---- the update ---------------------------------------------------------------------------------------------------------

def arguments(**changes):
    """What parse_args gives for the tiny world, small."""
    args = grpo.parse_args(["--steps", "4", "--prompts", "4", "--group", "4", "--length", "3", "--max-new-tokens", "12",
                            "--eval-questions", "8", "--eval-every", "2", "--save-every", "1"])
    args.schedule, args.seed = "linear", 0
    for name, value in changes.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


class FirstToken(Task):
    """Right if the completion starts with an even token: an untrained model is right about half of the time."""

    def judge(self, completion, gold, finish="stop"):
        words = completion.split()
        return {"accuracy": float(bool(words) and len(words[0]) % 2 == 0), "answered": 1.0}


@pytest.fixture
def task():
    tiny = tiny_task(32, 8)
    return FirstToken("first", tiny.train, tiny.test)


def rollouts_of(model, tokenizer, vae, task, args):
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    rollouts = collect(Decoder(model, slots=5), tokenizer, task, palette, 1, args, ALONE)
    set_advantages(rollouts, args)
    return rollouts


def gradient_of(model, rollouts, args):
    """The gradient that update() would apply, with everything that follows it left out."""
    found = {}

    def grab(model, *_):
        found.update({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        return 0.0

    original, grpo.apply_gradients = grpo.apply_gradients, grab
    try:
        sums, _ = update(model, make_optimizer(model, 1e-3), None, rollouts, args, ALONE)
    finally:
        grpo.apply_gradients = original
    return found, sums


VARIANTS = [("grpo", "token"), ("rloo", "sequence"), ("dr-grpo", "constant")]


@pytest.mark.parametrize("algorithm, mean_over", VARIANTS)
def test_the_first_update_is_on_policy_and_its_gradient_is_the_formula(model, tokenizer, vae, task, algorithm, mean_over):
    """With prefixes on some rows, end tokens, uneven lengths, temperature 0.7: log-ratio 0, gradient = -A grad log p / normaliser."""
    args = arguments(algorithm=algorithm, mean_over=mean_over, temperature=0.7)
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    assert {r.guided for r in rollouts} == {True, False} and {r.finish for r in rollouts} >= {"length"}
    ours, sums = gradient_of(model, rollouts, args)
    assert sums["log_ratio"] / sums["tokens"] < 1e-5
    tokens, embed, total = sum(len(r.completion_ids) for r in rollouts), model.get_input_embeddings(), 0.0
    for r in rollouts:
        lead = r.prefix if r.guided else torch.zeros(0, 128)
        inputs = torch.cat([lead, embed(torch.tensor(r.prompt_ids + r.completion_ids))])[None]
        logprobs = (model(inputs_embeds=inputs).logits[0, -len(r.completion_ids) - 1:-1] / 0.7).log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(r.completion_ids)[:, None]).sum()
        normaliser = {"token": tokens, "sequence": len(r.completion_ids) * len(rollouts), "constant": len(rollouts) * 12}[mean_over]
        total = total - r.advantage * picked / normaliser
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("algorithm, mean_over", VARIANTS)
def test_the_gradient_does_not_depend_on_the_micro_batches(model, tokenizer, vae, task, algorithm, mean_over):
    args = arguments(algorithm=algorithm, mean_over=mean_over)
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    found = [gradient_of(model, rollouts, SimpleNamespace(**{**vars(args), "tokens_per_batch": size}))[0] for size in (1, 90, 10**6)]
    for other in found[1:]:
        for name in other:
            torch.testing.assert_close(found[0][name], other[name], atol=1e-6, rtol=1e-3, msg=name)


def test_the_reward_is_the_weighted_sum_of_its_parts_and_each_is_logged(model, tokenizer, vae, task):
    args = arguments(reward={"accuracy": 1.0, "overlong": 0.5})
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    for r in rollouts:
        assert r.reward == r.rewards["accuracy"] + 0.5 * r.rewards["overlong"]
        assert r.rewards["overlong"] == (0.0 if len(r.completion_ids) <= 10 else -0.5 if len(r.completion_ids) == 11 else -1.0)
    row = grpo.summary(rollouts, [({"loss": 0, "tokens": 1, "clipped": 0, "log_ratio": 0, "kl": 0, "entropy": 0}, 0.0)], 4, 0, ALONE)
    assert row["reward"] == pytest.approx(sum(r.reward for r in rollouts) / 16)
    guided = [r for r in rollouts if r.guided]
    assert row["rollouts_guided"] == len(guided) and row["overlong_guided"] == pytest.approx(
        sum(r.rewards["overlong"] for r in guided) / len(guided))


def test_silent_rollouts_cost_no_forward_pass(model, tokenizer, vae, task, monkeypatch):
    args = arguments()
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    for r in rollouts:
        r.advantage = 0.0
    monkeypatch.setattr(grpo, "completion_logprobs", lambda *_: 1 / 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sums, norm = update(model, make_optimizer(model, 1e-3), None, rollouts, args, ALONE)
    assert (sums["tokens"], norm) == (0, 0.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_which_rollouts_are_guided_and_who_shares_a_latent(model, tokenizer, vae, task):
    for per, distinct in (("rollout", 4), ("prompt", 1)):
        rollouts = rollouts_of(model, tokenizer, vae, task, arguments(schedule="constant", latent_per=per))
        first = [r for r in rollouts if r.prompt == 0]
        assert all(r.guided for r in rollouts) and len({tuple(r.latent.flatten().tolist()) for r in first}) == distinct
    assert not any(r.guided for r in rollouts_of(model, tokenizer, vae, task, arguments(schedule="none")))


def test_a_kl_term_pulls_towards_the_reference(model, tokenizer, vae, task):
    args = arguments(kl=0.5)
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    reference = copy.deepcopy(model).requires_grad_(False)
    sums, _ = update(model, make_optimizer(model, 1e-2), reference, rollouts, args, ALONE)
    assert sums["kl"] == pytest.approx(0.0, abs=1e-4)                       # the policy still is the reference
    sums, _ = update(model, make_optimizer(model, 1e-2), reference, rollouts, args, ALONE)
    assert sums["kl"] > 1e-3 and sums["log_ratio"] > 0
    for r in rollouts:                                                      # nothing but the KL term is left
        r.advantage = 0.0
    optimizer, before = make_optimizer(model, 3e-3), sums["kl"]
    for _ in range(10):
        sums, _ = update(model, optimizer, reference, rollouts, args, ALONE)
    assert sums["kl"] < 0.5 * before


def test_the_clip_bounds_reach_the_loss_in_their_order(model, tokenizer, vae, task, monkeypatch):
    args, seen = arguments(clip_low=0.1, clip_high=0.3), []
    rollouts = rollouts_of(model, tokenizer, vae, task, args)
    original = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a: seen.append(a[4:6]) or original(*a))
    update(model, make_optimizer(model, 1e-3), None, rollouts, args, ALONE)
    assert seen and set(seen) == {(0.1, 0.3)}


def test_filters_of_the_sampling_are_those_of_the_scoring(model, tokenizer, vae, task):
    """Bug 2 of design.md: sampled with top-p, top-k and a temperature, scored without."""
    args = arguments(temperature=0.8, top_p=0.7, top_k=20)
    sums = gradient_of(model, rollouts_of(model, tokenizer, vae, task, args), args)[1]
    assert sums["tokens"] > 50 and sums["log_ratio"] / sums["tokens"] < 1e-5
    assert sums["entropy"] / sums["tokens"] < math.log(20)


def test_every_step_samples_anew(model, tokenizer, vae, task):
    task.train[:] = task.train[:4]                                          # the same four prompts at every step
    args, decoder = arguments(schedule="constant"), Decoder(model)
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    one, two = ({r.prompt_ids[1:] and tuple(r.prompt_ids + r.completion_ids) for r in collect(decoder, tokenizer, task, palette, step, args, ALONE)}
                for step in (0, 1))
    assert not one & two
    latents = [{tuple(r.latent.flatten().tolist()) for r in collect(decoder, tokenizer, task, palette, step, args, ALONE)} for step in (0, 1)]
    assert not latents[0] & latents[1]


# ---- the loop -----------------------------------------------------------------------------------------------------------

def run_training(folder, policy_folder, vae, task, args, resume=False):
    model, tokenizer = load_policy(str(policy_folder))
    palette = Palette(vae, model.get_input_embeddings().weight.detach(), "prior", args.length)
    train(model, tokenizer, task, palette, Run(folder, {}, ALONE, resume=resume), args)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return model, [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("die_at, call", [("collect", 1), ("collect", 4), ("update", 10), ("save", 3)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, policy_folder, vae, task, die_at, call, monkeypatch):
    args = arguments(epochs=2, minibatches=2)
    whole, metrics = run_training(tmp_path / "whole", policy_folder, vae, task, args)
    calls, owner = [], Run if die_at == "save" else grpo
    original = getattr(owner, die_at)

    def dying(*a, **k):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*a, **k)

    monkeypatch.setattr(owner, die_at, dying)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "torn", policy_folder, vae, task, args)
    monkeypatch.setattr(owner, die_at, original)
    resumed, resumed_metrics = run_training(tmp_path / "torn", policy_folder, vae, task, args, resume=True)
    assert resumed_metrics == metrics and [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert (tmp_path / "torn" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_the_loop_learns_a_rewarded_first_token(tmp_path, policy_folder, vae, task):
    args = arguments(steps=20, prompts=8, lr=3e-3, eval_every=20, save_every=100)
    _, metrics = run_training(tmp_path / "r", policy_folder, vae, task, args)
    assert metrics[1]["reward"] < 0.8 and metrics[-1]["reward"] > 0.95
    assert metrics[1]["log_ratio_start"] < 1e-5
    assert metrics[1]["reward_guided"] is not None and metrics[1]["rollouts_guided"] == 8 * 4
    sample = json.loads((tmp_path / "r" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prefix"] == "prior" and len(sample["latent"][0]) == 8 and "completion" in sample


RANK_SCRIPT = """
import sys
import torch
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
import test_grpo as t
from rewards import tiny_task
from vae import VAE
tiny = tiny_task(32, 8)
model, tokenizer = t.load_policy({policy!r})
palette = t.Palette(VAE.load({vae!r}), model.get_input_embeddings().weight.detach(), "prior", 3)
ranks = t.Ranks.start("cpu")
args = t.arguments(mean_over={mean_over!r}, algorithm={algorithm!r})
t.train(model, tokenizer, t.FirstToken("first", tiny.train, tiny.test), palette, t.Run(Path({out!r}), {{}}, ranks), args)
"""


def test_two_ranks_train_like_one(tmp_path, policy_folder, vae):
    vae.save(tmp_path / "vae")
    metrics = []
    for world in (1, 2):
        script = tmp_path / f"ranks{world}.py"
        script.write_text(RANK_SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), policy=str(policy_folder), vae=str(tmp_path / "vae"),
                                             out=str(tmp_path / f"out{world}"), mean_over="sequence", algorithm="grpo"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=0",
                               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)],
                              env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics.append([json.loads(line) for line in (tmp_path / f"out{world}" / "metrics.jsonl").read_text().splitlines()])
    assert len(metrics[0]) == len(metrics[1]) == 5
    for one, two in zip(*metrics):
        for name, value in one.items():
            if not name.startswith("seconds"):
                assert two[name] == pytest.approx(value, abs=1e-5), (one["step"], name)


def test_the_stages_are_those_that_the_scripts_alone_would_make(monkeypatch):
    """So `python vae.py` or `python sft.py` after `python grpo.py` (or before) use one another's results."""
    built = {}
    monkeypatch.setattr(grpo, "stage", lambda main, argv, script, *_, **__: built.setdefault(script, []).append(argv))
    policies = grpo.prepare(grpo.parse_args([]), ALONE)
    assert policies == {"none": "runs/tiny/sft-none/policy", "prior": "runs/tiny/sft/policy"}
    assert vars(vae_script.parse_args(built["vae.py"][0])) == vars(vae_script.parse_args([]))
    for argv, alone in zip(built["sft.py"], (["pretrain"], ["--prefix", "none"], [])):
        settings = [{k: v for k, v in vars(sft.parse_args(flags)).items() if k not in ("resume", "device")} for flags in (argv, alone)]
        assert settings[0] == settings[1]


# ---- the command line ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--group", "1"], "--group must be at least 2, not 1"), (["--length", "-1"], "--length must be 0 or more"),
    (["--temperature", "0"], "--temperature must be above 0"), (["--steps", "0"], "--steps must be at least 1"),
    (["--model", "some/model"], "--traces is needed"), (["--source", "poetry"], "unknown --source 'poetry'"),
    (["--reward", "beauty=1"], "unknown reward 'beauty'"), (["--reward", "accuracy=much"], "NAME=WEIGHT"),
])
def test_bad_flags_end_with_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_bad_input_ends_before_any_work_with_one_sentence_and_status_1(tmp_path):
    for argv, message in ((["--task", "mine", "--train-data", "nowhere.jsonl", "--test-data", "x"], "grpo.py: no such file: nowhere.jsonl"),
                          (["--prompts", "8", "--minibatches", "3"], "cannot be split over 1 ranks x 3 minibatches"),
                          (["--model", "/nowhere", "--task", "tiny", "--traces", "nowhere.jsonl", "--out", str(tmp_path)], "nowhere")):
        done = subprocess.run([sys.executable, str(ROOT / "grpo.py"), *argv], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_prompt_over_the_limit_is_named(tokenizer, task):
    with pytest.raises(ValueError, match="a prompt of 1[0-9] tokens is over --max-prompt 4.*'(calc|take)"):
        grpo.check_prompts(task, tokenizer, arguments(max_prompt=4))
