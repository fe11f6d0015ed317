"""Several ranks: two train as one, sharded (--fsdp) or not, and one that dies ends the job.

Ranks are forked from this process (gloo, on the CPU), which saves each of them the imports; one
test runs torchrun itself.
"""

import contextlib
import dataclasses
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
import torch
import torch.distributed.checkpoint  # noqa: F401  imported once here, not in every forked rank
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor  # noqa: F401
from test_grpo import small_config, starts_evenly

import drawn_scenes
import grpo
import sft
import tiny_world
from grpo import RunPlan, train_run
from prefix import Decoder, Prompt, Sampling, completion_logprobs, load_policy, unshard
from rewards import Task, load_rewards
from sft import (
    Ranks,
    Run,
    TrainingConfig,
    apply_gradients,
    lm_step,
    load_reference,
    load_trainable,
    make_optimizer,
)
from vae import run_main

ALONE = Ranks.alone()
BOTH_WELL = [0, 0]


@pytest.fixture(autouse=True)
def no_collection_in_forked_ranks():
    """A forked rank that collects garbage ends sockets of its parent's: seen to crash."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_ranks(work, *arguments, fsdp=True, exit_codes=BOTH_WELL):
    """Call work(ranks, *arguments) in a forked process for each exit code, which it must end by."""
    world = len(exit_codes)
    port = free_port()

    def work_as(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        ranks = Ranks.start("cpu", fsdp)
        work(ranks, *arguments)
        if torch.distributed.is_initialized():
            ranks.close()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work_as, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == exit_codes


def policy_of(folder):
    """The weights of a run folder, or of a policy's own."""
    return load_policy(str(folder))[0].state_dict()


def assert_close_policies(folder, other, atol=1e-5):
    weights = policy_of(other)
    for name, weight in policy_of(folder).items():
        torch.testing.assert_close(weights[name], weight, atol=atol, rtol=1e-4, msg=name)


# ---- What ranks tell each other ------------------------------------------------------------------


def exchange(ranks):
    rank = ranks.rank
    assert ranks.shard([10, 11, 12, 13, 14]) == [[10, 12, 14], [11, 13]][rank]
    assert ranks.all_reduce_sum([rank, 1.5]) == [1.0, 3.0]
    assert ranks.gather(7 + rank) == [7.0, 8.0]
    micro_batches = [[[0], [1]], [[2]]][rank]
    padded = ranks.pad_for_fsdp(micro_batches)
    if ranks.fsdp:
        assert padded == [[[0], [1]], [[2], []]][rank]
    else:
        assert padded == micro_batches


@pytest.mark.parametrize("fsdp", [True, False])
def test_what_ranks_tell_each_other(fsdp):
    run_ranks(exchange, fsdp=fsdp)


def measure_apart(ranks):
    """The first rank has a guided item and two others, the second has none."""
    sums = {}
    values = torch.tensor([2.0, 4.0, 9.0])
    guided = [True, False, False]
    if ranks.rank == 1:
        values = torch.zeros(0)
        guided = []
    sft.add_metrics(sums, {"tokens": torch.ones(len(values)), "kl": values}, guided)
    row = sft.mean_metrics(sums, "tokens", ranks)
    assert (row["tokens"], row["kl"], row["kl_guided"], row["kl_unguided"]) == (3, 5.0, 2.0, 6.5)


def test_metrics_are_means_over_the_items_of_all_ranks():
    run_ranks(measure_apart, fsdp=False)


# ---- One step ------------------------------------------------------------------------------------


@pytest.fixture
def untied_folder(tmp_path, model, reader):
    """A policy whose head is a table of its own."""
    folder = tmp_path / "untied"
    model.config.tie_word_embeddings = False
    head = model.lm_head.weight.detach().flip(0).clone()
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    reader.save(folder)
    return folder


