"""The simplest training loop, and what every loop shares: ranks, optimizer step, run folders, exact resume.

  warmup    ten updates on worked answers with a prefix before the prompt, z from the *prior*, L = 1 (Eq. 11): the model learns
            to take a prefix as context. More would teach it to ignore the prefix. `--prefix none`: the RL baselines' start.
  pretrain  makes the embedded default model `tiny`: a small Qwen3, trained on the tiny world of rewards.py and saved as an
            ordinary Hugging Face folder, so that nothing downstream knows it is special. `--model tiny-vl`: a small Qwen2.5-VL
            with its vision tower, on drawn scenes.

It also builds what comes before RL (`prepare`): base, VAE and warm-up, where they are missing.

Departs from the paper, which gives no learning rate or batch size: ours are flags. Randomness is a pure function of
(seed, step, row), so a resumed run needs no generator state, and N ranks see the batches that one rank would.

Run it:
    python sft.py pretrain                                  # runs/tiny/base, a bit over a minute on two idle cores
    python sft.py pretrain --model tiny-vl                  # runs/tiny-vl/base, about a minute and a half
    python sft.py                                           # warm up the tiny model under prefixes
    python sft.py --model Qwen/Qwen3-0.6B-Base --vae runs/qwen/vae --traces math=traces_math.jsonl --out runs/qwen/sft
    torchrun --nproc_per_node=4 sft.py --model ...          # the same on four GPUs
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import time
import warnings
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

import vae as vae_stage
from prefix import (Palette, check_source, completion_logprobs, load_policy, micro_batches, prompt_of, rope_positions, text_model,
                    whole)
from rewards import (ANSWER, CHAT_LEAK, END, IMAGE, PAD, QUESTION, SIDE, STYLES, STYLES_OF, TINY_CHAT_TEMPLATE, TINY_VOCABULARY,
                     VISION_END, VISION_START, VL_LEAK, VL_STYLE_WORDS, VL_VOCABULARY, prompt_ids, tiny_answer, tiny_document,
                     tiny_question, tiny_scene_document, tiny_scene_traces, tiny_task, tiny_traces, tiny_vl_task)
from vae import (TINY_BASES, VAE, Processor, add_flags, as_flags, check_traces, find_model, find_vae, load_traces, read_json,
                 reason, require_same, run_main, see_images, tiny_defaults, write_text)

# ---- ranks --------------------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """Where this process stands among the ranks of a torchrun job; alone it is rank 0 of 1.

    Each rank holds the whole model, or with fsdp its share of every weight, gradient and moment (`shard`).
    """
    rank: int
    world: int
    device: torch.device
    fsdp: bool = False

    @classmethod
    def start(cls, device="auto", fsdp=False):
        """Join the job that torchrun describes in the environment, if any. device: auto, cpu, cuda or mps.

        torchrun ends all ranks as soon as one has died. The time-out is for a rank that hangs, and longer than any honest
        wait: rank 0 may fetch a model or train a VAE meanwhile.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = device_of(device)
        if device == "cuda" and world > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if fsdp and world == 1:
            raise ValueError("--fsdp shards over several ranks: start them with torchrun --nproc_per_node=N, or leave it out")
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=1))
        return cls(rank, world, torch.device(device), fsdp)

    def own(self, rows):
        """This rank's share of a global batch: every world-th item."""
        return rows[self.rank::self.world]

    def total(self, values):
        """Sum of a list of numbers over all ranks, element by element, in double precision."""
        summed = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type != "cuda" else self.device)
        if self.world > 1:
            dist.all_reduce(summed)
        return summed.tolist()

    def level(self, groups):
        """This rank's micro-batches, under FSDP with empty ones added until every rank has as many: each forward and backward
        gathers weights from all ranks, so each must be run by all. completion_logprobs makes of [] a row that counts nothing.
        """
        if not self.fsdp:
            return groups
        counts = self.total([len(groups) * (rank == self.rank) for rank in range(self.world)])
        return groups + [[]] * (int(max(counts)) - len(groups))

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def leave(self):
        """End what the ranks do together: from here on each is alone, and may end."""
        if self.world > 1:
            dist.destroy_process_group()


def device_of(name):
    """"auto" is the GPU, if there is one. ValueError for a device that cannot be used."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {reason(error)[:150]}") from None
    return name


def seed_of(*parts):
    """A 63-bit seed that is a pure function of its parts, e.g. seed_of(seed, "rollout", step, row)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def rows_of_step(rows, step, count, seed, extra=0):
    """The `count` rows of a training set that a step asks: every row once an epoch, each epoch in an order of its own.

    extra * count replacements follow: the set's other rows, in an order of the step's own. So a step asks no row twice,
    unless the set has fewer than (1 + extra) * count.
    """
    start, size = step * count, len(rows)
    first, last = start // size, (start + count - 1) // size
    order = [i for epoch in range(first, last + 1) for i in random.Random(seed_of(seed, "epoch", epoch)).sample(range(size), size)]
    chosen = order[start - first * size:][:count]
    others = (sorted(set(range(size)) - set(chosen)) or chosen) if extra else []
    random.Random(seed_of(seed, "replacements", step)).shuffle(others)
    return [rows[i] for i in chosen + [others[i % len(others)] for i in range(extra * count)]]


