"""How much memory does a GPU need? The sum of what a step of grpo.py holds, as a table.

`rollout_parts` and `update_parts` below are the whole formula, one line for each tensor that
counts; it leaves out the CUDA context, NCCL's buffers and the allocator's gaps. Then the formula is
held against the peak memory of real steps on the CPU, of a random model in a child process. No GPU
was at hand: the table is computed, not measured.

    python tests/bench_memory.py                # the table, and four measured steps
    python tests/bench_memory.py --quick        # with a smaller model to measure
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prefix import Decoder, Prompt, Sampling
from sft import Ranks, apply_gradients, lm_step, make_optimizer

GIB = 2**30
TOLERANCE = 0.12  # of the measured growth


@dataclass
class Shape:
    """Sizes of a model."""

    width: int
    layers: int
    heads: int
    ffn: int
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151936
    tied: bool = True

    @property
    def layer_weights(self):
        """Numbers in one layer: q k v, out, gate up down, norms."""
        attention = self.qkv_weights + self.heads * self.head_dim * self.width
        mlp = 3 * self.width * self.ffn
        return attention + mlp + 2 * self.width + 2 * self.head_dim

    @property
    def qkv_weights(self):
        return self.width * self.head_dim * (self.heads + 2 * self.kv_heads)

    @property
    def table_weights(self):
        return self.vocabulary * self.width

    @property
    def all_weights(self):
        tables = self.table_weights if self.tied else 2 * self.table_weights
        return self.layers * self.layer_weights + tables + self.width

    def config(self):
        return Qwen3Config(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "Qwen3-0.6B": Shape(width=1024, layers=28, heads=16, ffn=3072),
    "Qwen3-1.7B": Shape(width=2048, layers=28, heads=16, ffn=6144),
    "Qwen3-4B": Shape(width=2560, layers=36, heads=32, ffn=9728),
    "Qwen3-8B": Shape(width=4096, layers=36, heads=32, ffn=12288, tied=False),
}


@dataclass
class Options:
    """How the step is run."""

    gpus: int = 1
    fsdp: bool = False
    bf16: bool = False
    checkpointing: bool = False
    kl: bool = False
    rollout_bytes: int = 4  # of a number in the decoder
    tokens: int = 8192  # of a micro-batch
    slots: int = 64  # of the decoder's cache,
    columns: int = 1024  # and its width
    # On CUDA the optimizer works on all weights at once, and the decoder reads in place what it
    # need neither fuse nor round.
    cuda: bool = True

    @property
    def share(self):
        """Of all weights, on one GPU."""
        return 1 / self.gpus if self.fsdp else 1

    @property
    def half(self):
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4


FLAGS = {
    "(none)": Options(),
    "bf16": Options(bf16=True),
    "bf16, checkpointing": Options(bf16=True, checkpointing=True),
    "fsdp, bf16": Options(fsdp=True, bf16=True),
    "fsdp, bf16, checkpointing": Options(fsdp=True, bf16=True, checkpointing=True),
    "and bf16 rollouts": Options(fsdp=True, bf16=True, checkpointing=True, rollout_bytes=2),
    "and kl": Options(fsdp=True, bf16=True, checkpointing=True, rollout_bytes=2, kl=True),
}


# ---- The formula ---------------------------------------------------------------------------------


def state_parts(shape, options):
    """{what: bytes} that are held all the time."""
    weights = shape.all_weights * options.share
    parts = {"weights": 4 * weights, "AdamW moments": 8 * weights}
    if options.kl:
        parts["KL reference"] = options.half * weights
    return parts


def rollout_parts(shape, options):
    """{what: bytes} while the decoder runs."""
    parts = state_parts(shape, options)
    cached = options.slots * options.columns * shape.layers * 2 * shape.kv_heads * shape.head_dim
    parts["KV cache"] = options.rollout_bytes * cached
    parts["logits"] = 24 * options.slots * shape.vocabulary
    packed = shape.layers * shape.layer_weights + 2 * shape.table_weights
    if options.cuda and not options.fsdp and options.rollout_bytes == 4:
        # Only what is fused is copied: q k v, and gate up.
        packed = shape.layers * (shape.qkv_weights + 2 * shape.width * shape.ffn)
    parts["packed weights"] = options.rollout_bytes * packed
    return parts


def update_parts(shape, options):
    """{what: bytes} at the largest moment of an update: head, backward pass or optimizer."""
    state = state_parts(shape, options)
    gradients = 4 * shape.all_weights * options.share
    layer = options.tokens * activations_of_token(shape, options)
    stored = shape.layers * layer  # for the backward pass
    if options.checkpointing:
        stored = shape.layers * options.tokens * 4 * shape.width
    update = {**state, "gradients": gradients, "activations": stored}
    update["weights in use"] = weights_in_use(shape, options)

    logits = 2 * 4 * min(2**25, options.tokens * shape.vocabulary)
    head = {**update, "logits": logits, "table gradient": 4 * shape.table_weights}
    work = 2 * layer if options.checkpointing else layer
    backward = {**update, "a layer's work": work}
    step = {**state, "gradients": gradients}
    if options.cuda:
        step["AdamW's work"] = gradients
    return max(head, backward, step, key=total)


def activations_of_token(shape, options):
    """Bytes that a layer keeps of one token."""
    attention = (shape.heads + shape.kv_heads) * shape.head_dim
    if options.bf16:
        return 26 * shape.width + 8 * shape.ffn + 10 * attention
    return 24 * shape.width + 16 * shape.ffn + 16 * attention


def weights_in_use(shape, options):
    """Bytes of weights beside those of the state: gathered, or rounded."""
    if options.fsdp:  # this layer and the next, and the head
        return options.half * (2 * shape.layer_weights + shape.table_weights)
    if options.bf16:
        return 2 * (shape.layers * shape.layer_weights + shape.table_weights)
    return 0


def total(parts):
    return sum(parts.values())


def need(shape, options):
    """GiB on one GPU."""
    return max(total(rollout_parts(shape, options)), total(update_parts(shape, options))) / GIB


def table(cases=(1, 4, 8)):
    """The Markdown table: GiB a GPU for each model, number of GPUs and flags."""
    lines = ["| GiB a GPU | GPUs | " + " | ".join(FLAGS) + " |"]
    lines.append("|" + "---|" * (len(FLAGS) + 2))
    for name, shape in SHAPES.items():
        for gpus in cases:
            cells = [name, str(gpus)]
            for options in FLAGS.values():
                if options.fsdp and gpus == 1:
                    cells.append("-")
                else:
                    cells.append(f"{need(shape, replace(options, gpus=gpus)):.0f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_sizes():
    """The numbers of weights above are those of transformers' own models."""
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = Qwen3ForCausalLM(shape.config())
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == shape.all_weights, name


