"""The warm-up under a prefix (Eq. 11), the simplest training loop, and what every loop shares.

Part 1 is shared: ranks, the model and its optimizer step, metrics by name, run folders with exact
resume, settings. Part 2 is the warm-up: updates on worked answers with a prefix before the prompt.
Where its latent z comes from decides what is learnt:
    prior      z ~ N(0, I), drawn without a look at the answer, L = 1: the paper's. The model learns
               to bear a prefix, in ten updates; more would teach it to ignore the prefix.
    posterior  z ~ q(z|h), h of the very trace that is answered: z says something about the answer,
               so the model learns to follow it, the more the longer.
    none       no prefix: where the baselines of RL start.
Part 3 measures what prefixes do to the loss of held-out answers: it needs no reward.

Departs from the paper, which warms up from the prior alone and gives no learning rate or batch
size: the posterior and the settings are ours. Randomness is a pure function of (seed, step, row),
so a resumed run needs no generator state, and N ranks see the batches that one rank would.

Run it:
    python sft.py                                   # warm up the tiny world's model under prefixes
    python sft.py --source prior                    # as in the paper
    python sft.py --source none                     # without prefixes: where the baselines start
    python sft.py --model Qwen/Qwen3-0.6B-Base --vae runs/qwen/vae --out runs/qwen/sft \\
        --traces math=traces_math.jsonl
    torchrun --nproc_per_node=4 sft.py --model ...  # the same on four GPUs
"""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import vae as vae_file
from prefix import (
    Palette,
    check_source,
    completion_logprobs,
    generator_of,
    load_policy,
    micro_batches,
    needs_vae,
    prompt_of,
    text_model,
    unshard,
    use_fast_linears,
)
from rewards import (
    DEFAULT_WORLD,
    find_model,
    prompt_style,
    world_defaults,
    world_domains,
    world_of,
    world_root,
    world_traces,
)
from vae import (
    VAE,
    VAEConfig,
    check_traces,
    first_line,
    is_held_out,
    load_traces,
    parse_settings,
    pool,
    read_json,
    require_at_least,
    require_choices,
    require_same,
    result_settings,
    run_main,
    write_text,
)

# ==== Part 1: what every training loop shares =====================================================

# ---- Ranks ---------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """Where this process stands among the ranks of a torchrun job; alone it is rank 0 of 1.

    Each rank holds the whole model, or with fsdp its share of every weight, gradient and moment.
    """

    rank: int  # of this process
    world: int  # number of ranks
    device: torch.device
    fsdp: bool = False

    @classmethod
    def alone(cls, device="cpu"):
        return cls(0, 1, torch.device(device))

    @classmethod
    def start(cls, device="auto", fsdp=False):
        """Join the job that torchrun describes in the environment, if any.

        device: auto, cpu, cuda or mps. torchrun ends all ranks as soon as one has died. The
        time-out is for a rank that hangs, and longer than any honest wait: rank 0 may fetch a model
        or train a VAE meanwhile. Raises ValueError for a device that cannot be used.
        """
        rank = int(os.environ.get("RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
        device = device_of(device)
        if fsdp and world == 1:
            raise ValueError(
                "--fsdp shards over several ranks: start them with torchrun --nproc_per_node=N, "
                "or leave it out"
            )

        backend = "gloo"
        if device == "cuda" and world > 1:
            backend = "nccl"
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        return cls(rank, world, torch.device(device), fsdp)

    def shard(self, items):
        """This rank's share of a global batch: every world-th item."""
        return items[self.rank :: self.world]

    def all_reduce_sum(self, numbers):
        """Sum of a list of numbers over all ranks, element by element, in double precision."""
        device = "cpu"
        if self.device.type == "cuda":  # nccl reads no other memory
            device = self.device
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, number):
        """The number that each rank has, as a list of floats by rank."""
        numbers = [0.0] * self.world
        numbers[self.rank] = number
        return self.all_reduce_sum(numbers)

    def pad_for_fsdp(self, micro_batches):
        """Under FSDP this rank's micro-batches, and empty ones until every rank has as many.

        Each forward and backward gathers weights from all ranks, so all must run it.
        completion_logprobs makes of an empty micro-batch a row that counts nothing.
        """
        if not self.fsdp:
            return micro_batches
        most = int(max(self.gather(len(micro_batches))))
        return micro_batches + [[]] * (most - len(micro_batches))

    @property
    def load_device(self):
        """Where a model is read: one that is to be sharded may be too large for the device."""
        if self.fsdp:
            return torch.device("cpu")
        return self.device

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        """End what the ranks do together: from here on each is alone, and may end."""
        self.wait()  # one that ends while another still talks to it can take that one down
        if self.world > 1:
            dist.destroy_process_group()


def device_of(name):
    """What torch calls the device; "auto" is the GPU, if there is one.

    Raises ValueError for a device that cannot be used.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        problem = first_line(error)[:150]
        raise ValueError(f"--device {name} cannot be used here: {problem}") from None
    return name


def seed_of(*parts):
    """A 63-bit seed that is a pure function of its parts, e.g. seed_of(seed, "rollout", step)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rows_of_step(rows, step, count, seed, extra=0):
    """The `count` rows of a training set that a step asks, and extra * count replacements.

    Every row comes once an epoch, each epoch in an order of its own. The replacements are the
    set's other rows, in an order of the step's own. So a step asks no row twice, unless the set
    has fewer than (1 + extra) * count.
    """
    size = len(rows)
    orders = {}  # of the rows, by epoch
    chosen = []
    for position in range(step * count, (step + 1) * count):  # in the endless sequence of epochs
        epoch, place = divmod(position, size)
        if epoch not in orders:
            shuffler = random.Random(seed_of(seed, "epoch", epoch))
            orders[epoch] = shuffler.sample(range(size), size)
        chosen.append(orders[epoch][place])

    replacements = []
    if extra > 0:
        others = sorted(set(range(size)) - set(chosen))
        if not others:  # the set is too small: ask the same rows again
            others = list(chosen)
        random.Random(seed_of(seed, "replacements", step)).shuffle(others)
        for i in range(extra * count):
            replacements.append(others[i % len(others)])
    return [rows[i] for i in chosen + replacements]


