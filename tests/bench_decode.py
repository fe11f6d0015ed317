"""How fast is the prefix decoder? Beside transformers' generate, and log-probs beside full logits.

    python tests/bench_decode.py                         # CPU, 15 minutes; --quick: under 45 s
    python tests/bench_decode.py --model models/smollm2  # adds a real checkpoint, fp32 and bf16
    python tests/bench_decode.py --device cuda           # tokens/s beside the bandwidth floor, too

CPU figures are process-CPU seconds on one thread: the two sides alternate in one process and each
reports its median. The task: prompts of 16 to 48 tokens, half of the rows with an 8-row prefix,
completions of mean length 48 (exponential, cut at 128; the lengths are set, the same on both
sides). `generate` gets the same embeddings, left-padded, with an attention mask, its dynamic cache
and the same sampling (temperature 1, no filters); a queue of 256 rows it gets in 4 batches of 64.
The last line is JSON with every figure.
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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prefix import Decoder, Prompt, Sampling, completion_logprobs, micro_batches

CLASSES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
SLOTS = 64


@dataclass
class Shape:
    """Sizes of a random model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    family: str = "qwen3"


TINY = Shape(4, 128, 4, 2, 32, 384, 128)
SMALL = Shape(12, 512, 8, 4, 64, 1536, 32000)
QWEN = Shape(28, 1536, 12, 2, 128, 8960, 151936, "qwen2")
TRAINING = Shape(2, 896, 14, 2, 64, 4864, 151936, "qwen2")
CUDA_SHAPES = {
    "Qwen3-0.6B": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen2.5-1.5B": QWEN,
}


