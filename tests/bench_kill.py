"""Kill a run of 30 steps at random moments (SIGKILL), resume it, and compare the results.

Most kills come at a uniformly random time; a quarter as soon as the temporary folder of a random
save appears, so that half-written files are met often. A resumed run is sometimes killed again.
Then metrics (without their times), samples, and the weights of policy/ and best/ must equal those
of a run that nobody disturbed, to the bit, and no temporary or other leftover may remain. The runs
are forked from one process that has done the imports and a run of its own, so each starts at once.

    python tests/bench_kill.py                  # 200 runs
    python tests/bench_kill.py --quick          # 12 runs
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint  # noqa: F401  so that no run has to import it
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tutorials"))
from grpo import GRPOConfig, RunPlan, train_run
from rewards import load_rewards, load_task
from sft import Ranks, Run
from tiny_world import make_reader, make_traces
from vae import VAEConfig, train_vae

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
STEPS = 30
# Right if at least half of the words have an even number of letters: so nearly every step of an
# untrained model has something to learn.
TASK = """
from tiny_world import load


def judge(completion, row):
    words = completion.split()
    even = [word for word in words if len(word) % 2 == 0]
    return {"accuracy": len(words) > 0 and 2 * len(even) >= len(words)}
"""


# ---- The run -------------------------------------------------------------------------------------


def make_inputs(root):
    """An untrained policy of one layer, a VAE on its embeddings, and a task, in the folder root."""
    reader = make_reader()
    tokenizer = reader.tokenizer
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(root / "start")
    reader.save(root / "start")

    vae_config = VAEConfig(out=str(root / "vae"), decoder="mlp", latent=8, epochs=2)
    train_vae(vae_config, make_traces(60, 0), reader, model)
    (root / "even_words.py").write_text(TASK)


def settings_of(root):
    return GRPOConfig(
        task=str(root / "even_words.py"),
        out=str(root),
        steps=STEPS,
        prompts=2,
        group=6,
        length=2,
        max_new_tokens=4,
        save_every=2,
        eval_every=3,
        eval_questions=8,
        epochs=2,
        lr=3e-4,
        vae=str(root / "vae"),
    )


def train(root, folder):
    """One RL run in a folder, from its newest checkpoint on."""
    config = settings_of(root)
    plan = RunPlan(schedule="linear", seed=0, folder=folder, settings={"steps": STEPS})
    run = Run(folder, plan.settings, Ranks.alone(), resume=True)
    if run.finished:
        return
    task = load_task(config.task)
    task.train = task.train[:16]
    task.test = task.test[:8]
    rewards = load_rewards(config.reward, task)
    train_run(plan, run, task, rewards, str(root / "start"), config)


@dataclass
class Result:
    """What must be equal to the bit."""

    metrics: list  # rows without their times
    samples: str
    best: str  # best.json
    weights: dict  # {"policy", "best": the bytes of the file}
    files: list  # the names of all that is left


def result_of(folder):
    metrics = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        metrics.append({name: row[name] for name in row if not name.startswith("seconds")})
    weights = {}
    for name in ("policy", "best"):
        weights[name] = (folder / name / "model.safetensors").read_bytes()
    return Result(
        metrics=metrics,
        samples=(folder / "samples.jsonl").read_text(),
        best=(folder / "best" / "best.json").read_text(),
        weights=weights,
        files=sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    )


def differences(result, expected):
    """The names of the fields that differ."""
    names = []
    for name, value in vars(expected).items():
        if getattr(result, name) != value:
            names.append(name)
    return names


# ---- Children, and how they end ------------------------------------------------------------------


def start(work, *arguments, log):
    """Run work(*arguments) in a forked child, its output in `log`; returns the child's id."""
    child = os.fork()
    if child != 0:
        return child
    status = 0
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ends_well(child):
    """Wait for a child; whether its status is 0."""
    _, status = os.waitpid(child, 0)
    return status == 0


def has_ended(child):
    ended, _ = os.waitpid(child, os.WNOHANG)
    return ended != 0


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_at_a_time(child, rng, seconds):
    """Kill the child at a random time; False if it has ended before."""
    moment = time.time() + rng.uniform(0, seconds)
    while time.time() < moment:
        if has_ended(child):
            return False
        time.sleep(0.001)
    kill(child)
    return True


def kill_within_a_save(child, folder, rng):
    """Kill the child soon after a random temporary folder appears; False if it has ended before."""
    saves = rng.randrange(1, 12)
    names = set()
    while len(names) < saves:
        if has_ended(child):
            return False
        names.update(path.name for path in folder.glob(".*.tmp"))
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, 0.003))
    kill(child)
    return True