# ---- the model and its optimizer ----------------------------------------------------------------------------------------

def load_trainable(name, ranks, args):
    """(model, tokenizer) for a training loop: fp32 weights, all trained but a vision tower's.

    --checkpointing keeps a layer's input alone and runs the layer again in the backward pass. With --fsdp each rank reads the
    model into its host's memory and moves its share of it to the device.
    """
    model, tokenizer = load_policy(name, "cpu" if ranks.fsdp else ranks.device)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in text_model(model).layers:
            layer.training = True               # without it transformers ignores the call; what is inside stays in eval mode
    return shard(model, ranks, args.precision) if ranks.fsdp else model, tokenizer


def load_reference(name, model, ranks, args):
    """The policy that a KL term measures from: only read, in bf16 with --precision bf16, and sharded as `model` is. What
    training leaves as it is (a vision tower) it shares with `model`."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    reference = load_policy(name, "cpu" if ranks.fsdp else ranks.device, dtype)[0].requires_grad_(False)
    reference = shard(reference, ranks, args.precision) if ranks.fsdp else reference
    for own, trained in zip(reference.parameters(), model.parameters()):
        if not trained.requires_grad:
            own.data = trained.data
    return reference


def shard(model, ranks, precision):
    """FSDP2: leave this rank its share (along dimension 0) of every weight; so the gradients and moments are shares, too.

    A layer's weights are gathered when it runs, forward and backward, and dropped after it; in bf16 with --precision bf16,
    while shares, gradients and residual stream are fp32. The tables of embedding and head are read outside of any module's
    forward, so `whole` (prefix.py) gathers them. Gradients of ranks are added, not averaged, as apply_gradients has it.
    A vision tower, which is small and not trained, stays whole on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if precision == "bf16" else (), cast_forward_inputs=False)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    share = lambda weight: distribute_tensor(weight.detach().to(ranks.device), mesh, [Shard(0)])
    tables = {weight: torch.nn.Parameter(share(weight), weight.requires_grad)
              for weight in dict.fromkeys(module.weight for module in ends)}                        # one, where they are tied
    for module in ends:
        module.weight = tables[module.weight]
    text = text_model(model)
    for part in (*text.layers, text):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=set(tables.values()))
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if text is not model.model:
        model.model.visual.to(ranks.device)
    return model