def build(shape, dtype=torch.float32, device="cpu"):
    """A random model that never ends a completion by itself."""
    config_class, model_class = CLASSES[shape.family]
    config = config_class(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device(device):
        return model_class(config).to(dtype).eval()


@dataclass
class Work:
    """Rows to decode: what stands before each completion, and how long it is to be."""

    prompts: list
    prefixes: list
    lengths: list

    def first(self, count):
        return Work(self.prompts[:count], self.prefixes[:count], self.lengths[:count])


def make_work(model, rows, longest=128, tail=True):
    """The same Work for every call. tail: exponential lengths, else one length and no prefix."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompt_lengths = torch.randint(16, 49, (rows,), generator=generator).tolist()
    prompts = []
    for length in prompt_lengths:
        prompts.append(torch.randint(vocabulary, (length,), generator=generator).tolist())
    if not tail:
        prompts = [Prompt((ids * 3)[:48]) for ids in prompts]
        return Work(prompts, [None] * rows, [48] * rows)

    weight = model.get_input_embeddings().weight
    std = weight.float().std().item()
    prefixes = []
    for row in range(rows):
        prefix = None
        if row % 2 == 1:
            prefix = torch.randn(8, model.config.hidden_size, generator=generator) * std
            prefix = prefix.to(weight)
        prefixes.append(prefix)

    # Quantiles of an exponential distribution: the mean does not depend on luck.
    quantiles = (torch.arange(rows) + 0.5) / rows
    lengths = (-quantiles.log() * 53 * longest / 128).ceil().clamp(1, longest).long()
    lengths = lengths[torch.randperm(rows, generator=generator)].tolist()
    return Work([Prompt(ids) for ids in prompts], prefixes, lengths)


class SetLengths(Decoder):
    """A decoder whose rows end at set lengths, so that both sides do the same work."""

    def _admit(self, new, jobs, sampling):
        all_jobs = super()._admit(new, jobs, sampling)
        for slot in range(len(jobs), len(all_jobs)):
            self.stop[slot] = self.pos[slot] + self.lengths[all_jobs[slot].number]
        return all_jobs


def decode(decoder, work):
    """The work by our decoder; returns the number of tokens."""
    decoder.lengths = work.lengths
    rows = decoder.embed(work.prompts, work.prefixes)
    sampling = Sampling(max_new_tokens=max(work.lengths))
    completions = decoder.generate(rows, sampling)
    lengths = [len(completion.ids) for completion in completions]
    assert lengths == work.lengths
    return sum(lengths)


class RowLimits(StoppingCriteria):
    """Ends each row of generate at a length of its own."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


@torch.no_grad()
def generate(model, work, batch=SLOTS):
    """The work by transformers; returns the number of tokens."""
    for start in range(0, len(work.prompts), batch):
        rows = slice(start, start + batch)
        generate_batch(model, work.prompts[rows], work.prefixes[rows], work.lengths[rows])
    return sum(work.lengths)


def generate_batch(model, prompts, prefixes, lengths):
    inputs = embed(model, prompts, [[]] * len(prompts), prefixes)
    longest = max(len(x) for x in inputs)
    padded, masks = [], []
    for x in inputs:
        pads = longest - len(x)
        padded.append(F.pad(x, (0, 0, pads, 0)))  # on the left
        masks.append((torch.arange(longest) >= pads).long())
    limits = torch.tensor(lengths, device=model.device)
    model.generate(
        inputs_embeds=torch.stack(padded),
        attention_mask=torch.stack(masks).to(model.device),
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        max_new_tokens=max(lengths),
        stopping_criteria=StoppingCriteriaList([RowLimits(limits)]),
    )


def embed(model, prompts, completions, prefixes):
    """[prefix | prompt | completion] of each row, by the module: one [T, d] a row."""
    inputs = []
    for prompt, completion, prefix in zip(prompts, completions, prefixes):
        ids = torch.tensor(prompt.ids + completion, device=model.device)
        x = model.get_input_embeddings()(ids)
        if prefix is not None:
            x = torch.cat([prefix, x])
        inputs.append(x)
    return inputs


def compare(name, model, rows, repeats, tail=True):
    """Print and return one line of the CPU table."""
    work = make_work(model, rows, tail=tail)
    decoder = SetLengths(model, eos_ids=[], slots=SLOTS)
    generate_seconds, our_seconds = [], []
    for _ in range(repeats):
        start = time.process_time()
        generate(model, work)
        generate_seconds.append(time.process_time() - start)
        start = time.process_time()
        decode(decoder, work)
        our_seconds.append(time.process_time() - start)
    theirs = statistics.median(generate_seconds)
    ours = statistics.median(our_seconds)
    ratio = theirs / ours
    tokens = sum(work.lengths)
    rates = f"{tokens / theirs:.0f} / {tokens / ours:.0f}"
    print(f"| {name} | {theirs:.2f} | {ours:.2f} | {ratio:.2f}x | {rates} |", flush=True)
    return {
        "tokens": tokens,
        "hf_s": round(theirs, 3),
        "ours_s": round(ours, 3),
        "ratio": round(ratio, 2),
        "repeats": repeats,
    }


def cpu_lines(args):
    """The CPU table; returns its figures."""
    queued = 80 if args.quick else 256
    figures = {}

    def line(name, model, rows, tail=True):
        if args.only in name:
            model.generation_config.eos_token_id = None  # lengths are set
            figures[name] = compare(name, model, rows, args.repeats, tail)

    print("| task | generate s | ours s | ratio | tokens/s |\n|---|---|---|---|---|")
    tiny = build(TINY)
    line("tiny Qwen3 (4 x 128, vocab 128), 64 rows", tiny, 64)
    line(f"the same, {queued} rows queued", tiny, queued)
    line("the same, 64 rows of one length", tiny, 64, tail=False)
    if args.quick:
        return figures

    line("12 layers x 512, vocab 32,000, fp32", build(SMALL), 64)
    if args.only in "Qwen2.5-1.5B shape, bf16":
        line("Qwen2.5-1.5B shape, bf16", build(QWEN, torch.bfloat16), 64)
    if not Path(args.model, "config.json").exists():
        print(f"(no checkpoint at {args.model}: --model names another folder)")
        return figures
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        line(f"{Path(args.model).name}, {str(dtype)[6:]}", model, 64)
    return figures


# ---- Training log-probs: one side per child process, so that its peak memory is its own ----------


def train_side(side, rows, device):
    """Forward and backward of all micro-batches once; prints seconds and peak memory as JSON."""
    torch.manual_seed(0)
    model = build(TRAINING, device=device)
    work = make_work(model, rows)
    completions, lengths = [], []
    for prompt, prefix, length in zip(work.prompts, work.prefixes, work.lengths):
        completions.append(torch.randint(TRAINING.vocabulary, (length,)).tolist())
        prefix_length = 0 if prefix is None else len(prefix)
        lengths.append(prefix_length + len(prompt.ids) + length)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    score = chunked_logprobs if side == "chunked" else full_logprobs
    peak_before = peak_memory(device)
    start = clock(device)
    for group in micro_batches(lengths, 2048):
        prompts = [work.prompts[i] for i in group]
        prefixes = [work.prefixes[i] for i in group]
        logprobs = score(model, prompts, [completions[i] for i in group], prefixes)
        logprobs.sum().backward()
    seconds = clock(device) - start
    peak = peak_memory(device) - peak_before
    print(json.dumps({"seconds": seconds, "peak_gb": peak / 2**30}))


def peak_memory(device):
    """Bytes, since the process began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock(device):
    """Seconds: of the processor, or of the wall once the GPU has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def chunked_logprobs(model, prompts, completions, prefixes):
    """Ours."""
    scored = completion_logprobs(model, prompts, completions, prefixes, with_entropy=False)
    return scored[0]


def full_logprobs(model, prompts, completions, prefixes):
    """The plain way: all logits of the padded batch, log-softmax in fp32, gather."""
    inputs = embed(model, prompts, completions, prefixes)
    x = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # [B, T, d]
    logp = model(inputs_embeds=x).logits.float().log_softmax(-1)  # [B, T, V]
    picked = []
    for i, completion in enumerate(completions):
        last = len(inputs[i]) - 1
        columns = torch.arange(last - len(completion), last, device=model.device)
        targets = torch.tensor(completion, device=model.device)
        picked.append(logp[i, columns, targets])
    return torch.cat(picked)


def compare_training(rows, repeats, device):
    """Print and return the training lines."""
    runs = {"full": [], "chunked": []}
    for _ in range(repeats):
        for side in runs:
            command = [sys.executable, __file__, "--train-side", side]
            command += ["--rows", str(rows), "--device", device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))

    figures = {"sequences": rows, "repeats": repeats}
    print(
        f"\nTraining log-probs, forward and backward, {rows} sequences, width 896, vocab 151,936:"
    )
    for side, results in runs.items():
        seconds = statistics.median(run["seconds"] for run in results)
        peak = statistics.median(run["peak_gb"] for run in results)
        figures[side] = {"seconds": round(seconds, 3), "peak_gb": round(peak, 3)}
        print(f"{side} {seconds:.2f} s, {peak:.2f} GB")
    full, chunked = figures["full"], figures["chunked"]
    figures["time_ratio"] = round(chunked["seconds"] / full["seconds"], 3)
    figures["peak_ratio"] = round(chunked["peak_gb"] / full["peak_gb"], 3)
    print(f"time x {figures['time_ratio']:.2f}, peak x {figures['peak_ratio']:.2f}")
    return figures


