"""Several ranks: shares (--fsdp) train as whole models do, checkpoints of any number of ranks, and a rank that dies ends the job.

Ranks are forked from this process (gloo, on the CPU), which saves each of them the imports; one test runs torchrun itself.
"""
import gc
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

import grpo
import sft
from prefix import Decoder, Palette, Sampling, load_policy, prompt_of, whole
from rewards import tiny_scene_traces, tiny_task
from sft import (Ranks, Run, apply_gradients, lm_step, load_reference, load_trainable, make_optimizer, tiny_vl_model,
                 tiny_vl_processor)
from test_grpo import FirstToken, arguments
from test_sft import warm_args
from vae import VAE, as_flags, run_main

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_collection_in_forked_ranks():
    """A forked rank that collects garbage ends sockets and threads of its parent's: seen to crash."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run_ranks(work, *arguments, world=2, fsdp=True, codes=(0, 0)):
    """Call work(ranks, *arguments) in `world` forked processes; asserts their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        work(Ranks.start("cpu", fsdp), *arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == list(codes)


# ---- one step -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def untied_folder(tmp_path, model, tokenizer):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    model.save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def train_a_little(ranks, folder, out, args):
    """Four updates on nine rows of uneven lengths, half of them under prefixes; at the third, rank 0 has all rows.

    Writes gradient norms, weights and a greedy completion to out-RANK.pt.
    """
    model, _ = load_trainable(str(folder), ranks, args)
    generator, optimizer, norms = torch.Generator().manual_seed(0), make_optimizer(model, 1e-3), []
    ids = torch.randint(2, 100, (9, 40), generator=generator).tolist()
    rows = [(row[:2 + i], row[10:13 + 3 * i]) for i, row in enumerate(ids)]
    prefixes = [torch.randn(3, 128, generator=generator) if i % 2 else None for i in range(9)]
    for step in range(4):
        own = ranks.own(range(9)) if step != 2 else range(9) if ranks.rank == 0 else ()
        lm_step(model, [rows[i] for i in own], [prefixes[i] for i in own], ranks, 60, args.precision)
        norms.append(apply_gradients(model, [optimizer], ranks))
    decoder = Decoder(model, [1], slots=2)
    greedy = decoder.generate([[5, 6, 7]] * (1 + 3 * ranks.rank), None, Sampling(0.0, max_new_tokens=5))[0].ids
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    torch.save({"norms": norms, "greedy": greedy, "weights": weights}, f"{out}-{ranks.rank}.pt")


@pytest.mark.parametrize("tied", [True, False])
def test_shares_train_as_whole_models_do(tmp_path, policy_folder, untied_folder, tied):
    """The same norms say that gradients are added, not averaged; tied and untied that both tables get theirs."""
    folder, args = policy_folder if tied else untied_folder, warm_args(checkpointing=False)
    train_a_little(ALONE, folder, tmp_path / "alone", args)
    run_ranks(train_a_little, folder, tmp_path / "fsdp", args)
    run_ranks(train_a_little, folder, tmp_path / "ddp", args, fsdp=False)
    alone = torch.load(tmp_path / "alone-0.pt")
    for name in ("fsdp-0", "fsdp-1", "ddp-1"):
        found = torch.load(tmp_path / f"{name}.pt")
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-5) and found["greedy"] == alone["greedy"]
        for key, value in alone["weights"].items():
            assert (found["weights"][key] - value).norm() <= 1e-5 * value.norm(), (name, key)
    assert torch.load(tmp_path / "fsdp-0.pt")["norms"] == torch.load(tmp_path / "fsdp-1.pt")["norms"]


def test_shares_in_bf16_with_checkpointing(tmp_path, policy_folder):
    args = warm_args(checkpointing=False, precision="bf16")
    train_a_little(ALONE, policy_folder, tmp_path / "alone", args)
    run_ranks(train_a_little, policy_folder, tmp_path / "fsdp", warm_args(checkpointing=True, precision="bf16"))
    alone, found = torch.load(tmp_path / "alone-0.pt"), torch.load(tmp_path / "fsdp-0.pt")
    assert found["norms"] == pytest.approx(alone["norms"], rel=0.02)
    assert all(value.dtype == torch.float32 for value in found["weights"].values())