def make_optimizer(model, lr, weight_decay=0.0):
    """AdamW on every trainable weight; our choice: betas (0.9, 0.98), as the moments must settle within tens of steps."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, (0.9, 0.98), weight_decay=weight_decay)


def set_learning_rate(optimizer, args, step):
    """--lr x a factor that is a pure function of the step, so a resumed run has nothing to restore: it rises over
    --lr-warmup steps, then stays, or falls along a line or half a cosine that reaches 0 after the last step. Returns it."""
    rise, tau = (step + 1) / (args.lr_warmup + 1), step / args.steps
    fall = {"constant": 1.0, "linear": 1 - tau, "cosine": (1 + math.cos(math.pi * tau)) / 2}[args.lr_schedule]
    optimizer.param_groups[0]["lr"] = args.lr * min(1.0, rise) * fall
    return optimizer.param_groups[0]["lr"]


def apply_gradients(model, optimizers, ranks, max_norm=1.0):
    """Add the gradients of all ranks (FSDP's backward has), clip, step, clear. Returns the gradient norm before clipping.

    Losses are divided by *global* counts before backward, so gradients of ranks and of micro-batches add up to those of
    one big batch. A rank without any loss takes part with zeros: every rank makes the same collective calls.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if ranks.world > 1 and not ranks.fsdp:
            dist.all_reduce(p.grad)
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if not torch.isfinite(norm):                    # the same on every rank: all of them stop here, with their weights whole
        raise ValueError("the gradient is not finite: lower --lr, or use --precision fp32; what was saved is still good")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def autocast(device, precision):
    """Forward passes in bf16 with fp32 weights, or plain fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


# ---- metrics ------------------------------------------------------------------------------------------------------------

def by_part(values, guided):
    """values [N, K] and N truth values -> the sums [2, K] over unguided and over guided items, in double precision."""
    values, guided = values.cpu().double(), torch.tensor(guided, dtype=torch.bool)
    return torch.stack([values[~guided].sum(0), values[guided].sum(0)])


def means(names, sums, ranks):
    """sums [2, K] over this rank's unguided and guided items, the first their number -> means over all ranks, by name."""
    (unguided, guided), row = ranks.total(sums.tolist()), {}
    for part, (count, *values) in (("", map(sum, zip(unguided, guided))), ("_guided", guided), ("_unguided", unguided)):
        row[names[0] + part] = int(count)
        row.update({name + part: value / count if count else None for name, value in zip(names[1:], values)})
    return row


# ---- run folders --------------------------------------------------------------------------------------------------------

class Run:
    """A run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint-N/, best/ and policy/ (the finished model).

    policy/ and best/ are Hugging Face folders. Files and folders are filled under a temporary name that is changed when they
    are complete: a kill at any moment leaves the old or the new, never a part. Rank 0 alone writes, but for checkpoints of
    sharded models, of which each rank writes its share; all ranks must see the folder.
    Raises ValueError where is_finished does, unless overwrite is asked for.
    """

    def __init__(self, folder, config, ranks, resume=False, overwrite=False, keep=2):
        self.folder, self.ranks, self.keep, self.writes = Path(folder), ranks, keep, ranks.rank == 0
        self.best, known = {"step": 0, "score": -math.inf}, self.folder / "config.json"
        if overwrite and self.writes and known.is_file():
            self.tidy()
            for path in (self.folder / "policy", self.folder / "best", *self.folder.glob("*.jsonl"), known):    # ours alone
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)      # known last: a kill in between shows
        ranks.wait()                                    # every rank sees the folder as rank 0 left it
        self.finished = known.is_file() and is_finished(self.folder, config, resume)
        ranks.wait()
        if self.writes and self.finished:
            self.tidy()                                 # a kill may have come between policy/ and this
        elif self.writes and not known.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(known, json.dumps(config, indent=1))

    def log(self, name, *rows):
        """Append rows to NAME.jsonl, handed to the system before this returns."""
        if self.writes:
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def checkpoints(self):
        return sorted(self.folder.glob("checkpoint-[0-9]*"))

    def save(self, step, model, optimizers, **state):
        """checkpoint-STEP/: all that the loop needs to go on after `step` finished steps. Keeps the newest `keep`."""
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}        # a tied weight once
        for i, optimizer in enumerate(optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                tensors.update({f"{i}.{index}.{name}": value for name, value in entries.items()})
        with self.new_folder(f"checkpoint-{step:06d}") as folder:
            if self.ranks.fsdp:                         # every rank writes its shares into a file of its own
                with distributed_checkpoint() as dcp:
                    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
            elif self.writes:
                save_file(tensors, folder / "tensors.safetensors")
            sums = self.checksums(folder)
            if self.writes:
                (folder / "state.json").write_text(json.dumps({"step": step, **state, "crc32": sums}))
        if self.writes:
            for old in self.checkpoints()[:-self.keep]:
                shutil.rmtree(old)
            bests = [*self.former_bests(), self.folder / "best"]
            for folder, following in zip(bests, bests[1:]):             # wanted while a checkpoint goes back before the next best
                if step_of(following) <= step_of(self.checkpoints()[0]):
                    shutil.rmtree(folder)
        self.ranks.wait()

    def checksums(self, folder):
        """CRC-32 of each file of tensors, in the order of their names; of a sharded checkpoint each rank reads its own file."""
        if not self.ranks.fsdp:
            return [crc32(path) for path in folder.glob("*.safetensors")] if self.writes else []
        own = sum(crc32(path) for path in folder.glob(f"shard-{self.ranks.rank + 1:05d}-*.safetensors"))
        return list(map(int, self.ranks.total([own * (rank == self.ranks.rank) for rank in range(self.ranks.world)])))

    def restore(self, model, optimizers):
        """Load the newest checkpoint that all ranks can read, of any number of ranks. Returns {"step": ...}, step 0 if none.

        Metrics and samples are cut back to that step, and best/ to what it was: what came after is about to happen again.
        Raises ValueError, and touches nothing, if there are checkpoints but none can be read.
        """
        state = {"step": 0}
        for folder in reversed(self.checkpoints()):
            try:
                tensors, found, problem = *read_checkpoint(folder, model, optimizers, self.ranks), None
            except Exception as error:                  # each library has its own error for a torn file; go one back
                problem = reason(error)
                print(f"{folder} cannot be read ({problem}): going back to the one before", flush=True)
            if not self.ranks.total([problem is not None])[0]:
                load_tensors(tensors, model, optimizers)
                state = found
                break
        if self.checkpoints() and not state["step"]:
            raise ValueError(f"no checkpoint in {self.folder} can be read here ({problem or 'another rank cannot'}), perhaps as "
                             "another version saved them: --overwrite starts the run again, another --out keeps what is there")
        if self.writes:
            for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
                if path.is_file():                          # a torn last line has no end of line
                    lines = path.read_text().split("\n")[:-1] if state["step"] else []
                    write_text(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= state["step"]))
            for folder in [*self.former_bests(), self.folder / "best"]:
                if folder.exists() and step_of(folder) > state["step"]:
                    shutil.rmtree(folder)
            for folder in self.checkpoints():               # unreadable ones: set aside, or they would be taken for the newest
                aside = self.folder / f"unreadable-{folder.name}"
                if folder.name > f"checkpoint-{state['step']:06d}":
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(folder, aside)
                    print(f"{folder} is now {aside}, until the run is finished", flush=True)
            if self.former_bests() and not (self.folder / "best").exists():
                os.rename(self.former_bests()[-1], self.folder / "best")
        self.ranks.wait()
        if (self.folder / "best").exists():
            self.best = json.loads((self.folder / "best" / "best.json").read_text())
        return state

    def keep_best(self, step, score, model, tokenizer):
        """best/: the policy of the highest score so far (the earliest of equals), with best.json {"step", "score"}."""
        if score <= self.best["score"]:
            return
        if self.writes and (self.folder / "best").exists() and self.checkpoints():      # a resumed run may want it back
            os.rename(self.folder / "best", self.folder / f"best-{self.best['step']:06d}")
        self.best = {"step": step, "score": score}
        self.write_policy("best", model, tokenizer, self.best)

    def former_bests(self):
        return sorted(self.folder.glob("best-[0-9]*"))

    def finish(self, model, tokenizer):
        """Write policy/, the finished model; its presence says that the run is complete. Checkpoints are dropped."""
        self.write_policy("policy", model, tokenizer)
        self.finished = True
        if self.writes:
            self.tidy()

    def write_policy(self, name, model, tokenizer, note=None):
        """An ordinary Hugging Face folder; the weights of a sharded model are gathered one by one."""
        weights = {}
        for key, p in model.named_parameters() if self.ranks.fsdp else ():
            value = whole(p.detach())
            weights.update({key: value.cpu()} if self.writes else {})
        with self.new_folder(name) as folder:
            if self.writes:
                model.save_pretrained(folder, state_dict=weights or None)
                tokenizer.save_pretrained(folder)
                if note:
                    (folder / f"{name}.json").write_text(json.dumps(note))
        self.ranks.wait()

    def tidy(self):
        """Drop what only an unfinished run needs."""
        for folder in (*self.checkpoints(), *self.former_bests(), *self.folder.glob("unreadable-*"), *self.folder.glob(".*.tmp")):
            shutil.rmtree(folder)

    @contextlib.contextmanager
    def new_folder(self, name):
        """Fill a folder, on all ranks, under a temporary name. Rank 0 gives it its own name when it is complete, and removes it
        if filling it fails."""
        path, temporary = self.folder / name, self.folder / f".{name}.tmp"
        if self.writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.ranks.wait()
        try:
            yield temporary
            if self.writes:
                if path.exists():
                    shutil.rmtree(path)
                os.rename(temporary, path)
        finally:
            if self.writes:
                shutil.rmtree(temporary, ignore_errors=True)


