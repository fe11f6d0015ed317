"""How long does one GRPO step take? Ours beside TRL's GRPOTrainer, at equal settings.

    python tests/bench_step.py            # a tiny model and one of 12 layers, about 25 minutes; --quick: under 45 s, the tiny one
    pip install trl                       # the other side; without it ours is measured alone

One step: 8 prompts of 16 to 48 tokens x 8 rollouts are sampled (temperature 1, no filters), decoded to text and rewarded by the
same function, then one AdamW update on all 64: GRPO's group-normalised advantages, the mean over sequences, clip 0.2, no KL
term, fp32, no gradient checkpointing, metrics included. Both sides start from the same random weights, whose next token is close
to uniform, so the share of words that end a completion sets the lengths: none ("to the limit": every completion has 48 tokens,
so both sides do the same work), or one in 43 ("with a tail": the same distribution on both sides, mean about 40, cut at 128).
Process-CPU seconds on one thread: TRL's trainer runs, and after each of its steps, outside its clock, we take one of ours;
medians without the first step. The last column is the share of one more step of ours that the profiler finds in matrix products:
what nobody can do faster with the same sums. The last line is JSON with every figure.
"""
import argparse
import copy
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import grpo  # noqa: E402
from bench_decode import build, hardware  # noqa: E402
from prefix import Decoder, Palette  # noqa: E402
from rewards import Task  # noqa: E402
from sft import Ranks, make_optimizer  # noqa: E402

LR = 1e-6
SHAPES = {"tiny Qwen3 (4 layers x 128, vocab 128)": (4, 128, 4, 2, 32, 384, 128),
          "12 layers x 512, vocab 32,000": (12, 512, 8, 4, 64, 1536, 32000)}
TASKS = {"to the limit": (48, 0), "with a tail": (128, 43)}              # (longest completion, one word in ... ends it)


def words(vocab):
    """A tokenizer of `vocab` words, one id each, whose end token the model has no row for: it is never sampled."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="<never>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"             # so that our prompt is the text and nothing else
    return tokenizer


def reward_of(text):
    """1 where the first word's number is odd: about half of the time, so that nearly every group has a signal."""
    return float(text.split()[0][1:] in odd) if text.split() else 0.0


odd = {str(i) for i in range(1, 32000, 2)}


class FirstWord(Task):
    def judge(self, completion, gold, finish="stop"):
        return {"accuracy": reward_of(completion)}


def our_step(model, tokenizer, prompts, ends, limit):
    """A function that takes one step and returns the number of sampled tokens."""
    ranks, optimizer, decoder = Ranks(0, 1, torch.device("cpu")), make_optimizer(model, LR), Decoder(model, ends)
    args = grpo.parse_args(["--max-new-tokens", str(limit)])
    args.schedule, args.seed = "none", 0
    task = FirstWord("bench", [{"question": prompt, "answer": ""} for prompt in prompts], [])
    palette = Palette(None, model.get_input_embeddings().weight.detach(), "none")
    steps = iter(range(args.steps))

    def step():
        rollouts = grpo.collect(decoder, tokenizer, task, palette, next(steps), args, ranks)
        done = grpo.update(model, optimizer, rollouts, args, ranks)
        decoder.refresh()
        row = grpo.summary(rollouts, [done], args, ranks)
        assert row["log_ratio_start"] < 1e-5
        return row["rollouts"] * row["length"]
    return step


def trl_steps(model, tokenizer, prompts, ends, limit, repeats, after):
    """Run TRL's trainer for repeats + 1 steps; after(seconds, tokens) is called behind each one."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            after(time.process_time() - self.start, tokens.pop())

    tokens = []

    def reward(completions, completion_ids, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [reward_of(text) for text in completions]

    model.generation_config.eos_token_id = ends or None
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, max_steps=repeats + 1, per_device_train_batch_size=64,
            gradient_accumulation_steps=1, steps_per_generation=1, num_generations=8, max_completion_length=limit,
            temperature=1.0, top_p=1.0, top_k=0, beta=0.0, num_iterations=1, epsilon=0.2, loss_type="grpo", scale_rewards="group",
            learning_rate=LR, lr_scheduler_type="constant", optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.98,
            weight_decay=0.0, max_grad_norm=1.0)
        GRPOTrainer(model, reward, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
                    callbacks=[Clock()]).train()


def matrix_share(step):
    """The share of a step's time that is spent in matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(f"aten::{name}", 0) for name in ("mm", "bmm", "addmm", "addmm_")) / sum(times.values())


def compare(name, shape, kind, repeats, with_trl):
    """One line of the table: medians of both sides."""
    (limit, one_in), vocab, rng = TASKS[kind], shape[-1], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, tokenizer = build(*shape), words(vocab)
    lengths = torch.randint(16, 49, (8,), generator=rng).tolist()
    prompts = [" ".join(f"w{i}" for i in torch.randint(vocab, (n,), generator=rng).tolist()) for n in lengths]
    ends = list(range(1, vocab, one_in)) if one_in else []
    step = our_step(copy.deepcopy(model), tokenizer, prompts, ends, limit)
    seconds, tokens = {"trl": [], "ours": []}, {"trl": [], "ours": []}

    def ours(*trl):
        start = time.process_time()
        count = step()
        for side, spent, sampled in [("ours", time.process_time() - start, count), *([("trl", *trl)] if trl else [])]:
            seconds[side].append(spent)
            tokens[side].append(sampled)

    if with_trl:
        trl_steps(model, tokenizer, prompts, ends, limit, repeats, ours)
    else:
        for _ in range(repeats + 1):
            ours()
    middle = {side: statistics.median(values[1:]) for side, values in seconds.items() if values}
    figures = {f"{side}_s": round(value, 3) for side, value in middle.items()}
    figures.update({f"{side}_tokens": round(statistics.mean(values[1:])) for side, values in tokens.items() if values})
    figures["ratio"] = round(middle["trl"] / middle["ours"], 2) if with_trl else None
    figures["matrix_share"] = round(matrix_share(step), 2)
    print(f"| {name}, {kind} | {figures.get('trl_tokens', '-')} / {figures['ours_tokens']} | {figures.get('trl_s', '-')} | "
          f"{figures['ours_s']} | {figures['ratio'] or '-'}{'x' if with_trl else ''} | {figures['matrix_share']:.0%} |", flush=True)
    return {**figures, "repeats": repeats}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 s: the tiny model, two steps")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each side (default: 5)")
    parser.add_argument("--only", default="", help="only lines whose name contains this (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import trl
        other = f"trl {trl.__version__}"
    except ImportError:
        other = None
        print("TRL is not installed, so ours is measured alone: pip install trl\n")
    note = f"{hardware('cpu')}{f', {other}' if other else ''}, {datetime.date.today()}"
    print(f"{note}\n\n| one step of 64 rollouts | sampled tokens, TRL / ours | TRL s | ours s | ratio | products |\n"
          "|---|---|---|---|---|---|")
    lines = {}
    for name, shape in list(SHAPES.items())[:1 if args.quick else 2]:
        for kind in TASKS:
            if args.only in f"{name}, {kind}":
                lines[f"{name}, {kind}"] = compare(name, shape, kind, 2 if args.quick else args.repeats, other is not None)
    print(json.dumps({"note": note, "lines": lines}))


if __name__ == "__main__":
    main()
