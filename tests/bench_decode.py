"""How fast is the prefix decoder? A table against Hugging Face `generate`, and training log-probs against full logits.

    python tests/bench_decode.py                         # CPU, about 15 minutes; --quick: under 45 seconds
    python tests/bench_decode.py --model models/smollm2  # adds a real checkpoint, fp32 and bf16
    python tests/bench_decode.py --device cuda           # tokens/s beside generate and the memory-bandwidth floor

CPU figures are process-CPU seconds on one thread: the two sides alternate in one process and each reports its median.
The task: prompts of 16 to 48 tokens, half of the rows with an 8-row prefix, completions of mean length 48 (exponential,
cut at 128; the lengths are set, the same on both sides). `generate` gets the same embeddings, left-padded, with an
attention mask, its dynamic cache and the same sampling (temperature 1, no filters); a queue of 256 rows it gets in 4
batches of 64. The last line is JSON with every figure.
"""
import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers import StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prefix import Decoder, Sampling, completion_logprobs, micro_batches  # noqa: E402


def build(layers, width, heads, kv, dim, ffn, vocab, family="qwen3", dtype=torch.float32, device="cpu", tied=True):
    """A random model of the given shape."""
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    with torch.device(device):
        return model(config(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv,
            head_dim=dim, intermediate_size=ffn, vocab_size=vocab, tie_word_embeddings=tied,
            max_position_embeddings=4096, eos_token_id=None, bos_token_id=None)).to(dtype).eval()


def task(model, rows, longest=128, tail=True):
    """(prompts, prefixes, completion lengths): the same for every call."""
    rng = torch.Generator().manual_seed(0)
    vocab, width, weight = model.config.vocab_size, model.config.hidden_size, model.get_input_embeddings().weight
    prompts = [torch.randint(vocab, (int(n),), generator=rng).tolist()
               for n in torch.randint(16, 49, (rows,), generator=rng)]
    prefixes = [(torch.randn(8, width, generator=rng) * weight.float().std().item()).to(weight) if row % 2 else None
                for row in range(rows)]
    if not tail:
        return [(p * 3)[:48] for p in prompts], [None] * rows, [48] * rows
    even = (torch.arange(rows) + 0.5) / rows  # quantiles of an exponential: the mean does not depend on luck
    lengths = (-even.log() * 53 * longest / 128).ceil().clamp(1, longest).long()
    return prompts, prefixes, lengths[torch.randperm(rows, generator=rng)].tolist()


class SetLengths(Decoder):
    """A decoder whose rows end at set lengths, so that both sides do the same work."""

    def _admit(self, new, jobs, sampling):
        first = len(jobs)
        super()._admit(new, jobs, sampling)
        for slot, job in enumerate(new, first):
            self.stop[slot] = self.pos[slot] + self.lengths[job.row]


class RowLimits(StoppingCriteria):
    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.lengths


@torch.no_grad()
def hf_generate(model, prompts, prefixes, lengths, batch=64):
    """The same rows through `generate`; returns the number of tokens."""
    embed, total = model.get_input_embeddings(), 0
    for a in range(0, len(prompts), batch):
        rows = [embed(torch.tensor(p, device=model.device)) for p in prompts[a:a + batch]]
        rows = [x if p is None else torch.cat([p, x]) for x, p in zip(rows, prefixes[a:a + batch])]
        T = max(map(len, rows))
        x = torch.stack([F.pad(r, (0, 0, T - len(r), 0)) for r in rows])
        mask = torch.stack([(torch.arange(T) >= T - len(r)).long() for r in rows]).to(model.device)
        limits = torch.tensor(lengths[a:a + batch], device=model.device)
        model.generate(inputs_embeds=x, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0,
                       max_new_tokens=int(limits.max()), stopping_criteria=StoppingCriteriaList([RowLimits(limits)]))
        total += int(limits.sum())
    return total


def compare(name, model, rows, repeats, tail=True):
    """Print and return one line of the CPU table."""
    prompts, prefixes, lengths = task(model, rows, tail=tail)
    decoder = SetLengths(model, eos_ids=[], slots=64)
    decoder.lengths = lengths

    def ours():
        out = decoder.generate(prompts, prefixes, Sampling(max_new_tokens=max(lengths)))
        assert [len(c.ids) for c in out] == lengths

    seconds = {"hf": [], "ours": []}
    for repeat in range(repeats):
        for side, call in (("hf", lambda: hf_generate(model, prompts, prefixes, lengths)), ("ours", ours)):
            start = time.process_time()
            call()
            seconds[side].append(time.process_time() - start)
    hf, mine = (statistics.median(seconds[side]) for side in ("hf", "ours"))
    print(f"| {name} | {hf:.2f} | {mine:.2f} | {hf / mine:.2f}x |", flush=True)
    return {"hf_s": round(hf, 3), "ours_s": round(mine, 3), "ratio": round(hf / mine, 2), "repeats": repeats}