def make_rows():
    """Nine (Prompt, answer ids) of uneven lengths, and their prefixes: every other one has one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 100, (9, 40), generator=generator).tolist()
    pairs = []
    prefixes = []
    for i, row in enumerate(ids):
        pairs.append((Prompt(row[: 2 + i]), row[10 : 13 + 3 * i]))
        prefixes.append(torch.randn(3, 128, generator=generator) if i % 2 == 1 else None)
    return pairs, prefixes


def train_a_little(ranks, folder, out, config):
    """Four updates on nine rows; at the third, rank 0 has all of them.

    Writes gradient norms, weights and a greedy completion to out-RANK.pt.
    """
    model, _ = load_trainable(str(folder), ranks, config)
    optimizer = make_optimizer(model, 1e-3)
    pairs, prefixes = make_rows()
    norms = []
    for step in range(4):
        mine = ranks.shard(list(range(9)))
        if step == 2:
            mine = list(range(9)) if ranks.rank == 0 else []
        my_pairs = [pairs[i] for i in mine]
        my_prefixes = [prefixes[i] for i in mine]
        lm_step(model, my_pairs, my_prefixes, ranks, 60, config.precision)
        norms.append(apply_gradients(model, [optimizer], ranks))

    decoder = Decoder(model, [1], slots=2)
    rows = decoder.embed([Prompt([5, 6, 7])] * (1 + 3 * ranks.rank))  # uneven work here, too
    greedy = decoder.generate(rows, Sampling(0.0, max_new_tokens=5))[0].ids
    weights = {name: unshard(p.detach()) for name, p in model.named_parameters()}
    torch.save({"norms": norms, "greedy": greedy, "weights": weights}, f"{out}-{ranks.rank}.pt")


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_train_as_one_sharded_or_not(tmp_path, policy_folder, untied_folder, tied):
    """Equal norms: gradients are added, not averaged. Tied and untied: both tables get theirs."""
    folder = policy_folder if tied else untied_folder
    config = TrainingConfig()
    train_a_little(ALONE, folder, tmp_path / "alone", config)
    run_ranks(train_a_little, folder, tmp_path / "fsdp", config)
    run_ranks(train_a_little, folder, tmp_path / "ddp", config, fsdp=False)

    alone = torch.load(tmp_path / "alone-0.pt")
    for name in ("fsdp-0", "fsdp-1", "ddp-0", "ddp-1"):
        result = torch.load(tmp_path / f"{name}.pt")
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert result["greedy"] == alone["greedy"]
        for key, weight in alone["weights"].items():
            assert (result["weights"][key] - weight).norm() <= 1e-5 * weight.norm(), (name, key)
    norms = [torch.load(tmp_path / f"fsdp-{rank}.pt")["norms"] for rank in (0, 1)]
    assert norms[0] == norms[1]


def test_shares_in_bf16_with_checkpointing(tmp_path, policy_folder):
    config = TrainingConfig(precision="bf16")
    train_a_little(ALONE, policy_folder, tmp_path / "alone", config)
    config = TrainingConfig(precision="bf16", checkpointing=True)
    run_ranks(train_a_little, policy_folder, tmp_path / "fsdp", config)
    alone = torch.load(tmp_path / "alone-0.pt")
    result = torch.load(tmp_path / "fsdp-0.pt")
    assert result["norms"] == pytest.approx(alone["norms"], rel=0.02)
    assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}


def numbers_here(tensors):
    """How many numbers of sharded tensors this rank holds."""
    return sum(tensor.to_local().numel() for tensor in tensors)


def hold_a_share(ranks, folder):
    """A rank's weights, gradients and moments are half of the model's each, a reference's too."""
    config = TrainingConfig(precision="bf16")
    model, _ = load_trainable(str(folder), ranks, config)
    optimizer = make_optimizer(model, 1e-3)
    lm_step(model, [(Prompt([5, 6]), [7, 8])], [None], ranks, 60, "bf16")
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    share = numbers_here(parameters)
    assert share == pytest.approx(total / 2, rel=0.04)
    assert numbers_here(p.grad for p in parameters) == share
    apply_gradients(model, [optimizer], ranks)
    assert numbers_here(state["exp_avg_sq"] for state in optimizer.state.values()) == share
    assert {p.dtype for p in parameters} == {torch.float32}

    reference = load_reference(str(folder), model, ranks, config)
    assert numbers_here(reference.parameters()) == share
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in reference.parameters())


def test_every_rank_holds_its_share_alone(policy_folder):
    run_ranks(hold_a_share, policy_folder)