def hold_a_share(ranks, folder):
    """A rank's weights, gradients and moments together are half of the model's, in fp32; a frozen reference is in bf16."""
    args = warm_args(checkpointing=False, precision="bf16")
    model, _ = load_trainable(str(folder), ranks, args)
    optimizer = make_optimizer(model, 1e-3)
    lm_step(model, [([5, 6], [7, 8])], [None], ranks, 60, "bf16")
    local = lambda tensors: sum(tensor.to_local().numel() for tensor in tensors)
    parameters, total = list(model.parameters()), sum(p.numel() for p in model.parameters())
    assert abs(local(parameters) - total / 2) <= 0.02 * total and local(p.grad for p in parameters) == local(parameters)
    apply_gradients(model, [optimizer], ranks)
    assert local(state["exp_avg_sq"] for state in optimizer.state.values()) == local(parameters)
    assert {p.dtype for p in parameters} == {torch.float32}
    reference = load_reference(str(folder), model, ranks, args)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16} and local(reference.parameters()) == local(parameters)
    assert not any(p.requires_grad for p in reference.parameters())


def test_every_rank_holds_its_share_alone(policy_folder):
    run_ranks(hold_a_share, policy_folder)


def see_a_little(ranks, folder, out, args):
    """Three updates of a vision-language model on six scenes, saved after the second and read back before the third."""
    model, reader = load_trainable(str(folder), ranks, args)
    optimizer, run, norms = make_optimizer(model, 1e-3), Run(out, {}, ranks), []
    rows = [(prompt_of(trace, reader), reader(trace["answer"], add_special_tokens=False)["input_ids"])
            for trace in tiny_scene_traces(6, seed=0)]
    for step in range(3):
        if step == 2:
            run.save(step, model, [optimizer])
            model, optimizer = load_trainable(str(folder), ranks, args)[0], None
            optimizer = make_optimizer(model, 1e-3)
            assert run.restore(model, [optimizer])["step"] == 2
        lm_step(model, ranks.own(rows), [None] * len(ranks.own(rows)), ranks, 200)
        norms.append(apply_gradients(model, [optimizer], ranks))
    run.finish(model, reader)
    (run.folder / f"norms-{ranks.rank}.json").write_text(json.dumps(norms))