# ---- The model and its optimizer step ------------------------------------------------------------


def load_trainable(name, ranks, config):
    """(model, reader) for a training loop: fp32 weights, all trained but a vision tower's.

    config: a TrainingConfig, of which checkpointing and precision are read. Checkpointing keeps a
    layer's input alone and runs the layer again in the backward pass. With FSDP each rank reads the
    model into its host's memory and moves its share of it to the device.
    """
    model, reader = load_policy(name, ranks.load_device)
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in text_model(model).layers:
            # Without it transformers ignores the call; what is inside stays in eval mode.
            layer.training = True
    if ranks.fsdp:
        shard_model(model, ranks, config.precision)
    else:
        use_fast_linears(model)
    return model, reader


def load_reference(name, model, ranks, config):
    """The policy that a KL term measures from: only read, and sharded as `model` is.

    In bf16 with that precision. What training leaves as it is (a vision tower) is `model`'s own.
    """
    dtype = torch.float32
    if config.precision == "bf16":
        dtype = torch.bfloat16
    reference, _ = load_policy(name, ranks.load_device, dtype)
    reference.requires_grad_(False)
    if ranks.fsdp:
        shard_model(reference, ranks, config.precision)
    else:
        use_fast_linears(reference)  # rounds as the trained policy does
    for weight, trained in zip(reference.parameters(), model.parameters()):
        if not trained.requires_grad:
            weight.data = trained.data
    return reference


def shard_model(model, ranks, precision):
    """FSDP2: leave this rank its share (along dimension 0) of every weight of the model.

    So gradients and moments are shares, too. A layer's weights are gathered when it runs, forward
    and backward, and dropped after it; in bf16 with that precision, while shares, gradients and
    residual stream are fp32. The tables of embedding and head are read outside of any module's
    forward, so `unshard` (prefix.py) gathers them. Gradients of ranks are added, not averaged, as
    apply_gradients has it. A vision tower, which is small and not trained, stays whole.
    """
    # Only here: half a second that a single process does not need.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    tables = shard_tables(model, mesh, ranks.device)

    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    text = text_model(model)
    for module in (*text.layers, text):
        # Also the root: after a forward pass without a backward one (score_under) its weights would
        # else stay gathered, beside the shards of the others.
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=tables,
            reshard_after_forward=True,
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if text is not model.model:
        model.model.visual.to(ranks.device)


def shard_tables(model, mesh, device):
    """Shard the tables of embedding and head, one where they are tied. Returns the set of them."""
    from torch.distributed.tensor import Shard, distribute_tensor  # as in shard_model

    tables = {}  # by the weight that it replaces
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        if weight not in tables:
            share = distribute_tensor(weight.detach().to(device), mesh, [Shard(0)])
            tables[weight] = torch.nn.Parameter(share, weight.requires_grad)
        module.weight = tables[weight]
    return set(tables.values())