# ---- The trials ----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened in all runs."""

    kills: int = 0
    within_saves: int = 0
    half_filled: int = 0  # kills that left a temporary folder
    metrics_at_kill: list = field(default_factory=list)  # rows of metrics, one number a kill
    problems: dict = field(default_factory=dict)  # {number of a run: what is wrong with it}


def kill_once(root, folder, rng, seconds, tally):
    """Start or resume the run and kill it; False if it has ended before."""
    child = start(train, root, folder, log=root / "log")
    within_save = rng.random() < 0.25
    if within_save:
        killed = kill_within_a_save(child, folder, rng)
    else:
        killed = kill_at_a_time(child, rng, seconds)
    if not killed:
        return False

    tally.kills += 1
    tally.within_saves += within_save
    tally.half_filled += any(folder.glob(".*.tmp"))
    rows = 0
    if (folder / "metrics.jsonl").exists():
        rows = (folder / "metrics.jsonl").read_text().count("\n")
    tally.metrics_at_kill.append(rows)
    return True


def disturb(root, folder, rng, seconds, tally):
    """Kill a run in a folder once, and perhaps again when it has been resumed, up to four times."""
    while not kill_once(root, folder, rng, seconds, tally):
        shutil.rmtree(folder)  # it was through before the kill: once more
    for _ in range(3):
        if rng.random() > 0.3 or not kill_once(root, folder, rng, seconds, tally):
            break


def try_run(root, rng, seconds, expected, tally, number):
    """Disturb a run, let it end, and note what differs from the undisturbed one."""
    folder = root / "torn"
    disturb(root, folder, rng, seconds, tally)
    child = start(train, root, folder, log=root / "log")
    if not ends_well(child):
        tally.problems[number] = (root / "log").read_text()[-300:]
    else:
        names = differences(result_of(folder), expected)
        if names:
            tally.problems[number] = f"differs in {', '.join(names)}"
    shutil.rmtree(folder)


def undisturbed(root):
    """(seconds, Result) of the run that nobody disturbs."""
    train(root, root / "warm")  # what a process sets up once, the children inherit
    began = time.time()
    child = start(train, root, root / "undisturbed", log=root / "log")
    assert ends_well(child), (root / "log").read_text()
    seconds = time.time() - began
    result = result_of(root / "undisturbed")

    learning = [row for row in result.metrics if row.get("tokens", 0) > 0]
    print(
        f"the undisturbed run: {seconds:.2f} s, {len(result.metrics)} rows of metrics, "
        f"{len(learning)} steps of {STEPS} with something to train on, "
        f"files {', '.join(result.files)}"
    )
    assert len(learning) >= 25, "a run that hardly trains proves nothing"
    return seconds, result


def report(tally, runs, seconds):
    """Print the tally; the last line is JSON. Returns whether every run was exact."""
    histogram = [0, 0, 0, 0]
    for rows in tally.metrics_at_kill:
        histogram[rows // 10] += 1
    print(
        f"{tally.kills} kills in {runs} runs: {tally.kills - tally.within_saves} at random times, "
        f"{tally.within_saves} within saves; {tally.half_filled} of them left half-filled folders; "
        f"rows of metrics at the kill (0-9, 10-19, 20-29, 30-31): {histogram}"
    )
    for number, problem in list(tally.problems.items())[:10]:
        print(f"run {number}: {problem}")

    exact = runs - len(tally.problems)
    figures = {"runs": runs, "exact": exact, "kills": tally.kills}
    figures |= {"within_saves": tally.within_saves, "half_filled": tally.half_filled}
    print(json.dumps({**figures, "seconds": round(seconds)}))
    return exact == runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="runs that are killed (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--quick", action="store_true", help="12 runs")
    args = parser.parse_args()
    runs = 12 if args.quick else args.runs

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    # The usual lock is the children's, too: one that is killed with it would block all others.
    tqdm.set_lock(threading.RLock())
    gc.disable()  # a forked child that collects may end what is its parent's

    rng = random.Random(args.seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        make_inputs(root)
        seconds, expected = undisturbed(root)
        began = time.time()
        for number in range(runs):
            try_run(root, rng, seconds, expected, tally, number)
            if number % 20 == 19:
                print(f"{number + 1} runs, {number + 1 - len(tally.problems)} exact", flush=True)
    exact = report(tally, runs, time.time() - began)
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