def test_a_vision_language_model_trains_in_shares_beside_a_whole_tower(tmp_path):
    tiny_vl_model(seed=1).save_pretrained(tmp_path / "vl")
    tiny_vl_processor().save_pretrained(tmp_path / "vl")
    args = warm_args(checkpointing=True)
    see_a_little(ALONE, tmp_path / "vl", tmp_path / "alone", args)
    run_ranks(see_a_little, tmp_path / "vl", tmp_path / "fsdp", args)
    norms = [json.loads((tmp_path / name).read_text()) for name in ("alone/norms-0.json", "fsdp/norms-0.json", "fsdp/norms-1.json")]
    assert norms[1] == norms[2] == pytest.approx(norms[0], rel=1e-5)
    one, two, start = (policy_of(tmp_path / name) for name in ("alone/policy", "fsdp/policy", "vl"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(value, start[key]) == ("visual." in key), key


# ---- whole runs ---------------------------------------------------------------------------------------------------------

class HalfSilent(FirstToken):
    """The second rank's prompts (those at odd places) are never answered right: it has nothing to train on."""

    def judge(self, completion, gold, finish="stop"):
        return super().judge(completion, gold) if gold != "silent" else {"accuracy": 0.0, "answered": 1.0}


def half_silent(args):
    tiny = tiny_task(32, 8)
    task = HalfSilent("half", [dict(row) for row in tiny.train], tiny.test)
    for step in range(args.steps):
        for row in sft.rows_of_step(task.train, step, args.prompts, args.seed)[1::2]:
            row["answer"] = "silent"
    return task


def rl(ranks, folder, vae, out, args, resume=False, die_after=None):
    """grpo.py's loop on the half-silent task; die_after: the optimizer step after which every rank fails."""
    model, tokenizer = load_trainable(str(folder), ranks, args)
    reference = load_reference(str(folder), model, ranks, args) if args.kl else None
    palette, count = Palette(VAE.load(vae), whole(model.get_input_embeddings().weight.detach()), "prior", args.length), []
    original = grpo.apply_gradients

    def dying(*arguments):
        count.append(0)
        if len(count) - 1 == die_after:
            sys.exit(3)
        return original(*arguments)

    grpo.apply_gradients = dying
    try:
        grpo.train(model, tokenizer, half_silent(args), palette, Run(out, {}, ranks, resume=resume), args, reference)
    finally:
        grpo.apply_gradients = original


def metrics_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def assert_close(one, two):
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            assert b[name] == (value if value is None else pytest.approx(value, abs=1e-5, rel=1e-5)), (a["step"], name)


def policy_of(out):
    """The weights of a run folder, or of a policy's own."""
    return load_policy(str(out))[0].state_dict()


@pytest.fixture
def vae_folder(tmp_path, vae):
    vae.save(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("changes", [{}, dict(kl=0.1, tis=2.0, epochs=2, minibatches=2, resample=1)], ids=["once", "often"])
def test_rl_in_shares_equals_rl_alone_though_one_rank_has_nothing_to_train_on(tmp_path, policy_folder, vae_folder, changes):
    args = arguments(tokens_per_batch=90, **changes)
    rl(ALONE, policy_folder, vae_folder, tmp_path / "alone", args)
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "fsdp", args)
    one, two = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "fsdp")
    assert len(one) == len(two) == 5 and (changes or all(row["groups_without_signal"] >= 2 for row in one[1:]))
    assert_close(one, two)
    for name, value in policy_of(tmp_path / "alone").items():
        torch.testing.assert_close(policy_of(tmp_path / "fsdp")[name], value, atol=1e-5, rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "fsdp").iterdir()) == \
        ["best", "config.json", "metrics.jsonl", "policy", "samples.jsonl"]


def test_a_sharded_run_resumes_bit_for_bit_or_on_one_rank(tmp_path, policy_folder, vae_folder, monkeypatch, capfd):
    """The newest checkpoint cannot be read by rank 1 alone: both must go back to the one before."""
    args, original = arguments(kl=0.1), sft.read_checkpoint
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "whole", args)
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "torn", args, False, 3, codes=(3, 3))
    assert len(list((tmp_path / "torn" / "checkpoint-000003").glob("*.safetensors"))) == 2
    shutil.copytree(tmp_path / "torn", tmp_path / "fewer")

    def read(folder, *arguments):
        if os.environ.get("RANK") == "1" and folder.name == "checkpoint-000003":
            raise OSError(5, "Input/output error")
        return original(folder, *arguments)

    monkeypatch.setattr(sft, "read_checkpoint", read)
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "torn", args, True)
    assert "checkpoint-000003 cannot be read ([Errno 5]" in capfd.readouterr().out
    assert metrics_of(tmp_path / "torn") == metrics_of(tmp_path / "whole")
    assert all(torch.equal(value, policy_of(tmp_path / "torn")[key]) for key, value in policy_of(tmp_path / "whole").items())
    rl(ALONE, policy_folder, vae_folder, tmp_path / "fewer", args, True)
    assert_close(metrics_of(tmp_path / "fewer"), metrics_of(tmp_path / "whole"))


def test_a_full_disk_on_one_rank_ends_all_and_leaves_the_last_checkpoint(tmp_path, policy_folder, vae_folder, monkeypatch, capfd):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    original = HuggingFaceStorageWriter.write_data

    def write_data(self, *arguments):
        if os.environ.get("RANK") == "1" and "000002" in str(self.path):
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)
    run_ranks(rl, policy_folder, vae_folder, tmp_path / "full", arguments(), codes=(1, 1))
    assert "OSError: [Errno 28] No space left on device" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "full").glob("*checkpoint*")] == ["checkpoint-000001"]


