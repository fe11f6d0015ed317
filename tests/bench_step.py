"""How long does one GRPO step take? Ours beside TRL's GRPOTrainer, at equal settings.

One step: 8 prompts of 16 to 48 tokens x 8 rollouts are sampled (temperature 1, no filters), decoded
to text and rewarded by the same function, then one AdamW update on all 64: group-normalised
advantages, the mean over sequences, clip 0.2, no KL term, fp32, no gradient checkpointing, metrics
included. Both sides start from the same random weights, whose next token is close to uniform, so
the share of words that end a completion sets the lengths: none ("to the limit": every completion
has 48 tokens, so both sides do the same work), or one in 43 ("with a tail": the same distribution
on both sides, mean about 40, cut at 128).

Process-CPU seconds on one thread, medians without the first step: TRL's trainer runs, and after
each of its steps, outside its clock, we take one of ours. The last column is the share of one more
step of ours that the profiler finds in matrix products: what nobody can do faster with the same
sums. The last line is JSON with every figure.

    python tests/bench_step.py             # a tiny model and one of 12 layers, about 25 minutes
    python tests/bench_step.py --quick     # under 45 s: the tiny one, two steps
    pip install trl                        # the other side; without it ours is measured alone
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import hardware
from grpo import GRPOConfig, Sampler, collect, measure, points_of, update
from prefix import Decoder, Palette
from rewards import Task, load_rewards
from sft import Ranks, make_optimizer
from vae import Reader

LR = 1e-6
PROMPTS = 8
GROUP = 8


@dataclass
class Shape:
    """Of a random Qwen3."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    words: int


SHAPES = [
    Shape("tiny Qwen3 (4 layers x 128, vocab 128)", 4, 128, 4, 2, 32, 384, 128),
    Shape("12 layers x 512, vocab 32,000", 12, 512, 8, 4, 64, 1536, 32000),
]


@dataclass
class Kind:
    """How long completions are."""

    name: str
    limit: int
    end_every: int  # one word in so many ends a completion; 0: none does


KINDS = [Kind("to the limit", 48, 0), Kind("with a tail", 128, 43)]


# ---- what both sides get -------------------------------------------------------------------------


def make_model(shape):
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.hidden,
        vocab_size=shape.words,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def make_tokenizer(words):
    """One id a word. The model has no row for its end token, so that it is never sampled."""
    word_ids = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(word_ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="<never>"
    )
    # So that our prompt is the text and nothing else.
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def make_prompts(words):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 49, (PROMPTS,), generator=generator).tolist()
    prompts = []
    for length in lengths:
        ids = torch.randint(words, (length,), generator=generator).tolist()
        prompts.append(" ".join(f"w{i}" for i in ids))
    return prompts


def reward_of(text):
    """1 where the first word's number is odd: so nearly every group has a signal."""
    words = text.split()
    if not words:
        return 0.0
    number = words[0].removeprefix("w")
    return float(number.isdigit() and int(number) % 2 == 1)


def judge(completion, row):
    return {"accuracy": reward_of(completion)}


# ---- the two sides -------------------------------------------------------------------------------


class OurSide:
    """Each call of `step` is one step of grpo.py; returns the number of sampled tokens."""

    def __init__(self, model, tokenizer, prompts, ends, limit):
        rows = [{"question": prompt, "answer": ""} for prompt in prompts]
        task = Task("bench", rows, [], judge_function=judge)
        self.config = GRPOConfig(
            schedule=["none"], prompts=PROMPTS, group=GROUP, lr=LR, max_new_tokens=limit
        )
        table = model.get_input_embeddings().weight.detach()
        self.sampler = Sampler(
            Decoder(model, ends),
            Reader(tokenizer),
            task,
            load_rewards(self.config.reward, task),
            Palette(None, table, "none"),
            points_of("none"),
            seed=0,
        )
        self.model = model
        self.optimizer = make_optimizer(model, LR)
        self.ranks = Ranks.alone()
        self.steps = 0

    def step(self):
        rollouts = collect(self.steps, self.sampler, self.config, self.ranks)
        self.sampler.decoder.refresh()
        result = update(self.model, self.optimizer, rollouts, self.config, self.ranks)
        metrics = measure(rollouts, [result], self.config, self.ranks)
        self.steps += 1
        assert metrics["log_ratio_start"] < 1e-5
        return metrics["rollouts"] * metrics["length"]