def say_a_verdict(ranks, folder, vae, traces, out):
    """All ranks measure, in the precision of the shards; rank 0 speaks."""
    config = TrainingConfig(precision="bf16")
    model, reader = load_trainable(str(folder), ranks, config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sft.say_control("now", model, reader, vae, traces, 2, ranks, config, "auto")
    (out / f"said-{ranks.rank}").write_text(printed.getvalue())


def test_ranks_measure_control_in_the_precision_of_their_shares(
    policy_folder, vae, traces, tmp_path
):
    run_ranks(say_a_verdict, policy_folder, vae, traces, tmp_path)
    assert (tmp_path / "said-0").read_text().startswith("now: ")
    assert (tmp_path / "said-1").read_text() == ""


def see_a_little(ranks, folder, out, config):
    """Three updates of a vision-language model on six scenes, through a checkpoint after two."""
    model, reader = load_trainable(str(folder), ranks, config)
    optimizer = make_optimizer(model, 1e-3)
    run = Run(out, {}, ranks)
    pairs = []
    for trace in ranks.shard(drawn_scenes.make_traces(6, 0)):
        pairs.append(sft.answer_ids(trace, reader, "auto", 512))
    norms = []
    for step in range(3):
        if step == 2:
            run.save(step, model, [optimizer])
            model, _ = load_trainable(str(folder), ranks, config)
            optimizer = make_optimizer(model, 1e-3)
            assert run.restore(model, [optimizer]) == 2
        lm_step(model, pairs, [None] * len(pairs), ranks, 200)
        norms.append(apply_gradients(model, [optimizer], ranks))
    run.finish(model, reader)
    (run.folder / f"norms-{ranks.rank}.json").write_text(json.dumps(norms))


def test_a_vision_language_model_trains_in_shares_beside_a_whole_tower(tmp_path):
    start = tmp_path / "vl"
    drawn_scenes.make_model(seed=1).save_pretrained(start)
    drawn_scenes.make_reader().save(start)
    config = TrainingConfig(checkpointing=True)
    see_a_little(ALONE, start, tmp_path / "alone", config)
    run_ranks(see_a_little, start, tmp_path / "fsdp", config)

    norms = []
    for name in ("alone/norms-0.json", "fsdp/norms-0.json", "fsdp/norms-1.json"):
        norms.append(json.loads((tmp_path / name).read_text()))
    assert norms[1] == norms[2]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    # A step of Adam is lr = 1e-3 however small the gradient: where it is nearly 0, rounding shows.
    assert_close_policies(tmp_path / "alone", tmp_path / "fsdp", atol=1e-4)
    before = policy_of(start)
    for name, weight in policy_of(tmp_path / "alone").items():
        is_frozen = "visual." in name
        assert torch.equal(weight, before[name]) == is_frozen, name


def score_and_step_without_loss(ranks, folder):
    model, _ = load_trainable(folder, ranks, TrainingConfig())
    with torch.no_grad():
        completion_logprobs(model, [Prompt([5, 6])], [[7]], None)
    assert apply_gradients(model, [make_optimizer(model, 1e-3)], ranks) == 0.0


def test_weights_are_shares_again_after_a_forward_without_a_backward(policy_folder):
    """As where pi_old is scored and no rank then trains on anything: all groups are silent."""
    run_ranks(score_and_step_without_loss, policy_folder)


# ---- Whole runs ----------------------------------------------------------------------------------


def judge_half(completion, row):
    """The questions marked silent are never answered right."""
    values = starts_evenly(completion, row)
    if row["answer"] == "silent":
        values["accuracy"] = 0.0
    return values


def half_silent_task(config):
    """A task in which the second rank, which has every second prompt, has nothing to train on."""
    train = tiny_world.load("train")[:32]
    test = tiny_world.load("test")[:8]
    for step in range(config.steps):
        for row in sft.rows_of_step(train, step, config.prompts, config.seed[0])[1::2]:
            row["answer"] = "silent"
    return Task("half", train, test, judge_function=judge_half)


def rl(ranks, folder, vae_folder, out, config, resume=False, stop_after=None):
    """grpo.py's run on the half-silent task; stop_after: all ranks fail after so many updates."""
    config = dataclasses.replace(config, vae=str(vae_folder))
    task = half_silent_task(config)
    rewards = load_rewards(config.reward, task)
    plan = RunPlan("linear", config.seed[0], out, {})
    run = Run(out, {}, ranks, resume=resume)
    original = sft.apply_gradients
    updates = 0

    def apply_until(*arguments):
        nonlocal updates
        if updates == stop_after:
            sys.exit(3)
        updates += 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "apply_gradients", apply_until)
        train_run(plan, run, task, rewards, str(folder), config)


def metrics_of(out):
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: row[name] for name in row if not name.startswith("seconds")})
    return rows