def make_optimizer(model, lr, weight_decay=0.0):
    """AdamW on every trainable weight.

    Our choice: betas (0.9, 0.98), as the moments must settle within tens of steps.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, betas=(0.9, 0.98), weight_decay=weight_decay)


def apply_gradients(model, optimizers, ranks, max_norm=1.0):
    """Add the gradients of all ranks (FSDP's backward has), clip, step, clear.

    Returns the gradient norm before clipping. Losses are divided by *global* counts before
    backward, so gradients of ranks and of micro-batches add up to those of one big batch. A rank
    without any loss takes part with zeros: every rank makes the same collective calls.
    Raises ValueError, with the weights as they were, for a gradient that is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if ranks.world > 1 and not ranks.fsdp:
            dist.all_reduce(p.grad)

    norm = unshard(torch.nn.utils.get_total_norm([p.grad for p in trained]))
    if not torch.isfinite(norm):  # the same on every rank: all of them stop here
        raise ValueError(
            "the gradient is not finite: lower --lr, or use --precision fp32; "
            "what was saved is still good"
        )
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)

    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def autocast(device, precision):
    """Forward passes in bf16 with fp32 weights, or plain fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


# ---- Metrics by name -----------------------------------------------------------------------------


def add_metrics(sums, values, guided):
    """Add N measured items (rollouts, or tokens) to the sums of their metrics.

    values: {name: Tensor [N]}, one of them ones, which counts the items. guided: N booleans.
    sums: {name: Tensor [2] float64} over the unguided and over the guided items; names may be new.
    """
    columns = torch.stack(list(values.values()), 1)  # [N, K]
    columns = columns.cpu().double()  # one copy from the device
    is_guided = torch.tensor(guided, dtype=torch.bool)  # [N]
    unguided_sums = columns[~is_guided].sum(0)  # [K]
    guided_sums = columns[is_guided].sum(0)  # [K]

    for k, name in enumerate(values):
        both = torch.stack([unguided_sums[k], guided_sums[k]])
        if name in sums:
            both = sums[name] + both
        sums[name] = both


def mean_metrics(sums, count_name, ranks):
    """This rank's sums -> {name, name_guided, name_unguided: mean over the items of all ranks}.

    count_name: the metric that counts the items; it is no mean but their number. A mean over no
    items is None. All ranks call it with the same names, also one that has measured no items.
    """
    names = list(sums)
    numbers = []
    for name in names:
        numbers += sums[name].tolist()
    numbers = ranks.all_reduce_sum(numbers)
    unguided = dict(zip(names, numbers[0::2]))
    guided = dict(zip(names, numbers[1::2]))
    both = {name: unguided[name] + guided[name] for name in names}

    row = {}
    for suffix, part in (("", both), ("_guided", guided), ("_unguided", unguided)):
        count = part[count_name]
        row[count_name + suffix] = int(count)
        for name in names:
            if name != count_name:
                row[name + suffix] = part[name] / count if count > 0 else None
    return row


# ---- Run folders ---------------------------------------------------------------------------------


class Run:
    """A run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint-N/, best/ and policy/.

    policy/ (the finished model, which says that the run is complete) and best/ are Hugging Face
    folders. Files and folders are filled under a temporary name that is changed when they are
    complete: a kill at any moment leaves no part of one. Rank 0 alone writes, but for checkpoints
    of sharded models, of which each rank writes its share; all ranks must see the folder. A resumed
    run repeats what came after the checkpoint, on the same ranks and device bit for bit.

    settings: what must be the same when a run is resumed (vae.result_settings).
    overwrite: replace a run of other settings; its policy/ and best/ are kept as old-policy/ and
    old-best/ until this run is finished.
    Raises ValueError where is_finished does.
    """

    CHECKPOINTS = 2  # kept, the newest ones: the second is for a damaged first

    def __init__(self, folder, settings, ranks, resume=False, overwrite=False):
        self.folder = Path(folder)
        self.ranks = ranks
        self.writes = ranks.rank == 0
        self.best_score = -math.inf

        if overwrite and self.writes:
            self.set_aside()
        ranks.wait()  # every rank sees the folder as rank 0 left it
        self.finished = is_finished(self.folder, settings, resume)
        ranks.wait()

        if self.writes and self.finished:
            self.tidy()  # a kill may have come between policy/ and this
        elif self.writes and not (self.folder / "config.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.json", json.dumps(settings, indent=1))

    def log(self, name, *rows):
        """Append rows to NAME.jsonl, handed to the system before this returns."""
        if self.writes:
            lines = [json.dumps(row) + "\n" for row in rows]
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write("".join(lines))

    def log_files(self):
        return [self.folder / "metrics.jsonl", self.folder / "samples.jsonl"]

    def checkpoints(self):
        return sorted(self.folder.glob("checkpoint-[0-9]*"))

    def save(self, step, model, optimizers):
        """checkpoint-STEP/: all that the loop needs to go on after `step` finished steps."""
        with self.new_folder(f"checkpoint-{step:06d}") as folder:
            checksum = 0
            if self.ranks.fsdp or self.writes:
                write_tensors(folder, model, optimizers, self.ranks)
                checksum = crc32(folder / tensor_file(self.ranks.rank))
            checksums = self.ranks.gather(checksum)
            if self.writes:
                files = {}
                for rank, value in enumerate(checksums):
                    if self.ranks.fsdp or rank == 0:
                        files[tensor_file(rank)] = int(value)
                (folder / "state.json").write_text(json.dumps({"step": step, "crc32": files}))
        if self.writes:
            for folder in self.checkpoints()[: -self.CHECKPOINTS]:
                shutil.rmtree(folder)
        self.ranks.wait()

    def restore(self, model, optimizers):
        """Load the newest checkpoint that all ranks can read. Returns its step, 0 if there is none.

        Any number of ranks may have written it. Metrics and samples are cut back to that step: what
        came after is about to happen again. A best/ of a later step stays: the repeat reaches the
        same score. Raises ValueError, and changes no file, where no checkpoint can be read.
        """
        step = self.load_newest(model, optimizers)
        if self.writes:
            self.cut_back(step)
        self.ranks.wait()
        best = self.folder / "best" / "best.json"
        if best.is_file():
            self.best_score = read_json(best)["score"]
        return step

    def load_newest(self, model, optimizers):
        """The part of `restore` that reads, on all ranks; one that fails takes all one back."""
        problem = None
        for folder in reversed(self.checkpoints()):
            problem = None
            try:
                step = read_checkpoint(folder, model, optimizers, self.ranks)
            except torch.OutOfMemoryError:  # the file is good
                raise
            except Exception as error:  # each library has its own error for a torn file
                problem = first_line(error)
                print(
                    f"{folder} cannot be read ({problem}): going back to the one before", flush=True
                )
            ranks_in_trouble = sum(self.ranks.gather(problem is not None))
            if ranks_in_trouble == 0:
                return step
        if self.checkpoints():
            problem = problem or "another rank cannot"
            raise ValueError(
                f"no checkpoint in {self.folder} can be read here ({problem}), perhaps as another "
                "version saved them: --overwrite starts the run again, another --out keeps what "
                "is there"
            )
        return 0

    def cut_back(self, step):
        """Drop metrics and samples after a step; later checkpoints, unreadable ones, go aside."""
        for path in self.log_files():
            if path.is_file():
                lines = path.read_text().split("\n")[:-1]  # a torn last line has no end of line
                lines = [line for line in lines if step > 0 and json.loads(line)["step"] <= step]
                write_text(path, "".join(line + "\n" for line in lines))

        for folder in self.checkpoints():  # or they would be taken for the newest
            if folder.name > f"checkpoint-{step:06d}":
                aside = self.folder / f"unreadable-{folder.name}"
                move(folder, aside)
                print(f"{folder} is now {aside}, until the run is finished", flush=True)

    def keep_best(self, step, score, model, reader):
        """best/: the policy of the highest score so far (the earliest of equals), and best.json."""
        if score > self.best_score:
            self.best_score = score
            self.write_policy("best", model, reader, {"step": step, "score": score})

    def finish(self, model, reader):
        """Write policy/, the finished model. Checkpoints are dropped."""
        self.write_policy("policy", model, reader)
        self.finished = True
        if self.writes:
            self.tidy()

    def write_policy(self, name, model, reader, note=None):
        """An ordinary Hugging Face folder; weights of a sharded model are gathered one by one."""
        weights = None  # save_pretrained takes the model's own
        if self.ranks.fsdp:
            weights = {}
            for key, p in model.named_parameters():
                weight = unshard(p.detach())
                if self.writes:
                    weights[key] = weight.cpu()

        with self.new_folder(name) as folder:
            if self.writes:
                model.save_pretrained(folder, state_dict=weights)
                reader.save(folder)
            if self.writes and note is not None:
                (folder / f"{name}.json").write_text(json.dumps(note))
        self.ranks.wait()

    @contextlib.contextmanager
    def new_folder(self, name):
        """Fill a folder, on all ranks, under a temporary name, which is removed if that fails."""
        path = self.folder / name
        temporary = self.folder / f".{name}.tmp"
        if self.writes:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.ranks.wait()
        try:
            yield temporary
            if self.writes and path.exists():
                move(path, self.folder / f".old-{name}.tmp")
            if self.writes:
                os.rename(temporary, path)
        finally:
            if self.writes:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(self.folder / f".old-{name}.tmp", ignore_errors=True)

    def set_aside(self):
        """Make way for a run of other settings. Only what a run writes is touched.

        config.json goes last: until then it says that what is there has other settings.
        """
        if not (self.folder / "config.json").is_file():
            return
        for folder in (*self.checkpoints(), *self.folder.glob("unreadable-checkpoint-*")):
            shutil.rmtree(folder)
        # Of an unfinished run nothing is kept: the old policies may be those of one before it.
        finished = (self.folder / "policy").exists()
        for name in ("policy", "best"):
            if finished and (self.folder / name).exists():
                move(self.folder / name, self.folder / f"old-{name}")
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in (*self.log_files(), self.folder / "config.json"):
            path.unlink(missing_ok=True)

    def tidy(self):
        """Drop what only an unfinished run needs."""
        leftovers = [*self.checkpoints(), self.folder / "old-policy", self.folder / "old-best"]
        leftovers += self.folder.glob("unreadable-checkpoint-*")
        leftovers += self.folder.glob(".*.tmp")
        for folder in leftovers:
            if folder.exists():
                shutil.rmtree(folder)


def is_finished(folder, settings, resume=False):
    """Whether a folder holds a complete run of these settings; False where it holds none.

    Raises ValueError for a run of other settings, and for an unfinished one without resume.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    before = read_json(folder / "config.json")
    now = json.loads(json.dumps(settings))  # as it would be read again
    require_same(f"{folder} holds a run", before, now, "--overwrite to replace it")
    finished = (folder / "policy" / "config.json").is_file()
    if not finished and not resume:
        raise ValueError(
            f"{folder} holds an unfinished run: --resume goes on with it, "
            "--overwrite starts it again"
        )
    return finished