def is_finished(folder, config, resume):
    """Whether the run in a folder that has a config.json is complete. Raises ValueError if its settings are others, or if it is
    unfinished and resume is not asked for."""
    before = read_json(folder / "config.json")
    require_same(f"{folder} holds a run", before, json.loads(json.dumps(config)), "--overwrite to replace it")
    finished = (folder / "policy" / "config.json").is_file()
    if not finished and not resume:
        raise ValueError(f"{folder} holds an unfinished run: --resume goes on with it, --overwrite starts it again")
    return finished


def step_of(folder):
    """The step of a checkpoint or best folder."""
    return json.loads((folder / ("best.json" if folder.name.startswith("best") else "state.json")).read_text())["step"]


def crc32(path):
    """The checksum of a file, read in pieces of 16 MB."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(2 ** 24):
            value = zlib.crc32(piece, value)
    return value


def read_checkpoint(folder, model, optimizers, ranks):
    """({key: tensor}, state) of a complete checkpoint, however many ranks wrote it; of a sharded tensor this rank's share.

    Nothing is loaded into model or optimizers yet, and no rank waits for another: reading may fail on one alone.
    """
    state = json.loads((folder / "state.json").read_text())
    paths, sums = sorted(folder.glob("*.safetensors")), state.pop("crc32")
    if len(paths) != len(sums) or any(crc32(paths[i]) != sums[i] for i in ranks.own(range(len(sums)))):     # together: all
        raise ValueError("its files are not as they were saved")
    owners = {f"model.{name}": p for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        owners.update({f"{i}.{j}": p for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"])})
    with distributed_checkpoint() as dcp:
        reader, tensors = dcp.HuggingFaceStorageReader(str(folder)), {}
        for key, entry in reader.read_metadata().state_dict_metadata.items():       # a moment is laid out as its weight is
            owner = owners[key if key.startswith("model.") else key.rpartition(".")[0]]
            tensors[key] = torch.zeros_like(owner) if entry.size == owner.shape else torch.zeros(entry.size)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, state


@contextlib.contextmanager
def distributed_checkpoint():
    """torch.distributed.checkpoint (safetensors, no pickle), its errors as OSError: they are no Exceptions. It also warns that
    with no_dist each rank reads for itself, which is what we want."""
    from torch.distributed import checkpoint
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield checkpoint
    except checkpoint.CheckpointException as error:
        raise OSError(str(next(iter(error.failures.values()))[0])) from error


@torch.no_grad()
def load_tensors(tensors, model, optimizers):
    """Put what read_checkpoint found into model and optimizers."""
    for name, p in model.named_parameters():
        p.copy_(tensors[f"model.{name}"])
    contents = [{**optimizer.state_dict(), "state": {}} for optimizer in optimizers]
    for key, value in tensors.items():
        if not key.startswith("model."):
            which, index, name = key.split(".", 2)
            contents[int(which)]["state"].setdefault(int(index), {})[name] = value
    for optimizer, content in zip(optimizers, contents):
        optimizer.load_state_dict(content)


# ---- warm-up under a prefix (Eq. 11) ------------------------------------------------------------------------------------

def answer_ids(trace, tokenizer, prompt_style, max_tokens):
    """(prompt ids, answer ids with the end token) of a trace; the answer is cut at max_tokens (then without end token).

    A prompt over max_tokens gives (None, None): cut, it would lose its chat header or its end.
    """
    prompt = prompt_of(trace, tokenizer, style=prompt_style)
    lead = "" if prompt_style == "chat" or (prompt_style == "auto" and tokenizer.chat_template) else " "
    answer = tokenizer(lead + trace["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return (prompt, answer[:max_tokens]) if len(prompt) <= max_tokens else (None, None)


def lm_step(model, rows, prefixes, ranks, tokens_per_batch=4096, precision="fp32"):
    """Backward of the mean negative log-likelihood of the answers. rows: this rank's (prompt ids, answer ids).

    The mean is over the answer tokens of *all* ranks, so neither micro-batches nor ranks change the gradient. Returns
    (this rank's summed loss, all ranks' answer tokens).
    """
    total = ranks.total([sum(len(answer) for _, answer in rows)])[0]
    loss_sum = 0.0
    lengths = [len(prompt) + len(answer) + (0 if p is None else len(p)) for (prompt, answer), p in zip(rows, prefixes)]
    for group in ranks.level(micro_batches(lengths, tokens_per_batch)):
        with autocast(ranks.device, precision):
            logprobs, _ = completion_logprobs(model, [rows[i][0] for i in group], [rows[i][1] for i in group],
                                              [prefixes[i] for i in group], with_entropy=False)
        (-logprobs.sum() / total).backward()
        loss_sum -= logprobs.sum().item()
    return loss_sum, total


def pairs_of(traces, tokenizer, args, ranks):
    """answer_ids of all traces whose prompts are not over --max-tokens. ValueError if none is left."""
    pairs = [pair for pair in (answer_ids(trace, tokenizer, args.prompt, args.max_tokens) for trace in traces) if pair[0]]
    if not pairs:
        raise ValueError(f"the prompts of all {len(traces)} traces are over --max-tokens {args.max_tokens}: raise it")
    if ranks.rank == 0 and len(pairs) < len(traces):
        print(f"left out {len(traces) - len(pairs)} of {len(traces)} traces: prompts over --max-tokens {args.max_tokens}")
    return pairs


def warmup(model, tokenizer, pairs, palette, run, args):
    """Eq. 11: `args.steps` updates on answers under prefixes drawn from the prior, independent of the trace. pairs: pairs_of."""
    optimizer = make_optimizer(model, args.lr)
    start = run.restore(model, [optimizer])["step"]
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="sft", disable=not run.writes):
        began = time.time()
        rows = run.ranks.own(random.Random(seed_of(args.seed, "sft batch", step)).choices(pairs, k=args.batch))
        prefixes, _ = palette.draw([seed_of(args.seed, "sft prefix", step, i) for i in run.ranks.own(range(args.batch))])
        loss_sum, tokens = lm_step(model, rows, prefixes, run.ranks, args.tokens_per_batch, args.precision)
        lr, norm = set_learning_rate(optimizer, args, step), apply_gradients(model, [optimizer], run.ranks)
        run.log("metrics", {"step": step + 1, "loss": run.ranks.total([loss_sum])[0] / tokens, "gradient_norm": norm, "lr": lr,
                            "answer_tokens": int(tokens), "seconds": round(time.time() - began, 3)})
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            run.save(step + 1, model, [optimizer])
    run.finish(model, tokenizer)


# ---- pretraining the tiny base ------------------------------------------------------------------------------------------

def tiny_tokenizer(vocabulary=TINY_VOCABULARY):
    """A word-level Hugging Face tokenizer of the tiny world, with a chat template "<q> question <a>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [word for word in (VISION_START, VISION_END, IMAGE) if word in vocabulary]        # stand without spaces around
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=END, unk_token=PAD,
                                        additional_special_tokens=special)
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