def run_trl(model, tokenizer, prompts, ends, limit, steps, after_step):
    """Run TRL's trainer; after_step(seconds, tokens) is called behind each step."""
    # Only here: TRL is optional.
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    tokens_of_step = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            seconds = time.process_time() - self.start
            after_step(seconds, tokens_of_step.pop())

    def reward(completions, completion_ids, **_):
        tokens_of_step.append(sum(len(ids) for ids in completion_ids))
        return [reward_of(text) for text in completions]

    model.generation_config.eos_token_id = ends or None
    with tempfile.TemporaryDirectory() as folder:
        config = TRLConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * GROUP,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            num_generations=GROUP,
            max_completion_length=limit,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            num_iterations=1,
            epsilon=0.2,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_beta1=0.9,
            adam_beta2=0.98,
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
        trainer = GRPOTrainer(
            model,
            reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()


def trl_version():
    """None where TRL is not installed."""
    try:
        import trl
    except ImportError:
        return None
    return trl.__version__


# ---- the comparison ------------------------------------------------------------------------------


@dataclass
class Measured:
    """One side, a number a step; the first step warms up, and is left out."""

    seconds: list = field(default_factory=list)
    tokens: list = field(default_factory=list)

    def add(self, seconds, tokens):
        self.seconds.append(seconds)
        self.tokens.append(tokens)

    @property
    def median_seconds(self):
        return statistics.median(self.seconds[1:])

    @property
    def mean_tokens(self):
        return round(statistics.mean(self.tokens[1:]))


def matrix_share(step):
    """The share of a step's time that is spent in matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    products = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"}
    in_products = 0
    total = 0
    for event in profile.key_averages():
        total += event.self_cpu_time_total
        if event.key in products:
            in_products += event.self_cpu_time_total
    return in_products / total


def compare(shape, kind, repeats, with_trl):
    """The figures of one line of the table."""
    model = make_model(shape)
    tokenizer = make_tokenizer(shape.words)
    prompts = make_prompts(shape.words)
    ends = []
    if kind.end_every:
        ends = list(range(1, shape.words, kind.end_every))

    our_side = OurSide(copy.deepcopy(model), tokenizer, prompts, ends, kind.limit)
    ours = Measured()
    trls = Measured()

    def step_of_ours():
        start = time.process_time()
        tokens = our_side.step()
        ours.add(time.process_time() - start, tokens)

    def after_step_of_trl(seconds, tokens):
        trls.add(seconds, tokens)
        step_of_ours()

    if with_trl:
        run_trl(model, tokenizer, prompts, ends, kind.limit, repeats + 1, after_step_of_trl)
    else:
        for _ in range(repeats + 1):
            step_of_ours()

    figures = {"ours_s": round(ours.median_seconds, 3), "ours_tokens": ours.mean_tokens}
    figures["ratio"] = None
    if with_trl:
        figures["trl_s"] = round(trls.median_seconds, 3)
        figures["trl_tokens"] = trls.mean_tokens
        figures["ratio"] = round(trls.median_seconds / ours.median_seconds, 2)
    figures["matrix_share"] = round(matrix_share(our_side.step), 2)
    figures["repeats"] = repeats
    return figures


COLUMNS = [
    "one step of 64 rollouts",
    "sampled tokens, TRL / ours",
    "TRL s",
    "ours s",
    "ratio",
    "products",
]


def cells_of(name, figures):
    ratio = "-"
    if figures["ratio"] is not None:
        ratio = f"{figures['ratio']}x"
    return [
        name,
        f"{figures.get('trl_tokens', '-')} / {figures['ours_tokens']}",
        figures.get("trl_s", "-"),
        figures["ours_s"],
        ratio,
        f"{figures['matrix_share']:.0%}",
    ]


def table_row(cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under 45 s: the tiny model")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side (default: 5)")
    parser.add_argument("--only", default="", help="lines whose name contains this (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    version = trl_version()
    note = hardware("cpu")
    if version is None:
        print("TRL is not installed, so ours is measured alone: pip install trl\n")
    else:
        note += f", trl {version}"
    note += f", {datetime.date.today()}"
    print(f"{note}\n")
    print(table_row(COLUMNS))
    print("|---" * len(COLUMNS) + "|")

    shapes = SHAPES
    repeats = arguments.repeats
    if arguments.quick:
        shapes = SHAPES[:1]
        repeats = 2
    lines = {}
    for shape in shapes:
        for kind in KINDS:
            name = f"{shape.name}, {kind.name}"
            if arguments.only in name:
                lines[name] = compare(shape, kind, repeats, version is not None)
                print(table_row(cells_of(name, lines[name])), flush=True)
    print(json.dumps({"note": note, "lines": lines}))


if __name__ == "__main__":
    main()