def move(folder, target):
    """Give a folder another name, in place of what has that name."""
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)


# ---- Checkpoints ---------------------------------------------------------------------------------


def checkpoint_tensors(model, optimizers):
    """{key: tensor} of all that changes: weights (a tied one once), and the moments."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
    for i, optimizer in enumerate(optimizers):
        for number, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                tensors[f"{i}.{number}.{name}"] = moment
    return tensors


def write_tensors(folder, model, optimizers, ranks):
    """Write the weights and moments of one process, or of every rank its shares."""
    tensors = checkpoint_tensors(model, optimizers)
    with distributed_checkpoint() as dcp:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=not ranks.fsdp)


def tensor_file(rank):
    """What HuggingFaceStorageWriter calls the file of a rank."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def read_checkpoint(folder, model, optimizers, ranks):
    """Read a checkpoint into the model and its optimizers; of what is sharded, this rank's share.

    Returns its step. No rank waits for another here: reading may fail on one alone. The checksums
    are shared out: all ranks together read every file.
    """
    state = read_json(folder / "state.json")
    files = state["crc32"]
    for name in ranks.shard(sorted(files)):
        path = folder / name
        if not path.is_file() or crc32(path) != files[name]:
            raise ValueError("its files are not as they were saved")

    for optimizer in optimizers:
        make_moments(optimizer)
    tensors = checkpoint_tensors(model, optimizers)
    with distributed_checkpoint() as dcp:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return state["step"]