def tiny_model(seed=0):
    """A Qwen3 of 2 layers, width 128 and 0.4M weights. Init 0.08, our choice: at 0.02 learning starts late."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(TINY_VOCABULARY), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, intermediate_size=384, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=TINY_VOCABULARY.index(END), pad_token_id=TINY_VOCABULARY.index(PAD)))


def tiny_vl_processor():
    """The tokenizer of the drawn scenes, with the settings of their pictures: 8 x 8 patches of 7 pixels, 4 x 4 visual tokens."""
    bounds = dict(shortest_edge=14 * 14, longest_edge=224 * 224)
    return Processor(tiny_tokenizer(VL_VOCABULARY), patch_size=7, temporal_patch_size=1, size=bounds)


def tiny_vl_model(seed=0):
    """A Qwen2.5-VL of 2 layers and width 128, with a vision tower of 1 layer and width 64."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(seed)
    word = {name: i for i, name in enumerate(VL_VOCABULARY)}
    text = dict(vocab_size=len(VL_VOCABULARY), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                intermediate_size=384, max_position_embeddings=512, initializer_range=0.08, bos_token_id=None,
                eos_token_id=word[END], pad_token_id=word[PAD],
                rope_parameters=dict(rope_type="default", rope_theta=1000.0, mrope_section=[4, 6, 6]))
    vision = dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=7, spatial_merge_size=2,
                  temporal_patch_size=1, window_size=SIDE, fullatt_block_indexes=[0], out_hidden_size=128, initializer_range=0.08)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=word[IMAGE], vision_start_token_id=word[VISION_START],
        vision_end_token_id=word[VISION_END], tie_word_embeddings=True))


def tiny_batch(seed, step, batch, length, model, tokenizer):
    """The text world's documents of one step, as embed_documents gives them; positions are the columns (None)."""
    rng = random.Random(seed_of(seed, "document", step))
    return *embed_documents([tiny_document(rng, length) for _ in range(batch)], model, tokenizer), None