def whole_job(ranks, flags):
    """grpo.py from the warm-up to the closing table, which rank 0 makes alone, long after the others have ended."""
    close = grpo.evaluate.close_rl

    def close_rl(*arguments):
        assert not torch.distributed.is_initialized()
        time.sleep(2)
        close(*arguments)

    grpo.evaluate.close_rl = close_rl
    grpo.main(flags)


def test_the_whole_job_on_two_ranks_ends_with_its_table(tmp_path, policy_folder, vae_folder, trace_file):
    rows = [json.dumps({"question": f"calc {i} + 1 ?", "answer": str(i)}) + "\n" for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = dict(model=policy_folder, traces=[trace_file], vae=vae_folder, task="mine", train_data=tmp_path / "rows.jsonl",
                 test_data=tmp_path / "rows.jsonl", schedule=["linear"], steps=1, prompts=2, group=2, length=2, max_new_tokens=4,
                 sft_batch=4, eval_questions=3, arms=["greedy"], arm_questions=2, arm_samples=2, device="cpu", out=tmp_path / "out")
    run_ranks(whole_job, as_flags(**flags), fsdp=False)
    assert (tmp_path / "out" / "grpo-prior.md").read_text().count("grpo-prior linear") == 1
    assert "greedy" in json.loads((tmp_path / "out" / "evaluation" / "results.json").read_text())["arms"]
    steps = [row["loss"] for row in metrics_of(tmp_path / "out" / "sft")]
    run_ranks(whole_job, as_flags(**{**flags, "out": tmp_path / "one"}), world=1, fsdp=False, codes=(0,))
    assert [row["loss"] for row in metrics_of(tmp_path / "one" / "sft")] == pytest.approx(steps, rel=1e-5)


# ---- death --------------------------------------------------------------------------------------------------------------

def doomed(folder, traces, out, how):
    """A warm-up on two ranks in which one of them fails; `how` and where it does."""
    rank, original = int(os.environ["RANK"]), sft.apply_gradients
    if how == "corrupt traces on rank 0" and rank == 0:
        traces = traces.with_name("corrupt.jsonl")
    save = sft.save_file
    if how == "disk full on rank 0":
        sft.save_file = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")) if rank == 0 else save

    def step(*arguments):
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and how == "raises":
            raise RuntimeError("rank 1 has had enough")
        return original(*arguments)

    sft.apply_gradients = step
    try:
        run_main(lambda: sft.main(["--model", str(folder), "--traces", str(traces), "--prefix", "none", "--steps", "3", "--batch",
                                   "4", "--save-every", "1", "--out", str(out), "--device", "cpu"]), "sft.py")
    except Exception:
        traceback.print_exc()                               # as a script's end would; a forked rank leaves it out
        raise


@pytest.fixture
def trace_file(tmp_path, traces):
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in traces[:20]))
    (tmp_path / "corrupt.jsonl").write_text('{"question": "torn')
    return tmp_path / "traces.jsonl"


@pytest.mark.parametrize("how, cause", [("raises", "rank 1 has had enough"), ("disk full on rank 0", "No space left on device"),
                                        ("corrupt traces on rank 0", "corrupt.jsonl, line 1: not JSON")])
def test_a_rank_that_fails_ends_the_job_with_its_own_error(tmp_path, policy_folder, trace_file, capfd, how, cause):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", monitor_interval=0.1,
                          max_restarts=0)
    began = time.time()
    with pytest.raises(ChildFailedError) as failed:
        elastic_launch(config, doomed)(policy_folder, trace_file, tmp_path / "out", how)
    assert time.time() - began < 60
    assert cause in capfd.readouterr().err + str(failed.value)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_torchrun_ends_when_a_rank_is_killed(tmp_path, policy_folder, trace_file):
    script = tmp_path / "doomed.py"
    script.write_text(f"import sys\nsys.path[:0] = {[path for path in sys.path if path]!r}\nfrom pathlib import Path\n"
                      f"import test_ranks\ntest_ranks.doomed({str(policy_folder)!r}, Path({str(trace_file)!r}), "
                      f"{str(tmp_path / 'out')!r}, 'killed')\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                           "--rdzv_endpoint=localhost:0", str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr and "local_rank: 1" in done.stderr