def make_moments(optimizer):
    """A new optimizer has no moments to read into: make them by a step that changes no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, rates):
        group["lr"] = lr


def crc32(path):
    """The checksum of a file, read in pieces of 16 MB."""
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            checksum = zlib.crc32(piece, checksum)
    return checksum


@contextlib.contextmanager
def distributed_checkpoint():
    """torch.distributed.checkpoint (safetensors, no pickle), its errors as OSError.

    They are no Exceptions. It also warns that with no_dist each rank is for itself: so we want it.
    """
    from torch.distributed import checkpoint  # half a second that a short run does not need

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield checkpoint
    except checkpoint.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise OSError(str(cause)) from error


# ---- Settings ------------------------------------------------------------------------------------


@dataclass
class TrainingConfig:
    """The settings that every training script has: where it runs, in which pieces, and its folder.

    All but the precision leave the result as it is, and may differ when a run is resumed. What is
    None here has a default of its own in each script.
    """

    device: str = HfArg(default="auto", help="auto, cpu, cuda or mps", compare=False)
    precision: Literal["fp32", "bf16"] = HfArg(default="fp32", help="of training's forward passes")
    fsdp: bool = HfArg(
        default=False,
        help="under torchrun: shard weights, gradients and moments over the ranks",
        compare=False,
    )
    checkpointing: bool = HfArg(
        default=False, help="keep layer inputs only, run layers again in backward", compare=False
    )
    tokens_per_batch: int | None = HfArg(default=None, help="of a micro-batch", compare=False)
    save_every: int | None = HfArg(default=None, help="steps between checkpoints", compare=False)
    resume: bool = HfArg(default=False, help="go on with an unfinished run", compare=False)
    overwrite: bool = HfArg(
        default=False, help="replace a run of other settings in --out", compare=False
    )

    def __post_init__(self):
        require_at_least(self, tokens_per_batch=1, save_every=1)
        require_choices(self)


# ==== Part 2: the warm-up under a prefix (Eq. 11) =================================================

# Defaults by the source of prefixes, where a world has no others (DEFAULTS["sft"] of its file). The
# ten updates are the paper's, all else is our choice.
WARM_UPS = {
    "prior": {"steps": 10, "lr": 1e-5, "tokens_per_batch": 4096},
    "posterior": {"steps": 100, "lr": 3e-5, "tokens_per_batch": 4096},
}


def warm_up_defaults(model, source):
    """{name of a field: value} of a warm-up; all sources but the posterior have the paper's."""
    kind = "posterior" if source == "posterior" else "prior"
    of_world = world_defaults(model).get("sft", {})
    return {**WARM_UPS[kind], **of_world.get(kind, {})}


def default_source(model):
    """Where a warm-up's prefixes come from if nothing else is said: the world's, or the paper's."""
    return world_defaults(model).get("warm_up", "prior")


def warm_up_folder(root, model, source):
    """Where the warm-up of a source lies below a folder: sft, or sft-SOURCE if it is no default."""
    if source == default_source(model):
        return f"{root}/sft"
    return f"{root}/sft-{source}"


@dataclass
class SFTConfig(TrainingConfig):
    """The settings of a warm-up. What is None is filled in from the model, and from the VAE."""

    # model and data
    model: str = HfArg(default=DEFAULT_WORLD, help="hub name, folder, or a world")
    vae: str | None = HfArg(default=None, help="folder of a trained VAE (default: the world's)")
    traces: list[str] | None = HfArg(
        default=None, help="[DOMAIN=]SOURCE: JSONL files or hub:... (default: the world's)"
    )
    limit: int | None = HfArg(
        default=None, help="traces kept per source (default: 2000, of a world all)"
    )
    prompt: Literal["auto", "chat", "plain"] = HfArg(default="auto", help="prompt format")
    out: str | None = HfArg(
        default=None,
        help="run folder (default: the world's sft, or sft-SOURCE of another than its default)",
        compare=False,
    )

    # prefix
    source: str | None = HfArg(
        default=None,
        help="of prefixes: prior (the paper), posterior (the trace's own latent), none (baseline), "
        "or another of prefix.py (default: the world's, or prior)",
    )
    lengths: list[int] | None = HfArg(
        default=None,
        help="prefix rows L, of which each answer draws one (default: the rows of one z, 1, or 8 "
        "of the GPT decoder; from the posterior 1 2 4 8, or 8)",
    )
    unguided: float = HfArg(default=0.0, help="share of answers without prefix")

    # training
    steps: int | None = HfArg(
        default=None, help="updates (default: the world's, or 10, from the posterior 100)"
    )
    batch: int = HfArg(default=64, help="answers per update, over all ranks")
    lr: float | None = HfArg(
        default=None,
        help="AdamW's learning rate (default: the world's, or 1e-5, from the posterior 3e-5)",
    )
    max_tokens: int = HfArg(default=512, help="longest prompt, and longest answer, in tokens")
    seed: int = HfArg(default=0, help="seed of everything random")
    save_every: int = HfArg(default=100, help="steps between checkpoints", compare=False)

    def __post_init__(self):
        if self.source is None:
            self.source = default_source(self.model)
        for name, value in warm_up_defaults(self.model, self.source).items():
            # L depends on the VAE, too: see default_lengths.
            if name != "lengths" and getattr(self, name) is None:
                setattr(self, name, value)
        if world_of(self.model) is not None:
            self.take_from_world()
        if self.limit is None:
            self.limit = 2000

        super().__post_init__()
        require_at_least(self, limit=1, steps=1, batch=1, lr=0, max_tokens=1, unguided=0)
        self.check_prefixes()
        if not self.traces:
            raise ValueError("--traces is needed for a model of your own: worked answers")
        if self.out is None:
            raise ValueError("--out is needed for a model of your own: a run folder")
        if self.vae is None and self.needs_vae:
            raise ValueError(
                f"--vae is needed for prefixes from '{self.source}': train one by vae.py"
            )

    def take_from_world(self):
        root = world_root(self.model)
        if not self.traces:
            self.traces = world_traces(self.model)
            if self.limit is None:
                self.limit = 10**9
        if self.vae is None:
            self.vae = f"{root}/vae"
        if self.out is None:
            self.out = warm_up_folder(root, self.model, self.source)

    def check_prefixes(self):
        """ValueError for prefixes that cannot be, or that no answer would get."""
        if self.unguided >= 1:
            raise ValueError(
                f"--unguided {self.unguided} leaves no answer with a prefix: use --source none"
            )
        if self.source == "none" and (self.unguided > 0 or self.lengths is not None):
            raise ValueError("--source none has no prefixes: leave out --lengths and --unguided")
        for length in self.lengths or ():
            if length < 1:
                raise ValueError(
                    f"--lengths must be at least 1, not {length}: --unguided is the share without"
                )

    @property
    def needs_vae(self):
        return needs_vae(self.source)