def assert_close_metrics(out, other):
    rows = metrics_of(out)
    other_rows = metrics_of(other)
    assert len(rows) == len(other_rows) == 5
    for row, other_row in zip(rows, other_rows):
        assert row.keys() == other_row.keys()
        for name, value in row.items():
            if value is not None:
                value = pytest.approx(value, abs=1e-5, rel=1e-5)
            assert other_row[name] == value, (row["step"], name)


@pytest.fixture
def vae_folder(tmp_path, vae):
    vae.save(tmp_path / "vae")
    return tmp_path / "vae"


OFTEN = {"kl": 0.1, "tis": 2.0, "epochs": 2, "minibatches": 2, "resample": 1}


@pytest.mark.parametrize("changes", [{}, OFTEN], ids=["once", "often"])
def test_rl_in_shares_equals_rl_alone_though_one_rank_has_nothing_to_train_on(
    tmp_path, policy_folder, vae_folder, changes
):
    config = small_config(tokens_per_batch=90, **changes)
    rl(ALONE, policy_folder, vae_folder, tmp_path / "alone", config)
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "fsdp", config)
    assert_close_metrics(tmp_path / "alone", tmp_path / "fsdp")
    assert_close_policies(tmp_path / "alone", tmp_path / "fsdp")
    if not changes:
        silent = [row["groups_without_signal"] for row in metrics_of(tmp_path / "alone")[1:]]
        assert min(silent) >= 2  # the second rank's two groups
    names = sorted(path.name for path in (tmp_path / "fsdp").iterdir())
    assert names == ["best", "config.json", "metrics.jsonl", "policy", "samples.jsonl"]


def test_a_sharded_run_resumes_bit_for_bit_or_on_one_rank(
    tmp_path, policy_folder, vae_folder, monkeypatch, capfd
):
    """The newest checkpoint cannot be read by rank 1 alone: both must go back to the one before."""
    config = small_config(kl=0.1)
    job = (rl, policy_folder, vae_folder)
    run_ranks(*job, tmp_path / "undisturbed", config)
    run_ranks(*job, tmp_path / "torn", config, False, 3, exit_codes=[3, 3])
    newest = tmp_path / "torn" / "checkpoint-000003"
    assert len(list(newest.glob("*.safetensors"))) == 2
    shutil.copytree(tmp_path / "torn", tmp_path / "fewer")

    original = sft.read_checkpoint

    def read_checkpoint(folder, *arguments):
        if os.environ.get("RANK") == "1" and folder.name == "checkpoint-000003":
            raise OSError(5, "Input/output error")
        return original(folder, *arguments)

    monkeypatch.setattr(sft, "read_checkpoint", read_checkpoint)
    run_ranks(*job, tmp_path / "torn", config, True)
    assert "checkpoint-000003 cannot be read ([Errno 5]" in capfd.readouterr().out
    assert metrics_of(tmp_path / "torn") == metrics_of(tmp_path / "undisturbed")
    weights = policy_of(tmp_path / "undisturbed")
    for name, weight in policy_of(tmp_path / "torn").items():
        assert torch.equal(weight, weights[name]), name

    rl(ALONE, policy_folder, vae_folder, tmp_path / "fewer", config, resume=True)
    assert_close_metrics(tmp_path / "fewer", tmp_path / "undisturbed")


def test_a_run_of_one_rank_goes_on_sharded(tmp_path, policy_folder, vae_folder):
    config = small_config()
    rl(ALONE, policy_folder, vae_folder, tmp_path / "alone", config)
    with pytest.raises(SystemExit):
        rl(ALONE, policy_folder, vae_folder, tmp_path / "torn", config, stop_after=3)
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "torn", config, True)
    assert_close_metrics(tmp_path / "alone", tmp_path / "torn")
    assert_close_policies(tmp_path / "alone", tmp_path / "torn")


def test_a_full_disk_on_one_rank_ends_all_and_leaves_the_last_checkpoint(
    tmp_path, policy_folder, vae_folder, monkeypatch, capfd
):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    original = HuggingFaceStorageWriter.write_data

    def write_data(self, *arguments):
        if os.environ.get("RANK") == "1" and "000002" in str(self.path):
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)
    out = tmp_path / "full"
    run_ranks(rl, policy_folder, vae_folder, out, small_config(), exit_codes=[1, 1])
    assert "OSError: [Errno 28] No space left on device" in capfd.readouterr().err
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-000001"]