# ---------------------------------------------------------------------------------------------------------------------
# Training log-probs: one side per child process, so that its peak memory is its own

def train_side(side, rows, device):
    """Forward and backward of all micro-batches once; prints seconds and peak memory as JSON."""
    torch.manual_seed(0)
    model = build(2, 896, 14, 2, 64, 4864, 151936, "qwen2", device=device)
    prompts, prefixes, lengths = task(model, rows)
    completions = [torch.randint(151936, (n,)).tolist() for n in lengths]
    full = [len(p) + (0 if x is None else len(x)) + n for p, x, n in zip(prompts, prefixes, lengths)]
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    peak = (lambda: torch.cuda.max_memory_allocated()) if device == "cuda" else \
        (lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    before, start = peak(), time.process_time() if device == "cpu" else time.perf_counter()
    for group in micro_batches(full, 2048):
        args = [[values[i] for i in group] for values in (prompts, completions, prefixes)]
        if side == "chunked":
            loss = completion_logprobs(model, *args, Sampling(), with_entropy=False)[0].sum()
        else:
            loss = full_logprobs(model, *args).sum()
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.process_time() if device == "cpu" else time.perf_counter()) - start
    print(json.dumps({"seconds": seconds, "peak_gb": (peak() - before) / 2 ** 30}))


def full_logprobs(model, prompts, completions, prefixes):
    """The plain way: all logits of the padded batch, log-softmax in fp32, gather."""
    embed, rows = model.get_input_embeddings(), []
    for p, c, x in zip(prompts, completions, prefixes):
        row = embed(torch.tensor(p + c, device=model.device))
        rows.append(row if x is None else torch.cat([x, row]))
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logprobs = model(inputs_embeds=x).logits.float().log_softmax(-1)  # [B, T, V]
    picked = []
    for i, (row, c) in enumerate(zip(rows, completions)):
        where = torch.arange(len(row) - len(c) - 1, len(row) - 1, device=model.device)
        picked.append(logprobs[i, where, torch.tensor(c, device=model.device)])
    return torch.cat(picked)


def compare_training(rows, repeats, device):
    """Print and return the training lines."""
    runs = {"full": [], "chunked": []}
    for repeat in range(repeats):
        for side in runs:
            command = [sys.executable, __file__, "--train-side", side, "--rows", str(rows), "--device", device]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            runs[side].append(json.loads(out.splitlines()[-1]))
    mid = {side: {key: statistics.median(run[key] for run in runs[side]) for key in ("seconds", "peak_gb")}
           for side in runs}
    time_ratio, peak_ratio = (mid["chunked"][key] / mid["full"][key] for key in ("seconds", "peak_gb"))
    print(f"\nTraining log-probs, forward and backward, {rows} sequences, width 896, vocab 151,936, fp32, medians of "
          f"{repeats}:\nfull logits {mid['full']['seconds']:.2f} s, {mid['full']['peak_gb']:.2f} GB; "
          f"completion_logprobs {mid['chunked']['seconds']:.2f} s, {mid['chunked']['peak_gb']:.2f} GB: "
          f"time x {time_ratio:.2f}, peak x {peak_ratio:.2f}")
    mid = {side: {key: round(value, 3) for key, value in mid[side].items()} for side in mid}
    return {"sequences": rows, "repeats": repeats, **mid, "time_ratio": round(time_ratio, 3),
            "peak_ratio": round(peak_ratio, 3)}


# ---------------------------------------------------------------------------------------------------------------------
# CUDA

def bandwidth():
    """Bytes per second of a large copy on this GPU (reads + writes)."""
    x = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    for repeat in range(6):
        if repeat == 1:  # the first copy warms up
            torch.cuda.synchronize()
            start = time.perf_counter()
        y.copy_(x)
    torch.cuda.synchronize()
    return 5 * 2 * x.numel() / (time.perf_counter() - start)