def answer_ids(trace, reader, style, max_tokens):
    """(Prompt, answer ids with the end token) of a trace, or None if the prompt is over max_tokens.

    Cut, the prompt would lose its chat header or its end. The answer is cut (and has no end token).
    """
    tokenizer = reader.tokenizer
    prompt = prompt_of(trace, reader, style=style)
    if len(prompt.ids) > max_tokens:
        return None

    text = trace["answer"]
    if prompt_style(tokenizer, style) != "chat":
        text = " " + text  # a chat template ends in white space of its own
    answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt, answer[:max_tokens]


def pairs_of(traces, reader, config):
    """{number of a trace: its answer_ids}, of all traces to train on but those of long prompts.

    ValueError if none is left.
    """
    pairs = {}
    for number, trace in enumerate(traces):
        if is_held_out(number):
            continue
        pair = answer_ids(trace, reader, config.prompt, config.max_tokens)
        if pair is not None:
            pairs[number] = pair
    if not pairs:
        raise ValueError(
            f"the prompts of all {len(traces)} traces are over --max-tokens {config.max_tokens}: "
            "raise it"
        )
    return pairs


def row_lengths(pairs, prefixes):
    """Tokens of each row [prefix | prompt | answer]."""
    lengths = []
    for (prompt, answer), prefix in zip(pairs, prefixes):
        prefix_length = 0 if prefix is None else len(prefix)
        lengths.append(prefix_length + len(prompt.ids) + len(answer))
    return lengths


def say_left_out(pairs, traces, config):
    """Print how many traces are not trained on as their prompts are too long, if any."""
    to_train_on = sum(not is_held_out(number) for number in range(len(traces)))
    left_out = to_train_on - len(pairs)
    if left_out > 0:
        limit = f"--max-tokens {config.max_tokens}"
        print(f"left out {left_out} of {to_train_on} traces: prompts over {limit}")


def lm_step(model, pairs, prefixes, ranks, tokens_per_batch=4096, precision="fp32"):
    """Backward of the mean negative log-likelihood of the answers under their prefixes (Eq. 11).

    pairs: this rank's (Prompt, answer ids). prefixes: one a pair, Tensor [L, d] or None. The mean
    is over the answer tokens of *all* ranks, so neither micro-batches nor ranks change the
    gradient. Returns this rank's summed loss, and the number of all ranks' answer tokens.
    """
    answer_tokens = sum(len(answer) for _, answer in pairs)
    (answer_tokens,) = ranks.all_reduce_sum([answer_tokens])

    loss_sum = 0.0
    lengths = row_lengths(pairs, prefixes)
    for micro_batch in ranks.pad_for_fsdp(micro_batches(lengths, tokens_per_batch)):
        prompts = [pairs[i][0] for i in micro_batch]
        answers = [pairs[i][1] for i in micro_batch]
        leads = [prefixes[i] for i in micro_batch]
        with autocast(ranks.device, precision):
            # [N], one for each answer token of the micro-batch
            logprobs, _ = completion_logprobs(model, prompts, answers, leads, with_entropy=False)
        loss = -logprobs.sum()
        (loss / answer_tokens).backward()
        loss_sum += loss.item()
    return loss_sum, answer_tokens


@dataclass
class Posterior:
    """q(z|h) of traces: a Gaussian with independent entries for each (Eq. 6)."""

    mu: torch.Tensor  # [N, k]
    sigma: torch.Tensor  # [N, k]


@torch.no_grad()
def posterior_of(traces, reader, model, table, vae):
    """The Posterior of traces under a VAE. table: E [V, d], on which the VAE was trained."""
    vae.check_policy(table)
    h = pool(traces, reader, model, table, vae.rows_per_z)  # [N, rows * d]
    mu, log_var = vae.encode(h)
    return Posterior(mu, torch.exp(log_var / 2))


class PrefixDraws:
    """The prefixes of a warm-up: that of a row is a function of (seed, step, row) and its trace.

    posterior: of the traces that are trained on; None: z is drawn without a look at them.
    """

    def __init__(self, vae, table, config, posterior=None):
        source = config.source
        if posterior is not None:
            source = "prior"  # of the VAE; each z is given
        self.lengths = config.lengths or [0]
        self.palettes = {}  # by L
        for length in self.lengths:
            self.palettes[length] = Palette(vae, table, source, length)
        self.config = config
        self.posterior = posterior

    def draw(self, step, row, number):
        """The prefix [L, d] of a row in a step's batch, which has the trace `number`; or None."""
        seed = self.config.seed
        rng = random.Random(seed_of(seed, "sft length", step, row))
        length = rng.choice(self.lengths)
        if rng.random() < self.config.unguided:
            return None

        prefix_seed = seed_of(seed, "sft prefix", step, row)
        z = None
        if self.posterior is not None:
            mu = self.posterior.mu[number]  # [k]
            sigma = self.posterior.sigma[number]  # [k]
            epsilon = torch.randn(len(mu), generator=generator_of(prefix_seed))
            z = mu + sigma * epsilon
            z = z[None]  # [1, k]
        return self.palettes[length].draw(prefix_seed, z).embeddings