def embed_documents(documents, model, tokenizer):
    """Documents (words, n_title, soft) -> ids [B, T], input embeddings [B, T, d] (soft title rows are means of bags), weights
    [B, T]: 1 where the word is to be predicted, 0 in titles, pads and inside questions, which hold nothing to learn."""
    word_id, table = tokenizer.get_vocab(), model.get_input_embeddings().weight
    longest = max(len(words) for words, _, _ in documents)
    ids = torch.tensor([[word_id[word] for word in words] + [word_id[PAD]] * (longest - len(words))
                        for words, _, _ in documents])                                                 # [B, T]
    opened, closed = (ids == word_id[QUESTION]).cumsum(1), (ids == word_id[ANSWER]).cumsum(1)
    weights = ~((opened > closed) & (ids != word_id[QUESTION]) | (ids == word_id[ANSWER]) | (ids == word_id[PAD]))     # [B, T]
    for row, (_, n_title, _) in zip(weights, documents):
        row[:n_title] = False
    embeddings = torch.nn.functional.embedding(ids, table)                                             # [B, T, d]
    soft = [(b, t, bag) for b, (_, _, bags) in enumerate(documents) for t, bag in bags.items()]
    if soft:
        flat = torch.tensor([word_id[word] for _, _, bag in soft for word in bag])
        starts = torch.tensor([0] + [len(bag) for _, _, bag in soft[:-1]]).cumsum(0)
        means = torch.nn.functional.embedding_bag(flat, table, starts, mode="mean")                    # [soft rows, d]
        embeddings = embeddings.index_put((torch.tensor([b for b, _, _ in soft]), torch.tensor([t for _, t, _ in soft])), means)
    return ids, embeddings, weights.float()