# ---- Measured ------------------------------------------------------------------------------------


def measured_shape(quick):
    layers = 4 if quick else 12
    sizes = {"kv_heads": 4, "head_dim": 64, "vocabulary": 8000}
    return Shape(width=512, layers=layers, heads=8, ffn=1536, **sizes)


def peak_memory():
    """Bytes, since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(quick, options):
    """Two updates, and a rollout if there are slots, of a random model.

    Prints by how much they raise this process's peak memory. Each update has two micro-batches: the
    second one meets the gradients of the first, as the formula has it.
    """
    torch.set_num_threads(1)
    precision = "bf16" if options.bf16 else "fp32"
    ranks = Ranks.alone()
    warm_up(ranks, precision)
    before = peak_memory()

    model = Qwen3ForCausalLM(measured_shape(quick).config()).eval()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True
    optimizer = make_optimizer(model, 1e-3)
    pair = (Prompt([1] * 64), [2] * 192)
    pairs = [pair] * (2 * options.tokens // 256)  # 2 micro-batches
    for _ in range(2):
        lm_step(model, pairs, [None] * len(pairs), ranks, options.tokens, precision)
        apply_gradients(model, [optimizer], ranks)
    if options.slots:
        decoder = Decoder(model, eos_ids=[0], slots=options.slots)
        rows = decoder.embed([Prompt([1 + i] * 5) for i in range(options.slots)])
        decoder._reserve(options.columns, options.slots)
        decoder.generate(rows, Sampling(max_new_tokens=4), range(options.slots))
    print(peak_memory() - before)


def warm_up(ranks, precision):
    """What torch sets up once, by a step of a far smaller model."""
    shape = replace(measured_shape(quick=True), width=64, layers=1)
    model = Qwen3ForCausalLM(shape.config()).eval()
    lm_step(model, [(Prompt([1, 2]), [3, 4])], [None], ranks, 64, precision)
    apply_gradients(model, [make_optimizer(model, 1e-3)], ranks)


def measure(name, options, quick):
    """{computed, measured} in GiB for a run on the CPU, in a process of its own; prints its row."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(options))]
    if quick:
        command.append("--quick")
    # MALLOC_MMAP_THRESHOLD_: what is freed is given back.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    computed = need(measured_shape(quick), options)
    measured = int(done.stdout.splitlines()[-1]) / GIB
    print(f"| {name} | {computed:.2f} | {measured:.2f} |", flush=True)
    return {"computed": round(computed, 3), "measured": round(measured, 3)}


def compare(quick):
    """Print computed and measured memory of four runs; returns {run: figures}."""
    update = Options(slots=0, columns=0, tokens=512 if quick else 2048, cuda=False)
    runs = {
        "update": update,
        "update, checkpointing": replace(update, checkpointing=True),
        "update, bf16": replace(update, bf16=True),
        "rollout": replace(update, slots=64, columns=1024, tokens=256),
    }
    print("\n| on the CPU, GiB | computed | measured |\n|---|---|---|")
    return {name: measure(name, options, quick) for name, options in runs.items()}


# ---- The script ----------------------------------------------------------------------------------


def show(name, parts):
    sizes = [f"{what} {size / GIB:.1f}" for what, size in parts.items() if size]
    print(f"{name}: {', '.join(sizes)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="measure a smaller model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.quick, Options(**json.loads(args.child)))
        return 0

    check_sizes()
    print("computed: fp32 weights and moments, micro-batches of 8,192 tokens, 64 slots x 1,024\n")
    print(f"{table()}\n")
    options = replace(FLAGS["and bf16 rollouts"], gpus=8)
    show("Qwen3-8B, 8 GPUs, rollout", rollout_parts(SHAPES["Qwen3-8B"], options))
    show("Qwen3-8B, 8 GPUs, update", update_parts(SHAPES["Qwen3-8B"], options))

    figures = compare(args.quick)
    worst = 0.0
    for row in figures.values():
        worst = max(worst, abs(row["computed"] - row["measured"]) / row["measured"])
    print(f"\nlargest difference {worst:.0%}, allowed {TOLERANCE:.0%}")
    print(json.dumps({"largest_difference": round(worst, 3), "gib": figures}))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