def warm_up(model, reader, pairs, prefix_draws, run, config):
    """Eq. 11: updates on answers under prefixes."""
    ranks = run.ranks
    optimizer = make_optimizer(model, config.lr)
    start = run.restore(model, [optimizer])
    steps = range(start, config.steps)
    for step in tqdm(steps, desc="sft", initial=start, total=config.steps, disable=not run.writes):
        began = time.time()

        batch_rng = random.Random(seed_of(config.seed, "sft batch", step))
        numbers = batch_rng.choices(list(pairs), k=config.batch)
        batch = []
        prefixes = []
        for row in ranks.shard(range(config.batch)):
            number = numbers[row]
            batch.append(pairs[number])
            prefixes.append(prefix_draws.draw(step, row, number))
        loss_sum, answer_tokens = lm_step(
            model, batch, prefixes, ranks, config.tokens_per_batch, config.precision
        )
        gradient_norm = apply_gradients(model, [optimizer], ranks)

        (loss_sum,) = ranks.all_reduce_sum([loss_sum])
        metrics = {
            "step": step + 1,
            "loss": loss_sum / answer_tokens,
            "gradient_norm": gradient_norm,
            "answer_tokens": int(answer_tokens),
            "seconds": round(time.time() - began, 3),
        }
        run.log("metrics", metrics)
        if (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            run.save(step + 1, model, [optimizer])
    run.finish(model, reader)


# ==== Part 3: control, a measure that needs no reward =============================================

TOO_DEAR, STEERS = 0.5, 0.05  # nats a token, from which on the verdict says so: our choice
LONGEST_PROMPT, LONGEST_ANSWER = 1024, 96  # tokens: longer prompts are left out, answers are cut
VERDICT_LENGTH = 8  # prefix rows L of the verdicts on a warm-up, those that RL takes by default


@dataclass
class Control:
    """Mean loss per token of held-out answers of each domain under prefixes of several sources.

    losses: {domain: {source: [a loss for each answer, in nats]}}. All sources read the same
    answers, so that differences are paired. "own" is the mean latent of the answer itself.
    """

    losses: dict

    def differences(self, domain, source, reference="none"):
        """The loss under one source less that under another, answer by answer."""
        pairs = zip(self.losses[domain][source], self.losses[domain][reference])
        return [loss - other for loss, other in pairs]

    def costs(self):
        """What a prefix costs, [a value for each answer] by domain.

        The loss under prefixes of the answer's own domain above that without any.
        """
        return [self.differences(domain, domain) for domain in self.losses]

    def gains(self):
        """How much likelier an answer is under latents of its own domain than of the others.

        [a value for each answer] by domain, in nats a token; nothing where there is one domain.
        """
        gains = []
        for domain in self.losses:
            by_other = []
            for other in self.losses:
                if other != domain:
                    by_other.append(self.differences(domain, other, reference=domain))
            if by_other:
                gains.append([sum(values) / len(by_other) for values in zip(*by_other)])
        return gains

    def verdict(self):
        """One sentence: what a prefix costs, whether latents steer, what to do if they do not."""
        cost = mean_of_domains(self.costs())
        if cost > TOO_DEAR:
            return (
                f"prefixes raise the loss of held-out answers by {cost:.2f} nats a token: warm up "
                "longer, or at a larger --lr (sft.py --source posterior)"
            )
        change = f"prefixes change the loss of held-out answers by {cost:+.2f} nats a token"
        if len(self.losses) < 2:
            return f"{change}; with one domain there is nothing to steer to"
        gain = mean_of_domains(self.gains())
        if gain < STEERS:
            return (
                f"{change}, but an answer is no likelier under latents of its own domain "
                f"({gain:+.2f} nats a token): they do not steer; warm up longer from the posterior "
                "(sft.py --source posterior)"
            )
        return f"{change}, and latents steer: the own domain's are {gain:.2f} nats a token likelier"


def mean_of_domains(values):
    """The mean over domains of the mean over their answers."""
    means = [sum(of_domain) / len(of_domain) for of_domain in values]
    return sum(means) / len(means)


def held_out_pairs(traces, reader, domains, style, answers):
    """{number of a trace: (Prompt, answer ids)} of measure_control."""
    examples = {}
    count = dict.fromkeys(domains, 0)
    for number, trace in enumerate(traces):
        domain = trace["domain"]
        if not is_held_out(number) or domain not in count or count[domain] == answers:
            continue
        pair = answer_ids(trace, reader, style, LONGEST_PROMPT)
        if pair is not None:
            prompt, answer = pair
            examples[number] = (prompt, answer[:LONGEST_ANSWER])
            count[domain] += 1
    return examples


@torch.no_grad()
def measure_control(
    model, reader, vae, traces, length, sources=(), style="auto", answers=8, precision="fp32"
):
    """The Control of a model under a VAE's prefixes of `length` rows.

    traces: as load_traces gives them; of each domain of the VAE the first `answers` held-out ones
    (is_held_out) with prompts of at most LONGEST_PROMPT tokens are read.
    sources: beside "none" and the domains, which are always among them: of prefix.py, or "own".
    Returns None where a domain has no such trace. The prefix of an answer is a function of the
    source and of the trace's number.
    """
    examples = held_out_pairs(traces, reader, vae.domains, style, answers)
    domains = {traces[number]["domain"] for number in examples}
    if len(domains) < len(vae.domains):
        return None

    table = unshard(model.get_input_embeddings().weight.detach())
    held_out = [traces[number] for number in examples]
    pairs = list(examples.values())
    posterior = None
    if "own" in sources:
        posterior = posterior_of(held_out, reader, model, table, vae)
    losses = {domain: {} for domain in vae.domains}
    for source in ("none", *vae.domains, *sources):
        palette = Palette(vae, table, "prior" if source == "own" else source, length)
        prefixes = []
        for i, number in enumerate(examples):
            z = posterior.mu[i : i + 1] if source == "own" else None  # [1, k]
            prefixes.append(palette.draw(seed_of("control", number), z).embeddings)
        for trace, loss in zip(held_out, answer_losses(model, pairs, prefixes, precision)):
            losses[trace["domain"]].setdefault(source, []).append(loss)
    return Control(losses)


@torch.no_grad()
def answer_losses(model, pairs, prefixes, precision="fp32", tokens_per_batch=4096):
    """The mean loss per token of each answer under its prefix, in nats."""
    device = model.get_input_embeddings().weight.device
    losses = [0.0] * len(pairs)
    for micro_batch in micro_batches(row_lengths(pairs, prefixes), tokens_per_batch):
        prompts = [pairs[i][0] for i in micro_batch]
        answers = [pairs[i][1] for i in micro_batch]
        leads = [prefixes[i] for i in micro_batch]
        with autocast(device, precision):
            logprobs, _ = completion_logprobs(model, prompts, answers, leads, with_entropy=False)
        counts = [len(answer) for answer in answers]
        for i, of_answer in zip(micro_batch, logprobs.split(counts)):
            losses[i] = -of_answer.mean().item()
    return losses


def say_control(when, model, reader, vae, traces, length, ranks, config, style):
    """Print the verdict on a small sample: before hours of training, and behind them.

    config: a TrainingConfig, of which the precision is read. All ranks measure, as a sharded model
    needs them all; rank 0 speaks. vae.py, which knows no policy, cannot: the first that says it is
    the warm-up, before its first update.
    """
    control = measure_control(
        model, reader, vae, traces, length, style=style, precision=config.precision
    )
    if ranks.rank != 0:
        return
    if control is None:
        print(f"{when}: no verdict on prefixes, as a domain has no held-out trace (every tenth is)")
    else:
        print(f"{when}: {control.verdict()}", flush=True)


# ==== The whole stage =============================================================================


def make_missing(config, ranks):
    """Make what a world lacks, its base model and its VAE, on rank 0 while the others wait.

    Returns the config with the run folder of the base in place of the world's name. A model that
    is no world is left as it is. Raises ValueError for a source that the world does not have.
    """
    if world_of(config.model) is None:
        return config
    has_vae = (Path(config.vae) / "config.json").is_file()
    if not has_vae:
        check_source(config.source, [*world_domains(config.model), "posterior"])

    base = f"{world_root(config.model)}/base"
    if ranks.rank == 0:
        find_model(config.model)
        if config.needs_vae and not has_vae:
            print(f"building {config.vae}, which is missing", flush=True)
            vae_file.train(
                VAEConfig(model=base, traces=config.traces, limit=config.limit, out=config.vae)
            )
    ranks.wait()
    return replace(config, model=base)


def load_vae(config):
    """The VAE of the settings, or None where their source needs none.

    ValueError for a source that there is not.
    """
    vae = None
    domains = ()
    if config.needs_vae:
        vae = VAE.load(config.vae)
        domains = vae.domains
    check_source(config.source, [*domains, "posterior"])
    return vae


def default_lengths(config, world, vae):
    """From the posterior several L, so that the model follows a prefix of any; else one z's rows.

    The rows that one z makes are parts of a whole, by a GPT decoder: there L is their number.
    world: what the model was called, which may have lengths of its own.
    """
    if vae is not None and vae.rows_per_z > 1:
        return [vae.rows_per_z]
    usual = [1, 2, 4, 8] if config.source == "posterior" else [1]
    return warm_up_defaults(world, config.source).get("lengths", usual)


def train(config, ranks=None):
    """The whole warm-up: check, make what is missing, load, train. Returns its Run.

    A finished run of the same settings is left as it is. Raises ValueError, before the run folder
    is touched, for what cannot be trained on, and where is_finished does.
    """
    if ranks is None:
        ranks = Ranks.start(config.device, config.fsdp)
    check_traces(config.traces, config.limit, skip=world_traces(config.model))
    world = config.model
    config = make_missing(config, ranks)

    vae = load_vae(config)
    if config.lengths is None and config.source != "none":
        config = replace(config, lengths=default_lengths(config, world, vae))

    settings = result_settings(config)
    if not config.overwrite and is_finished(config.out, settings, config.resume):
        return Run(config.out, settings, ranks)

    # All that may refuse comes before the run folder.
    traces = load_traces(config.traces, config.limit)
    model, reader = load_trainable(find_model(config.model), ranks, config)
    pairs = pairs_of(traces, reader, config)
    if ranks.rank == 0:
        say_left_out(pairs, traces, config)
    table = unshard(model.get_input_embeddings().weight.detach())
    posterior = None
    if config.source == "posterior":
        posterior = posterior_of(traces, reader, model, table, vae)
    prefix_draws = PrefixDraws(vae, table, config, posterior)

    run = Run(config.out, settings, ranks, config.resume, config.overwrite)
    say = partial(
        say_control,
        model=model,
        reader=reader,
        vae=vae,
        traces=traces,
        length=VERDICT_LENGTH,
        ranks=ranks,
        config=config,
        style=config.prompt,
    )
    if vae is not None:
        say("before the warm-up")
    warm_up(model, reader, pairs, prefix_draws, run, config)
    if vae is not None:
        say("after the warm-up")
    return run


def main(argv=None):
    config = parse_settings(SFTConfig, __doc__, argv)
    run = train(config)
    if run.writes:
        print(f"the warmed-up policy is in {run.folder}/policy")
    run.ranks.close()


if __name__ == "__main__":
    run_main(main, "sft.py")
