"""How much memory a GPU needs: the sum of what a step of grpo.py holds, computed from a model's configuration, as a table.

`parts` below is the whole formula, one line for each tensor that counts; it leaves out the CUDA context, NCCL's buffers and the
allocator's gaps. Then the formula is held against the peak memory of real steps on the CPU, of a random model in a child
process. No GPU was at hand: the table is computed, not measured.

    python tests/bench_memory.py                # the table, and three measured steps
    python tests/bench_memory.py --quick        # with a smaller model to measure
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

GIB = 2 ** 30
SHAPES = {"Qwen3-0.6B": dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=3072),
          "Qwen3-1.7B": dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144),
          "Qwen3-4B": dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, intermediate_size=9728),
          "Qwen3-8B": dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288,
                           tie_word_embeddings=False)}
FLAGS = {"(none)": {}, "bf16": dict(bf16=True), "bf16, checkpointing": dict(bf16=True, checkpointing=True),
         "fsdp, bf16": dict(fsdp=True, bf16=True), "fsdp, bf16, checkpointing": dict(fsdp=True, bf16=True, checkpointing=True),
         "and bf16 rollouts": dict(fsdp=True, bf16=True, checkpointing=True, rollout=2),
         "and kl": dict(fsdp=True, bf16=True, checkpointing=True, rollout=2, kl=True)}
TOLERANCE = 0.12            # of the measured growth


def config_of(vocab_size=151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **shape):
    from transformers import Qwen3Config
    return Qwen3Config(vocab_size=vocab_size, num_key_value_heads=num_key_value_heads, head_dim=head_dim,
                       tie_word_embeddings=tie_word_embeddings, **shape)


def sizes(config):
    """Numbers of weights: one layer, one table [V, d], all."""
    d, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    layer = d * dim * (heads + 2 * kv) + heads * dim * d + 3 * d * ffn + 2 * d + 2 * dim    # qkv, out, gate up down, norms
    table = config.vocab_size * d
    return layer, table, config.num_hidden_layers * layer + table * (1 if config.tie_word_embeddings else 2) + d


def parts(config, gpus=1, fsdp=False, bf16=False, checkpointing=False, kl=False, rollout=4, tokens=8192, slots=64, columns=1024,
          cuda=True):
    """{what: bytes} on one GPU in the two phases of a step, (rollout, update).

    rollout: bytes of a number in the decoder. tokens: of a micro-batch. slots, columns: the decoder's cache. cuda: its optimizer
    works on all weights at once, and its decoder reads what it need neither fuse nor round in place.
    """
    layer, table, all_weights = sizes(config)
    d, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    share, half = (1 / gpus if fsdp else 1), (2 if bf16 else 4)
    state = {"weights": 4 * all_weights * share, "AdamW moments": 8 * all_weights * share,
             "KL reference": half * all_weights * share if kl else 0}
    fused = layers * (d * dim * (heads + 2 * kv) + 2 * d * ffn)                              # qkv and gate_up
    in_place = cuda and not fsdp and rollout == 4
    sampling = {**state, "KV cache": rollout * slots * columns * layers * 2 * kv * dim, "logits": 24 * slots * config.vocab_size,
                "packed weights": rollout * (fused if in_place else layers * layer + 2 * table)}
    per_layer = tokens * (26 * d + 8 * ffn + 10 * (heads + kv) * dim if bf16 else 24 * d + 16 * ffn + 16 * (heads + kv) * dim)
    stored = layers * tokens * 4 * d if checkpointing else layers * per_layer                # for the backward pass
    gathered = half * (2 * layer + table)                                                    # this layer and the next, the head
    update = {**state, "gradients": 4 * all_weights * share, "activations": stored,
              "weights in use": gathered if fsdp else 2 * (layers * layer + table) if bf16 else 0}
    head = {**update, "logits": 2 * 4 * min(2 ** 25, tokens * config.vocab_size), "table gradient": 4 * table}
    backward = {**update, "a layer's work": (2 if checkpointing else 1) * per_layer}
    step = {**state, "gradients": 4 * all_weights * share, "AdamW's work": 4 * all_weights * share if cuda else 0}
    return sampling, max(head, backward, step, key=lambda phase: sum(phase.values()))


def need(config, **options):
    return max(sum(phase.values()) for phase in parts(config, **options)) / GIB


def table(cases=(1, 4, 8)):
    """The Markdown table: GiB a GPU for each model, number of GPUs and flags."""
    lines = ["| GiB a GPU | GPUs | " + " | ".join(FLAGS) + " |", "|" + "---|" * (len(FLAGS) + 2)]
    for name, shape in SHAPES.items():
        for gpus in cases:
            cells = [f"{need(config_of(**shape), gpus=gpus, **flags):.0f}" if gpus > 1 or "fsdp" not in flags else "-"
                     for flags in FLAGS.values()]
            lines.append(f"| {name} | {gpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured_shape(quick):
    return dict(vocab_size=8000, num_key_value_heads=4, head_dim=64, hidden_size=512, num_attention_heads=8,
                intermediate_size=1536, num_hidden_layers=4 if quick else 12)


def child(quick, options):
    """Two updates (or a rollout) of a random model; prints the growth of this process's peak memory over its state before.

    Each update has two micro-batches: the second one meets the gradients of the first, as the formula has it."""
    import resource
    from prefix import Decoder, Sampling
    from sft import Ranks, apply_gradients, lm_step, make_optimizer
    from transformers import Qwen3ForCausalLM
    torch.set_num_threads(1)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    precision, ranks = "bf16" if options.get("bf16") else "fp32", Ranks(0, 1, torch.device("cpu"))
    warm = Qwen3ForCausalLM(config_of(**{**measured_shape(True), "hidden_size": 64, "num_hidden_layers": 1})).eval()
    lm_step(warm, [([1, 2], [3, 4])], [None], ranks, 64, precision)         # what torch sets up once
    apply_gradients(warm, [make_optimizer(warm, 1e-3)], ranks)
    before = peak()
    model = Qwen3ForCausalLM(config_of(**measured_shape(quick))).eval()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True
    optimizer, rows = make_optimizer(model, 1e-3), [([1] * 64, [2] * 192)] * (2 * options["tokens"] // 256)      # 2 micro-batches
    for _ in range(2):
        lm_step(model, rows, [None] * len(rows), ranks, options["tokens"], precision)
        apply_gradients(model, [optimizer], ranks)
    if options["slots"]:
        Decoder(model, [0], options["slots"], options["columns"]).generate(
            [[1 + i] * 5 for i in range(options["slots"])], None, Sampling(max_new_tokens=4), range(options["slots"]))
    print(peak() - before)


def measure(quick):
    """(name, computed, measured) in GiB for four runs on the CPU, each in a process of its own."""
    tokens, rows, here = 768 if quick else 2048, [], str(Path(__file__).parent)
    update = dict(slots=0, columns=0, tokens=tokens)
    cases = {"update": update, "update, checkpointing": dict(update, checkpointing=True), "update, bf16": dict(update, bf16=True),
             "rollout": dict(slots=64, columns=1024, tokens=256)}
    for name, options in cases.items():
        script = f"import sys; sys.path.insert(0, {here!r}); import bench_memory; bench_memory.child({quick}, {options!r})"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}     # what is freed is given back
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
        rows.append((name, need(config_of(**measured_shape(quick)), cuda=False, **options), int(done.stdout) / GIB))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure a smaller model")
    quick = parser.parse_args().quick
    from transformers import Qwen3ForCausalLM
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config_of(**shape))
        assert sum(p.numel() for p in model.parameters()) == sizes(config_of(**shape))[2], name
    print(f"computed: fp32 weights and moments, micro-batches of 8,192 tokens, 64 slots of 1,024 columns\n\n{table()}\n")
    options = dict(gpus=8, **FLAGS["and bf16 rollouts"])
    for phase, found in zip(("rollout", "update"), parts(config_of(**SHAPES["Qwen3-8B"]), **options)):
        print(f"Qwen3-8B, 8 GPUs, {', '.join(options)[6:]}, {phase}: " + ", ".join(f"{what} {size / GIB:.1f}" for what, size in
                                                                                   found.items() if size))
    rows = measure(quick)
    print("\n| on the CPU, GiB | computed | measured |\n|---|---|---|")
    for name, computed, measured in rows:
        print(f"| {name} | {computed:.2f} | {measured:.2f} |")
    worst = max(abs(computed - measured) / measured for _, computed, measured in rows)
    print(f"\nlargest difference {worst:.0%}, allowed {TOLERANCE:.0%}")
    print(json.dumps({"largest_difference": round(worst, 3), "gib": {name: {"computed": round(c, 3), "measured": round(m, 3)}
                                                                     for name, c, m in rows}}))
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