# ---- CUDA ----------------------------------------------------------------------------------------


def bandwidth():
    """Bytes per second of a large copy on this GPU (reads + writes)."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)  # the first copy warms up
    start = clock("cuda")
    for _ in range(5):
        y.copy_(x)
    return 5 * 2 * x.numel() / (clock("cuda") - start)


def rate(function, *arguments):
    """Tokens per second of the second call; the first loads kernels and captures graphs."""
    function(*arguments)
    start = clock("cuda")
    tokens = function(*arguments)
    return tokens / (clock("cuda") - start)


def floor_rate(model, shape, work, slots, bytes_per_second):
    """Tokens per second if a step only read the weights and the live keys and values, once."""
    weight_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    column_bytes = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim  # keys, values; bf16
    context = 0
    for prompt, length in zip(work.prompts, work.lengths):
        context += (len(prompt.ids) + length / 2) / len(work.prompts)
    seconds = (weight_bytes + slots * context * column_bytes) / bytes_per_second
    return slots / seconds


def cuda_lines(new=256):
    """tokens/s at 64 and 256 slots, beside generate and the floor."""
    speed = bandwidth()
    figures = {}
    print(f"copy bandwidth {speed / 1e12:.2f} TB/s\n")
    print("| model, slots | generate tok/s | ours tok/s | ratio | share of floor |")
    print("|---|---|---|---|---|")
    for name, shape in CUDA_SHAPES.items():
        model = build(shape, dtype=torch.bfloat16, device="cuda")
        for slots in (64, 256):
            work = make_work(model, 4 * slots, longest=new)
            theirs = rate(generate, model, work.first(slots), slots)
            ours = rate(decode, SetLengths(model, eos_ids=[], slots=slots), work)
            floor = floor_rate(model, shape, work, slots, speed)
            cells = f"{theirs:.0f} | {ours:.0f} | {ours / theirs:.1f}x | {ours / floor:.0%}"
            print(f"| {name}, {slots} | {cells} |", flush=True)
            figures[f"{name} {slots}"] = {
                "hf_tok_s": round(theirs),
                "ours_tok_s": round(ours),
                "floor_tok_s": round(floor),
                "share": round(ours / floor, 3),
            }
    return figures


# ---- The script ----------------------------------------------------------------------------------


def hardware(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [platform.processor()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, 1 of {len(names)} cores, torch {torch.__version__}"


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, under 45 s")
    parser.add_argument("--model", default="models/smollm2", help="a checkpoint folder, too")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, help="default: 5, with --quick 3")
    parser.add_argument("--only", default="", help="only lines whose name contains this")
    parser.add_argument("--train-side", choices=["full", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=64, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats is None:
        args.repeats = 3 if args.quick else 5
    return args


def main():
    args = parse_flags()
    torch.set_num_threads(1)
    if args.train_side:
        train_side(args.train_side, args.rows, args.device)
        return

    torch.manual_seed(0)
    figures = {"date": str(datetime.date.today()), "hardware": hardware(args.device)}
    print(figures["hardware"], figures["date"], "\n")
    if args.device == "cuda":
        figures["decode"] = cuda_lines()
        figures["training"] = compare_training(64, 3, "cuda")
    else:
        figures["decode"] = cpu_lines(args)
        if args.only in "training":
            rows, repeats = (2, 1) if args.quick else (64, 3)
            figures["training"] = compare_training(rows, repeats, "cpu")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