def whole_job(ranks, flags):
    """grpo.py from the warm-up to the tables, which rank 0 makes alone, after the others' end."""
    original = grpo.report

    def report(*arguments):
        assert not torch.distributed.is_initialized()
        time.sleep(2)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "report", report)
        grpo.main(flags)


def test_the_whole_job_on_two_ranks_ends_with_its_table(
    tmp_path, policy_folder, vae_folder, trace_file
):
    rows = []
    for i in range(4):
        rows.append(json.dumps({"question": f"calc {i} + 1 ?", "answer": str(i)}) + "\n")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    flags = f"--model {policy_folder} --traces {trace_file} --vae {vae_folder}"
    flags += f" --task mine --train-data {data} --test-data {data}"
    flags += " --schedule linear --steps 1 --prompts 2 --group 2 --length 2 --max-new-tokens 4"
    flags += " --eval-questions 3 --closing-questions 2 --device cpu"

    two = tmp_path / "two"
    one = tmp_path / "one"
    run_ranks(whole_job, [*flags.split(), "--out", str(two)], fsdp=False)
    run_ranks(whole_job, [*flags.split(), "--out", str(one)], fsdp=False, exit_codes=[0])
    assert (two / "grpo-prior.md").read_text().count("grpo-prior linear") == 1
    results = json.loads((two / "evaluation" / "results.json").read_text())
    assert "greedy" in results["arms"]
    losses = [row["loss"] for row in metrics_of(two / "sft")]
    assert [row["loss"] for row in metrics_of(one / "sft")] == pytest.approx(losses, rel=1e-5)


# ---- Death ---------------------------------------------------------------------------------------


def doomed(folder, traces, out, how):
    """A warm-up on two ranks in which one of them fails; `how` and where it does."""
    rank = int(os.environ["RANK"])
    if how == "corrupt traces on rank 0" and rank == 0:
        traces = traces.with_name("corrupt.jsonl")
    original_step = sft.apply_gradients
    original_write = sft.write_tensors

    def apply_or_fail(*arguments):
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and how == "raises":
            raise RuntimeError("rank 1 has had enough")
        return original_step(*arguments)

    def write_or_fail(*arguments):
        if rank == 0 and how == "disk full on rank 0":
            raise OSError(28, "No space left on device")
        return original_write(*arguments)

    sft.apply_gradients = apply_or_fail
    sft.write_tensors = write_or_fail
    flags = f"--model {folder} --traces {traces} --out {out} --source none --device cpu"
    flags += " --steps 3 --batch 4 --save-every 1"
    try:
        run_main(lambda: sft.main(flags.split()), "sft.py")
    except Exception:
        traceback.print_exc()  # as a script's end would; a forked rank leaves it out
        raise


@pytest.fixture
def trace_file(tmp_path, traces):
    lines = [json.dumps(trace) + "\n" for trace in traces[:20]]
    (tmp_path / "traces.jsonl").write_text("".join(lines))
    (tmp_path / "corrupt.jsonl").write_text('{"question": "torn')
    return tmp_path / "traces.jsonl"


@pytest.mark.parametrize(
    "how, cause",
    [
        ("raises", "rank 1 has had enough"),
        ("disk full on rank 0", "No space left on device"),
        ("corrupt traces on rank 0", "corrupt.jsonl, line 1: not JSON"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_own_error(
    tmp_path, policy_folder, trace_file, capfd, how, cause
):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
        max_restarts=0,
    )
    began = time.time()
    with pytest.raises(ChildFailedError) as failure:
        elastic_launch(config, doomed)(policy_folder, trace_file, tmp_path / "out", how)
    assert time.time() - began < 60
    assert cause in capfd.readouterr().err + str(failure.value)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_torchrun_ends_when_a_rank_is_killed(tmp_path, policy_folder, trace_file):
    paths = [path for path in sys.path if path]
    script = tmp_path / "doomed.py"
    script.write_text(
        f"import sys\n"
        f"sys.path[:0] = {paths!r}\n"
        f"from pathlib import Path\n"
        f"import test_ranks\n"
        f"out = Path({str(tmp_path / 'out')!r})\n"
        f"test_ranks.doomed({str(policy_folder)!r}, Path({str(trace_file)!r}), out, 'killed')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "local_rank: 1" in done.stderr
