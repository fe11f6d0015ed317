"""Kill a run of 30 steps at random moments (SIGKILL), resume it, and compare with the run that nobody disturbed, bit for bit.

Most kills come at a uniformly random time; a quarter as soon as the temporary folder of a random save appears, so that
half-written files are met often. A resumed run is sometimes killed again. Then metrics (without their times), samples, the
weights of policy/ and best/ must equal the undisturbed run's, and no temporary or other leftover may remain.
The runs are forked from one process that has done the imports and a run of its own, so that each starts at once.

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch

import grpo
import torch.distributed.checkpoint  # noqa: F401  so that no run has to import it
from rewards import tiny_task, tiny_traces
from sft import Ranks, Run, tiny_tokenizer
from tqdm import tqdm
from vae import train_vae

FLAGS = ["--steps", "30", "--prompts", "2", "--group", "6", "--length", "2", "--max-new-tokens", "4", "--save-every", "2",
         "--eval-every", "3", "--eval-questions", "8", "--epochs", "2", "--lr", "3e-4", "--lr-schedule", "cosine"]


def make_inputs(root):
    """An untrained policy of one layer and a VAE on its embeddings, as folders."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(root / "start")
    tokenizer.save_pretrained(root / "start")
    train_vae(tiny_traces(60, 0), tokenizer, model.get_input_embeddings().weight.detach(), root / "vae", epochs=2)


class EvenWords(type(tiny_task(1, 1))):
    """Right if at least half of the words have an even number of letters: so nearly every step has something to learn."""

    def judge(self, completion, gold, finish="stop"):
        even = [len(word) % 2 == 0 for word in completion.split()]
        return {"accuracy": float(2 * sum(even) >= len(even) > 0), "answered": 1.0}


def train(root, folder):
    args = grpo.parse_args([*FLAGS, "--vae", str(root / "vae")])
    args.schedule, args.seed = "linear", 0
    tiny = tiny_task(16, 8)
    run = Run(folder, {"flags": FLAGS}, Ranks(0, 1, torch.device("cpu")), resume=True)
    if not run.finished:
        grpo.train_one(args, EvenWords("short", tiny.train, tiny.test), run, str(root / "start"))


def fork(work, *arguments, log):
    """Run work(*arguments) in a child, its output in `log`; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        work(*arguments)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(child):
    """Wait for a child that must end well."""
    return os.waitpid(child, 0)[1] == 0


def kill_somewhere(child, folder, rng, seconds):
    """Kill a training child, at a random time or within a random save. Returns "time", "save", or None if it had ended."""
    within, saves, seen, began = rng.random() < 0.25, rng.randrange(1, 12), set(), time.time()
    moment = rng.uniform(0, seconds)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if within:
            seen |= {path.name for path in folder.glob(".*.tmp")}
            time.sleep(0.0002)
        if len(seen) >= saves or not within and time.time() - began >= moment:
            if within:
                time.sleep(rng.uniform(0, 0.003))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "save" if within else "time"
        if not within:
            time.sleep(min(0.001, max(0.0, moment - (time.time() - began))))
    return None


def result(folder):
    """What must be equal: metrics without times, samples, the weights of policy/ and best/, and the names of all that is left."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"metrics": [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows],
            "samples": (folder / "samples.jsonl").read_text(), "best step": (folder / "best" / "best.json").read_text(),
            **{name: (folder / name / "model.safetensors").read_bytes() for name in ("policy", "best")},
            "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs that are killed at least once (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--quick", action="store_true", help="12 runs")
    args = parser.parse_args()
    runs, rng = 12 if args.quick else args.runs, random.Random(args.seed)
    torch.set_num_threads(1)                                # threads do not survive a fork
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())                        # the usual one is the children's, too: one killed with it blocks all
    gc.disable()                                            # a forked child that collects may end what is its parent's
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        make_inputs(root)
        train(root, root / "warm")
        began = time.time()
        assert ended(fork(train, root, root / "whole", log=root / "log")), (root / "log").read_text()
        seconds, whole = time.time() - began, result(root / "whole")
        trained = sum(row.get("tokens", 0) > 0 for row in whole["metrics"])
        print(f"the undisturbed run: {seconds:.2f} s, {len(whole['metrics'])} rows of metrics, {trained} steps of 30 with something to "
              f"train on, files {', '.join(whole['files'])}")
        assert trained >= 25, "a run that hardly trains proves nothing"
        kills, debris, wrong, steps = {"time": 0, "save": 0}, 0, [], []
        for number in range(runs):
            folder, killed = root / "torn", 0
            while not killed or rng.random() < 0.3 and killed < 4:          # the first kill must hit; more may follow
                child = fork(train, root, folder, log=root / "log")
                how = kill_somewhere(child, folder, rng, seconds)
                if how is None:
                    if killed:
                        break
                    shutil.rmtree(folder, ignore_errors=True)               # it was through before the kill: once more
                    continue
                kills[how], killed = kills[how] + 1, killed + 1
                debris += bool(list(folder.glob(".*.tmp")))
                metrics = folder / "metrics.jsonl"
                steps.append(metrics.read_text().count("\n") if metrics.exists() else 0)
            if not ended(fork(train, root, folder, log=root / "log")):
                wrong.append((number, (root / "log").read_text()[-300:]))
            else:
                found = result(folder)
                wrong += [(number, name) for name in whole if found[name] != whole[name]]
            shutil.rmtree(folder)
            if number % 20 == 19:
                print(f"{number + 1} runs, {number + 1 - len({n for n, _ in wrong})} exact", flush=True)
        histogram = [sum(10 * i <= step < 10 * (i + 1) for step in steps) for i in range(4)]
        print(f"{sum(kills.values())} kills in {runs} runs: {kills['time']} at random times, {kills['save']} within saves; "
              f"{debris} of them left a half-filled folder; rows of metrics at the kill (0-9, 10-19, 20-29, 30-31): {histogram}")
        for number, what in wrong[:10]:
            print(f"run {number}: {what}")
    exact = runs - len({number for number, _ in wrong})
    print(json.dumps({"runs": runs, "exact": exact, "kills": sum(kills.values()), "within_saves": kills["save"],
                      "half_filled": debris, "seconds": round(time.time() - began)}))
    sys.exit(exact != runs)


if __name__ == "__main__":
    main()