def cuda_lines(new=256):
    """tokens/s at 64 and 256 slots, beside generate and the floor: weights and live KV read once per step."""
    speed, figures = bandwidth(), {}
    print(f"copy bandwidth {speed / 1e12:.2f} TB/s\n")
    print("| model, slots | generate tok/s | ours tok/s | ratio | share of floor |\n|---|---|---|---|---|")
    for name, shape in (("Qwen3-0.6B", (28, 1024, 16, 8, 128, 3072, 151936, "qwen3")),
                        ("Qwen2.5-1.5B", (28, 1536, 12, 2, 128, 8960, 151936, "qwen2"))):
        model = build(*shape, dtype=torch.bfloat16, device="cuda")
        for slots in (64, 256):
            prompts, prefixes, lengths = task(model, 4 * slots, longest=new)
            decoder = SetLengths(model, eos_ids=[], slots=slots, max_length=56 + new)
            decoder.lengths = lengths
            rates = {}
            for side, call in (("hf", lambda: hf_generate(model, prompts[:slots], prefixes, lengths[:slots], slots)),
                               ("ours", lambda: sum(len(c.ids) for c in decoder.generate(
                                   prompts, prefixes, Sampling(max_new_tokens=new))))):
                call()  # loads kernels, captures graphs
                torch.cuda.synchronize()
                start = time.perf_counter()
                tokens = call()
                torch.cuda.synchronize()
                rates[side] = tokens / (time.perf_counter() - start)
            kv = 2 * shape[0] * shape[3] * shape[4] * 2  # bytes per cached position
            context = statistics.mean((len(p) + n / 2) for p, n in zip(prompts, lengths))
            step = (sum(p.numel() for p in model.parameters()) * 2 + slots * context * kv) / speed
            share = rates["ours"] / (slots / step)
            print(f"| {name}, {slots} | {rates['hf']:.0f} | {rates['ours']:.0f} | {rates['ours'] / rates['hf']:.1f}x | "
                  f"{share:.0%} |", flush=True)
            figures[f"{name} {slots}"] = {"hf_tok_s": round(rates["hf"]), "ours_tok_s": round(rates["ours"]),
                                          "floor_tok_s": round(slots / step), "share": round(share, 3)}
    return figures


def hardware(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return f"{names[0]}, 1 of {len(names)} cores, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 45 s: small models, fewer training sequences")
    parser.add_argument("--model", default="models/smollm2", help="a checkpoint folder to measure as well")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="only lines whose name contains this")
    parser.add_argument("--train-side", choices=["full", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=64, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.train_side:
        return train_side(args.train_side, args.rows, args.device)
    torch.manual_seed(0)
    figures = {"date": str(datetime.date.today()), "hardware": hardware(args.device)}
    print(figures["hardware"], figures["date"], "\n")
    if args.device == "cuda":
        figures["decode"] = cuda_lines()
        figures["training"] = compare_training(64, 3, "cuda")
    else:
        figures["decode"] = cpu_lines(args)
        if "training".startswith(args.only):
            figures["training"] = compare_training(2 if args.quick else 64, 1 if args.quick else 3, "cpu")
    print(json.dumps(figures))


def cpu_lines(args):
    queued = 96 if args.quick else 256
    tiny = build(4, 128, 4, 2, 32, 384, 128)
    lines = [("tiny Qwen3 (4 x 128, vocab 128), 64 rows", lambda: tiny, 64, True),
             (f"the same, {queued} rows queued", lambda: tiny, queued, True),
             ("the same, 64 rows of one length", lambda: tiny, 64, False)]
    if not args.quick:
        lines.append(("12 layers x 512, vocab 32,000, fp32",
                      lambda: build(12, 512, 8, 4, 64, 1536, 32000), 64, True))
        if Path(args.model, "config.json").exists():
            for dtype in (torch.float32, torch.bfloat16):
                lines.append((f"{Path(args.model).name}, {str(dtype)[6:]}", lambda dtype=dtype:
                              AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval(), 64, True))
        else:
            print(f"(no checkpoint at {args.model}: its lines are skipped; --model names another folder)\n")
    print("| task | generate s | ours s | ratio |\n|---|---|---|---|")
    figures = {}
    for name, model, rows, tail in lines:
        if args.only in name:
            model = model()
            model.generation_config.eos_token_id = None  # lengths are set
            figures[name] = compare(name, model, rows, args.repeats, tail)
    return figures


if __name__ == "__main__":
    main()