def tiny_vl_batch(seed, step, batch, _, model, processor):
    """The drawn world's documents of one step: also the pictures' rows from the vision tower, and rotary positions [3, B, T]."""
    rng = random.Random(seed_of(seed, "scene document", step))
    documents = [tiny_scene_document(rng, (SIDE // 14) ** 2) for _ in range(batch)]
    ids, embeddings, weights = embed_documents([document[:3] for document in documents], model, processor)
    pictures = [processor.read(image) for *_, image in documents]
    at_image = (ids == model.config.image_token_id)[:, :, None]                                        # [B, T, 1]
    embeddings = embeddings.masked_scatter(at_image, torch.cat(see_images(model, pictures)))
    return ids, embeddings, weights, rope_positions(model, ids.tolist(), [()] * batch, pictures, ids.shape[1])


def pretrain(out, seed=0, steps=900, batch=32, length=80, world="tiny", resume=False, overwrite=False, save_every=100, keep=2):
    """Make the base of a tiny world ("tiny" or "tiny-vl") in `out`: policy/ (a Hugging Face folder) and traces.jsonl.

    Returns the Run. length: words of a document (a scene's document is as long as it is).
    """
    ranks, vl = Ranks.start("cpu"), world == "tiny-vl"
    config = dict(stage="pretrain", seed=seed, steps=steps, batch=batch, length=length, world=world)
    run = Run(out, config, ranks, resume, overwrite, keep)
    if run.writes and not run.finished:
        run.ranks = Ranks(0, 1, ranks.device)           # rank 0 works alone: the model is too small to share
        model, reader = (tiny_vl_model(seed), tiny_vl_processor()) if vl else (tiny_model(seed), tiny_tokenizer())
        make_batch = tiny_vl_batch if vl else tiny_batch
        _pretrain(run, model, lambda step: make_batch(seed, step, batch, length, model, reader), steps, save_every)
        leak = (style_leak_vl if vl else style_leak)(model, reader)
        print(f"without context an answer opens in style {', '.join(f'{name} {share:.3%}' for name, share in leak.items())} "
              f"(trained at {f'{VL_LEAK:.2%} for box and place' if vl else f'{CHAT_LEAK:.2%} for math and code'})")
        run.log("metrics", {"step": steps, **{f"leak_{name}": share for name, share in leak.items()}})
        traces = tiny_scene_traces(1500, seed) if vl else tiny_traces(3000, seed)
        write_text(run.folder / "traces.jsonl", "".join(json.dumps(row) + "\n" for row in traces))
        run.finish(model.eval(), reader)
    ranks.wait()
    return run


def _pretrain(run, model, make_batch, steps, save_every):
    """The loop of both worlds. Muon (hidden matrices) and AdamW (the rest), both from torch.optim: AdamW alone needs more steps.

    make_batch(step) -> ids [B, T], embeddings [B, T, d], weights [B, T], rotary positions [3, B, T] or None.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and (".layers." in name or "visual." in name)]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = run.restore(model, optimizers)["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="pretraining the tiny base")
    for step in bar:
        warm, cool = (step + 1) / 30, 0.03 + 1.6 * (1 - step / steps)      # up over 30 steps, flat, then down from 40% on
        for optimizer, lr in zip(optimizers, peak):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, warm, cool)
        ids, embeddings, weights, positions = make_batch(step)
        hidden = text_model(model)(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden)[:, :-1]                                         # [B, T-1, V]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        norm = apply_gradients(model, optimizers, run.ranks)
        run.log("metrics", {"step": step + 1, "loss": loss.item(), "gradient_norm": norm})
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            run.save(step + 1, model, optimizers)


@torch.no_grad()
def style_leak(model, tokenizer, questions=512):
    """Mean probability of each style's opening words where an answer to arithmetic begins, without any context: how rare the
    good strategies are decides what exploration can gain, so it is measured and printed, not assumed."""
    asked = [row["question"] for row in tiny_task(0, questions).test if row["family"] == "arith"]
    rows = torch.tensor([prompt_ids(question, tokenizer) for question in asked])                       # [N, T], all one length
    first = model(input_ids=rows).logits[:, -1].softmax(-1).mean(0)                                    # [V]
    openings = {style: {tiny_answer(random.Random(i), tiny_question(random.Random(i)), style).split()[0] for i in range(200)}
                for style in STYLES}
    return {style: first[tokenizer.convert_tokens_to_ids(sorted(openings[style]))].sum().item() for style in STYLES}


@torch.no_grad()
def style_leak_vl(model, processor, questions=256):
    """The same for the drawn scenes, whose styles open with words of their own."""
    prompts = [prompt_of(row, processor) for row in tiny_vl_task(0, questions).test]
    first = processor.convert_tokens_to_ids([words[0] for words in VL_STYLE_WORDS.values()] + ["picture"])
    logprobs = [completion_logprobs(model, prompts, [[word]] * len(prompts), None, with_entropy=False)[0] for word in first]
    box, prose, place, picture = (values.exp().mean().item() for values in logprobs)
    return {"box": box, "prose": prose + picture, "place": place}


# ---- what comes before RL -----------------------------------------------------------------------------------------------

def prepare(args, ranks):
    """Build what is missing below grpo.py's loop, each stage with the command that a user would type, and set args.vae.

    Returns {schedule: folder of the warmed-up policy to start from}; that of "none" is warmed up without prefixes.
    """
    root, base, given = Path(args.out), args.model, args.vae
    if base in TINY_BASES:
        base = str(root / "base")
        stage("sft.py pretrain", main,
              dict(model=args.model, out=base, seed=args.base_seed, steps=args.base_steps, resume=True), ranks)
        if not args.traces:
            args.traces, args.limit = [f"{base}/traces.jsonl"], 10**9
    common, args.vae = dict(model=base, limit=args.limit, traces=args.traces), given or str(root / "vae")
    found = given and Path(given, "config.json").is_file()              # a VAE that you name is used as it is
    stage("vae.py", vae_stage.main if ranks.rank == 0 and not found else None, dict(out=args.vae, **common), ranks)
    folders = {schedule: root / ("sft-none" if schedule == "none" else "sft") for schedule in args.schedule}
    for folder in dict.fromkeys(folders.values()):
        stage("sft.py", main, dict(
            out=folder, vae=args.vae, prefix="none" if folder.name == "sft-none" else "prior", lr=args.sft_lr, batch=args.sft_batch,
            **common, precision=args.precision, device=args.device, prompt="plain" if args.prompt == "few-shot" else args.prompt,
            resume=True, fsdp=args.fsdp, checkpointing=args.checkpointing), ranks)
    return {schedule: str(folder / "policy") for schedule, folder in folders.items()}


def stage(script, main_function, flags, ranks):
    """Run another script's main, and wait for all ranks (None: only wait). Where its result is there already it only compares
    the settings, and refuses others."""
    argv = [*script.split()[1:], *as_flags(**flags)]
    if main_function and ranks.rank == 0:
        print(f"python {script} {shlex.join(as_flags(**flags))}", flush=True)
    try:
        if main_function:
            main_function(argv)
    except ValueError as error:                             # --overwrite of grpo.py is for RL runs, not for what they start from
        raise ValueError(str(error).replace("--overwrite to replace it", f"replace it: python {script} ... --overwrite")) from None
    ranks.wait()


# ---- command line -------------------------------------------------------------------------------------------------------

# What does not change a run's result, and so may differ when it is resumed; the stages have a config.json of their own.
STAGE_FLAGS = ("vae", "traces", "limit", "sft_lr", "sft_batch", "base_seed", "base_steps")
NOT_RESULTS = ("out", "resume", "overwrite", "device", "tokens_per_batch", "save_every", "keep", "fsdp", "checkpointing")


def parse_args(argv=None):
    """The flags of both stages; one sentence (exit status 2, or ValueError) where they cannot be right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=("warmup", "pretrain"), default="warmup", help="what to do (default: warmup)")
    add_flags(parser, "model and data",
              model=("tiny", "hub name, folder, tiny or tiny-vl"),
              vae=(str, "folder of a trained VAE (default: runs/tiny/vae, or runs/tiny-vl/vae)"),
              traces=([str], "JSONL files or hub:... (default: the tiny world's)", "[DOMAIN=]SOURCE"),
              limit=(2000, "traces kept per source", 1),
              prompt=("auto", "prompt format", ("auto", "chat", "plain")),
              out=(str, "run folder (default: runs/tiny/base for pretrain, runs/tiny/sft[-none] for warmup)"))
    add_flags(parser, "prefix",
              prefix=("prior", "prior (the paper), none (baseline) or another source"),
              length=(int, "prefix rows L (default: those of one z, 1, or 8 of the GPT decoder)", 0))
    add_flags(parser, "training",
              steps=(int, "updates (default: 10 for warmup; 900 for pretrain, 400 of tiny-vl)", 1),
              batch=(int, "rows per update (default: 64; 32 for pretrain, 48 of tiny-vl)", 1),
              lr=(3e-6, "AdamW's learning rate in warmup", 0),
              max_tokens=(512, "longest prompt, and longest answer", 1),
              seed=(0, "seed of everything random"))
    add_machine_flags(parser, tokens_per_batch=4096, save_every=100)
    args = parser.parse_args(argv)
    vl = args.model == "tiny-vl"
    if args.stage == "pretrain":
        if args.model not in TINY_BASES:
            parser.error(f"pretrain makes {' or '.join(TINY_BASES)}, not {args.model}")
        kept = ("stage", "model", "out", "steps", "batch", "seed", "save_every", "keep", "resume", "overwrite", "device")
        for name in (name for name in vars(args) if name not in kept and getattr(args, name) != parser.get_default(name)):
            parser.error(f"--{name.replace('_', '-')} is of warmup: pretrain does not read it")
    elif args.model in TINY_BASES and not Path(args.vae or f"runs/{args.model}/vae").exists():      # known before there is a VAE
        check_source(args.prefix, STYLES_OF[args.model])
    args.steps = args.steps if args.steps is not None else 10 if args.stage == "warmup" else 400 if vl else 900
    args.batch = args.batch if args.batch is not None else (64 if args.stage == "warmup" else 48 if vl else 32)
    root = f"runs/{'tiny-vl' if vl else 'tiny'}"
    args.vae = args.vae or f"{root}/vae"
    args.out = args.out or root + ("/base" if args.stage == "pretrain" else "/sft-none" if args.prefix == "none" else "/sft")
    if args.model not in TINY_BASES and not args.traces and args.stage == "warmup":
        parser.error("--traces is needed for a model other than tiny or tiny-vl")
    return tiny_defaults(args) if args.stage == "warmup" else args


def main(argv=None):
    """Run the stage that the flags name; a finished run of the same settings is left as it is."""
    args = parse_args(argv)
    ranks = Ranks.start(args.device, args.fsdp)
    if args.stage == "pretrain":
        run = pretrain(args.out, args.seed, args.steps, args.batch, 80, args.model, args.resume, args.overwrite, args.save_every,
                       args.keep)
        return print(f"the tiny base is in {run.folder}/policy") if ranks.rank == 0 else None
    check_traces(args.traces, args.limit)
    needs_vae = args.prefix not in ("none", "noise")
    if ranks.rank == 0:                                 # what is missing of the tiny world is made once
        name = find_model(args.model)
        if needs_vae:
            find_vae(args.vae, name)
    ranks.wait()
    vae = VAE.load(args.vae) if needs_vae else None
    args.length = args.length if args.length is not None else vae.rows if vae else 1
    traces = load_traces(args.traces, args.limit)
    model, tokenizer = load_trainable(args.model, ranks, args)
    pairs = pairs_of(traces, tokenizer, args, ranks)        # before the run folder: it may refuse
    palette = Palette(vae, whole(model.get_input_embeddings().weight.detach()), args.prefix, args.length)
    config = {name: value for name, value in vars(args).items() if name not in NOT_RESULTS}
    run = Run(args.out, config, ranks, args.resume, args.overwrite, args.keep)
    if not run.finished:
        warmup(model, tokenizer, pairs, palette, run, args)
    if ranks.rank == 0:
        print(f"the warmed-up policy is in {run.folder}/policy")


def add_stage_flags(parser):
    """grpo.py's flags on the stages that `prepare` builds."""
    add_flags(parser, "stages before RL",
              vae=(str, "VAE folder (default: OUT/vae, trained if it is missing)"),
              traces=([str], "for VAE and warm-up (default: the tiny world's)", "[DOMAIN=]SOURCE"),
              limit=(2000, "traces kept per source of your own", 1),
              sft_lr=(3e-6, "the warm-up's learning rate", 0),
              sft_batch=(64, "rows per warm-up update", 1),
              base_seed=(0, "seed of the tiny base model"),
              base_steps=(900, "pretraining steps of the tiny base model", 1))


def add_machine_flags(parser, tokens_per_batch, save_every):
    """The flags that every training script has: where it runs, in which pieces, and what becomes of its run folder."""
    add_flags(parser, "machine and run folder",
              device=("auto", "auto, cpu, cuda or mps"),
              precision=("fp32", "of training's forwards", ("fp32", "bf16")),
              fsdp=(False, "under torchrun: shard weights, gradients and moments over the ranks"),
              checkpointing=(False, "keep layer inputs only, run layers again in backward"),
              tokens_per_batch=(tokens_per_batch, "of a micro-batch", 1),
              save_every=(save_every, "steps between checkpoints", 1),
              keep=(2, "checkpoints kept, the newest ones", 1),
              lr_schedule=("constant", "the learning rate stays, or falls to 0", ("constant", "linear", "cosine")),
              lr_warmup=(0, "steps over which the learning rate rises", 0),
              resume=(False, "go on with an unfinished run"),
              overwrite=(False, "replace a run of other settings in --out"))


if __name__ == "__main__":
    run_main(main, "sft.py")
